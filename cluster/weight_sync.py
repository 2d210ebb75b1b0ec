"""Weight sync, the driver's side: from the learner to every inference engine, by one of three transports.

*Object store*: the learner puts buckets (``cluster.weight_buckets``) into Ray's object store and every rollout worker
pulls them, on whatever node it is. It works everywhere, and it delivers whatever the other two cannot. The direct
transports reach all engines at once, driven by the learner (``cluster.weight_sender``): *broadcast* is vLLM's NCCL
engine, for learner and engines on GPUs of their own; *ipc* needs both on one machine: vLLM's CUDA IPC engine where they
share GPUs, shared memory where they have none.

**Workers that start late** (new ones, replacements) missed the direct transfer, and the learner may have moved on
since. ``WeightProvider.weights_revision`` counts the calls that change its weights; calls run in the order in which
they were issued. While the count is the one at the publish, the weights fetched now are the ones that were published,
so the late worker gets them through the object store under that version. Otherwise nobody can fetch the published
weights any more; but then the driver is between an update and the publish that follows, for which it needs no rollouts,
so that publish will come even if the only worker has died. The late worker waits for it, and it takes the object store
because somebody is waiting (``WeightReceivers.has_pending_workers``).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import ray

from ergo_rl.cluster.config import Transport, WeightsConfig
from ergo_rl.errors import ErgoError

logger = logging.getLogger(__name__)


class WeightSyncFailed(ErgoError, RuntimeError):
    """A direct transfer did not reach every engine. The message says which one failed and how."""


class WeightSnapshot:
    """The weights of one published version, for workers that missed the transfer."""

    def __init__(self, version: int, fetch: Callable[[], Awaitable[Sequence[ray.ObjectRef] | None]]) -> None:
        self.version, self._fetch = version, fetch
        self._buckets: Sequence[ray.ObjectRef] | None = None
        self._fetching = asyncio.Lock()
        self.outdated = asyncio.Event()
        """Set once another version was published."""

    async def buckets(self) -> Sequence[ray.ObjectRef] | None:
        """Fetch the buckets once and return the same objects to every caller. None: they are gone, and another publish
        is about to follow."""
        async with self._fetching:
            if self._buckets is None:
                self._buckets = await self._fetch()
            return self._buckets


class WeightProvider(Protocol):
    """Whoever has the weights: the learner."""

    weights_revision: int
    """Number of calls issued so far that change the weights (update, restore)."""

    async def weights(self) -> Sequence[ray.ObjectRef]:
        """Put the current weights into the object store, each object a ``Bucket``. They may change once it returns."""

    async def connect(self, transport: Transport, engines: Sequence[Any], processes: int, timeout_s: float) -> None:
        """Prepare a direct transfer to these actors, each with ``processes`` that hold weights. Replaces the connection
        of before. Raises WeightSyncFailed."""

    async def send_weights(self, version: int) -> float:
        """Replace the weights of all connected engines; seconds for which the slowest one paused. The weights may
        change once it returns. Raises WeightSyncFailed; engines that got a part stay paused until they get weights."""


class WeightReceivers(Protocol):
    """Whoever generates with the weights: the rollout workers."""

    @property
    def processes(self) -> int:
        """Processes of one member that hold weights."""

    @property
    def has_pending_workers(self) -> bool:
        """Whether a worker waits for weights before it can become a member."""

    def members(self) -> tuple[Any, ...]:
        """The actors that would receive weights now."""

    def set_target(self, snapshot: WeightSnapshot) -> None:
        """From now on a worker becomes a member only with these weights."""

    def hold_requests(self) -> AbstractAsyncContextManager[None]:
        """Inside the block new rollouts wait."""

    async def load_weights(self, version: int, buckets: Sequence[ray.ObjectRef]) -> list[float]:
        """Load the weights everywhere; seconds per worker. Returns when every worker holds ``version``. Rollouts that
        are requested meanwhile use ``version``, too."""


@dataclass(frozen=True, slots=True)
class Publication:
    """How one publish went."""

    version: int
    gather_s: float
    """Seconds for which the learner stood still."""
    load_s: float | None
    """Seconds of the slowest engine, which pauses generation for most of them; None if nobody waited for it. Only
    through the object store do these follow ``gather_s``; the direct transports do both at once."""
    transport: Transport = Transport.OBJECT_STORE


class WeightChannel:
    """From one provider to its receivers. Versions are published one after the other, in order."""

    def __init__(
        self, provider: WeightProvider, receivers: WeightReceivers, config: WeightsConfig | None = None
    ) -> None:
        """config: the result of ``WeightsConfig.for_roles``; without it everything goes through the object store."""
        self._provider, self._receivers = provider, receivers
        self._transport = Transport.OBJECT_STORE if config is None else config.transport
        self._timeout_s = 0.0 if config is None else config.timeout_s
        self._connected: tuple[Any, ...] = ()
        self._loading: asyncio.Future[list[float]] | None = None

    async def publish(self, version: int, wait: bool = True) -> Publication:
        """Give every receiver the provider's current weights, stamped with ``version``. Without ``wait`` it returns as
        soon as the provider may change its weights again (with a direct transport: when they have arrived); an error
        after that is raised by the next call."""
        await self.settled()
        started = time.monotonic()
        direct = self._transport in (Transport.BROADCAST, Transport.IPC)
        if direct and self._receivers.members() and not self._receivers.has_pending_workers:
            try:
                seconds = await self._send(version)
            except WeightSyncFailed as error:
                logger.warning(
                    "version %d did not arrive by %s and goes through the object store: %s (the next publish connects "
                    "anew)", version, self._transport, error,
                )  # fmt: skip
            else:
                self._loading = asyncio.get_running_loop().create_future()
                self._loading.set_result([seconds])
                return Publication(version, time.monotonic() - started, seconds, self._transport)
        buckets = await self._provider.weights()
        gather_s = time.monotonic() - started
        self._loading = asyncio.create_task(self._receivers.load_weights(version, buckets))
        return Publication(version, gather_s, await self.settled() if wait else None)

    async def settled(self) -> float | None:
        """Wait until the last publish has arrived everywhere; seconds of the slowest receiver, None before the first
        publish."""
        return None if self._loading is None else max(await asyncio.shield(self._loading))

    async def _send(self, version: int) -> float:
        connected, self._connected = self._connected, ()
        members = self._receivers.members()
        if connected != members:
            await self._provider.connect(self._transport, members, self._receivers.processes, self._timeout_s)
        if members != self._receivers.members():
            raise WeightSyncFailed("workers came or went while the learner connected to them")
        # Nothing is awaited between the check above and this line, so whoever becomes a member later has seen it.
        self._receivers.set_target(WeightSnapshot(version, self._fetch_while_unchanged()))
        async with self._receivers.hold_requests():
            seconds = await self._provider.send_weights(version)
        self._connected = members
        return seconds

    def _fetch_while_unchanged(self) -> Callable[[], Awaitable[Sequence[ray.ObjectRef] | None]]:
        provider, revision = self._provider, self._provider.weights_revision

        async def fetch() -> Sequence[ray.ObjectRef] | None:
            return await provider.weights() if provider.weights_revision == revision else None

        return fetch
