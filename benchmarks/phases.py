"""Where a run's time goes: median seconds per step of each phase, their shares, trajectories and tokens per second.

    python benchmarks/phases.py runs/panels            # prints JSON, and one line in words

Reads what a run wrote (``metrics.jsonl``); the first step is left out, because engines warm up in it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path


def phases(run: Path) -> dict[str, float]:
    """Medians over steps; ``share/...`` of the step's median. Raises SystemExit for a run of fewer than two steps."""
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][1:]
    if not steps:
        raise SystemExit(f"{run} has fewer than two steps")

    def median(name: str) -> float:
        return statistics.median(step[name] for step in steps)

    found = {name: median(name) for name in steps[0] if name.startswith("time/") and "slowest" not in name}
    whole = found["time/step_s"]
    shares = {
        f"share/{name.removeprefix('time/').removesuffix('_s')}": value / whole
        for name, value in found.items()
        if name != "time/step_s"
    }
    rates = {
        "steps": float(len(steps)),
        "trajectories_per_s": median("rollout/trajectories") / whole,
        "learner_tokens_per_s": median("learner/tokens") / found["time/learn_s"],
    }
    return found | shares | rates


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run")
    run = parser.parse_args().run
    found = phases(run)
    print(json.dumps({"run": str(run), **{name: round(value, 4) for name, value in found.items()}}, indent=2))
    parts = ", ".join(f"{name.removeprefix('share/')} {value:.0%}" for name, value in found.items() if "share/" in name)
    print(f"{found['time/step_s']:.2f} s a step: {parts}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
