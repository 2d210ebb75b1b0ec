"""How well a policy looks and reads: held-out questions, greedy decoding, every figure with its interval."""

from __future__ import annotations

import asyncio
import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from ergo_rl.actors.config import SamplingConfig
from ergo_rl.actors.rollout_pool import RolloutPool
from ergo_rl.actors.rollout_worker import Unplayable, stable_seed, without_image
from ergo_rl.actors.trajectory_store import Group
from ergo_rl.episodes import images
from ergo_rl.episodes.questions import DatasetError
from ergo_rl.episodes.types import Box, Question, Score
from ergo_rl.jobs.config import EvaluationConfig, MetricsConfig
from ergo_rl.jobs.metrics import Metrics, covered_and_paid, reward_metrics, rollout_metrics
from ergo_rl.rewards.reward_pool import RewardPool

Z = 1.959964
"""Of a 95 % interval."""


class BoxSource(StrEnum):
    """Who says where to look: the policy, or a baseline that puts a box into its mouth."""

    POLICY = "policy"
    WHOLE = "whole"
    RANDOM = "random"
    ORACLE = "oracle"


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Every question was played once; what could not be played is counted and named, never left out in silence."""

    groups: tuple[Group, ...]
    unplayable: tuple[Unplayable, ...]

    def metrics(self, config: MetricsConfig) -> Metrics:
        """As ``eval/...``; shares are of the questions that were played."""
        found = rollout_metrics(self.groups, config) | reward_metrics(self.groups) if self.groups else {}
        kept = {f"eval/{name.partition('/')[2]}": value for name, value in found.items() if "equal_groups" not in name}
        return kept | {"eval/unplayable": float(len(self.unplayable))}

    def intervals(self, config: MetricsConfig) -> dict[str, tuple[float, float]]:
        """95 % intervals of the figures that are shares (Wilson's, each of its own number of cases) and of the mean
        area ratio (normal), by their names in ``metrics``."""
        metrics = self.metrics(config)
        facts = [facts for group in self.groups for facts in group.played.facts]
        scored = sum(isinstance(score, Score) for group in self.groups for score in group.scores)
        pairs = covered_and_paid(self.groups)
        cases = dict.fromkeys(("full_image_rate", "tiny_box_rate", "bad_box_rate", "answered_rate"), len(facts))
        cases |= dict.fromkeys(("accuracy", "region", "box", "format"), scored)
        cases["coverage"] = sum(len(group.played.facts) for group in self.groups if group.question.boxes)
        cases["region_precision"] = sum(paid for _, paid in pairs)
        cases["region_recall"] = sum(covered for covered, _ in pairs)
        named = {f"eval/{name}": count for name, count in cases.items()}
        found = {name: wilson(metrics[name] * count, count) for name, count in named.items() if name in metrics}
        ratios = [one.area_ratio for one in facts if one.area_ratio is not None]
        if len(ratios) > 1:
            mean, half = statistics.mean(ratios), Z * statistics.stdev(ratios) / math.sqrt(len(ratios))
            found["eval/area_ratio"] = (mean - half, mean + half)
        return found


async def evaluate(
    questions: Sequence[Question],
    rollouts: RolloutPool,
    rewards: RewardPool,
    config: EvaluationConfig,
    source: BoxSource = BoxSource.POLICY,
) -> Evaluation:
    """Play every question once, greedily, and score it. Raises DatasetError where the oracle has no box to show."""
    places = asyncio.Semaphore(config.in_flight)
    greedy: SamplingConfig = replace(rollouts.config.sampling, temperature=0.0)

    async def one(number: int, question: Question) -> Group | Unplayable:
        async with places:
            box = await asyncio.to_thread(choose_box, question, source, config)
            rollout = await rollouts.play(question, seed=0, samples=1, sampling=greedy, box=box)
            if isinstance(rollout, Unplayable):
                return rollout
            seen = without_image(question)
            scores = await rewards.score(seen, rollout.trajectories)
            return Group(number, seen, rollout.played, scores, rollout.trajectories)

    answers = await asyncio.gather(*(one(number, question) for number, question in enumerate(questions)))
    return Evaluation(
        tuple(answer for answer in answers if isinstance(answer, Group)),
        tuple(answer for answer in answers if isinstance(answer, Unplayable)),
    )


def choose_box(question: Question, source: BoxSource, config: EvaluationConfig) -> Box | None:
    """The box of a baseline in original pixels; None for the policy's own."""
    if source is BoxSource.POLICY:
        return None
    width, height = images.size(question.image)
    if source is BoxSource.WHOLE:
        return Box(0, 0, width, height)
    if source is BoxSource.RANDOM:
        draw = random.Random(stable_seed("random box", question.id))
        side = math.sqrt(config.random_area)
        w, h = max(1, round(width * side)), max(1, round(height * side))
        x, y = draw.randint(0, width - w), draw.randint(0, height - h)
        return Box(x, y, x + w, y + h)
    if not question.boxes:
        raise DatasetError(f"question {question.id!r} has no boxes; an oracle needs them")
    return images.around(question.boxes, config.oracle_margin, width, height)


def wilson(hits: float, count: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927)."""
    if count == 0:
        return 0.0, 1.0
    share = hits / count
    centre = (share + Z * Z / (2 * count)) / (1 + Z * Z / count)
    half = Z / (1 + Z * Z / count) * math.sqrt(share * (1 - share) / count + Z * Z / (4 * count * count))
    return max(0.0, centre - half), min(1.0, centre + half)
