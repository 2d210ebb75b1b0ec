"""The pool on real Ray actors: spreading, errors, deaths, resizing."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import ray

from cluster.placement import Cluster
from cluster.pool import Pool, PoolExhausted


@ray.remote(num_cpus=0.01)
class Clerk:
    """Says who it is; can be told to fail, to die once, to take its time."""

    def __init__(self, index: int) -> None:
        self.index, self.taught = index, 0

    async def start(self) -> None:
        pass

    async def teach(self, value: int) -> None:
        self.taught = value

    async def who(self, nap_s: float = 0.0) -> tuple[int, int, int]:
        await asyncio.sleep(nap_s)
        return self.index, self.taught, os.getpid()

    async def fail(self) -> None:
        raise KeyError("no such row")

    async def die_unless(self, flag: str) -> str:
        """Dies, unless a former attempt has left its flag."""
        if not os.path.exists(flag):
            with open(flag, "w"):
                os._exit(1)
        return "done"

    async def die(self) -> None:
        os._exit(1)

    async def pair(self) -> tuple[str, list[int]]:
        return "facts", [1, 2, 3]


Story = Callable[[Pool], Coroutine[Any, Any, None]]


def run(story: Story, size: int = 2, restarts: int = 3, prepare: Any = None) -> None:
    async def play() -> None:
        pool = Pool(lambda index: Clerk.remote(index), size, restarts, "clerks", prepare)
        try:
            await pool.ready(60)
            await story(pool)
        finally:
            await pool.close()

    asyncio.run(play())


def test_calls_go_to_the_least_loaded_worker(ray_cluster: Cluster) -> None:
    async def story(pool: Pool) -> None:
        answers = await asyncio.gather(*(pool.call("who", 0.2) for _ in range(4)))
        assert sorted(index for index, _, _ in answers) == [0, 0, 1, 1]

    run(story)


def test_what_a_method_raises_rises_as_it_was(ray_cluster: Cluster) -> None:
    async def story(pool: Pool) -> None:
        with pytest.raises(KeyError, match="no such row"):
            await pool.call("fail")
        assert pool.restarts == 0

    run(story)


def test_several_returns_leave_the_rest_as_references(ray_cluster: Cluster) -> None:
    async def story(pool: Pool) -> None:
        facts, payload = await pool.call("pair", num_returns=2)
        assert facts == "facts" and isinstance(payload, ray.ObjectRef)
        await pool.close()  # the reference is ours: it outlives the worker
        assert ray.get(payload) == [1, 2, 3]

    run(story)


def test_a_death_is_no_callers_business(ray_cluster: Cluster, tmp_path: Any) -> None:
    """The worker is replaced, brought up to date, and the call is made again."""
    seen: list[Any] = []

    async def teach(actor: Any) -> None:
        seen.append(actor)
        await actor.teach.remote(7)

    async def story(pool: Pool) -> None:
        assert await pool.call("die_unless", str(tmp_path / "flag")) == "done"
        assert pool.restarts == 1 and len(seen) == 3  # two at the start, one replacement
        assert [taught for _, taught, _ in await pool.call_all("who")] == [7, 7]

    run(story, prepare=teach)


def test_many_callers_see_one_death_and_it_is_replaced_once(ray_cluster: Cluster, tmp_path: Any) -> None:
    async def story(pool: Pool) -> None:
        flag = str(tmp_path / "flag")
        calls = [pool.call("who", 0.5) for _ in range(5)]
        assert await asyncio.gather(*calls, pool.call("die_unless", flag))
        assert pool.restarts == 1

    run(story, size=1)


def test_a_spent_budget_ends_every_call(ray_cluster: Cluster) -> None:
    async def story(pool: Pool) -> None:
        answers = await asyncio.gather(*(pool.call("die") for _ in range(3)), return_exceptions=True)
        assert all(isinstance(answer, PoolExhausted) for answer in answers)
        with pytest.raises(PoolExhausted, match="no restarts are left"):
            await pool.call("who")

    run(story, size=1, restarts=1)


def test_resize_adds_prepared_workers_and_lets_removed_ones_finish(ray_cluster: Cluster) -> None:
    async def story(pool: Pool) -> None:
        await pool.resize(3)
        answers = await asyncio.gather(*(pool.call("who", 0.2) for _ in range(3)))
        assert sorted(index for index, _, _ in answers) == [0, 1, 2]
        slow = asyncio.gather(*(pool.call("who", 1.0) for _ in range(3)))
        await asyncio.sleep(0.2)
        started = time.monotonic()
        await pool.resize(1)
        assert len(await slow) == 3 and len(pool) == 1 and time.monotonic() - started < 10

    run(story, size=1)


def test_ready_gives_up_with_the_numbers(ray_cluster: Cluster) -> None:
    async def play() -> None:
        pool = Pool(lambda index: Clerk.options(num_cpus=10_000).remote(index), 1, 0, "giants")
        with pytest.raises(TimeoutError, match="only 0 of 1 giants were ready after 1 s; free in the cluster"):
            await pool.ready(1)
        await pool.close()

    asyncio.run(play())


def test_a_gang_that_cannot_be_held_is_refused_with_the_numbers(ray_cluster: Cluster) -> None:
    from cluster.placement import ClusterConfig
    from cluster.resources import Resources

    with pytest.raises(TimeoutError, match=r"did not offer 2 x \{'CPU': 5000.*free now: \{'CPU'"):
        Cluster(ClusterConfig(wait_s=0.2)).reserve("giants", 2, Resources(cpus=5000))
