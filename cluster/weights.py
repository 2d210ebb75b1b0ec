"""The weight channel: one protocol between whoever has weights and whoever plays with them, and three transports.

*Object store*: the source returns buckets (``cluster.buckets``) as Ray objects that the driver owns; every sink pulls
them by itself, on whatever node it is, late joiners too. Works everywhere. The other two reach every worker process of
every engine at once (``cluster.broadcast``), and what they cannot deliver the object store does. *Broadcast*: one
collective, so nothing goes through main memory on GPUs. *IPC*: from memory to memory where learner and engines are on
one machine and share their GPUs, or have none. The receiving end inside vLLM is ``cluster.weight_receiver``.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import ray

from ergo_rl.cluster.broadcast import Broadcast, NotDelivered, Receivers, Sender
from ergo_rl.cluster.config import Transport, WeightsConfig

logger = logging.getLogger(__name__)


class WeightSource(Sender, Protocol):
    """Whoever has weights."""


class WeightSink(Receivers, Protocol):
    async def load_weights(self, version: int, buckets: Sequence[ray.ObjectRef]) -> list[float]:
        """Take over the weights; seconds per worker. Returns when every worker holds ``version``. Whoever asks it to
        play meanwhile plays with ``version``, too."""


@dataclass(frozen=True, slots=True)
class Publication:
    """gather_s: the source's part, the learner stands still for so long; load_s: the slowest sink's part, generation
    paused for most of it, None where nobody waited for it. But for the object store the two go on at once."""

    version: int
    gather_s: float
    load_s: float | None
    transport: Transport = Transport.OBJECT_STORE


class WeightChannel:
    """From one source to one sink. Publications arrive one after the other, in their order."""

    def __init__(self, source: WeightSource, sink: WeightSink, config: WeightsConfig | None = None) -> None:
        """``config``: of ``WeightsConfig.for_roles``; the object store without one."""
        self._source, self._sink = source, sink
        self._broadcast, self._transport = None, Transport.OBJECT_STORE
        if config is not None and config.transport in (Transport.BROADCAST, Transport.IPC):
            self._transport = config.transport
            self._broadcast = Broadcast(source, sink, config.timeout_s, config.transport is Transport.IPC)
        self._loading: asyncio.Future[list[float]] | None = None

    async def publish(self, version: int, wait: bool = True) -> Publication:
        """Give every sink the source's current weights, stamped with ``version``. Without ``wait`` it returns as soon
        as the source may change its weights again (by broadcast or IPC: when they have arrived); what goes wrong
        afterwards rises from the next call."""
        await self.settled()
        started = time.monotonic()
        if self._broadcast is not None and self._sink.members() and not self._sink.joining:
            try:
                seconds = await self._broadcast.publish(version)
            except NotDelivered as error:
                logger.warning(
                    "version %d did not arrive by %s, it goes through the object store: %s (the next one tries a new "
                    "group)", version, self._transport, error,
                )  # fmt: skip
            else:
                self._loading = asyncio.get_running_loop().create_future()
                self._loading.set_result(seconds)
                return Publication(version, time.monotonic() - started, max(seconds), self._transport)
        buckets = await self._source.weights()
        gather_s = time.monotonic() - started
        self._loading = asyncio.create_task(self._sink.load_weights(version, buckets))
        return Publication(version, gather_s, await self.settled() if wait else None)

    async def settled(self) -> float | None:
        """Wait until what was published has arrived everywhere; seconds that the slowest sink took, None where nothing
        was published yet."""
        return None if self._loading is None else max(await asyncio.shield(self._loading))
