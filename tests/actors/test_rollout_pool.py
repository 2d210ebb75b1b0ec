"""Weights by broadcast to real Ray actors whose engines are a number: who holds what when, whoever comes, goes or
dies."""

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
from ergo_rl.cluster.buckets import Layout
from ergo_rl.cluster.config import EngineConfig, Resources, Transport, WeightsConfig
from ergo_rl.cluster.meeting import Meeting
from ergo_rl.cluster.placement import Cluster
from ergo_rl.cluster.weights import WeightChannel
from ergo_rl.episodes.config import EpisodeConfig

LAYOUT = Layout(("w",), ("int64",), ((),), (8,))


class Worker:
    """In place of a rollout worker. ``dies_in`` says of which version it does not survive the broadcast."""

    def __init__(self, config: RolloutConfig, episode: EpisodeConfig) -> None:
        self.holds: Any = "the model's folder"
        self.place: Any = None
        self.dies_in = -1

    async def start(self) -> None:
        pass

    async def enter_group(self, meeting: Meeting, first_rank: int) -> float:
        self.place = meeting.generation, first_rank, meeting.world
        return 0.0

    async def receive_weights(self, version: int, generation: int, layouts: Sequence[Layout]) -> float:
        if version == self.dies_in:
            os._exit(1)
        assert generation == self.place[0] and list(layouts) == [LAYOUT]
        self.holds = version, "broadcast"
        return 0.5

    async def load_weights(self, version: int, *buckets: str) -> float:
        self.holds = version, *buckets
        return 0.25

    async def state(self) -> tuple[Any, Any]:
        return self.holds, self.place

    async def die_in(self, version: int) -> None:
        self.dies_in = version


class Learner:
    """Weights are how often they were updated."""

    def __init__(self) -> None:
        self.changes, self.asked, self.opened = 0, 0, 0
        self.why = ""
        self.ranks = 3  # of which only the first takes part in a broadcast

    def update(self) -> None:
        self.changes += 1

    async def weights(self) -> list[Any]:
        self.asked += 1
        return [ray.put(f"after {self.changes}")]

    async def layouts(self) -> list[Layout]:
        return [LAYOUT]

    async def open(self, timeout_s: float) -> tuple[str, int]:
        self.opened += 1
        return "127.0.0.1", 1

    async def enter(self, meeting: Meeting) -> str:
        return self.why

    async def broadcast(self, generation: int) -> str:
        return self.why


Story = Callable[[RolloutPool, Learner, WeightChannel], Coroutine[Any, Any, None]]


def run(cluster: Cluster, monkeypatch: pytest.MonkeyPatch, story: Story, workers: int = 2, processes: int = 1) -> None:
    async def play() -> None:
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
    asyncio.run(play())


async def held(pool: RolloutPool) -> list[Any]:
    return [holds for holds, _ in await pool._pool.call_all("state")]


async def places(pool: RolloutPool) -> list[Any]:
    return [place for _, place in await pool._pool.call_all("state")]


def test_a_group_lives_as_long_as_its_members(ray_cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks follow one another: the sender is 0, each engine of two processes takes two. Who is new holds the last
    version before he is a member; one object is made for two latecomers."""

    async def story(pool: RolloutPool, learner: Learner, channel: WeightChannel) -> None:
        for version in (1, 2):
            learner.update()
            publication = await channel.publish(version)
            assert (publication.transport, publication.load_s) == (Transport.BROADCAST, 0.5)
            assert await held(pool) == [(version, "broadcast")] * 2
        (first, *_), (same, *_) = await places(pool)
        assert (learner.opened, first) == (1, same)
        assert [place[1:] for place in await places(pool)] == [(1, 5), (3, 5)]
        await pool.resize(4)
        assert await held(pool) == [(2, "broadcast")] * 2 + [(2, "after 2")] * 2 and learner.asked == 1
        learner.update()
        assert (await channel.publish(3)).transport is Transport.BROADCAST
        assert await held(pool) == [(3, "broadcast")] * 4 and learner.opened == 2
        assert [place[1:] for place in await places(pool)] == [(1, 9), (3, 9), (5, 9), (7, 9)]
        assert len({place[0] for place in await places(pool)} | {first}) == 2, "a number of its own"
        await pool.resize(1)
        assert (await channel.publish(4)).transport is Transport.BROADCAST and learner.opened == 3

    run(ray_cluster, monkeypatch, story, processes=2)


def test_what_a_broadcast_does_not_deliver_the_object_store_does(
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
        assert await held(pool) == [(2, "broadcast")] * 2 and learner.opened == 2
        learner.why = "Connection closed by peer"
        assert (await channel.publish(3)).transport is Transport.OBJECT_STORE
        assert await held(pool) == [(3, "after 1")] * 2 and learner.opened == 2
        learner.why = ""
        assert (await channel.publish(4)).transport is Transport.BROADCAST and learner.opened == 3

    run(ray_cluster, monkeypatch, story)


def test_the_only_worker_may_die_and_its_successor_gets_weights_whatever_the_learner_does(
    ray_cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the learner stands where it stood, at once. If it has gone on, with the publish that follows, which goes
    through the object store because somebody waits; and it plays for no version that it does not hold."""

    async def story(pool: RolloutPool, learner: Learner, channel: WeightChannel) -> None:
        await channel.publish(7)
        ray.kill(pool.members()[0])
        assert await pool._pool.call("state") == ((7, "after 0"), None)
        await channel.publish(8)
        learner.update()
        ray.kill(pool.members()[0])
        playing = asyncio.create_task(pool._pool.call("state"))
        while not pool.joining:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        assert not playing.done() and pool.members() == ()
        assert (await channel.publish(9)).transport is Transport.OBJECT_STORE
        assert await playing == ((9, "after 1"), None)
        assert (await channel.publish(10)).transport is Transport.BROADCAST
        assert await held(pool) == [(10, "broadcast")] and pool.restarts == 2

    run(ray_cluster, monkeypatch, story, workers=1)
