"""``ergo-rl ablate``: the same run with other rewards and other seeds, as a table and a plot."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, TimeElapsedColumn

from ergo_rl.console import PlainConsole, progress_bar, text_column
from ergo_rl.jobs.ablation import DEFAULT_PLAN, AblationRun, load_plan, run_all, runs_of, write_report
from ergo_rl.jobs.cli import add_overrides, command, parse_with_overrides
from ergo_rl.jobs.config import load_config
from ergo_rl.questions.prepare import prepare_embedded


@command("ablate", stopped="stopped by hand; the same command continues")
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="ergo-rl ablate",
        description="Train every row of a plan with every seed, and write a table and a plot. Finished runs are kept: "
        "call it again to continue, or with more rows or seeds.",
        epilog="example: ergo-rl ablate configs/ablations/panels.yaml --out runs/ablation total_steps=40",
    )
    parser.add_argument("plan", nargs="?", default=DEFAULT_PLAN, help=f"YAML plan (default: {DEFAULT_PLAN})")
    add_overrides(parser, "values for every run")
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"), help="folder (default: %(default)s)")
    parser.add_argument("--at-once", type=int, default=1, help="runs at the same time (default: %(default)s)")
    parser.add_argument("--report-only", action="store_true", help="train nothing; report the finished runs")
    options = parse_with_overrides(parser, argv)
    console = PlainConsole()
    columns = (text_column("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    failed: list[AblationRun] = []
    plan = load_plan(Path(options.plan), options.overrides)
    runs = runs_of(plan, options.out)
    if not options.report_only:
        prepare_embedded(load_config(Path(plan.recipe), plan.overrides).embedded)
        with progress_bar(*columns, console=console) as progress:
            failed = asyncio.run(run_all(runs, max(1, options.at_once), progress))
    curves = {row: [curve for run in runs if run.row == row and (curve := run.curve())] for row in plan.rows}
    command_line = " ".join(["ergo-rl ablate", options.plan, *options.overrides])
    for path in write_report(options.out, command_line, plan.rows, curves, len(plan.seeds)):
        console.print(f"wrote {path}")
    for run in failed:
        log = run.folder / f"seed-{run.seed}.log"
        print(f"ergo-rl ablate: {run.row!r} with seed {run.seed} failed; its output is in {log}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
