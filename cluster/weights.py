"""The weight channel: one protocol between whoever has weights and whoever plays with them.

Transport here: Ray's object store. The source returns buckets (``cluster.buckets``) as objects that the driver owns;
every sink pulls them by itself, on whatever node it is, late joiners too. The receiving end inside vLLM is
``cluster.weight_receiver``.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import ray


class WeightSource(Protocol):
    async def weights(self) -> Sequence[ray.ObjectRef]:
        """The current weights, each object a ``cluster.buckets.Bucket``. They may change again when it returns."""


class WeightSink(Protocol):
    async def load_weights(self, version: int, buckets: Sequence[ray.ObjectRef]) -> list[float]:
        """Take over the weights; seconds per worker. Returns when every worker holds ``version``. Whoever asks it to
        play meanwhile plays with ``version``, too."""


@dataclass(frozen=True, slots=True)
class Publication:
    """gather_s: the source's part, the learner stands still for so long; load_s: the slowest sink's part, generation
    paused for most of it, None where nobody waited for it."""

    version: int
    gather_s: float
    load_s: float | None


class WeightChannel:
    """From one source to one sink. Publications arrive one after the other, in their order."""

    def __init__(self, source: WeightSource, sink: WeightSink) -> None:
        self._source, self._sink = source, sink
        self._loading: asyncio.Task[list[float]] | None = None

    async def publish(self, version: int, wait: bool = True) -> Publication:
        """Give every sink the source's current weights, stamped with ``version``. Without ``wait`` it returns as soon
        as the source may change its weights again; what goes wrong afterwards rises from the next call."""
        await self.settled()
        started = time.monotonic()
        buckets = await self._source.weights()
        gather_s = time.monotonic() - started
        self._loading = asyncio.create_task(self._sink.load_weights(version, buckets))
        return Publication(version, gather_s, await self.settled() if wait else None)

    async def settled(self) -> float | None:
        """Wait until what was published has arrived everywhere; seconds that the slowest sink took, None where nothing
        was published yet."""
        return None if self._loading is None else max(await asyncio.shield(self._loading))
