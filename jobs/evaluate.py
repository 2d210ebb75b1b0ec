"""``ergo-rl evaluate``: a policy on held-out questions, beside the baselines whole image, random box, oracle box."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cluster.placement import Cluster
from cluster.pool import together
from episodes import images
from episodes.questions import DatasetError, QuestionStream
from episodes.types import Question
from jobs.commands import EXPECTED, add_recipe, launch_players, recipe_of
from jobs.config import TrainConfig, load_config
from jobs.evaluation import BoxSource, evaluate
from jobs.metrics import Metrics
from jobs.prepare import prepare_embedded

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


def heldout(config: TrainConfig) -> list[Question]:
    """The questions of an evaluation, in the order of their files; none where no files are named.

    Raises DatasetError."""
    evaluation = config.evaluation
    if not evaluation.paths:
        return []
    stream = QuestionStream(replace(config.questions, paths=evaluation.paths, shuffle=False))
    return list(islice(stream, min(evaluation.questions or len(stream), len(stream))))


def occluded(questions: Sequence[Question]) -> list[Question]:
    """The same questions with the targets blacked out: where they are can only be told from what is around them.

    Raises DatasetError where a question does not say where its target is."""
    for question in questions:
        if not question.boxes:
            raise DatasetError(f"question {question.id!r} has no boxes; there is no target to hide")
    return [replace(question, image=images.hide(question.image, question.boxes)) for question in questions]


async def compare(
    config: TrainConfig, questions: Sequence[Question], sources: Sequence[BoxSource], console: Console
) -> dict[str, Metrics]:
    """The metrics of each source of boxes, on the same questions and engines."""
    found: dict[str, Metrics] = {}
    with Cluster.connect(config.cluster) as cluster:
        with console.status("starting engines (20 to 60 s on a CPU)"):
            rollouts, rewards = launch_players(cluster, config)
            await together(rollouts.ready(config.start_deadline_s), rewards.ready(config.start_deadline_s))
        for source in sources:
            with console.status(f"{len(questions)} questions, boxes from: {source}"):
                evaluation = await evaluate(questions, rollouts, rewards, config.evaluation, source)
            for bad in evaluation.unplayable:
                console.print(f"could not play {bad.question_id!r}: {bad.reason}", highlight=False)
            bounds = evaluation.intervals(config.metrics)
            lows = {f"{name}_low": low for name, (low, _) in bounds.items()}
            highs = {f"{name}_high": high for name, (_, high) in bounds.items()}
            found[source] = evaluation.metrics(config.metrics) | lows | highs
    return found


def as_table(found: dict[str, Metrics], how: str) -> Table:
    """A row per figure, a column per source of boxes."""
    table = Table(title=f"held-out questions, {how}; with 95 % intervals")
    table.add_column("")
    for source in found:
        table.add_column(f"box: {source}", justify="right")
    for name, title in _ROWS.items():
        table.add_row(title, *(_cell(one, f"eval/{name}") for one in found.values()))
    return table


def _cell(metrics: Metrics, name: str) -> str:
    if name not in metrics:
        return "-"
    text = f"{metrics[name]:.1%}"
    low, high = metrics.get(f"{name}_low"), metrics.get(f"{name}_high")
    return text if low is None or high is None else f"{text} [{low:.1%} - {high:.1%}]"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="ergo-rl evaluate",
        description="Measure a policy on held-out questions, beside baselines that put another box into its mouth: the "
        "whole image at the same token budget, a random box, the target's own box.",
        epilog="example: ergo-rl evaluate --model runs/panels/policy --out after.json",
    )
    add_recipe(parser)
    parser.add_argument("--model", help="Hugging Face folder or hub name of the policy (default: the recipe's)")
    sources = [str(source) for source in BoxSource]
    parser.add_argument("--boxes", nargs="+", choices=sources, default=sources, help="whose boxes (default: all four)")
    parser.add_argument(
        "--hide-target",
        action="store_true",
        help="the occlusion test: black out every target; coverage then says whether its place is found from context",
    )
    parser.add_argument("--questions", type=int, default=0, help="how many questions (default: all)")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    options = parser.parse_intermixed_args(argv)
    recipe, overrides = recipe_of(options)
    model = [f"rollout.engine.model={options.model}", f"learner.model={options.model}"] if options.model else []
    console = Console(width=None if sys.stdout.isatty() else 160)  # a log has no width: 80 would break the table
    try:
        config = load_config(recipe, [*overrides, *model, f"evaluation.questions={options.questions}"])
        prepare_embedded(config.embedded)
        questions = heldout(config)
        if not questions:
            raise DatasetError("evaluation.paths is empty; name at least one Parquet file of held-out questions")
        if options.hide_target:
            questions = occluded(questions)
        found = asyncio.run(compare(config, questions, [BoxSource(source) for source in options.boxes], console))
    except EXPECTED as error:
        print(f"ergo-rl evaluate: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    console.print(as_table(found, "targets hidden" if options.hide_target else "greedy decoding"))
    if options.out is not None:
        options.out.write_text(
            json.dumps({"model": config.rollout.engine.model, "hide_target": options.hide_target, **found}, indent=2)
            + "\n"
        )
        console.print(f"figures: {options.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
