"""The flow of questions: played, scored, put into the store; as many ahead of the learner as allowed."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

from actors.rollout_pool import RolloutPool
from actors.rollout_worker import Unplayable, stable_seed, without_image
from actors.trajectory_store import Group, TrajectoryStore
from episodes.questions import BadRow, OnBadRow, QuestionStream
from jobs.metrics import Metrics
from rewards.reward_pool import RewardPool

logger = logging.getLogger(__name__)

MOST_UNPLAYABLE_IN_A_ROW = 64


class Flow:
    """Plays and scores questions in the background. Synchronous and asynchronous training differ only in how
    far ahead ``allow`` lets it run."""

    def __init__(
        self,
        questions: QuestionStream,
        rollouts: RolloutPool,
        rewards: RewardPool,
        store: TrajectoryStore,
        seed: int,
        on_bad_row: OnBadRow,
    ) -> None:
        self._questions, self._rollouts, self._rewards, self._store = questions, rollouts, rewards, store
        self._seed, self._on_bad_row = seed, on_bad_row
        self._started = self._allowed = store.next_number
        self._in_flight: set[asyncio.Task[None]] = set()
        self._unplayable_in_a_row = 0
        self._slowest: dict[str, float] = {}
        self.unplayable = self.replaced = 0

    def allow(self, groups: int) -> None:
        """Let ``groups`` more questions be played."""
        self._allowed += groups
        while self._started < self._allowed:
            number, self._started = self._started, self._started + 1
            task = asyncio.create_task(self._play_and_score(number))
            self._in_flight.add(task)
            task.add_done_callback(self._in_flight.discard)

    async def take(self, count: int, oldest: int, wanted: Callable[[Group], bool], spare: int) -> list[Group]:
        """The next ``count`` groups, sampled by version ``oldest`` or later. In place of one that is not ``wanted``
        another question is played, ``spare`` times at most (DAPO's dynamic sampling, arXiv 2503.14476, section 3.2);
        after that groups are taken as they come.

        Decided in the order of questions, so what is taken does not depend on which was finished first; and at once,
        so that engines need not wait for the whole step's groups to be judged."""
        taken: list[Group] = []
        while len(taken) < count:
            (group,) = await self._store.take(1, oldest)
            if spare and not wanted(group):
                spare, self.replaced = spare - 1, self.replaced + 1
                self.allow(1)
            else:
                taken.append(group)
        return taken

    def metrics(self) -> Metrics:
        """Counts since the start of the run (what was left out, what was replaced, what was too old), and the longest
        that a group was played and scored since the last call."""
        slowest = {f"time/slowest_{what}_s": seconds for what, seconds in self._slowest.items()}
        self._slowest.clear()
        return slowest | {
            "count/bad_rows": float(self._questions.skipped.total()),
            "count/unplayable": float(self.unplayable),
            "count/rollout_restarts": float(self._rollouts.restarts),
            "count/reward_restarts": float(self._rewards.restarts),
            "count/stale_groups": float(self._store.dropped),
            "count/equal_groups_replaced": float(self.replaced),
        }

    async def stop(self) -> None:
        for task in self._in_flight:
            task.cancel()
        await asyncio.gather(*self._in_flight, return_exceptions=True)

    async def _play_and_score(self, number: int) -> None:
        try:
            question = next(self._questions)
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
        self.allow(1)


@asynccontextmanager
async def flowing(flow: Flow) -> AsyncIterator[Flow]:
    """Whatever happens inside, nothing is left playing behind it."""
    try:
        yield flow
    finally:
        await flow.stop()
