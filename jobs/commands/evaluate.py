"""``ergo-rl evaluate``: measure a policy on held-out questions, beside baselines, or in several modes and budgets."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from ergo_rl.console import PlainConsole, plain, table
from ergo_rl.jobs.benchmark import run_benchmark
from ergo_rl.jobs.benchmark_grid import Mode
from ergo_rl.jobs.cli import add_endpoint, add_recipe, command, parse_with_overrides, recipe_of
from ergo_rl.jobs.config import load_config
from ergo_rl.jobs.evaluation import BoxSource, HeldOut, compare_boxes
from ergo_rl.jobs.metrics import Metrics
from ergo_rl.jobs.probe import run_probe
from ergo_rl.jobs.report import COSTS, number, probe_table, share
from ergo_rl.questions.prepare import prepare_embedded

_ROWS = {
    "coverage": "target coverage",
    "accuracy": "accuracy",
    "area_ratio": "mean crop area",
    "full_image_rate": "whole image",
    "tiny_box_rate": "tiny box",
    "bad_box_rate": "bad box",
    "region": "r_region",
    "region_precision": "paid crops that hold the target",
    "region_recall": "crops with the target that are paid",
}
_COUNTS = {
    "questions": ("questions", ".0f"),
    "failed": ("failed (counted as wrong)", ".0f"),
    "unscored": ("without a reward", ".0f"),
}


def as_table(results: dict[str, Metrics], how: str) -> Table:
    """A row per figure, a column per source of boxes."""
    figures = table(f"held-out questions, {how}; with 95 % intervals")
    figures.add_column("")
    for source in results:
        figures.add_column(f"box: {source}", justify="right")
    for name, title in _ROWS.items():
        figures.add_row(title, *(share(metrics, f"eval/{name}") for metrics in results.values()))
    for name, (title, form) in (COSTS | _COUNTS).items():
        figures.add_row(title, *(number(metrics, f"eval/{name}", form) for metrics in results.values()))
    return figures


def as_probe_table(metrics: Metrics, how: str) -> Table:
    """A row per figure, a column per replacement of the crop."""
    asked = f"{number(metrics, 'eval/questions')} held-out questions, {how}; with 95 % intervals"
    found = probe_table(metrics, f"is the crop used? {asked}")
    figures = table(found.title, caption=plain(found.note), caption_justify="left")
    for place, name in enumerate(found.columns):
        figures.add_column(name, justify="right" if place else "left")
    for row in found.rows:
        figures.add_row(*row)
    return figures


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ergo-rl evaluate",
        description="Measure a policy on held-out questions, beside baselines that replace its box: the whole image at "
        "the same token budget, a random box, the target's own box.",
        epilog="example: ergo-rl evaluate --model runs/panels/policy --out after.json",
    )
    add_recipe(parser)
    parser.add_argument("--model", default="", help="Hugging Face folder or hub name of the policy (default: recipe's)")
    sources = [str(source) for source in BoxSource]
    parser.add_argument("--boxes", nargs="+", choices=sources, help="whose boxes (default: all four)")
    parser.add_argument(
        "--hide-target",
        action="store_true",
        help="the occlusion test: black out every target; coverage then says whether its place is found from context",
    )
    parser.add_argument(
        "--probe",
        action="store_true",
        help="instead of --boxes: is the crop used? turn 2 again with the policy's own crop replaced by noise, by "
        "another question's, by the oracle's, by none; no verifier is started",
    )
    parser.add_argument("--questions", type=int, default=0, help="how many questions (default: all)")
    parser.add_argument(
        "--modes",
        nargs="+",
        choices=[str(mode) for mode in Mode],
        help="instead of --boxes: direct (one turn), two-stage, oracle (two-stage with the target's own box), each at "
        "every one of --budgets; no verifier is started",
    )
    parser.add_argument("--budgets", nargs="+", type=int, default=[], help="with --modes: visual tokens of each view")
    add_endpoint(parser)
    parser.add_argument(
        "--out",
        type=Path,
        help="write the figures, of a probe also every answer, to this JSON file; with --modes: a folder for records, "
        "table, JSON and plot (default: evaluation), where the same command continues after a stop",
    )
    return parser


@command("evaluate", stopped="stopped by hand; with --modes the same command continues")
def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parse_with_overrides(parser, argv)
    if options.budgets and not options.modes:
        parser.error("--budgets is for --modes; try --modes direct two-stage oracle")
    if options.url and not (options.modes or options.probe):
        parser.error("--url is for --modes and --probe; try --modes direct two-stage oracle")
    if sum(map(bool, (options.boxes, options.modes, options.probe))) > 1:
        parser.error("--boxes, --modes and --probe are three evaluations; name one of them")
    console = PlainConsole(width=None if sys.stdout.isatty() else 160)  # a log has no width: 80 would break the table
    recipe, overrides = recipe_of(options)
    models = [f"rollout.engine.model={options.model}", f"learner.model={options.model}"] if options.model else []
    config = load_config(recipe, [*overrides, *models, f"evaluation.questions={options.questions}"])
    prepare_embedded(config.embedded)
    sources = [BoxSource(source) for source in options.boxes or BoxSource]
    oracle = Mode.ORACLE in options.modes if options.modes else BoxSource.ORACLE in sources and not options.probe
    questions = HeldOut(config, options.hide_target).require(boxes=options.hide_target or oracle)
    if options.modes:
        work = run_benchmark(
            config, questions, [Mode(mode) for mode in options.modes], options.budgets, hide_target=options.hide_target,
            url=options.url, served_model=options.served_model, family=options.family,
            out=options.out or Path("evaluation"), console=console,
        )  # fmt: skip
        for path in asyncio.run(work).files:
            console.print(path.read_text() if path.suffix == ".md" else str(path), markup=False, soft_wrap=True)
        return 0
    how = "targets hidden" if options.hide_target else "greedy decoding"
    report: dict[str, Any] = {"model": options.url or config.rollout.engine.model, "hide_target": options.hide_target}
    if options.probe:
        probing = run_probe(config, questions, console, url=options.url, served_model=options.served_model,
                            family=options.family)  # fmt: skip
        metrics, found = asyncio.run(probing)
        console.print(as_probe_table(metrics, how))
        report |= {"probe": metrics, "rows": [asdict(row) for row in found.rows]}
    else:
        results = asyncio.run(compare_boxes(config, questions, sources, console))
        console.print(as_table(results, how))
        report |= results
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=2) + "\n")
        console.print(f"figures: {options.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
