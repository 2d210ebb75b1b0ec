"""The store: order of questions, staleness, failures."""

from __future__ import annotations

import asyncio

import pytest
import ray

from ergo_rl.actors.rollout_worker import GroupResult, TrajectorySummary
from ergo_rl.actors.trajectory_store import Group, TrajectoryStore
from ergo_rl.episodes.types import Outcome, Question, Score


def group(number: int, *versions: int) -> Group:
    facts = tuple(TrajectorySummary(Outcome.ANSWERED, "ok", None, 0.1, 100, (5, 5), (v, v)) for v in versions)
    question = Question(f"q{number}", b"", "?", "ring")
    scores = tuple(Score(1.0) for _ in versions)
    return Group(number, question, GroupResult(question.id, facts), scores, ray.ObjectRef.nil())


async def take(store: TrajectoryStore, count: int, oldest: int = 0) -> list[int | None]:
    taken = [await store.take(oldest) for _ in range(count)]
    return [None if one is None else one.number for one in taken]


def test_take_returns_groups_in_the_order_of_questions() -> None:
    async def story() -> None:
        store = TrajectoryStore()
        for number in (2, 0, 1):
            await store.add(group(number, 0, 0))
        assert await take(store, 3) == [0, 1, 2]
        assert store.next_number == 3 and len(store) == 0

    asyncio.run(story())


def test_take_waits_for_missing_groups_and_passes_over_skipped_ones() -> None:
    async def story() -> None:
        store = TrajectoryStore()
        await store.add(group(2, 0, 0))
        taking = asyncio.create_task(take(store, 2))
        await asyncio.sleep(0)
        assert not taking.done()
        await store.skip(1)
        await store.add(group(0, 0, 0))
        assert await taking == [0, 2]

    asyncio.run(story())


def test_take_stale_group_is_dropped_and_counted() -> None:
    """A group is as old as its oldest turn. Whoever takes learns of it at once: nobody else would have another question
    played in its place, and the next take might wait for ever."""

    async def story() -> None:
        store = TrajectoryStore()
        for number, versions in enumerate([(3, 2), (4, 4), (3, 3)]):
            await store.add(group(number, *versions))
        assert await take(store, 3, oldest=3) == [None, 1, 2]
        assert store.stale == 1

    asyncio.run(story())


def test_take_stale_group_with_keep_stale_is_returned_and_counted() -> None:
    async def story() -> None:
        store = TrajectoryStore(keep_stale=True)
        for number, versions in enumerate([(3, 2), (4, 4)]):
            await store.add(group(number, *versions))
        assert await take(store, 2, oldest=3) == [0, 1]
        assert store.stale == 1

    asyncio.run(story())


def test_fail_raises_in_every_waiting_take() -> None:
    async def story() -> None:
        store = TrajectoryStore()
        taking = asyncio.create_task(store.take(oldest=0))
        await asyncio.sleep(0)
        await store.fail(ValueError("the reward model is gone"))
        with pytest.raises(ValueError, match="the reward model is gone"):
            await taking
        with pytest.raises(ValueError, match="the reward model is gone"):
            await store.take(oldest=0)

    asyncio.run(story())


def test_restore_continues_from_contents() -> None:
    async def story() -> None:
        store = TrajectoryStore()
        for number in (3, 0, 4):
            await store.add(group(number, 0, 0))
        await store.skip(2)
        assert await take(store, 1) == [0]
        groups, skipped = store.contents()
        assert [one.number for one in groups] == [3, 4] and skipped == (2,)
        again = TrajectoryStore()
        again.restore(store.next_number, groups, skipped, stale=5)
        await again.add(group(1, 0, 0))
        assert await take(again, 3) == [1, 3, 4] and again.stale == 5
        with pytest.raises(ValueError, match=r"groups \[3\] come before group 4"):
            again.restore(4, groups, (), 0)

    asyncio.run(story())


def test_group_with_too_few_scores_raises() -> None:
    one = group(0, 0, 0)
    with pytest.raises(ValueError, match="2 trajectories but 1 scores"):
        Group(0, one.question, one.result, (Score(1.0),), one.trajectories)
