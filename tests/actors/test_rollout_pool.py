"""Direct transfers to real Ray actors whose engines are a number: which worker holds which version, whichever starts,
stops or dies."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import pytest
import ray

from ergo_rl.actors import rollout_pool
from ergo_rl.actors.config import RolloutConfig
from ergo_rl.actors.rollout_pool import RolloutPool
from ergo_rl.cluster.config import EngineConfig, Resources, Transport, WeightsConfig
from ergo_rl.cluster.placement import Cluster
from ergo_rl.cluster.weight_sender import EngineClient
from ergo_rl.cluster.weight_sync import WeightChannel, WeightSyncFailed
from ergo_rl.episodes.config import EpisodeConfig


class Worker:
    """Stands in for a rollout worker. ``dies_in``: the version whose direct transfer it does not survive."""

    def __init__(self, config: RolloutConfig, episode: EpisodeConfig) -> None:
        self.holds: Any = "the model's folder"
        self.rank: Any = None
        self.dies_in = -1

    async def start(self) -> None:
        pass

    async def init_weight_transfer(self, transport: str, info: dict[str, Any], timeout_s: float) -> None:
        self.rank = info["connection"], info["rank_offset"], info["world_size"]

    async def start_weight_update(self, transfer: str) -> None:
        self.transfer = transfer

    async def update_weights(self, transfer: str, update: dict[str, Any]) -> None:
        assert transfer == self.transfer and update == {"transport": "nccl", "payload": {"names": ["w"]}}

    async def finish_weight_update(self, transfer: str, version: int) -> float:
        if version == self.dies_in:
            os._exit(1)
        assert transfer == self.transfer
        self.holds = version, "broadcast"
        return 0.5

    async def load_weights(self, version: int, *buckets: str) -> float:
        self.holds = version, *buckets
        return 0.25

    async def state(self) -> tuple[Any, Any]:
        return self.holds, self.rank

    async def die_in(self, version: int) -> None:
        self.dies_in = version


class Learner:
    """Its weights are the number of updates. It drives the workers with the client of a real learner."""

    def __init__(self) -> None:
        self.weights_revision, self.asked, self.connections = 0, 0, 0
        self.failure = ""
        self._client: EngineClient

    def update(self) -> None:
        self.weights_revision += 1

    async def weights(self) -> list[Any]:
        self.asked += 1
        return [ray.put(f"after {self.weights_revision}")]

    async def connect(self, transport: Transport, engines: Sequence[Any], processes: int, timeout_s: float) -> None:
        self.connections += 1
        self._client = EngineClient("nccl", engines, processes, timeout_s)
        info = {"connection": self.connections, "rank_offset": 1, "world_size": 1 + processes * len(engines)}
        await asyncio.to_thread(self._client.init_weight_transfer_engine, info)
        if self._client.failure:
            raise WeightSyncFailed(self._client.failure)

    async def send_weights(self, version: int) -> float:
        def send() -> None:
            self._client.version = version
            self._client.start_weight_update()
            self._client.update_weights({"names": ["w"]})
            self._client.finish_weight_update()

        await asyncio.to_thread(send)
        if failure := self.failure or self._client.failure:
            raise WeightSyncFailed(failure)
        return self._client.seconds


Story = Callable[[RolloutPool, Learner, WeightChannel], Coroutine[Any, Any, None]]


def run(cluster: Cluster, monkeypatch: pytest.MonkeyPatch, story: Story, workers: int = 2, processes: int = 1) -> None:
    async def go() -> None:
        config = RolloutConfig(
            workers=workers,
            resources=Resources(cpus=0.01),
            backoff_s=0.1,
            engine=EngineConfig(tensor_parallel_size=processes),
        )
        pool, learner = RolloutPool.launch(cluster, config, EpisodeConfig()), Learner()
        try:
            await pool.ready(60)
            channel = WeightChannel(learner, pool, WeightsConfig(Transport.BROADCAST, 5.0))
            await asyncio.wait_for(story(pool, learner, channel), 60)
        finally:
            await pool.close()

    monkeypatch.setattr(rollout_pool, "RolloutWorker", Worker)
    asyncio.run(go())


async def held(pool: RolloutPool) -> list[Any]:
    return [holds for holds, _ in await pool._pool.call_all("state")]


async def ranks(pool: RolloutPool) -> list[Any]:
    return [rank for _, rank in await pool._pool.call_all("state")]


async def kill_only_worker(pool: RolloutPool) -> None:
    """``ray.kill`` does not wait for the death, and until then the worker answers calls."""
    (worker,) = pool.members()
    ray.kill(worker)
    with pytest.raises(ray.exceptions.RayActorError):
        while True:
            await worker.state.remote()


def test_publish_keeps_the_connection_while_members_are_the_same(
    ray_cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks follow one another: the learner is 0, each engine of two processes takes two. A new worker holds the last
    version before it is a member; two late workers share one object."""

    async def story(pool: RolloutPool, learner: Learner, channel: WeightChannel) -> None:
        for version in (1, 2):
            learner.update()
            publication = await channel.publish(version)
            assert (publication.transport, publication.load_s) == (Transport.BROADCAST, 0.5)
            assert await held(pool) == [(version, "broadcast")] * 2
        (first, *_), (same, *_) = await ranks(pool)
        assert (learner.connections, first) == (1, same)
        assert [rank[1:] for rank in await ranks(pool)] == [(1, 5), (3, 5)]
        await pool.resize(4)
        assert await held(pool) == [(2, "broadcast")] * 2 + [(2, "after 2")] * 2 and learner.asked == 1
        learner.update()
        assert (await channel.publish(3)).transport is Transport.BROADCAST
        assert await held(pool) == [(3, "broadcast")] * 4 and learner.connections == 2
        assert [rank[1:] for rank in await ranks(pool)] == [(1, 9), (3, 9), (5, 9), (7, 9)]
        assert len({rank[0] for rank in await ranks(pool)} | {first}) == 2, "a new connection"
        await pool.resize(1)
        assert (await channel.publish(4)).transport is Transport.BROADCAST and learner.connections == 3

    run(ray_cluster, monkeypatch, story, processes=2)


def test_publish_after_failed_transfer_uses_the_object_store(
    ray_cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(pool: RolloutPool, learner: Learner, channel: WeightChannel) -> None:
        await pool.members()[1].die_in.remote(1)
        learner.update()
        assert (await channel.publish(1, wait=False)).transport is Transport.OBJECT_STORE
        await channel.settled()
        while len(pool.members()) < 2:
            await asyncio.sleep(0.01)
        assert await held(pool) == [(1, "after 1")] * 2 and pool.restarts == 1
        assert (await channel.publish(2)).transport is Transport.BROADCAST
        assert await held(pool) == [(2, "broadcast")] * 2 and learner.connections == 2
        learner.failure = "Connection closed by peer"
        assert (await channel.publish(3)).transport is Transport.OBJECT_STORE
        assert await held(pool) == [(3, "after 1")] * 2 and learner.connections == 2
        learner.failure = ""
        assert (await channel.publish(4)).transport is Transport.BROADCAST and learner.connections == 3

    run(ray_cluster, monkeypatch, story)


def test_replaced_only_worker_gets_weights_whether_or_not_the_learner_moved_on(
    ray_cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once while the learner's weights are the published ones. Otherwise with the publish that follows, which goes
    through the object store because a worker waits; and it takes no calls before it holds a version."""

    async def story(pool: RolloutPool, learner: Learner, channel: WeightChannel) -> None:
        await channel.publish(7)
        await kill_only_worker(pool)
        assert await pool._pool.call("state") == ((7, "after 0"), None)
        await channel.publish(8)
        learner.update()
        await kill_only_worker(pool)
        playing = asyncio.create_task(pool._pool.call("state"))
        while not pool.has_pending_workers:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        assert not playing.done() and pool.members() == ()
        assert (await channel.publish(9)).transport is Transport.OBJECT_STORE
        assert await playing == ((9, "after 1"), None)
        assert (await channel.publish(10)).transport is Transport.BROADCAST
        assert await held(pool) == [(10, "broadcast")] and pool.restarts == 2

    run(ray_cluster, monkeypatch, story, workers=1)
