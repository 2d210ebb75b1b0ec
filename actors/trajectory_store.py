"""Scored groups waiting for the learner: references and scores, bounded in staleness. The driver owns them,
so they outlive the workers that played them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass

import ray

from ergo_rl.actors.rollout_worker import Played
from ergo_rl.episodes.types import Question, Verdict


@dataclass(frozen=True, slots=True)
class Group:
    """The G trajectories of one question, scored. ``number``: its place in the order of questions, from 0;
    ``question``: without its image."""

    number: int
    question: Question
    played: Played
    scores: tuple[Verdict, ...]
    trajectories: ray.ObjectRef

    def __post_init__(self) -> None:
        if len(self.scores) != len(self.played.facts):
            raise ValueError(f"{len(self.played.facts)} trajectories but {len(self.scores)} scores")

    @property
    def oldest_version(self) -> int:
        return min(min(facts.policy_versions) for facts in self.played.facts)


class TrajectoryStore:
    """Hands out groups in the order their questions were asked, whatever order they were finished in, so that
    a synchronous run is reproducible. Groups older than a bound are counted, and dropped unless ``keep_stale``."""

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
        """The number of the group that is handed out next."""
        return self._next

    async def add(self, group: Group) -> None:
        async with self._changed:
            self._groups[group.number] = group
            self._changed.notify_all()

    async def skip(self, number: int) -> None:
        """There will be no group of this number (its question could not be played)."""
        async with self._changed:
            self._skipped.add(number)
            self._changed.notify_all()

    async def fail(self, error: BaseException) -> None:
        """Whoever waits, or comes to wait, gets this error instead of waiting for ever."""
        async with self._changed:
            self._failure = error
            self._changed.notify_all()

    async def take(self, oldest: int) -> Group | None:
        """The next group. One of which any token was sampled before version ``oldest`` is counted; then it is dropped
        and None comes in its place, whoever wants another one has to have it played; or it is kept (``keep_stale``),
        to be weighed down by whoever learns from it."""
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
        """The groups that wait here and the numbers that were skipped, both in order."""
        return tuple(self._groups[number] for number in sorted(self._groups)), tuple(sorted(self._skipped))

    def restore(self, next_number: int, groups: Iterable[Group], skipped: Iterable[int], stale: int) -> None:
        """What ``contents``, ``next_number`` and ``stale`` said, into an empty store.

        Raises ValueError for a group or a skipped number that was handed out before."""
        self._groups = {group.number: group for group in groups}
        self._skipped, self._next, self.stale = set(skipped), next_number, stale
        if past := sorted(number for number in {*self._groups, *self._skipped} if number < next_number):
            raise ValueError(f"groups {past} come before group {next_number}, which is handed out next")
