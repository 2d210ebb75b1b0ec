"""Keeps questions in flight: samples and scores them in the background, as far ahead of the learner as allowed."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Self

from ergo_rl.actors.rollout_pool import RolloutPool
from ergo_rl.actors.rollout_worker import SkippedQuestion, derive_seed, without_image
from ergo_rl.actors.trajectory_store import Group, TrajectoryStore
from ergo_rl.episodes.config import OnBadRow
from ergo_rl.episodes.types import Question, Unscored
from ergo_rl.errors import ErgoError
from ergo_rl.jobs.console_display import ConsoleDisplay
from ergo_rl.jobs.metrics import Metrics
from ergo_rl.questions.dataset import BadRow, Cursor, QuestionStream
from ergo_rl.rewards.config import RewardConfig
from ergo_rl.rewards.pool import RewardPool

logger = logging.getLogger(__name__)

MAX_UNPLAYABLE_IN_A_ROW = 64
FIRST_WAIT_S, MAX_WAIT_S = 5.0, 60.0
"""Between two attempts to score again; doubled each time."""


@dataclass(frozen=True, slots=True)
class SchedulerState:
    """State of a scheduler between two steps.

    Every number below ``next_number`` is done with; every number from there to ``started`` is in exactly one of
    ``groups``, ``skipped`` and ``in_flight``. So each question is used exactly once."""

    next_number: int = 0
    """Of the group that is handed out next."""
    started: int = 0
    """How many numbers were given out."""
    cursor: Cursor = field(default_factory=Cursor)
    """Behind the last question that was given a number."""
    in_flight: tuple[tuple[int, Cursor], ...] = ()
    """Number and cursor of each question that is being sampled or scored."""
    skipped: tuple[int, ...] = ()
    groups: tuple[Group, ...] = ()
    """Scored and not yet used."""
    unplayable: int = 0
    """This and the following: counts since the start of the run."""
    replaced: int = 0
    stale: int = 0
    bad_rows: int = 0

    def __post_init__(self) -> None:
        numbers = [*(group.number for group in self.groups), *self.skipped, *(number for number, _ in self.in_flight)]
        if sorted(numbers) != list(range(self.next_number, self.started)):
            raise ValueError(
                f"numbers {self.next_number} to {self.started - 1} should be there once each, found {sorted(numbers)}"
            )


class RolloutScheduler:
    """Samples and scores questions in the background.

    Synchronous and asynchronous training differ only in how many questions ``keep_ahead`` lets it start.

    Example::

        async with RolloutScheduler(questions, rollouts, rewards, seed, OnBadRow.SKIP) as scheduler:
            scheduler.keep_ahead(groups_per_step * (1 + max_staleness))
            groups = await scheduler.take(groups_per_step, oldest, estimator.has_signal, spare=0)
    """

    def __init__(
        self,
        questions: QuestionStream,
        rollouts: RolloutPool,
        rewards: RewardPool,
        seed: int,
        on_bad_row: OnBadRow,
        state: SchedulerState | None = None,
        keep_stale: bool = False,
    ) -> None:
        """Resume from ``state``; what was in flight then is started again by ``keep_ahead``.

        keep_stale: hand out groups that are too old instead of replacing them.

        Raises ValueError where the state does not fit ``questions``."""
        state = state or SchedulerState()
        self._questions, self._rollouts, self._rewards = questions, rollouts, rewards
        self._seed, self._on_bad_row = seed, on_bad_row
        self._store = TrajectoryStore(keep_stale)
        self._store.restore(state.next_number, state.groups, state.skipped, state.stale)
        self._started, self._resumed = state.started, list(state.in_flight)
        self._in_flight: dict[int, tuple[Cursor, asyncio.Task[None] | None]] = {
            number: (cursor, None) for number, cursor in state.in_flight
        }
        questions.restore(state.cursor)
        self._bad_rows_before = state.bad_rows - questions.skipped.total()
        self._unplayable_in_a_row = 0
        self._slowest: dict[str, float] = {}
        self.unplayable, self.replaced = state.unplayable, state.replaced

    def state(self) -> SchedulerState:
        """Return the state between two steps, when groups that were handed out are done with."""
        groups, skipped = self._store.contents()
        return SchedulerState(
            next_number=self._store.next_number,
            started=self._started,
            cursor=self._questions.cursor,
            in_flight=tuple((number, cursor) for number, (cursor, _) in sorted(self._in_flight.items())),
            skipped=skipped,
            groups=groups,
            unplayable=self.unplayable,
            replaced=self.replaced,
            stale=self._store.stale,
            bad_rows=self._bad_rows,
        )

    def keep_ahead(self, groups: int) -> None:
        """Start questions until ``groups`` of them are in flight or waiting in the store, and never more.

        So this number, not memory, bounds how far rollouts run ahead of the learner."""
        for number, cursor in self._resumed:
            self._start(number, self._reread(cursor))
        self._resumed.clear()
        self._start_more(groups - len(self._in_flight) - len(self._store))

    def _start_more(self, groups: int) -> None:
        for _ in range(groups):
            question = next(self._questions)
            number, self._started = self._started, self._started + 1
            self._in_flight[number] = (self._questions.cursor, None)
            self._start(number, question)

    def _reread(self, after: Cursor) -> Question:
        """Return the question that a cursor stands behind, and leave the stream where it was."""
        current = self._questions.cursor
        # A cursor was noted after its question was read: one position back reads the same row again.
        self._questions.restore(Cursor(after.epoch, after.position - 1))
        question = next(self._questions)
        self._questions.restore(current)
        return question

    def _start(self, number: int, question: Question) -> None:
        task = asyncio.create_task(self._sample_and_score(number, question))
        self._in_flight[number] = (self._in_flight[number][0], task)

    async def take(self, count: int, oldest: int, wanted: Callable[[Group], bool], spare: int) -> list[Group]:
        """Wait for the next ``count`` groups, sampled by policy version ``oldest`` or later.

        Each group that is not ``wanted`` is replaced by another question, at most ``spare`` times (DAPO's dynamic
        sampling, arXiv 2503.14476, section 3.2); after that groups are taken as they come. A group that is too old is
        replaced, too.

        Groups are judged in the order of their questions, so what is taken does not depend on which was finished
        first; and one by one, so that a replacement starts without waiting for the rest of the step."""
        taken: list[Group] = []
        while len(taken) < count:
            group = await self._store.take(oldest)
            if group is None:
                self._start_more(1)
            elif spare and not wanted(group):
                spare, self.replaced = spare - 1, self.replaced + 1
                self._start_more(1)
            else:
                taken.append(group)
        return taken

    def metrics(self) -> Metrics:
        """Return counts since the start of the run, and the longest times to sample and to score a group since the last
        call."""
        slowest = {f"time/slowest_{what}_s": seconds for what, seconds in self._slowest.items()}
        self._slowest.clear()
        return slowest | {
            "count/bad_rows": float(self._bad_rows),
            "count/unplayable": float(self.unplayable),
            "count/rollout_workers": float(len(self._rollouts)),
            "count/reward_workers": float(len(self._rewards)),
            "count/rollout_restarts": float(self._rollouts.restarts),
            "count/reward_restarts": float(self._rewards.restarts),
            "count/stale_groups": float(self._store.stale),
            "count/equal_groups_replaced": float(self.replaced),
        }

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def stop(self) -> None:
        """Cancel everything in flight."""
        tasks = [task for _, task in self._in_flight.values() if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def _bad_rows(self) -> int:
        return self._bad_rows_before + self._questions.skipped.total()

    async def _sample_and_score(self, number: int, question: Question) -> None:
        try:
            with self._timed("play"):
                rollout = await self._rollouts.rollout(question, derive_seed(self._seed, number))
            if isinstance(rollout, SkippedQuestion):
                await self._set_aside(number, rollout)
                return
            self._unplayable_in_a_row = 0
            seen = without_image(question)
            with self._timed("score"):
                scores = await self._rewards.score(seen, rollout.trajectories)
            await self._store.add(Group(number, seen, rollout.result, scores, rollout.trajectories))
            del self._in_flight[number]
        except Exception as error:  # raised by `take`; left in this task it would be lost
            await self._store.fail(error)

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self._slowest[what] = max(self._slowest.get(what, 0.0), time.monotonic() - started)

    async def _set_aside(self, number: int, question: SkippedQuestion) -> None:
        """Count a question that cannot be played and start another one in its place."""
        if self._on_bad_row is OnBadRow.ERROR:
            raise BadRow(f"question {question.question_id!r} cannot be played: {question.reason}")
        logger.warning("skipped question %r: %s", question.question_id, question.reason)
        self.unplayable += 1
        self._unplayable_in_a_row += 1
        if self._unplayable_in_a_row >= MAX_UNPLAYABLE_IN_A_ROW:
            raise BadRow(
                f"{self._unplayable_in_a_row} questions in a row could not be played; "
                f"the last one, {question.question_id!r}: {question.reason}"
            )
        await self._store.skip(number)
        del self._in_flight[number]
        self._start_more(1)


# --- when the verifier does not answer ----------------------------------------------------------------------------


class RewardsUnavailable(ErgoError, RuntimeError):
    """More of a step stayed unscored than is tolerated, for longer than is allowed; the message says why."""


def unscored_share(groups: Sequence[Group]) -> float:
    """Return the share of trajectories without a score that may get one later."""
    scores = [score for group in groups for score in group.scores]
    return sum(isinstance(score, Unscored) and score.may_pass for score in scores) / max(1, len(scores))


def why_unscored(groups: Sequence[Group]) -> str:
    """Return the most frequent reason; of an endpoint its address and error."""
    unscored = [score for group in groups for score in group.scores if isinstance(score, Unscored)]
    reasons = Counter(score.reason for score in unscored if score.may_pass)
    return reasons.most_common(1)[0][0]


async def retry_unscored(
    groups: Sequence[Group], rewards: RewardPool, config: RewardConfig, console: ConsoleDisplay
) -> list[Group]:
    """Score the groups of a step again while a larger share of them than ``unscored_tolerance`` has no score.

    The run waits for the verifier instead of learning from what little was scored; the wait is shown. Raises
    RewardsUnavailable after ``outage_deadline_s``."""
    since, wait_s, message = time.monotonic(), FIRST_WAIT_S, ""
    groups = list(groups)
    while (share := unscored_share(groups)) > config.unscored_tolerance:
        reason = why_unscored(groups)
        if (waited := time.monotonic() - since) >= config.outage_deadline_s:
            raise RewardsUnavailable(
                f"{share:.0%} of the step is unscored after {waited:.0f} s (reward.outage_deadline_s), more than "
                f"reward.unscored_tolerance = {config.unscored_tolerance:.0%}: {reason}"
            )
        message = f"paused: {share:.0%} of the step could not be scored: {reason}"
        logger.warning(message)
        console.warn({"rewards": message})
        await asyncio.sleep(min(wait_s, max(0.0, config.outage_deadline_s - waited)))
        wait_s = min(wait_s * 2, MAX_WAIT_S)
        groups = list(await asyncio.gather(*(_score_again(group, rewards) for group in groups)))
    if message:
        waited = time.monotonic() - since
        logger.warning("the verifier answers again after %.0f s", waited)
        console.warn({})
        console.say(f"continuing: the verifier answers again after {waited:.0f} s")
    return groups


async def _score_again(group: Group, rewards: RewardPool) -> Group:
    if not any(isinstance(score, Unscored) and score.may_pass for score in group.scores):
        return group
    return replace(group, scores=await rewards.score(group.question, group.trajectories))
