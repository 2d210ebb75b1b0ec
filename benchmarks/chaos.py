"""Kill every kind of process of a real training, one at a time at random moments; is anything lost?

    python -m benchmarks.chaos                       # 22 kills; about a quarter of an hour on two quiet cores
    python -m benchmarks.chaos --rounds 1 --seed 3   # each kind once

A run of the panels recipe (two questions of four trajectories a step, one step of staleness, a checkpoint behind each
step) is hurt ``--rounds`` times in each way and hung once; a driver that was killed is started again by the same
command. Then the run's own records are counted: every planned step once, every question of the epoch in one step with
all its samples, nothing twice. Prints a table of what was restarted and how long it took, a line, and JSON (``--out``).

*Recovery* is from the signal to the first finished work of what replaces the process: a group of trajectories or scores
of a worker, a step of learner or driver. Rollout engines have a worker process of their own here
(``distributed_executor_backend: mp``); by default, and in the reward engine, vLLM's worker is in the core's process.
"""

from __future__ import annotations

import math
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmarks.lives import ENGINE, GROUPS, G, Life, LifeFailed, descendants, lines_of, living, small_run, still
from benchmarks.reporting import parser_of, report


@dataclass(frozen=True)
class Kind:
    """title: how the command of the process begins; below: of the process that it belongs to; says: who logs that the
    replacement has done its first work ("": the next step tells)."""

    title: str = ""
    below: str = ""
    says: str = ""
    number: int = signal.SIGKILL


ROLLOUT, REWARD = "rollout workers", "reward workers"
KINDS = {
    "rollout actor": Kind("ray::RolloutWorker", says=ROLLOUT),
    "rollout engine core": Kind(ENGINE, "ray::RolloutWorker", ROLLOUT),
    "vLLM worker": Kind("VLLM::Worker", ENGINE, ROLLOUT),
    "reward actor": Kind("ray::RewardWorker", says=REWARD),
    "reward engine core": Kind(ENGINE, "ray::RewardWorker", REWARD),
    "learner rank": Kind("ray::LearnerRank"),
    "driver": Kind(),
    "hung engine core": Kind(ENGINE, "ray::RolloutWorker", ROLLOUT, signal.SIGSTOP),
}
STEPS_BETWEEN = 5
"""Steps from one kill to the next, so that each comes at a run that goes well."""
DRIVERS_FAMILY_S = 120.0
"""What is left so long behind a driver that was killed has been left behind. (Ray's own agents take some seconds.)"""


@dataclass(frozen=True)
class Kill:
    """What was done and what came of it. recovery_s: see above; gone_s: until the process was gone (of a driver: all
    that were below it); lost_steps: finished steps that had to be made again; noticed: what the log says of it."""

    kind: str
    after_step: int
    recovery_s: float
    gone_s: float
    lost_steps: int
    noticed: str


class Chaos:
    """One training over all its lives."""

    def __init__(self, folder: Path, kills: list[str], seed: int, hang_timeout_s: float, patience_s: float) -> None:
        self.folder, self.kinds, self.patience_s = folder, kills, patience_s
        self.steps = STEPS_BETWEEN * (len(kills) + 1)
        self._random = random.Random(seed)
        self._overrides = small_run(
            folder, self.steps, self.steps * GROUPS, max_staleness=1, **{
                "checkpoint.every": 1, "rollout.restarts": 100, "reward.restarts": 100, "start_deadline_s": patience_s,
                "recovery.learner_restarts": 100, "recovery.backoff_s": 0.5, "rollout.backoff_s": 0.5,
                "reward.backoff_s": 0.5, "rollout.hang_timeout_s": hang_timeout_s, "reward.hang_timeout_s": patience_s,
                "rollout.engine.extra.distributed_executor_backend": "mp",
            },
        )  # fmt: skip
        self.orphans: list[str] = []
        self.killed: list[Kill] = []

    def go(self) -> int:
        """Exit status of the last life."""
        with ExitStack() as stack:
            self.life = self._born(stack)
            for number, kind in enumerate(self.kinds, start=1):
                due = STEPS_BETWEEN * number
                self._wait_for_step(due - 1)
                time.sleep(self._random.uniform(0, self._a_step()))
                kill = self._kill_driver(stack) if kind == "driver" else self._kill(kind)
                self.killed.append(kill)
                print(
                    f"{number:3d}/{len(self.kinds)}  {kind:20s} after step {kill.after_step:3d}: "
                    f"{kill.recovery_s:6.1f} s  {kill.noticed[:90]}",
                    file=sys.stderr, flush=True,
                )  # fmt: skip
            return self.life.end(self.patience_s)

    def _born(self, stack: ExitStack) -> Life:
        return stack.enter_context(living(self._overrides, self.folder / "output.log"))

    def _wait_for_step(self, step: int) -> None:
        self.life.wait_for(f"step {step}", lambda: self._last() >= step, self.patience_s)

    def _last(self) -> int:
        """The last finished step; -1: none yet."""
        return max((step["step"] for step in self.life.steps()), default=-1)

    def _a_step(self) -> float:
        """Seconds."""
        return statistics.median([step["time/step_s"] for step in self.life.steps()] or [1.0])

    def _kill(self, kind: str) -> Kill:
        how = KINDS[kind]
        pid = process_of(self.life, how)
        last, told, since, gone_s = self._last(), len(self._log()), time.time(), 0.0
        self.life.send(pid, how.number)

        def back() -> float | None:
            """When the replacement had done its first work."""
            news = self._log()[told:]
            if how.says:
                return next((at for at, line in news if is_back(line, how.says)), None)
            begun = next((at for at, line in news if "starting the learner again" in line), math.inf)
            return min((step["time"] for step in self.life.steps() if step["time"] > begun), default=None)

        def recovered() -> bool:
            nonlocal gone_s
            if not gone_s and not still([(pid, "")]):
                gone_s = time.time() - since
            return bool(gone_s) and back() is not None

        self.life.wait_for(f"recovery of the {kind}", recovered, self.patience_s)
        noticed = next((line for _, line in self._log()[told:] if "died" in line or "failed" in line), "not said")
        lost = last + 1 - min((step["step"] for step in self.life.steps() if step["time"] > since), default=last + 1)
        took = (back() or math.nan) - since
        return Kill(kind, last, took, gone_s, max(0, lost), noticed.partition(": ")[2])

    def _kill_driver(self, stack: ExitStack) -> Kill:
        last, since = self._last(), time.time()
        gone_s = self.life.kill(DRIVERS_FAMILY_S)
        self.orphans += [command for _, command in self.life.left]
        again = time.time()
        self.life = self._born(stack)
        self.life.wait_for(
            "step of the new driver", lambda: any(step["time"] > again for step in self.life.steps()), self.patience_s
        )
        first = next(step for step in self.life.steps() if step["time"] > again)
        lost = max(0, last + 1 - first["step"])
        noticed = f"gone on with at step {first['step']}"
        return Kill("driver", last, first["time"] - since, gone_s, lost, noticed)

    def _log(self) -> list[tuple[float, str]]:
        """(time, line) of what the run wrote into its log, over all its lives."""
        path = self.life.run / "run.log"
        found = []
        for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
            try:
                at = datetime.strptime(line[:23], "%Y-%m-%d %H:%M:%S,%f").timestamp()
            except ValueError:  # the next line of a message
                found[-1:] = [(at, f"{text} {line}") for at, text in found[-1:]]
                continue
            found.append((at, line[24:]))
        return found


def is_back(line: str, who: str) -> bool:
    return f"{who}: " in line and "has done its first work" in line


def process_of(life: Life, how: Kind) -> int:
    """Its number; vLLM names its processes only where setproctitle is installed, so some are known by their parents."""
    if how.below == ENGINE:
        core = life.of_kind(ENGINE, "ray::RolloutWorker")
        below = [pid for pid, command in descendants(core) if "VLLM::Worker" in command or "spawn_main" in command]
        return below[0] if below else life.fail("the rollout engine has no worker process of its own")
    return life.of_kind(how.title, how.below or None)


def count(run: Path, steps: int) -> dict[str, Any]:
    """What the run's records say, against what was planned. Every figure but the first three should be 0."""
    made = [line["step"] for line in lines_of(run / "metrics.jsonl")]
    used = lines_of(run / "questions.jsonl")
    triples = Counter(
        (line["step"], question["id"], sample)
        for line in used
        for question in line["questions"]
        for sample in range(question["samples"])
    )
    questions = Counter(question["id"] for line in used for question in line["questions"])
    samples = Counter[str]()
    for line in used:
        for question in line["questions"]:
            samples[question["id"]] += question["samples"]
    numbers = [question["number"] for line in used for question in line["questions"]]
    return {
        "steps": len(made),
        "questions": len(questions),
        "trajectories": triples.total(),
        "steps_missing": len(set(range(steps)) - set(made)),
        "steps_twice": len(made) - len(set(made)),
        "steps_without_questions": len(set(range(steps)) ^ {line["step"] for line in used}),
        "questions_missing": steps * GROUPS - len(questions),
        "questions_in_two_steps": sum(times > 1 for times in questions.values()),
        "questions_not_exactly_G_times": sum(times != G for times in samples.values()),
        "step_question_sample_twice": sum(times > 1 for times in triples.values()),
        "out_of_order": sum(one != place for place, one in enumerate(numbers)),
    }


def table(kills: list[Kill]) -> Iterator[str]:
    """By kind: how often, seconds to recover (median, most), seconds until the process was gone, steps made again."""
    yield f"{'killed':22s}{'times':>6s}{'recovery s':>22s}{'gone s':>9s}{'steps again':>13s}"
    for kind in KINDS:
        mine = [kill for kill in kills if kill.kind == kind]
        if mine:
            took = sorted(kill.recovery_s for kill in mine)
            yield (
                f"{kind:22s}{len(mine):6d}{statistics.median(took):10.1f} at most {took[-1]:5.1f}"
                f"{max(kill.gone_s for kill in mine):8.1f}{sum(kill.lost_steps for kill in mine):13d}"
            )


def verdict(counted: dict[str, Any], kills: int, planned: int, orphans: list[str], status: int) -> tuple[bool, str]:
    wrong = [f"{name} {value}" for name, value in list(counted.items())[3:] if value]
    wrong += [f"{planned - kills} kills were not made"] if kills < planned else []
    wrong += [f"{len(orphans)} processes outlived a driver"] if orphans else []
    wrong += [f"the run ended with {status}"] if status else []
    facts = f"{kills} kills, {counted['steps']} steps, {counted['questions']} questions x {G}"
    return not wrong, f"{'NOTHING LOST' if not wrong else 'NOT SO: ' + ', '.join(wrong)}: {facts}"


def plan(rounds: int, kinds: list[str], seed: int) -> list[str]:
    """Each kind ``rounds`` times, in random order; one that hangs once, because it takes a deadline."""
    order = [kind for kind in kinds for _ in range(rounds if KINDS[kind].number == signal.SIGKILL else 1)]
    random.Random(seed).shuffle(order)
    return order


@contextmanager
def workplace(folder: Path | None) -> Iterator[Path]:
    """The folder that was asked for, or one that goes again. Inside, SIGTERM ends this process as Ctrl-C does: what it
    started is ended first."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    if folder is not None:
        folder.mkdir(parents=True)
        yield folder.resolve()
    else:
        with tempfile.TemporaryDirectory(prefix="ergo-rl-") as made:
            yield Path(made)


def main() -> int:
    parser = parser_of(__doc__, "chaos")
    parser.add_argument("--rounds", type=int, default=3, help="kills of each kind (default: %(default)s)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--seed", type=int, default=0, help="of order and moments (default: %(default)s)")
    parser.add_argument(
        "--hang-timeout-s", type=float, default=60, help="rollout.hang_timeout_s (default: %(default)s)"
    )
    parser.add_argument("--patience-s", type=float, default=900, help="for each recovery (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="a new folder for the run, kept (default: one that is removed)")
    options = parser.parse_args()
    kinds = plan(options.rounds, options.kinds, options.seed)
    started, status, failure = time.monotonic(), 1, ""
    with workplace(options.folder) as folder:
        chaos = Chaos(folder, kinds, options.seed, options.hang_timeout_s, options.patience_s)
        try:
            status = chaos.go()
        except LifeFailed as error:
            failure = str(error)
            print(failure, file=sys.stderr)
        counted = count(folder / "run", chaos.steps)
    good, line = verdict(counted, len(chaos.killed), len(kinds), chaos.orphans, status)
    found = {
        "minutes": (time.monotonic() - started) / 60, "counts": counted, "orphans": chaos.orphans, "failure": failure,
        "kills": [asdict(kill) for kill in chaos.killed],
        "vllm_worker": "its own process in the rollout engine, in the core's process in the reward engine",
    }  # fmt: skip
    print(*table(chaos.killed), sep="\n", file=sys.stderr)
    return report(options, found, good, line)


if __name__ == "__main__":
    raise SystemExit(main())
