"""The weight channel: one protocol between whoever has weights and whoever plays with them.

Transport here: Ray's object store. The source returns buckets (``cluster.buckets``) as objects that the driver owns;
every sink pulls them by itself, on whatever node it is, late joiners too. The receiving end inside vLLM is
``cluster.weight_receiver``.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import ray


class WeightSource(Protocol):
    async def weights(self) -> Sequence[ray.ObjectRef]:
        """The current weights, each object a ``cluster.buckets.Bucket``."""


class WeightSink(Protocol):
    async def load_weights(self, version: int, buckets: Sequence[ray.ObjectRef]) -> list[float]:
        """Take over the weights; seconds per worker. Returns when every worker holds ``version``."""


@dataclass(frozen=True, slots=True)
class Publication:
    """gather_s: the source's part; load_s: the slowest sink's part, generation paused for most of it."""

    version: int
    gather_s: float
    load_s: float


@dataclass(frozen=True, slots=True)
class WeightChannel:
    source: WeightSource
    sink: WeightSink

    async def publish(self, version: int) -> Publication:
        """Give every sink the source's current weights, stamped with ``version``."""
        started = time.monotonic()
        buckets = await self.source.weights()
        gathered = time.monotonic()
        seconds = await self.sink.load_weights(version, buckets)
        return Publication(version, gathered - started, max(seconds))
