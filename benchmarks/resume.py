"""Kill a training's driver at ten random moments; does what it resumes come to the same end?

    python -m benchmarks.resume                      # about a quarter of an hour on two quiet cores
    python -m benchmarks.resume --kills 2 --steps 12

Trains the panels recipe twice, small (two questions of four trajectories a step, synchronous, a checkpoint behind each
step): once undisturbed, once with ``kill -9`` of the driver again and again. Half of the kills come at a random moment
of a life, the others when a save has begun; how many landed inside one is counted by what they left behind. After each,
the same command must go on with exactly the step behind the last checkpoint. In the end losses, gradient norms,
rewards, questions and the weights are compared, bit for bit.
"""

from __future__ import annotations

import random
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.chaos import DRIVERS_FAMILY_S, workplace
from benchmarks.lives import GROUPS, Life, LifeFailed, lines_of, living, small_run
from benchmarks.reporting import parser_of, report

FIGURES = ("learner/loss", "learner/grad_norm", "reward/total", "rollout/reply_tokens")
"""Of every step, compared as they are."""


@dataclass(frozen=True)
class Kill:
    """saved: updates in the last whole checkpoint (-1: there was none); inside_save: a half-written one was left
    behind; next_step: the first step that the next life made; gone_s: until nothing of the driver's family was left."""

    saved: int
    inside_save: bool
    next_step: int
    gone_s: float

    @property
    def exact(self) -> bool:
        return self.next_step == max(self.saved, 0)


class Cut:
    """One training over all its lives."""

    def __init__(self, folder: Path, steps: int, kills: int, seed: int, patience_s: float) -> None:
        self.folder, self.steps, self.kills, self.patience_s = folder, steps, kills, patience_s
        self._random = random.Random(seed)
        self.done: list[Kill] = []
        self.orphans: list[str] = []

    def go(self) -> int:
        """Exit status of the last life."""
        run, waiting = self.folder / "run", None
        checkpoints = run / "checkpoints"
        for number in range(self.kills):
            born = time.time()
            with living(command(self.folder, self.steps), self.folder / "output.log") as life:
                if waiting is not None:
                    self._resumed(life, *waiting)
                else:
                    life.wait_for_steps(1, self.patience_s)
                # a share of what is left, so that every life gets somewhere and the last one has something to do
                furthest = len(life.steps()) + max(1, (self.steps - len(life.steps())) // (self.kills - number + 1))
                target = min(self._random.randint(len(life.steps()), furthest), self.steps - 2)
                life.wait_for_steps(target, self.patience_s)
                if number % 2:
                    life.wait_for(
                        "save", lambda: any(checkpoints.glob(".writing-step-*")), self.patience_s, pause_s=0.001
                    )
                    time.sleep(self._random.uniform(0, 0.05))
                else:
                    time.sleep(self._random.uniform(0, life.steps()[-1]["time/step_s"]))
                gone_s = life.kill(DRIVERS_FAMILY_S)
                self.orphans += [said for _, said in life.left]
            latest = checkpoints / "LATEST"
            saved = int(latest.read_text().strip().removeprefix("step-")) if latest.exists() else -1
            inside = any(path.stat().st_mtime > born for path in checkpoints.glob(".writing-step-*"))
            waiting = (saved, inside, gone_s)
        with living(command(self.folder, self.steps), self.folder / "output.log") as life:
            if waiting is not None:
                self._resumed(life, *waiting)
            return life.end(self.patience_s)

    def _resumed(self, life: Life, saved: int, inside_save: bool, gone_s: float) -> None:
        """Wait for the first step of a life behind a kill."""
        since = time.time()

        def made() -> list[int]:
            return [one["step"] for one in life.steps() if one["time"] > since]

        life.wait_for("step of the next life", lambda: bool(made()), self.patience_s)
        first = made()[0]
        self.done.append(Kill(saved, inside_save, first, gone_s))
        place = f"{'inside a save' if inside_save else 'between saves'}, {max(saved, 0)} updates saved"
        print(
            f"{len(self.done):3d}/{self.kills}  killed {place}; went on with step {first}", file=sys.stderr, flush=True
        )


def command(folder: Path, steps: int) -> list[str]:
    overrides = {"checkpoint.every": 1, "start_deadline_s": 1800}
    return small_run(folder, steps, steps * GROUPS, **overrides)


def compare(whole: Path, cut: Path) -> dict[str, Any]:
    """How many steps, figures and tensors differ between two finished runs, and by how much."""
    import torch
    from safetensors.torch import load_file

    lines = [lines_of(run / "metrics.jsonl") for run in (whole, cut)]
    questions = [lines_of(run / "questions.jsonl") for run in (whole, cut)]
    weights = [load_file(run / "policy" / "model.safetensors") for run in (whole, cut)]
    pairs = list(zip(*lines, strict=False))
    off = [float((weights[0][name] - weights[1][name]).abs().max()) for name in weights[0] if name in weights[1]]
    return {
        "steps": len(lines[0]),
        "tensors": len(weights[0]),
        "steps_more_or_less": abs(len(lines[0]) - len(lines[1])),
        "steps_that_differ": sum(any(one[name] != other[name] for name in FIGURES) for one, other in pairs),
        "largest_loss_difference": max((abs(one[FIGURES[0]] - other[FIGURES[0]]) for one, other in pairs), default=0.0),
        "questions_differ": int(questions[0] != questions[1]),
        "tensors_that_differ": sum(not torch.equal(weights[0][name], weights[1].get(name)) for name in weights[0]),
        "largest_weight_difference": max(off, default=0.0),
    }


def verdict(found: dict[str, Any], kills: list[Kill], planned: int, orphans: list[str]) -> tuple[bool, str]:
    wrong = [f"{name} {value}" for name, value in list(found.items())[2:] if value]
    wrong += [f"{planned - len(kills)} kills were not made"] if len(kills) < planned else []
    wrong += [f"{count} lives went on elsewhere"] if (count := sum(not kill.exact for kill in kills)) else []
    wrong += [f"{len(orphans)} processes outlived a driver"] if orphans else []
    inside = sum(kill.inside_save for kill in kills)
    facts = f"{len(kills)} kills, {inside} of them inside a save; {found.get('steps', 0)} steps"
    return not wrong, f"{'THE SAME TO THE LAST BIT' if not wrong else 'NOT SO: ' + ', '.join(wrong)}: {facts}"


def main() -> int:
    parser = parser_of(__doc__, "resume")
    parser.add_argument("--kills", type=int, default=10, help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=60, help="of either run (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    parser.add_argument("--patience-s", type=float, default=1800, help="for each wait (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="a new folder for the runs, kept (default: one that is removed)")
    options = parser.parse_args()
    if options.steps < options.kills + 3:
        parser.error("give more steps than kills, by 3")
    started, found, failure = time.monotonic(), dict[str, Any](), ""
    with workplace(options.folder) as folder:
        whole, cut = folder / "whole", folder / "cut"
        whole.mkdir(), cut.mkdir()
        trial = Cut(cut, options.steps, options.kills, options.seed, options.patience_s)
        try:
            with living(command(whole, options.steps), whole / "output.log") as life:
                if life.end(2 * options.patience_s):
                    life.fail("the undisturbed run failed")
            print(f"undisturbed: {options.steps} steps", file=sys.stderr, flush=True)
            if status := trial.go():
                failure = f"the last life ended with {status}: {(cut / 'output.log').read_text()[-2000:]}"
            else:
                found = compare(whole / "run", cut / "run")
        except LifeFailed as error:
            failure = str(error)
    good, line = verdict(found, trial.done, options.kills, trial.orphans)
    good = good and not failure
    figures = {
        "minutes": (time.monotonic() - started) / 60, **found, "orphans": trial.orphans, "failure": failure,
        "kills": [asdict(kill) for kill in trial.done],
    }  # fmt: skip
    return report(options, figures, good, failure or line)


if __name__ == "__main__":
    raise SystemExit(main())
