"""Scored groups that wait for the learner: references and scores, bounded in staleness. The driver owns them, so they
outlive the workers that made them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass

import ray

from ergo_rl.actors.rollout_worker import GroupResult
from ergo_rl.episodes.types import Question, Verdict


@dataclass(frozen=True, slots=True)
class Group:
    """The scored trajectories of one question."""

    number: int
    """Position of the question in the order of questions, from 0."""
    question: Question
    """Without its image."""
    result: GroupResult
    scores: tuple[Verdict, ...]
    """One per trajectory."""
    trajectories: ray.ObjectRef
    """To a ``tuple[Trajectory, ...]``."""

    def __post_init__(self) -> None:
        if len(self.scores) != len(self.result.summaries):
            raise ValueError(f"{len(self.result.summaries)} trajectories but {len(self.scores)} scores")

    @property
    def oldest_version(self) -> int:
        return min(min(facts.policy_versions) for facts in self.result.summaries)


class TrajectoryStore:
    """Hands out groups in the order of their questions, in whatever order they were finished, so that a synchronous run
    is reproducible. Groups older than a bound are counted, and dropped unless ``keep_stale`` is set."""

    def __init__(self, keep_stale: bool = False) -> None:
        self._keep_stale = keep_stale
        self._groups: dict[int, Group] = {}
        self._skipped: set[int] = set()
        self._next = 0
        self._failure: BaseException | None = None
        self._changed = asyncio.Condition()
        self.stale = 0

    def __len__(self) -> int:
        return len(self._groups)

    @property
    def next_number(self) -> int:
        """Number of the group that is handed out next."""
        return self._next

    async def add(self, group: Group) -> None:
        async with self._changed:
            self._groups[group.number] = group
            self._changed.notify_all()

    async def skip(self, number: int) -> None:
        """Give up on the group of this number: its question cannot be used."""
        async with self._changed:
            self._skipped.add(number)
            self._changed.notify_all()

    async def fail(self, error: BaseException) -> None:
        """Raise this error in every ``take`` that would wait, now and later."""
        async with self._changed:
            self._failure = error
            self._changed.notify_all()

    async def take(self, oldest: int) -> Group | None:
        """Wait for the next group and return it. If any of its tokens was sampled before version ``oldest`` it counts
        as stale: it is dropped and None returned, so that the caller can ask for another one; or, with ``keep_stale``,
        returned for the learner to weigh down."""
        async with self._changed:
            while True:
                while self._next not in self._groups and self._next not in self._skipped:
                    if self._failure is not None:
                        raise self._failure
                    await self._changed.wait()
                group = self._groups.pop(self._next, None)
                self._skipped.discard(self._next)
                self._next += 1
                if group is None:
                    continue
                stale = group.oldest_version < oldest
                self.stale += stale
                return None if stale and not self._keep_stale else group

    def contents(self) -> tuple[tuple[Group, ...], tuple[int, ...]]:
        """Return the waiting groups and the skipped numbers, both in order."""
        return tuple(self._groups[number] for number in sorted(self._groups)), tuple(sorted(self._skipped))

    def restore(self, next_number: int, groups: Iterable[Group], skipped: Iterable[int], stale: int) -> None:
        """Fill an empty store with what ``contents``, ``next_number`` and ``stale`` returned.

        Raises ValueError for a group or a skipped number that was handed out before."""
        self._groups = {group.number: group for group in groups}
        self._skipped, self._next, self.stale = set(skipped), next_number, stale
        if past := sorted(number for number in {*self._groups, *self._skipped} if number < next_number):
            raise ValueError(f"groups {past} come before group {next_number}, which is handed out next")
