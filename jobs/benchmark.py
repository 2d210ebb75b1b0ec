"""Benchmark a policy: every mode at every visual-token budget on held-out questions (``ergo_rl.evaluate``)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from ergo_rl.actors.rollout_pool import RolloutPool
from ergo_rl.cluster.placement import Cluster
from ergo_rl.console import PlainConsole
from ergo_rl.episodes.families import family_of
from ergo_rl.jobs.benchmark_grid import Figures, Mode, Record, run_grid, summarise, write_report
from ergo_rl.jobs.config import ConfigError, TrainConfig, with_model
from ergo_rl.jobs.evaluation import HeldOut
from ergo_rl.jobs.fingerprints import of_evaluation
from ergo_rl.jobs.policy_clients import EndpointClient, PolicyClient, PoolClient, endpoint_at, family_by_name
from ergo_rl.jobs.shutdown import run_blocking
from ergo_rl.questions.prepare import prepare_embedded

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class BenchmarkResult:
    """What ``evaluate`` found."""

    records: list[Record]
    """One episode each, by mode, budget and question."""
    figures: list[Figures]
    """A dictionary of figures for each mode, budget and category (``benchmark_report.figures``)."""
    files: list[Path]
    """The report: JSON, Markdown table, plot."""


def evaluate(
    config: TrainConfig,
    *,
    model: str = "",
    modes: Sequence[Mode | str] = (Mode.DIRECT, Mode.TWO_STAGE),
    budgets: Sequence[int] = (),
    questions: int | None = None,
    hide_target: bool = False,
    url: str = "",
    served_model: str = "",
    family: str = "qwen2_5_vl",
    out: Path | str = "evaluation",
    console: PlainConsole | None = None,
) -> BenchmarkResult:
    """Evaluate a policy on the held-out questions of a recipe, greedily; also from a notebook whose event loop runs.

    model: folder or hub name, the recipe's where empty. modes: ``direct``, ``two-stage``, ``oracle``. budgets: visual
    tokens of each view, the recipe's ``episode.coarse_tokens`` where empty. questions: how many; 0 for all, None as in
    the recipe. hide_target: black out every target first. url: ask this OpenAI-compatible endpoint instead of
    starting engines; served_model and family describe the model there. out: folder of the records and the report, in
    which the same call continues after a stop.

    Raises ConfigError, DatasetError, OSError, and what starting the workers raises.

    Example::

        result = evaluate(load_config("configs/panels.yaml"), budgets=[16, 36])
        print(result.figures[0]["accuracy"])
    """
    if model:
        config = with_model(config, model)
    if questions is not None:
        config = replace(config, evaluation=replace(config.evaluation, questions=questions))
    prepare_embedded(config.embedded, console)
    held_out = HeldOut(config, hide_target).require(hide_target or Mode.ORACLE in map(Mode, modes))
    return run_blocking(
        lambda: run_benchmark(
            config, held_out, [Mode(mode) for mode in modes], budgets,
            hide_target=hide_target, url=url, served_model=served_model, family=family, out=Path(out),
            console=console or PlainConsole(quiet=True),
        )
    )  # fmt: skip


async def run_benchmark(
    config: TrainConfig,
    questions: HeldOut,
    modes: Sequence[Mode],
    budgets: Sequence[int],
    *,
    hide_target: bool,
    url: str,
    served_model: str,
    family: str,
    out: Path,
    console: PlainConsole,
) -> BenchmarkResult:
    """As ``evaluate``, inside an event loop."""
    budgets = list(budgets) or [config.episode.coarse_tokens]
    with ExitStack() as stack:
        client: PolicyClient
        how: dict[str, Any]
        if url:
            endpoint = await endpoint_at(url, served_model, config)
            client, policy = EndpointClient(config, endpoint, family_by_name(family)), endpoint.model
            how = {"family": family, "request": endpoint.extra_body}
        else:
            engine = config.rollout.engine
            client, policy = await _launch(config, budgets, stack, console), engine.model
            how = {"family": config.episode.family, "dtype": engine.dtype, "engine arguments": engine.extra}
        settings = {
            "policy": policy,
            "at": url or "engines of this job",
            "questions": config.evaluation.paths,
            **of_evaluation(config),
            **how,
            "hide_target": hide_target,
            "prompts": asdict(config.episode.prompts),
            "on_bad_box": str(config.episode.on_bad_box),
            "box_notation": str(config.episode.box_notation),
            "max_image_pixels": config.episode.max_image_pixels,
            "reply_limits": [config.rollout.sampling.coarse_max_tokens, config.rollout.sampling.fine_max_tokens],
            "oracle_margin": config.evaluation.oracle_margin,
            "number_tolerance": config.reward.number_tolerance,
            "in_flight": config.evaluation.in_flight,
        }
        try:
            with console.status("") as status:

                def progress(done: int, wanted: int) -> None:
                    status.update(f"{done} of {wanted} episodes: {', '.join(modes)} at {budgets} visual tokens")

                records, again = await run_grid(questions, client, config, modes, budgets, out, settings, progress)
            if again:
                console.print(f"{again} of {len(records)} records are those of an earlier call in {out}")
        finally:
            await client.close()
    return BenchmarkResult(records, summarise(records), write_report(out, settings, records))


async def _launch(config: TrainConfig, budgets: Sequence[int], stack: ExitStack, console: PlainConsole) -> PoolClient:
    sampling, engine = config.rollout.sampling, config.rollout.engine
    longest = 2 * max(budgets) + sampling.coarse_max_tokens + sampling.fine_max_tokens
    if longest >= engine.max_model_len:
        raise ConfigError(
            f"rollout.engine.max_model_len ({engine.max_model_len}) must be above {longest}, twice the largest "
            "budget and both reply limits, with room for the prompts' text"
        )
    family = family_of(engine.model, config.episode.family)
    cluster = stack.enter_context(Cluster.connect(config.cluster))
    rollouts = RolloutPool.launch(cluster, config.rollout, config.episode)
    with console.status("starting engines (20 to 60 s on a CPU)"):
        await rollouts.ready(config.start_deadline_s)
    return PoolClient(rollouts, family)
