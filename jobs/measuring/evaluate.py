"""``ergo-rl evaluate``: a policy on held-out questions, beside the baselines whole image, random box, oracle box; or in
several modes at several visual-token budgets (``jobs.measuring.grid``)."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ergo_rl.actors.rollout_pool import RolloutPool
from ergo_rl.cluster.placement import Cluster
from ergo_rl.cluster.worker_pool import gather_or_cancel
from ergo_rl.episodes import images
from ergo_rl.episodes.families import family_of
from ergo_rl.episodes.questions import DatasetError, QuestionStream
from ergo_rl.episodes.types import Question
from ergo_rl.jobs.commands import EXPECTED, add_recipe, launch_players, recipe_of
from ergo_rl.jobs.config import ConfigError, TrainConfig, load_config
from ergo_rl.jobs.measuring.evaluation import BoxSource, evaluate
from ergo_rl.jobs.measuring.grid import Mode, run_grid
from ergo_rl.jobs.measuring.grid_report import write_report
from ergo_rl.jobs.metrics import Metrics
from ergo_rl.jobs.players import EndpointPlayer, Player, PoolPlayer, add_endpoint, endpoint_at, family_named
from ergo_rl.jobs.prepare import prepare_embedded

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
            await gather_or_cancel(rollouts.ready(config.start_deadline_s), rewards.ready(config.start_deadline_s))
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


async def grid(
    config: TrainConfig, questions: Sequence[Question], options: argparse.Namespace, console: Console
) -> list[Path]:
    """Every mode at every budget, by rollout workers of this job or an endpoint; the files of the report.

    Raises ConfigError, DatasetError, OSError and what starting the workers raises."""
    modes, budgets = [Mode(mode) for mode in options.modes], options.budgets or [config.episode.coarse_tokens]
    if Mode.ORACLE in modes and not any(question.boxes for question in questions):
        raise DatasetError("no question says where its target is; leave oracle out of --modes")
    sampling, engine = config.rollout.sampling, config.rollout.engine
    longest = 2 * max(budgets) + sampling.coarse_max_tokens + sampling.fine_max_tokens
    with ExitStack() as stack:
        player: Player
        if options.url:
            endpoint = await endpoint_at(options.url, options.served_model, config)
            player, policy = EndpointPlayer(config, endpoint, family_named(options.family)), endpoint.model
        else:
            if longest >= engine.max_model_len:
                raise ConfigError(
                    f"rollout.engine.max_model_len ({engine.max_model_len}) must be above {longest}, twice the largest "
                    "budget and both reply limits, with room for the prompts' text"
                )
            policy, family = engine.model, family_of(engine.model, config.episode.family)
            cluster = stack.enter_context(Cluster.connect(config.cluster))
            rollouts = RolloutPool.launch(cluster, config.rollout, config.episode)
            with console.status("starting engines (20 to 60 s on a CPU)"):
                await rollouts.ready(config.start_deadline_s)
            player = PoolPlayer(rollouts, family)
        told = {
            "policy": policy,
            "at": options.url or "engines of this job",
            "questions": config.evaluation.paths,
            "hide_target": options.hide_target,
            "prompts": asdict(config.episode.prompts),
            "on_bad_box": str(config.episode.on_bad_box),
            "reply_limits": [sampling.coarse_max_tokens, sampling.fine_max_tokens],
            "oracle_margin": config.evaluation.oracle_margin,
            "number_tolerance": config.reward.number_tolerance,
            "in_flight": config.evaluation.in_flight,
        }
        try:
            with console.status("") as status:

                def progress(done: int, wanted: int) -> None:
                    status.update(f"{done} of {wanted} episodes: {', '.join(modes)} at {budgets} visual tokens")

                records = await run_grid(questions, player, config, modes, budgets, options.out, told, progress)
        finally:
            await player.close()
    return write_report(options.out, told, records)


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
    parser.add_argument(
        "--modes",
        nargs="+",
        choices=[str(mode) for mode in Mode],
        help="instead of --boxes: direct (one turn), two-stage, oracle (two-stage with the target's own box), each at "
        "every one of --budgets; no reward model is started",
    )
    parser.add_argument("--budgets", nargs="+", type=int, default=[], help="with --modes: visual tokens of each view")
    add_endpoint(parser)
    parser.add_argument(
        "--out",
        type=Path,
        help="write the figures to this JSON file; with --modes: a folder for records, table, JSON and plot (default: "
        "evaluation), where the same command goes on after a stop",
    )
    options = parser.parse_intermixed_args(argv)
    if (options.budgets or options.url) and not options.modes:
        parser.error("--budgets and --url are for --modes; try --modes direct two-stage oracle")
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
        if options.modes:
            options.out = options.out or Path("evaluation")
            for path in asyncio.run(grid(config, questions, options, console)):
                console.print(path.read_text() if path.suffix == ".md" else str(path), markup=False, soft_wrap=True)
            return 0
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
