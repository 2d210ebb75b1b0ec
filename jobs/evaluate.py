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
from jobs.evaluation import BoxSource, Evaluation, evaluate, wilson
from jobs.metrics import Metrics
from jobs.prepare import prepare_embedded

_SHARES = {
    "coverage": "target coverage",
    "accuracy": "accuracy",
    "region": "r_region",
    "full_image_rate": "whole image",
    "bad_box_rate": "bad box",
}
_MEANS = {"area_ratio": "area", "region_precision": "region precision", "region_recall": "region recall"}


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
            found[source] = with_intervals(evaluation, evaluation.metrics(config.metrics))
    return found


def with_intervals(evaluation: Evaluation, metrics: Metrics) -> Metrics:
    """Every share with its 95 % interval, as ``NAME_low`` and ``NAME_high``."""
    played = len(evaluation.groups)
    shares = {name: metrics[f"eval/{name}"] for name in _SHARES if f"eval/{name}" in metrics}
    bounds = {name: wilson(share * played, played) for name, share in shares.items()}
    lows = {f"eval/{name}_low": low for name, (low, _) in bounds.items()}
    return metrics | lows | {f"eval/{name}_high": high for name, (_, high) in bounds.items()}


def as_table(found: dict[str, Metrics], how: str) -> Table:
    """A row per figure, a column per source of boxes."""
    table = Table(title=f"held-out questions, {how}; shares with 95 % intervals")
    table.add_column("")
    for source in found:
        table.add_column(f"box: {source}", justify="right")
    for name, title in _SHARES.items():
        key = f"eval/{name}"
        cells = [
            f"{one[key]:.1%} [{one[key + '_low']:.0%}-{one[key + '_high']:.0%}]" if key in one else "-"
            for one in found.values()
        ]
        table.add_row(title, *cells)
    for name, title in _MEANS.items():
        table.add_row(
            title, *(f"{one[f'eval/{name}']:.3f}" if f"eval/{name}" in one else "-" for one in found.values())
        )
    return table


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
    options = parser.parse_args(argv)
    recipe, overrides = recipe_of(options)
    model = [f"rollout.engine.model={options.model}", f"learner.model={options.model}"] if options.model else []
    console = Console()
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
