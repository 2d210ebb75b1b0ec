"""Evaluate a policy on held-out questions: greedy decoding, baselines for its boxes, an interval for every figure."""

from __future__ import annotations

import asyncio
import math
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import islice
from typing import TYPE_CHECKING

from ergo_rl.actors.config import SamplingConfig
from ergo_rl.actors.rollout_pool import RolloutPool
from ergo_rl.actors.rollout_worker import SkippedQuestion, derive_seed, without_image
from ergo_rl.actors.trajectory_store import Group
from ergo_rl.cluster.placement import Cluster
from ergo_rl.cluster.worker_pool import gather_or_cancel
from ergo_rl.episodes import images
from ergo_rl.episodes.families import family_of
from ergo_rl.episodes.types import Box, Question, Score
from ergo_rl.jobs.config import EvaluationConfig, MetricsConfig
from ergo_rl.jobs.metrics import Metrics, covered_and_paid, reward_metrics, rollout_metrics
from ergo_rl.questions.dataset import DatasetError, QuestionStream
from ergo_rl.rewards.config import Backend
from ergo_rl.rewards.pool import RewardPool
from ergo_rl.rewards.terms import TermSource

if TYPE_CHECKING:
    from rich.console import Console

    from ergo_rl.jobs.config import TrainConfig

Z = 1.959964
"""Quantile of the normal distribution for a 95 % interval."""


class BoxSource(StrEnum):
    """Whose box is read in turn 2: the policy's, or that of a baseline which replaces it."""

    POLICY = "policy"
    WHOLE = "whole"
    RANDOM = "random"
    ORACLE = "oracle"


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One greedy episode of every question."""

    groups: tuple[Group, ...]
    """Questions that were answered, in their order; each group has one trajectory."""
    unplayable: tuple[SkippedQuestion, ...]
    """Questions that were skipped, with the reason; the figures count them."""

    def metrics(self, config: MetricsConfig) -> Metrics:
        """The figures as ``eval/...``; shares are of the questions that were not skipped."""
        figures = rollout_metrics(self.groups, config) | reward_metrics(self.groups) if self.groups else {}
        kept = {
            f"eval/{name.partition('/')[2]}": value for name, value in figures.items() if "equal_groups" not in name
        }
        return kept | {"eval/unplayable": float(len(self.unplayable))}

    def intervals(self, config: MetricsConfig) -> dict[str, tuple[float, float]]:
        """95 % intervals by the names of ``metrics``: Wilson's for shares, each with its own number of counts, the
        normal one for the mean area ratio."""
        metrics = self.metrics(config)
        facts = [facts for group in self.groups for facts in group.result.summaries]
        scored = sum(isinstance(score, Score) for group in self.groups for score in group.scores)
        pairs = covered_and_paid(self.groups)
        counts = dict.fromkeys(("full_image_rate", "tiny_box_rate", "bad_box_rate", "answered_rate"), len(facts))
        counts |= dict.fromkeys(("accuracy", "region", "box", "format"), scored)
        counts["coverage"] = sum(len(group.result.summaries) for group in self.groups if group.question.boxes)
        counts["region_precision"] = sum(paid for _, paid in pairs)
        counts["region_recall"] = sum(covered for covered, _ in pairs)
        named = {f"eval/{name}": count for name, count in counts.items()}
        bounds = {name: wilson(metrics[name] * count, count) for name, count in named.items() if name in metrics}
        ratios = [fact.area_ratio for fact in facts if fact.area_ratio is not None]
        if len(ratios) > 1:
            mean, half = statistics.mean(ratios), Z * statistics.stdev(ratios) / math.sqrt(len(ratios))
            bounds["eval/area_ratio"] = (mean - half, mean + half)
        return bounds


async def evaluate(
    questions: Sequence[Question],
    rollouts: RolloutPool,
    rewards: RewardPool,
    config: EvaluationConfig,
    source: BoxSource = BoxSource.POLICY,
) -> Evaluation:
    """Run one greedy episode of every question and score it. Raises DatasetError where an oracle box is not known."""
    slots = asyncio.Semaphore(config.in_flight)
    greedy: SamplingConfig = replace(rollouts.config.sampling, temperature=0.0)

    async def run(number: int, question: Question) -> Group | SkippedQuestion:
        async with slots:
            box = await asyncio.to_thread(choose_box, question, source, config)
            rollout = await rollouts.rollout(question, seed=0, samples=1, sampling=greedy, box=box)
            if isinstance(rollout, SkippedQuestion):
                return rollout
            seen = without_image(question)
            scores = await rewards.score(seen, rollout.trajectories)
            return Group(number, seen, rollout.result, scores, rollout.trajectories)

    answers = await asyncio.gather(*(run(number, question) for number, question in enumerate(questions)))
    return Evaluation(
        tuple(answer for answer in answers if isinstance(answer, Group)),
        tuple(answer for answer in answers if isinstance(answer, SkippedQuestion)),
    )


def choose_box(question: Question, source: BoxSource, config: EvaluationConfig) -> Box | None:
    """The box of a baseline in pixels of the original; None for the policy's own. Raises DatasetError."""
    if source is BoxSource.POLICY:
        return None
    width, height = images.size(question.image)
    if source is BoxSource.WHOLE:
        return Box(0, 0, width, height)
    if source is BoxSource.RANDOM:
        draw = random.Random(derive_seed("random box", question.id))
        side = math.sqrt(config.random_area)
        w, h = max(1, round(width * side)), max(1, round(height * side))
        x, y = draw.randint(0, width - w), draw.randint(0, height - h)
        return Box(x, y, x + w, y + h)
    if not question.boxes:
        raise DatasetError(f"question {question.id!r} has no boxes; an oracle needs them")
    return images.expand_boxes(question.boxes, config.oracle_margin, width, height)


def wilson(hits: float, count: int) -> tuple[float, float]:
    """95 % interval of the share ``hits / count`` (Wilson 1927)."""
    if count == 0:
        return 0.0, 1.0
    share = hits / count
    centre = (share + Z * Z / (2 * count)) / (1 + Z * Z / count)
    half = Z / (1 + Z * Z / count) * math.sqrt(share * (1 - share) / count + Z * Z / (4 * count * count))
    return max(0.0, centre - half), min(1.0, centre + half)


def heldout(config: TrainConfig) -> list[Question]:
    """The questions of an evaluation, in the order of their files; none where no files are named.

    Raises DatasetError."""
    evaluation = config.evaluation
    if not evaluation.paths:
        return []
    stream = QuestionStream(replace(config.questions, paths=evaluation.paths, shuffle=False))
    return list(islice(stream, min(evaluation.questions or len(stream), len(stream))))


def occluded(questions: Sequence[Question]) -> list[Question]:
    """The same questions with the targets blacked out: only the context still tells where they are.

    Raises DatasetError where a question does not say where its target is."""
    for question in questions:
        if not question.boxes:
            raise DatasetError(f"question {question.id!r} has no boxes; there is no target to hide")
    return [replace(question, image=images.mask_boxes(question.image, question.boxes)) for question in questions]


def launch_workers(
    cluster: Cluster, config: TrainConfig, reward_terms: Mapping[str, TermSource] | None = None
) -> tuple[RolloutPool, RewardPool]:
    """Start rollout and reward workers in the background.

    Models are looked up here first, so that a missing one is reported at once (OSError, UnknownFamily) and not by a
    worker a minute later."""
    family_of(config.rollout.engine.model, config.episode.family)
    if config.reward.verifier.backend is Backend.ENGINE:
        family_of(config.reward.verifier.engine.model, config.reward.verifier.family)
    rollouts = RolloutPool.launch(cluster, config.rollout, config.episode)
    return rollouts, RewardPool.launch(cluster, config.reward, reward_terms)


async def compare_boxes(
    config: TrainConfig, questions: Sequence[Question], sources: Sequence[BoxSource], console: Console
) -> dict[str, Metrics]:
    """Evaluate the same questions on the same engines with the boxes of each source.

    Returns the metrics by source; ``NAME_low`` and ``NAME_high`` are the ends of an interval."""
    results: dict[str, Metrics] = {}
    with Cluster.connect(config.cluster) as cluster:
        with console.status("starting engines (20 to 60 s on a CPU)"):
            rollouts, rewards = launch_workers(cluster, config)
            await gather_or_cancel(rollouts.ready(config.start_deadline_s), rewards.ready(config.start_deadline_s))
        for source in sources:
            with console.status(f"{len(questions)} questions, boxes from: {source}"):
                evaluation = await evaluate(questions, rollouts, rewards, config.evaluation, source)
            for skipped in evaluation.unplayable:
                console.print(f"could not play {skipped.question_id!r}: {skipped.reason}", highlight=False)
            bounds = evaluation.intervals(config.metrics)
            lows = {f"{name}_low": low for name, (low, _) in bounds.items()}
            highs = {f"{name}_high": high for name, (_, high) in bounds.items()}
            results[source] = evaluation.metrics(config.metrics) | lows | highs
    return results
