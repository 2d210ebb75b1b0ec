"""The flow of questions: played, scored, put into the store; as many ahead of the learner as told."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field

from ergo_rl.actors.rollout_pool import RolloutPool
from ergo_rl.actors.rollout_worker import Unplayable, stable_seed, without_image
from ergo_rl.actors.trajectory_store import Group, TrajectoryStore
from ergo_rl.episodes.config import OnBadRow
from ergo_rl.episodes.questions import BadRow, Cursor, QuestionStream
from ergo_rl.episodes.types import Question
from ergo_rl.jobs.metrics import Metrics
from ergo_rl.rewards.reward_pool import RewardPool

logger = logging.getLogger(__name__)

MOST_UNPLAYABLE_IN_A_ROW = 64


@dataclass(frozen=True, slots=True)
class FlowState:
    """Where a flow stands between two steps: every number below ``next_number`` is done with, every number from there
    to ``started`` is in ``groups``, in ``skipped`` or in ``in_flight``. So each question is used exactly once.

    next_number: of the group that is handed out next; started: how many numbers were given out; cursor: of the question
    that comes after them; in_flight: number and cursor of each question that is being played or scored; unplayable,
    replaced, stale, bad_rows: counts since the start of the run."""

    next_number: int = 0
    started: int = 0
    cursor: Cursor = field(default_factory=Cursor)
    in_flight: tuple[tuple[int, Cursor], ...] = ()
    skipped: tuple[int, ...] = ()
    groups: tuple[Group, ...] = ()
    unplayable: int = 0
    replaced: int = 0
    stale: int = 0
    bad_rows: int = 0

    def __post_init__(self) -> None:
        numbers = [*(group.number for group in self.groups), *self.skipped, *(number for number, _ in self.in_flight)]
        if sorted(numbers) != list(range(self.next_number, self.started)):
            raise ValueError(
                f"numbers {self.next_number} to {self.started - 1} should be there once each, found {sorted(numbers)}"
            )


class Flow:
    """Plays and scores questions in the background. Synchronous and asynchronous training differ only in how
    many questions ``keep_ahead`` lets it play."""

    def __init__(
        self,
        questions: QuestionStream,
        rollouts: RolloutPool,
        rewards: RewardPool,
        seed: int,
        on_bad_row: OnBadRow,
        state: FlowState | None = None,
        keep_stale: bool = False,
    ) -> None:
        """Goes on from ``state``; what was in flight then is asked for again by ``keep_ahead``. ``keep_stale``: groups
        that are too old are handed out, too.

        Raises ValueError where the state does not fit ``questions``."""
        state = state or FlowState()
        self._questions, self._rollouts, self._rewards = questions, rollouts, rewards
        self._seed, self._on_bad_row = seed, on_bad_row
        self._store = TrajectoryStore(keep_stale)
        self._store.restore(state.next_number, state.groups, state.skipped, state.stale)
        self._started, self._again = state.started, list(state.in_flight)
        self._in_flight: dict[int, tuple[Cursor, asyncio.Task[None] | None]] = {
            number: (cursor, None) for number, cursor in state.in_flight
        }
        questions.restore(state.cursor)
        self._bad_rows_before = state.bad_rows - questions.skipped.total()
        self._unplayable_in_a_row = 0
        self._slowest: dict[str, float] = {}
        self.unplayable, self.replaced = state.unplayable, state.replaced

    def state(self) -> FlowState:
        """Between two steps: groups that were handed out are done with."""
        groups, skipped = self._store.contents()
        return FlowState(
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
        """See to it that ``groups`` questions are played, scored or waiting in the store: as many as the learner may
        be behind, and never more, so what is played ahead is bounded by this number and not by memory."""
        for number, cursor in self._again:
            self._ask(number, self._reread(cursor))
        self._again.clear()
        self._more(groups - len(self._in_flight) - len(self._store))

    def _more(self, groups: int) -> None:
        """Begin ``groups`` more questions."""
        for _ in range(groups):
            question = next(self._questions)
            number, self._started = self._started, self._started + 1
            self._in_flight[number] = (self._questions.cursor, None)
            self._ask(number, question)

    def _reread(self, behind: Cursor) -> Question:
        """The question that a cursor stands behind; the stream goes on where it was."""
        onward = self._questions.cursor
        self._questions.restore(Cursor(behind.epoch, behind.position - 1))
        question = next(self._questions)
        self._questions.restore(onward)
        return question

    def _ask(self, number: int, question: Question) -> None:
        task = asyncio.create_task(self._play_and_score(number, question))
        self._in_flight[number] = (self._in_flight[number][0], task)

    async def take(self, count: int, oldest: int, wanted: Callable[[Group], bool], spare: int) -> list[Group]:
        """The next ``count`` groups, sampled by version ``oldest`` or later. In place of one that is not ``wanted``
        another question is played, ``spare`` times at most (DAPO's dynamic sampling, arXiv 2503.14476, section 3.2);
        after that groups are taken as they come. Another one is played for each that is too old, too.

        Decided in the order of questions, so what is taken does not depend on which was finished first; and at once,
        so that engines need not wait for the whole step's groups to be judged."""
        taken: list[Group] = []
        while len(taken) < count:
            group = await self._store.take(oldest)
            if group is None:
                self._more(1)
            elif spare and not wanted(group):
                spare, self.replaced = spare - 1, self.replaced + 1
                self._more(1)
            else:
                taken.append(group)
        return taken

    def metrics(self) -> Metrics:
        """Counts since the start of the run (what was left out, what was replaced, what was too old), and the longest
        that a group was played and scored since the last call."""
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

    async def stop(self) -> None:
        tasks = [task for _, task in self._in_flight.values() if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def _bad_rows(self) -> int:
        return self._bad_rows_before + self._questions.skipped.total()

    async def _play_and_score(self, number: int, question: Question) -> None:
        try:
            with self._timed("play"):
                rollout = await self._rollouts.play(question, stable_seed(self._seed, number))
            if isinstance(rollout, Unplayable):
                await self._set_aside(number, rollout)
                return
            self._unplayable_in_a_row = 0
            seen = without_image(question)
            with self._timed("score"):
                scores = await self._rewards.score(seen, rollout.trajectories)
            await self._store.add(Group(number, seen, rollout.played, scores, rollout.trajectories))
            del self._in_flight[number]
        except Exception as error:  # to whoever waits at the store: a task's error would be lost here
            await self._store.fail(error)

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self._slowest[what] = max(self._slowest.get(what, 0.0), time.monotonic() - started)

    async def _set_aside(self, number: int, question: Unplayable) -> None:
        """Count a question that cannot be played and let another one take its place."""
        if self._on_bad_row is OnBadRow.ERROR:
            raise BadRow(f"question {question.question_id!r} cannot be played: {question.reason}")
        logger.warning("skipped question %r: %s", question.question_id, question.reason)
        self.unplayable += 1
        self._unplayable_in_a_row += 1
        if self._unplayable_in_a_row >= MOST_UNPLAYABLE_IN_A_ROW:
            raise BadRow(
                f"{self._unplayable_in_a_row} questions in a row could not be played; "
                f"the last one, {question.question_id!r}: {question.reason}"
            )
        await self._store.skip(number)
        del self._in_flight[number]
        self._more(1)


@asynccontextmanager
async def flowing(flow: Flow) -> AsyncIterator[Flow]:
    """Whatever happens inside, nothing is left playing behind it."""
    try:
        yield flow
    finally:
        await flow.stop()
