"""Weights to all engines at once, by a broadcast or from memory to memory: the driver's side. Light: the group itself
is ``cluster.collective``.

The learner sends; every worker process of every engine receives. A group lives as long as its members do:
when rollout workers come, go or are replaced, when the learner is another one, and after anything went wrong, a new one
meets under a number of its own, and nobody takes part in a broadcast of another number than that of his group.

**Who comes late** (new workers, replacements) was in no broadcast, and the learner may have gone on since. So:
``Sender.changes`` counts on the driver what was asked of the learner that changes its weights, and a learner does what
it is asked in the order in which it was asked. While that number is the one at the publish, weights asked for now are
those that were published, and the latecomer takes them over by way of the object store, stamped with that version.
Once it is another, nobody can have the published weights any more; but then the driver is between an update and the
publish that follows it, for which it needs no rollouts: so it comes, even where the only worker died. The latecomer
waits for it, and the channel sends it through the object store because somebody is waiting (``Receivers.joining``). A
worker plays from when what it holds is what was published last, which is looked at with nothing in between.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol, TypeVar, cast

import ray

from ergo_rl.cluster.buckets import Layout
from ergo_rl.cluster.meeting import Meeting

A = TypeVar("A")
B = TypeVar("B")
_generations = itertools.count(1)


class NotDelivered(RuntimeError):
    """A broadcast did not reach everybody. The message says who failed and how."""


class Published:
    """The weights of ``version``, for whoever has missed their publish."""

    def __init__(self, version: int, fetch: Callable[[], Awaitable[Sequence[ray.ObjectRef] | None]]) -> None:
        self.version, self._fetch = version, fetch
        self._buckets: Sequence[ray.ObjectRef] | None = None
        self._one_at_a_time = asyncio.Lock()
        self.outdated = asyncio.Event()
        """Set when something else was published."""

    async def buckets(self) -> Sequence[ray.ObjectRef] | None:
        """As objects, the same for all who ask. None: they are gone, and others are about to be published."""
        async with self._one_at_a_time:
            if self._buckets is None:
                self._buckets = await self._fetch()
            return self._buckets


class Sender(Protocol):
    changes: int
    """So often was it asked for something that changes its weights."""

    @property
    def ranks(self) -> int:
        """Processes that have weights."""

    async def weights(self) -> Sequence[ray.ObjectRef]:
        """The current weights, each object a ``cluster.buckets.Bucket``. They may change again when it returns."""

    async def layouts(self) -> list[Layout]:
        """What a broadcast will send, bucket by bucket."""

    async def open(self, timeout_s: float) -> tuple[str, int]:
        """Make a place where a group can meet: its address and port."""

    async def enter(self, meeting: Meeting) -> str:
        """Meet the others there, as the ranks below ``meeting.senders``. What went wrong, or nothing."""

    async def broadcast(self, generation: int) -> str:
        """Send the current weights; they may change again when it returns. What went wrong, or nothing."""


class Receivers(Protocol):
    @property
    def processes(self) -> int:
        """Of one member."""

    @property
    def joining(self) -> bool:
        """Somebody waits for weights in order to become a member."""

    def members(self) -> tuple[Any, ...]:
        """Who would receive now."""

    def announce(self, published: Published) -> None:
        """From here on this is what has to be held to become a member."""

    async def enter(self, meeting: Meeting, members: Sequence[Any]) -> None:
        """Have them all meet there, with ranks from ``meeting.senders`` in their order. Raises NotDelivered."""

    async def receive(
        self, version: int, meeting: Meeting, layouts: Sequence[Layout], members: Sequence[Any]
    ) -> list[float]:
        """Take over what is broadcast; seconds per member. Returns when all hold ``version``.

        Raises NotDelivered, with everybody's part at its end; who holds half of it does not play until it is given
        weights by another way."""


class Broadcast:
    """From one sender to whoever receives at the time. ``ipc``: from memory to memory (``cluster.lending``)."""

    def __init__(self, sender: Sender, receivers: Receivers, timeout_s: float, ipc: bool = False) -> None:
        self._sender, self._receivers, self._timeout_s, self._ipc = sender, receivers, timeout_s, ipc
        self._group: tuple[Meeting, tuple[Any, ...]] | None = None
        self._layouts: list[Layout] = []

    async def publish(self, version: int) -> list[float]:
        """Seconds per receiver. It is over for the sender when it is for the receivers, so that after NotDelivered the
        sender still has what was not delivered. The next publish meets anew, then."""
        group, self._group = self._group, None
        if group is None or group[1] != self._receivers.members():
            group = await self._meet()
        meeting, members = group
        self._layouts = self._layouts or await self._sender.layouts()  # they stay as they are
        # No await from here to the announcement: whoever becomes a member later has seen it.
        if members != self._receivers.members():
            raise NotDelivered("workers came or went while the group met")
        self._receivers.announce(Published(version, self._as_long_as_they_are_there()))
        why, seconds = await _both(
            self._sender.broadcast(meeting.generation),
            self._receivers.receive(version, meeting, self._layouts, members),
        )
        if why:
            raise NotDelivered(f"the learner: {why}")
        self._group = group
        return seconds

    async def _meet(self) -> tuple[Meeting, tuple[Any, ...]]:
        members = self._receivers.members()
        address, port = await self._sender.open(self._timeout_s)
        senders = self._sender.ranks if self._ipc else 1
        world = senders + self._receivers.processes * len(members)
        meeting = Meeting(next(_generations), address, port, world, self._timeout_s, senders, self._ipc)
        why, _ = await _both(self._sender.enter(meeting), self._receivers.enter(meeting, members))
        if why:
            raise NotDelivered(f"the learner: {why}")
        return meeting, members

    def _as_long_as_they_are_there(self) -> Callable[[], Awaitable[Sequence[ray.ObjectRef] | None]]:
        sender, changes = self._sender, self._sender.changes

        async def fetch() -> Sequence[ray.ObjectRef] | None:
            return await sender.weights() if sender.changes == changes else None

        return fetch


async def _both(one: Awaitable[A], other: Awaitable[B]) -> tuple[A, B]:
    """Both to their ends, whatever becomes of either; what the first raises rises first."""
    first, second = await asyncio.gather(one, other, return_exceptions=True)
    for result in (first, second):
        if isinstance(result, BaseException):
            raise result
    return cast(A, first), cast(B, second)
