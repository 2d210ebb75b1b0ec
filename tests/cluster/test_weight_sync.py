"""The channel: who waits for whom."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from ergo_rl.cluster.config import Resources, Transport, WeightsConfig
from ergo_rl.cluster.weight_sync import WeightChannel


class Source:
    """Weights that count how often they were asked for."""

    asked = 0

    async def weights(self) -> Any:
        self.asked += 1
        return [self.asked]


class Sink:
    """Loads when it is told so."""

    def __init__(self) -> None:
        self.may_load = asyncio.Event()
        self.begun: list[tuple[int, Any]] = []
        self.holds = 0

    async def load_weights(self, version: int, buckets: Sequence[Any]) -> list[float]:
        self.begun.append((version, buckets[0]))
        await self.may_load.wait()
        if version == 13:
            raise RuntimeError("no worker is left")
        self.holds = version
        return [0.25, 0.5]


def test_publish_waits_for_the_receivers_or_returns_before() -> None:
    async def story() -> None:
        source, sink = Source(), Sink()
        channel = WeightChannel(source, sink)
        assert await channel.settled() is None
        ahead = await channel.publish(1, wait=False)
        assert (ahead.version, ahead.load_s, sink.holds) == (1, None, 0)
        second = asyncio.create_task(channel.publish(2))
        await asyncio.sleep(0.01)
        assert sink.begun == [(1, 1)] and source.asked == 1, "one after the other"
        sink.may_load.set()
        assert (await second).load_s == 0.5 and sink.holds == 2

    asyncio.run(story())


def test_settled_cancelled_then_loading_continues() -> None:
    async def story() -> None:
        sink = Sink()
        channel = WeightChannel(Source(), sink)
        await channel.publish(1, wait=False)
        waiting = asyncio.create_task(channel.settled())
        await asyncio.sleep(0)
        waiting.cancel()
        sink.may_load.set()
        assert await channel.settled() == 0.5 and sink.holds == 1

    asyncio.run(story())


def test_publish_after_a_failed_load_raises_its_error() -> None:
    async def story() -> None:
        sink = Sink()
        channel = WeightChannel(Source(), sink)
        sink.may_load.set()
        await channel.publish(13, wait=False)
        with pytest.raises(RuntimeError, match="no worker is left"):
            await channel.publish(14)

    asyncio.run(story())


@pytest.mark.parametrize(
    ("asked", "gpus", "chosen"),
    [
        ("auto", (0, 0), "object_store"),
        ("auto", (1, 1), "broadcast"),
        ("auto", (1, 8), "broadcast"),
        ("auto", (0.6, 0.4), "ipc"),
        ("auto", (1, 0.5), "object_store"),
        ("auto", (1, 0), "object_store"),
        ("object_store", (1, 1), "object_store"),
        ("broadcast", (1, 1), "broadcast"),
        ("ipc", (0, 0), "ipc"),
        ("ipc", (0.5, 0.5), "ipc"),
    ],
)
def test_for_roles_resolves_the_transport_from_gpus(asked: str, gpus: tuple[float, float], chosen: str) -> None:
    roles = [Resources(gpus=share) for share in gpus]
    assert WeightsConfig(Transport(asked)).for_roles(*roles).transport == chosen


@pytest.mark.parametrize(
    ("asked", "gpus"),
    [
        ("broadcast", (0, 0)),
        ("broadcast", (1, 0)),
        ("broadcast", (0.5, 0.5)),
        ("broadcast", (1, 0.5)),
        ("ipc", (1, 0)),
        ("ipc", (0.5, 0)),
        ("ipc", (1, 0.5)),
        ("ipc", (1, 1)),
    ],
)
def test_for_roles_impossible_transport_raises(asked: str, gpus: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match=rf"{asked} needs .* got .*; set weights.transport=object_store"):
        WeightsConfig(Transport(asked)).for_roles(*[Resources(gpus=share) for share in gpus])
