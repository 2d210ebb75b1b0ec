"""Rollout workers 1 -> 3 -> 1 and reward workers 1 -> 2 of a running training, by ``ergo-rl scale``: does it pause?

    python -m benchmarks.scaling                     # about five minutes on two quiet cores

Trains the panels recipe, with its own 64 trajectories a step, and gives it workers by the command, as from another
terminal. A *gap* is the time from the end of one step to the end of the next, by the run's own records. New engines
start on the same cores as the run and slow all of its steps while they do; that is no pause. So each phase (from the
command until it returned) is compared with its own median step: a pause is what its longest gap is above that, and must
be below one step. Beside it stands the median of the undisturbed steps before, to see what the competition for cores
costs.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

from benchmarks.chaos import workplace
from benchmarks.lives import ROOT, Life, LifeFailed, living, small_run
from benchmarks.reporting import parser_of, report

PHASES = (("--rollout-workers", 3), ("--reward-workers", 2), ("--rollout-workers", 1))


@dataclass(frozen=True)
class Phase:
    """what: was asked for; said: the command's answer; took_s: until it answered; steps: that ended meanwhile, and the
    one behind; median_s, longest_s: of their gaps; joined_after: steps from the answer to the first one for which the
    run counts the new number (0: that step was under way)."""

    what: str
    said: str
    took_s: float
    steps: int
    median_s: float
    longest_s: float
    joined_after: int

    @property
    def pause_in_steps(self) -> float:
        """What the longest gap is above the median one, in medians."""
        return self.longest_s / self.median_s - 1


def gaps(ends: Sequence[float], begin: float, end: float) -> list[float]:
    """Seconds between the ends of steps, for all of them that lie in begin .. end at least in part."""
    return [after - before for before, after in pairwise(ends) if after > begin and before < end]


def scaled(life: Life, option: str, workers: int, patience_s: float) -> Phase:
    command = [sys.executable, "-m", "ergo_rl.jobs", "scale", str(life.run), option, str(workers)]
    begun = time.time()
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=patience_s)
    done = time.time()
    if answer.returncode or "not changed" in answer.stdout:
        life.fail(f"{' '.join(command[3:])}: {answer.stdout} {answer.stderr}")
    life.wait_for("two more steps", lambda: sum(one["time"] > done for one in life.steps()) >= 2, patience_s)
    name = f"count/{option.removeprefix('--').replace('-', '_')}"
    later = [one[name] for one in life.steps() if one["time"] > done]
    between = gaps([one["time"] for one in life.steps()], begun, done)
    joined = next((place for place, count in enumerate(later) if count == workers), -1)
    median_s, longest_s = statistics.median(between), max(between)
    return Phase(f"{option} {workers}", answer.stdout.strip(), done - begun, len(between), median_s, longest_s, joined)


def table(phases: Sequence[Phase], quiet_s: float) -> Iterator[str]:
    """A line for each phase; gaps in seconds."""
    yield f"{'asked for':22s}{'answer s':>9s}{'steps':>7s}{'median gap':>12s}{'longest':>9s}{'pause in steps':>16s}"
    yield f"{'(nothing)':22s}{'':9s}{'':7s}{quiet_s:12.2f}"
    for one in phases:
        yield (
            f"{one.what:22s}{one.took_s:9.1f}{one.steps:7d}{one.median_s:12.2f}{one.longest_s:9.2f}"
            f"{one.pause_in_steps:16.2f}"
        )


def verdict(phases: Sequence[Phase]) -> tuple[bool, str]:
    wrong = [f"{one.what} paused for {one.pause_in_steps:.1f} steps" for one in phases if one.pause_in_steps >= 1]
    wrong += [f"{one.what} did not take part within a step" for one in phases if one.joined_after not in (0, 1)]
    wrong += ["not everything was asked for"] if len(phases) < len(PHASES) else []
    worst = max((one.pause_in_steps for one in phases), default=0.0)
    return not wrong, f"{'NO PAUSE' if not wrong else 'NOT SO: ' + ', '.join(wrong)}: {worst:.2f} steps at most"


def main() -> int:
    parser = parser_of(__doc__, "scaling")
    parser.add_argument("--quiet-steps", type=int, default=12, help="undisturbed ones (default: %(default)s)")
    parser.add_argument("--patience-s", type=float, default=900, help="for each wait (default: %(default)s)")
    parser.add_argument("--staleness", type=int, default=1, help="max_staleness of the run (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="a new folder for the run, kept (default: one that is removed)")
    options = parser.parse_args()
    phases, quiet_s, failure = list[Phase](), 0.0, ""
    with workplace(options.folder) as folder:
        overrides = {
            "max_staleness": options.staleness, "checkpoint.every": 0, "groups_per_step": 8, "rollout.group_size": 8,
        }  # fmt: skip
        command = small_run(folder, 100_000, **overrides, start_deadline_s=options.patience_s)  # it is ended, not done
        try:
            with living(command, folder / "output.log") as life:
                life.wait_for_steps(options.quiet_steps + 1, options.patience_s)
                ends = [one["time"] for one in life.steps()]
                quiet_s = statistics.median(gaps(ends, ends[0], ends[-1])[1:])  # engines warm up in the first
                for option, workers in PHASES:
                    phases.append(scaled(life, option, workers, options.patience_s))
                    print(f"{phases[-1].what}: {phases[-1].said}", file=sys.stderr, flush=True)
        except (LifeFailed, subprocess.TimeoutExpired) as error:
            failure = str(error)
    good, line = verdict(phases)
    found = {
        "failure": failure, "quiet_median_s": quiet_s,
        "phases": [asdict(one) | {"pause_in_steps": one.pause_in_steps} for one in phases],
    }  # fmt: skip
    print(*table(phases, quiet_s), sep="\n", file=sys.stderr)
    return report(options, found, good and not failure, failure or line)


if __name__ == "__main__":
    raise SystemExit(main())
