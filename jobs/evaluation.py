"""Evaluate a policy on held-out questions: greedy decoding, baselines for its boxes, an interval for every figure."""

from __future__ import annotations

import asyncio
import math
import random
import statistics
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any, TypeVar

from ergo_rl.actors.config import SamplingConfig
from ergo_rl.actors.rollout_pool import RolloutPool
from ergo_rl.actors.rollout_worker import SkippedQuestion, derive_seed, without_image
from ergo_rl.actors.trajectory_store import Group
from ergo_rl.cluster.placement import Cluster
from ergo_rl.cluster.worker_pool import gather_or_cancel
from ergo_rl.episodes import images
from ergo_rl.episodes.families import family_of
from ergo_rl.episodes.types import Box, Question, Score, Unscored
from ergo_rl.jobs.config import EvaluationConfig, MetricsConfig
from ergo_rl.jobs.metrics import Metrics, covered_and_paid, reward_metrics, rollout_metrics
from ergo_rl.questions.dataset import BadRow, DatasetError, QuestionStream
from ergo_rl.rewards.config import Backend
from ergo_rl.rewards.endpoint import api_key
from ergo_rl.rewards.matching import matches
from ergo_rl.rewards.pool import RewardPool
from ergo_rl.rewards.terms import TermSource

if TYPE_CHECKING:
    from ergo_rl.console import PlainConsole
    from ergo_rl.jobs.config import TrainConfig
    from ergo_rl.jobs.policy_clients import EndpointRollouts

T = TypeVar("T")
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
    """One greedy episode of every question. Every row of the held-out files is here once: right, wrong or failed."""

    groups: tuple[Group, ...]
    """Questions that were played, in their order; each group has one trajectory."""
    failed: tuple[SkippedQuestion, ...]
    """Rows that are no question or could not be played, with the reason; they count as wrong."""
    right: tuple[bool, ...]
    """Whether the answer of each group is the ground truth, also where the reward model gave no score."""

    def metrics(self, config: MetricsConfig) -> Metrics:
        """The figures as ``eval/...``. Accuracy is a share of all rows; the others are of the questions that were
        played, and rewards of those that were scored."""
        figures = rollout_metrics(self.groups, config) | reward_metrics(self.groups) if self.groups else {}
        kept = {
            f"eval/{name.partition('/')[2]}": value for name, value in figures.items() if "equal_groups" not in name
        }
        rows = len(self.groups) + len(self.failed)
        if rows:
            kept["eval/accuracy"] = sum(self.right) / rows
        return kept | {"eval/questions": float(rows), "eval/failed": float(len(self.failed))}

    def intervals(self, config: MetricsConfig) -> dict[str, tuple[float, float]]:
        """95 % intervals by the names of ``metrics``: Wilson's for shares, each with its own number of counts, the
        normal one for the mean area ratio."""
        metrics = self.metrics(config)
        facts = [facts for group in self.groups for facts in group.result.summaries]
        scored = sum(isinstance(score, Score) for group in self.groups for score in group.scores)
        pairs = covered_and_paid(self.groups)
        counts = dict.fromkeys(("full_image_rate", "tiny_box_rate", "bad_box_rate", "answered_rate"), len(facts))
        counts |= dict.fromkeys(("region", "box", "format"), scored) | {"accuracy": int(metrics["eval/questions"])}
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

    def costs(self) -> Metrics:
        """What a question that was played costs: mean visual tokens and looks, and its time from the first request to
        the last reply, with ``evaluation.in_flight`` questions in flight."""
        if not self.groups:
            return {}
        facts = [group.result.summaries[0] for group in self.groups]
        return {
            "eval/visual_tokens": statistics.mean(float(fact.visual_tokens) for fact in facts),
            "eval/looks": statistics.mean(float(fact.crop is not None) for fact in facts),
            "eval/seconds_median": statistics.median(group.result.seconds for group in self.groups),
        }


async def evaluate(
    questions: Iterable[Question | SkippedQuestion],
    rollouts: RolloutPool | EndpointRollouts,
    rewards: RewardPool | None,
    config: EvaluationConfig,
    tolerance: float,
    source: BoxSource = BoxSource.POLICY,
) -> Evaluation:
    """Run one greedy episode of every question and score it; at most ``in_flight`` questions are read and held at once.
    Without ``rewards`` nothing is scored.

    tolerance: of numbers in answers (``reward.number_tolerance``)."""
    greedy: SamplingConfig = replace(rollouts.config.sampling, temperature=0.0)
    found: dict[int, Group | SkippedQuestion] = {}

    async def run(number: int, question: Question | SkippedQuestion) -> Group | SkippedQuestion:
        if isinstance(question, SkippedQuestion):
            return question
        try:
            box = await asyncio.to_thread(choose_box, question, source, config)
        except (DatasetError, images.UnreadableImage) as error:
            return SkippedQuestion(question.id, f"{type(error).__name__}: {error}")
        rollout = await rollouts.rollout(question, seed=0, samples=1, sampling=greedy, box=box)
        if isinstance(rollout, SkippedQuestion):
            return rollout
        seen = without_image(question)
        scores = (Unscored("no verifier"),) if rewards is None else await rewards.score(seen, rollout.trajectories)
        return Group(number, seen, rollout.result, scores, rollout.trajectories)

    async def record(number: int, row: Question | SkippedQuestion) -> None:
        found[number] = await run(number, row)

    await for_each(questions, config.in_flight, record)
    answers = [found[number] for number in sorted(found)]
    groups = tuple(answer for answer in answers if isinstance(answer, Group))
    return Evaluation(
        groups,
        tuple(answer for answer in answers if isinstance(answer, SkippedQuestion)),
        tuple(is_right(group, tolerance) for group in groups),
    )


async def for_each(rows: Iterable[T], at_once: int, work: Callable[[int, T], Awaitable[None]]) -> None:
    """Call ``work(number, row)`` for every row, for at most ``at_once`` at a time; a row is read (in a thread) when its
    turn has come. The first error cancels the others and is raised."""
    numbered, reading, none = enumerate(rows), asyncio.Lock(), object()

    async def one_after_another() -> None:
        while True:
            async with reading:
                entry: Any = await asyncio.to_thread(next, numbered, none)
            if entry is none:
                return
            await work(*entry)

    await gather_or_cancel(*(one_after_another() for _ in range(at_once)))


def is_right(group: Group, tolerance: float) -> bool:
    """Whether the policy's answer is the ground truth: of its reply alone, whatever the reward model did."""
    answer = group.result.summaries[0].answer
    return answer is not None and matches(answer, group.question, tolerance)


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


def ends(intervals: Mapping[str, tuple[float, float]]) -> Metrics:
    """Intervals as ``NAME_low`` and ``NAME_high``."""
    return {f"{name}_{end}": value for name, (low, high) in intervals.items() for end, value in
            (("low", low), ("high", high))}  # fmt: skip


class HeldOut:
    """The rows of an evaluation, in the order of their files, read anew at each iteration.

    A row that is no question comes as a ``SkippedQuestion``. An id that several rows have gets their file and row in
    front, so that no question is taken for another."""

    def __init__(self, config: TrainConfig, hide_target: bool = False) -> None:
        """hide_target: black out every target, so that only the context still tells where it is.

        Raises DatasetError."""
        self._hide_target = hide_target
        self._stream: QuestionStream | None = None
        self.names: tuple[str, ...] = ()
        if config.evaluation.paths:
            self._stream = QuestionStream(replace(config.questions, paths=config.evaluation.paths))
            self.names = self._stream.names[: config.evaluation.questions or None]

    def __len__(self) -> int:
        return len(self.names)

    def require(self, boxes: bool = False) -> HeldOut:
        """Return self. Raises DatasetError where there are no rows or, with ``boxes``, none that names its target."""
        if self._stream is None:
            raise DatasetError("evaluation.paths is empty; name at least one Parquet file of held-out questions")
        if boxes and not self._stream.has_boxes():
            raise DatasetError("no held-out question says where its target is (column boxes); leave oracle and "
                               "--hide-target out")  # fmt: skip
        return self

    def __iter__(self) -> Iterator[Question | SkippedQuestion]:
        rows = self._stream.rows() if self._stream else iter(())
        for name, row in zip(self.names, rows, strict=False):
            yield SkippedQuestion(name, str(row)) if isinstance(row, BadRow) else self._shown(row)

    def _shown(self, question: Question) -> Question | SkippedQuestion:
        try:
            return hide_targets(question) if self._hide_target else question
        except (BadRow, images.UnreadableImage) as error:
            return SkippedQuestion(question.id, str(error))


def hide_targets(question: Question) -> Question:
    """The same question with its targets blacked out. Raises BadRow where it does not say where they are, and
    UnreadableImage."""
    if not question.boxes:
        raise BadRow(f"question {question.id!r} has no boxes; there is no target to hide")
    return replace(question, image=images.mask_boxes(question.image, question.boxes))


def launch_workers(
    cluster: Cluster, config: TrainConfig, reward_terms: Mapping[str, TermSource] | None = None
) -> tuple[RolloutPool, RewardPool]:
    """Start rollout and reward workers in the background.

    Models are looked up here first, so that a missing one is reported at once (OSError, UnknownFamily) and not by a
    worker a minute later; so is an API key that is not set (ValueError)."""
    family_of(config.rollout.engine.model, config.episode.family)
    if config.reward.verifier.backend is Backend.ENGINE:
        family_of(config.reward.verifier.engine.model, config.reward.verifier.family)
    elif (key := config.reward.verifier.endpoint.api_key_env) and config.cluster.address is None:
        api_key(key)  # on a cluster the nodes have it, and this machine need not
    rollouts = RolloutPool.launch(cluster, config.rollout, config.episode)
    return rollouts, RewardPool.launch(cluster, config.reward, reward_terms)


async def compare_boxes(
    config: TrainConfig, questions: HeldOut, sources: Sequence[BoxSource], console: PlainConsole
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
                evaluation = await evaluate(
                    questions, rollouts, rewards, config.evaluation, config.reward.number_tolerance, source
                )
            for failed in evaluation.failed:
                console.say(f"failed: {failed.question_id}: {failed.reason}")
            bounds = ends(evaluation.intervals(config.metrics))
            results[source] = evaluation.metrics(config.metrics) | evaluation.costs() | bounds
    return results
