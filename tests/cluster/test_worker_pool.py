"""The pool on real Ray actors: spreading, errors, deaths, resizing."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import ray
from ray.exceptions import ActorDiedError, OutOfMemoryError, RayActorError

from ergo_rl.cluster.placement import Cluster
from ergo_rl.cluster.worker_pool import Faults, PoolExhausted, WorkerDied, WorkerPool


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

    async def run_out_of_memory_unless(self, flag: str) -> str:
        """As Ray says it where its memory monitor has ended an actor."""
        if not os.path.exists(flag):
            with open(flag, "w"):
                raise OutOfMemoryError("3 worker(s) were killed due to the node running low on memory")
        return "done"

    async def die(self) -> None:
        os._exit(1)

    async def give_up(self) -> None:
        raise WorkerDied("the engine is gone: 7 of 8 GPUs fell off the bus")

    async def hang_unless(self, flag: str) -> str:
        """Blocks its whole process for ever, unless a former attempt has left its flag."""
        if not os.path.exists(flag):
            with open(flag, "w"):
                time.sleep(1000)
        return "done"

    async def pair(self) -> tuple[str, list[int]]:
        return "facts", [1, 2, 3]


Story = Callable[[WorkerPool], Coroutine[Any, Any, None]]


def run(story: Story, size: int = 2, restarts: int = 3, prepare: Any = None, hang_timeout_s: float = 60.0) -> None:
    async def play() -> None:
        faults = Faults(restarts, hang_timeout_s, backoff_s=0.1)
        pool = WorkerPool(lambda index: Clerk.remote(index), size, faults, "clerks", prepare)
        try:
            await pool.ready(60)
            await story(pool)
        finally:
            await pool.close()

    asyncio.run(play())


def test_call_uses_the_least_loaded_worker(ray_cluster: Cluster) -> None:
    async def story(pool: WorkerPool) -> None:
        answers = await asyncio.gather(*(pool.call("who", 0.2) for _ in range(4)))
        assert sorted(index for index, _, _ in answers) == [0, 0, 1, 1]

    run(story)


def test_call_raises_what_the_method_raised(ray_cluster: Cluster) -> None:
    async def story(pool: WorkerPool) -> None:
        with pytest.raises(KeyError, match="no such row"):
            await pool.call("fail")
        assert pool.restarts == 0

    run(story)


def test_call_several_returns_leaves_the_rest_as_references(ray_cluster: Cluster) -> None:
    async def story(pool: WorkerPool) -> None:
        facts, payload = await pool.call("pair", num_returns=2)
        assert facts == "facts" and isinstance(payload, ray.ObjectRef)
        await pool.close()  # the reference is ours: it outlives the worker
        assert ray.get(payload) == [1, 2, 3]

    run(story)


def test_call_on_dying_worker_is_retried_and_worker_replaced(
    ray_cluster: Cluster, tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The worker is replaced, brought up to date, and the call is made again."""
    seen: list[Any] = []

    async def teach(actor: Any) -> None:
        seen.append(actor)
        await actor.teach.remote(7)

    async def story(pool: WorkerPool) -> None:
        assert await pool.call("die_unless", str(tmp_path / "flag")) == "done"
        assert pool.restarts == 1
        async with asyncio.timeout(60):  # the other worker answered; the replacement comes by itself
            while len(seen) < 3:  # two at the start, one replacement
                await asyncio.sleep(0.05)
        assert [taught for _, taught, _ in await pool.call_all("who")] == [7, 7]
        await asyncio.gather(*(pool.call("who", 0.1) for _ in range(2)))
        back = [message for message in caplog.messages if "has done its first work" in message]
        assert len(back) == 1 and back[0].startswith("clerks: worker ")
        assert [taught for _, taught, _ in await pool.call_all("who")] == [7, 7]

    run(story, prepare=teach)


def test_call_all_without_room_for_a_replacement_uses_the_others(ray_cluster: Cluster) -> None:
    """As after the loss of a machine: the third actor that is made asks for more than the cluster has."""
    made: list[int] = []

    def spawn(index: int) -> Any:
        made.append(index)
        return Clerk.options(num_cpus=0.01 if len(made) < 3 else 5000).remote(index)  # type: ignore[attr-defined]

    async def story() -> None:
        pool = WorkerPool(spawn, 2, Faults(restarts=1, hang_timeout_s=60, backoff_s=0.1), "clerks")
        try:
            await pool.ready(60)
            pids = {pid: index for index, _, pid in await pool.call_all("who")}
            dead, left = list(pids)
            waiting = [asyncio.create_task(pool.call("who", 0.5)) for _ in range(4)]
            await asyncio.sleep(0.1)
            os.kill(dead, signal.SIGKILL)
            answers = await asyncio.wait_for(asyncio.gather(*waiting), 30)
            assert {pid for _, _, pid in answers} <= set(pids) and len(made) == 3
            assert [pid for _, _, pid in await asyncio.wait_for(pool.call_all("who"), 30)] == [left]
        finally:
            await pool.close()

    asyncio.run(story())


def test_death_seen_by_many_callers_is_replaced_once(ray_cluster: Cluster, tmp_path: Any) -> None:
    async def story(pool: WorkerPool) -> None:
        flag = str(tmp_path / "flag")
        calls = [pool.call("who", 0.5) for _ in range(5)]
        assert await asyncio.gather(*calls, pool.call("die_unless", flag))
        assert pool.restarts == 1

    run(story, size=1)


def test_worker_killed_by_memory_monitor_is_replaced(ray_cluster: Cluster, tmp_path: Any) -> None:
    async def story(pool: WorkerPool) -> None:
        assert await pool.call("run_out_of_memory_unless", str(tmp_path / "flag")) == "done"
        assert pool.restarts == 1

    run(story, size=1)


def test_call_after_spent_restarts_raises_pool_exhausted(ray_cluster: Cluster) -> None:
    async def story(pool: WorkerPool) -> None:
        answers = await asyncio.gather(*(pool.call("die") for _ in range(3)), return_exceptions=True)
        assert all(isinstance(answer, PoolExhausted) for answer in answers)
        with pytest.raises(PoolExhausted, match="no restarts are left"):
            await pool.call("who")

    run(story, size=1, restarts=1)


def test_resize_prepares_new_workers_and_drains_removed_ones(ray_cluster: Cluster) -> None:
    async def story(pool: WorkerPool) -> None:
        await pool.resize(3)
        answers = await asyncio.gather(*(pool.call("who", 0.2) for _ in range(3)))
        assert sorted(index for index, _, _ in answers) == [0, 1, 2]
        slow = asyncio.gather(*(pool.call("who", 1.0) for _ in range(3)))
        await asyncio.sleep(0.2)
        started = time.monotonic()
        await pool.resize(1)
        assert len(await slow) == 3 and len(pool) == 1 and time.monotonic() - started < 10

    run(story, size=1)


def test_ready_without_resources_raises_with_numbers(ray_cluster: Cluster) -> None:
    async def play() -> None:
        pool = WorkerPool(lambda index: Clerk.options(num_cpus=10_000).remote(index), 1, Faults(0), "giants")
        with pytest.raises(TimeoutError, match="only 0 of 1 giants were ready after 1 s; free in the cluster"):
            await pool.ready(1)
        await pool.close()

    asyncio.run(play())


def test_reserve_gang_without_resources_raises_with_numbers(ray_cluster: Cluster) -> None:
    from ergo_rl.cluster.config import ClusterConfig, Resources

    with pytest.raises(TimeoutError, match=r"did not offer 2 x \{'CPU': 5000.*free now: \{'CPU'"):
        asyncio.run(Cluster(ClusterConfig(wait_s=0.2)).reserve_gang("giants", 2, Resources(cpus=5000)))


def test_reserve_gang_does_not_block_the_event_loop(ray_cluster: Cluster) -> None:
    from ergo_rl.cluster.config import ClusterConfig, Resources

    async def story() -> None:
        waiting = asyncio.create_task(Cluster(ClusterConfig(wait_s=3)).reserve_gang("giants", 1, Resources(cpus=5000)))
        ticks = 0
        while not waiting.done():
            await asyncio.sleep(0.02)
            ticks += 1
        assert ticks > 20 and isinstance(waiting.exception(), TimeoutError)

    asyncio.run(story())


def test_hung_worker_is_replaced(ray_cluster: Cluster, tmp_path: Any) -> None:
    """What it held is done again elsewhere, its own call and those behind it."""

    async def story(pool: WorkerPool) -> None:
        started = time.monotonic()
        calls = [pool.call("hang_unless", str(tmp_path / "flag")), *(pool.call("who") for _ in range(3))]
        first, *others = await asyncio.gather(*calls)
        assert first == "done" and len(others) == 3 and pool.restarts == 1
        assert 3 <= time.monotonic() - started < 60

    run(story, size=1, hang_timeout_s=3.0)


def test_slow_worker_is_not_replaced(ray_cluster: Cluster) -> None:
    """Six seconds of work, but every 1.5 seconds some of it is done."""

    async def story(pool: WorkerPool) -> None:
        assert len(await asyncio.gather(*(pool.call("who", nap) for nap in (1.5, 3.0, 4.5, 6.0)))) == 4
        await asyncio.sleep(5)  # and without work nothing is expected
        await pool.call("who")
        assert pool.restarts == 0

    run(story, size=1, hang_timeout_s=4.5)


def test_replacement_that_fails_to_start_is_retried_with_back_off(ray_cluster: Cluster) -> None:
    lives = iter(range(100))

    @ray.remote(num_cpus=0.01)
    class Feeble(Clerk.__ray_metadata__.modified_class):  # type: ignore[name-defined,misc]
        async def start(self) -> None:
            if self.index in (1, 2):
                raise OSError("no model yet")
            if self.index == 3:
                os._exit(1)

    async def play() -> None:
        pool = WorkerPool(lambda index: Feeble.remote(next(lives)), 1, Faults(4, 60.0, backoff_s=0.5), "feeble")
        await pool.ready(60)
        started = time.monotonic()
        with pytest.raises(PoolExhausted, match="feeble: worker 0 died and no restarts are left"):
            await pool.call("die")  # the fourth replacement starts, and dies of the same call
        assert pool.restarts == 4 and time.monotonic() - started >= 0.5 + 1.0 + 2.0
        await pool.close()

    asyncio.run(play())


def test_worker_died_error_is_replaced_and_its_reason_kept(
    ray_cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    """Its process is alive and would answer the next call with the same error, at once."""

    async def story(pool: WorkerPool) -> None:
        first = (await pool.call("who"))[2]
        started = time.monotonic()
        with pytest.raises(PoolExhausted, match=r"no restarts are left: WorkerDied .*7 of 8 GPUs"):
            await pool.call("give_up")
        assert pool.restarts == 2 and time.monotonic() - started >= 0.1, "the second replacement after a wait"
        assert not os.path.exists(f"/proc/{first}"), "nothing of it is left"

    with caplog.at_level("WARNING"):
        run(story, size=1, restarts=2)
    assert "worker 0 died (WorkerDied: the engine is gone: 7 of 8 GPUs fell off the bus" in caplog.text


def test_cancelled_call_does_not_stop_the_replacement(ray_cluster: Cluster) -> None:
    async def story(pool: WorkerPool) -> None:
        dying = asyncio.create_task(pool.call("die"))
        while pool.restarts == 0:
            await asyncio.sleep(0.01)
        dying.cancel()
        assert (await asyncio.wait_for(pool.call("who"), 60))[0] == 0 and pool.restarts == 1

    run(story, size=1)


def test_ready_with_dying_worker_raises_pool_exhausted(ray_cluster: Cluster) -> None:
    @ray.remote(num_cpus=0.01)
    class Stillborn(Clerk.__ray_metadata__.modified_class):  # type: ignore[name-defined,misc]
        async def start(self) -> None:
            os._exit(1)

    async def play() -> None:
        pool = WorkerPool(lambda index: Stillborn.remote(index), 1, Faults(3), "stillborn")
        with pytest.raises(PoolExhausted, match="stillborn: one died while it started"):
            await pool.ready(60)
        await pool.close()

    asyncio.run(play())


class NodeDied(ActorDiedError):
    """As Ray says it; its own error cannot be made outside of Ray."""

    def __init__(self) -> None:
        RayActorError.__init__(self, None, "The actor died because its node has died. Node Id: 9f", False, False)


@ray.remote(num_cpus=0.01)
class Movable(Clerk.__ray_metadata__.modified_class):  # type: ignore[name-defined,misc]
    async def start(self) -> None:
        if self.index == 0:
            raise NodeDied


def test_worker_whose_node_died_while_it_started_is_placed_again(
    ray_cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    lives = iter((0, 1, 0, 2))

    async def play() -> None:
        pool = WorkerPool(lambda index: Movable.remote(next(lives)), 1, Faults(2), "clerks")
        await pool.ready(60)
        assert pool.restarts == 1 and (await pool.call("who"))[0] == 1
        await pool.resize(2)  # the same for one that is added
        assert pool.restarts == 2 and len(pool) == 2
        assert sorted(index for index, *_ in await pool.call_all("who")) == [1, 2]
        await pool.close()

    with caplog.at_level("WARNING"):
        asyncio.run(play())
    assert "clerks: worker 0 died (NodeDied: The actor died because its node has died." in caplog.text


def test_nodes_that_go_on_dying_spend_the_restarts(ray_cluster: Cluster) -> None:
    async def play() -> None:
        pool = WorkerPool(lambda index: Movable.remote(0), 1, Faults(1), "clerks")
        with pytest.raises(PoolExhausted, match="clerks: one died while it started"):
            await pool.ready(60)
        assert pool.restarts == 1
        await pool.close()

    asyncio.run(play())


def test_resize_without_resources_raises_and_changes_nothing(ray_cluster: Cluster) -> None:
    sizes = iter((0.01, 10_000, 10_000))

    async def play() -> None:
        pool = WorkerPool(lambda index: Clerk.options(num_cpus=next(sizes)).remote(index), 1, Faults(3), "clerks")
        await pool.ready(60)
        pool._start_deadline_s = 1.0
        with pytest.raises(TimeoutError, match=r"2 of 2 new clerks did not start.*there are 1 now"):
            await pool.resize(3)
        assert (await pool.call("who"))[0] == 0
        await pool.close()

    asyncio.run(play())
