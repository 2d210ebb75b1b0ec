"""A pool of like Ray actors: spread calls, replace the dead and the hung, resubmit what they held, resize meanwhile."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError

logger = logging.getLogger(__name__)

Spawn = Callable[[int], ActorHandle]
"""Creates the actor with this index. The actor has an async method ``start()`` that returns when it is ready."""
Prepare = Callable[[ActorHandle], Awaitable[None]]
"""Brings a started worker up to date before it is used (its weights, say)."""
LONGEST_BACKOFF_S = 60.0


class PoolExhausted(RuntimeError):
    """Workers kept dying and the budget of restarts is spent."""


class WorkerDied(RuntimeError):
    """Raised by a worker's method: this worker can do nothing any more (its engine is gone), so replace it. One that
    answered all calls with errors, at once, would draw all the work."""


DEAD = (RayActorError, OutOfMemoryError, WorkerDied)
"""A worker's death: Ray's words for an actor that has ended (the second where its memory monitor ended it), and its
own."""


@dataclass(frozen=True, slots=True)
class Faults:
    """What a pool does about workers that fail. restarts: replacements before it gives up; hang_timeout_s: a worker
    that has work and finishes none of it for so long counts as dead; backoff_s: wait before the second replacement in a
    row, doubled each time, ``LONGEST_BACKOFF_S`` at most (a call that succeeds ends the row)."""

    restarts: int = 3
    hang_timeout_s: float = 900.0
    backoff_s: float = 2.0


class _Hung(Exception):
    """A worker has work and finishes none of it."""


@dataclass(eq=False)
class _Worker:
    index: int
    actor: ActorHandle
    load: int = 0
    progress: float = 0.0
    """When it last began to have work or finished some (``time.monotonic``)."""
    in_a_row: int = 0
    """Replacements since it last finished a call."""
    missed: float | None = None
    """When it was found dead, until its replacement has done its first work."""
    starting: bool = False
    """Its actor (a replacement) is not up yet: the cluster may have no room for it for a long time."""
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    repair: asyncio.Task[None] | None = None


class Pool:
    """Calls go to the least loaded worker. One asyncio loop owns the pool.

    A worker's death is no caller's business, nor that it hangs: the worker is replaced, the others make its calls
    meanwhile, until the budget of restarts is spent (PoolExhausted). What a method raises rises here as it was
    raised."""

    def __init__(
        self,
        spawn: Spawn,
        size: int,
        faults: Faults | None = None,
        name: str = "workers",
        prepare: Prepare | None = None,
    ):
        if size < 1:
            raise ValueError(f"a pool of {name} needs at least one worker, got {size}")
        self._spawn, self._prepare, self.name = spawn, prepare, name
        self._faults = faults or Faults()
        self._restarts_left = self._faults.restarts
        self._start_deadline_s: float | None = None
        self._exhausted = ""
        self.restarts = 0
        self._workers = [_Worker(index, spawn(index)) for index in range(size)]
        self._next_index = size
        self._changed = asyncio.Condition()
        self._resizing = asyncio.Lock()

    def __len__(self) -> int:
        return len(self._workers)

    async def ready(self, deadline_s: float) -> None:
        """Wait until every worker has started; replacements are given as long. Raises TimeoutError with what is free in
        the cluster, PoolExhausted where one dies."""
        self._start_deadline_s = deadline_s
        try:
            await asyncio.wait_for(together(*(self._start(worker) for worker in self._workers)), deadline_s)
        except TimeoutError:
            up = sum(worker.ready.is_set() for worker in self._workers)
            free = {k: v for k, v in ray.available_resources().items() if k in ("CPU", "GPU")}
            raise TimeoutError(
                f"only {up} of {len(self._workers)} {self.name} were ready after {deadline_s:.0f} s; "
                f"free in the cluster: {free}. Ask for fewer, or for less per worker."
            ) from None
        except DEAD as error:
            raise PoolExhausted(f"{self.name}: one died while it started: {error}") from error

    async def call(self, method: str, *args: Any, num_returns: int = 1) -> Any:
        """Call ``method`` on the least loaded worker. References among ``args`` go to Ray as they are.

        With ``num_returns`` above 1 only the first return value is awaited; the others come back as
        references owned by this process, so they outlive the worker."""
        while True:
            worker = await self._least_loaded()
            actor = worker.actor
            try:
                answer = getattr(actor, method).options(num_returns=num_returns).remote(*args)
                first = await self._watched(worker, answer if num_returns == 1 else answer[0])
                self._back(worker)
                return first if num_returns == 1 else (first, *answer[1:])
            except (*DEAD, _Hung) as error:
                self._replace(worker, actor, error)

    async def call_all(self, method: str, *args: Any) -> list[Any]:
        """Call ``method`` on every worker that is up, at least one. A replacement that has not started is left out
        while others are up: where a machine was lost there may be no room for it. It is prepared when it has."""
        workers = list(self._workers)
        answers = await asyncio.gather(*(self._call_one(worker, method, args) for worker in workers))
        return [answer[0] for answer in answers if answer]

    def up(self) -> tuple[ActorHandle, ...]:
        """The actors that take calls now."""
        return tuple(worker.actor for worker in self._workers if worker.ready.is_set())

    async def call_each(self, method: str, calls: Sequence[tuple[ActorHandle, tuple[Any, ...]]]) -> list[Any]:
        """Call ``method`` once on each of these actors, with its own arguments; returns when all have ended. What an
        actor raised, or that it died, stands in place of its answer: nothing is called again, but the dead are
        replaced."""
        return await asyncio.gather(*(self._call_once(actor, method, args) for actor, args in calls))

    async def resize(self, size: int) -> None:
        """Grow or shrink. New workers take calls once started and prepared; removed ones finish what they hold.

        Raises TimeoutError where a new one does not come up within the deadline of ``ready``; it is gone then."""
        if size < 1:
            raise ValueError(f"a pool of {self.name} needs at least one worker, got {size}")
        async with self._resizing:
            await self._resized(size)

    async def _resized(self, size: int) -> None:
        removed, self._workers = self._workers[size:], self._workers[:size]
        indices = range(self._next_index, self._next_index + size - len(self._workers))
        added = [_Worker(index, self._spawn(index)) for index in indices]
        self._next_index += len(added)
        draining = asyncio.gather(*(self._drain(worker) for worker in removed))
        starts = [asyncio.wait_for(self._join(worker), self._start_deadline_s) for worker in added]
        failures = [error for error in await asyncio.gather(*starts, return_exceptions=True) if error is not None]
        await draining
        for worker in [worker for worker in added if not worker.ready.is_set()]:
            if worker in self._workers:
                self._workers.remove(worker)
            ray.kill(worker.actor)
        if failures:
            raise TimeoutError(
                f"{len(failures)} of {len(added)} new {self.name} did not start: {type(failures[0]).__name__} "
                f"{failures[0]}; there are {len(self)} now"
            ) from failures[0]

    async def close(self) -> None:
        for worker in self._workers:
            if worker.repair is not None:
                worker.repair.cancel()
            ray.kill(worker.actor)
        self._workers = []

    async def _join(self, worker: _Worker) -> None:
        """A new worker comes into the list when it has started: ``call_all`` does not wait for its start, and from then
        on cannot miss it."""
        await self._begin(worker.actor.start.remote())
        self._workers.append(worker)
        await self._admit(worker)

    async def _start(self, worker: _Worker) -> None:
        await self._begin(worker.actor.start.remote())
        worker.starting = False  # from here on ``call_all`` waits for it: it may be being given what is out of date
        await self._admit(worker)

    @staticmethod
    async def _begin(started: Awaitable[Any]) -> None:
        try:
            await started
        except RayTaskError as error:
            raise _original(error) from error

    async def _admit(self, worker: _Worker) -> None:
        if self._prepare is not None:
            await self._begin(self._prepare(worker.actor))
        worker.ready.set()
        async with self._changed:
            self._changed.notify_all()

    async def _least_loaded(self) -> _Worker:
        async with self._changed:
            while True:
                if self._exhausted:
                    raise PoolExhausted(self._exhausted)
                if ready := [worker for worker in self._workers if worker.ready.is_set()]:
                    break
                await self._changed.wait()
        return min(ready, key=lambda worker: (worker.load, worker.index))

    async def _call_one(self, worker: _Worker, method: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """(answer,), or () where the worker is left out."""
        while True:
            if worker.starting and any(other.ready.is_set() for other in self._workers):
                return ()
            await self._until_ready(worker)
            actor = worker.actor
            try:
                return (await self._watched(worker, getattr(actor, method).remote(*args)),)
            except (*DEAD, _Hung) as error:
                self._replace(worker, actor, error)

    async def _call_once(self, actor: ActorHandle, method: str, args: tuple[Any, ...]) -> Any:
        worker = next((worker for worker in self._workers if worker.actor is actor), None)
        if worker is None:
            return LookupError("it is no worker any more")
        try:
            return await self._watched(worker, getattr(actor, method).remote(*args))
        except (*DEAD, _Hung) as error:
            self._replace(worker, actor, error)
            return error
        except Exception as error:  # the caller's to judge
            return error

    async def _until_ready(self, worker: _Worker) -> None:
        async with self._changed:
            while not worker.ready.is_set():
                if self._exhausted:
                    raise PoolExhausted(self._exhausted)
                await self._changed.wait()

    async def _watched(self, worker: _Worker, answer: ray.ObjectRef) -> Any:
        """The answer, unless the worker hangs: it has work, and no call of it has ended for ``hang_timeout_s``."""
        if worker.load == 0:
            worker.progress = time.monotonic()
        worker.load += 1
        waiting = asyncio.ensure_future(_awaited(answer))
        try:
            while not waiting.done():
                left = worker.progress + self._faults.hang_timeout_s - time.monotonic()
                if left <= 0:
                    raise _Hung(f"it finished nothing for {self._faults.hang_timeout_s:.0f} s")
                await asyncio.wait({waiting}, timeout=left)
            failure = waiting.exception()
            if isinstance(failure, RayTaskError):
                failure = _original(failure)
            if not isinstance(failure, DEAD):
                worker.progress, worker.in_a_row = time.monotonic(), 0
            if failure is not None:
                raise failure from failure.__cause__
            return waiting.result()
        except asyncio.CancelledError:
            ray.cancel(answer)  # nobody waits for it: let the worker do something else
            raise
        finally:
            worker.load -= 1
            waiting.cancel()

    def _replace(self, worker: _Worker, dead: ActorHandle, error: Exception) -> None:
        """Begin to replace a dead actor. Many callers may see one death: one repair is begun."""
        if worker.actor is dead and worker.repair is None:
            worker.ready.clear()
            worker.missed = time.monotonic()
            worker.starting = True
            worker.repair = asyncio.create_task(self._repair(worker, error))

    async def _repair(self, worker: _Worker, error: Exception) -> None:
        try:
            while self._restarts_left:
                self._restarts_left -= 1
                self.restarts += 1
                logger.warning(
                    "%s: worker %d died (%s: %s); replacing it (%d left)",
                    self.name, worker.index, type(error).__name__, on_one_line(error)[:300], self._restarts_left,
                )  # fmt: skip
                ray.kill(worker.actor)  # a hung one, or what is left of it
                if worker.in_a_row:
                    wait_s = self._faults.backoff_s * 2 ** (worker.in_a_row - 1)
                    await asyncio.sleep(min(wait_s, LONGEST_BACKOFF_S))
                worker.in_a_row += 1
                worker.starting = True
                worker.actor = self._spawn(worker.index)
                try:
                    await asyncio.wait_for(self._start(worker), self._start_deadline_s)
                    return
                except Exception as another:  # whatever it is, the budget bounds how often it is tried
                    error = another
            why = f"{type(error).__name__} {on_one_line(error)}"
            self._exhausted = f"{self.name}: worker {worker.index} died and no restarts are left: {why}"
            logger.error(self._exhausted)
        finally:
            worker.repair = None
            async with self._changed:
                self._changed.notify_all()

    def _back(self, worker: _Worker) -> None:
        if worker.missed is not None and worker.ready.is_set():
            waited, worker.missed = time.monotonic() - worker.missed, None
            logger.warning(
                "%s: worker %d has done its first work, %.1f s after it was found dead", self.name, worker.index, waited
            )

    async def _drain(self, worker: _Worker) -> None:
        while worker.load:
            await asyncio.sleep(0.1)
        ray.kill(worker.actor)


def on_one_line(error: BaseException) -> str:
    """Ray's messages have many, and a log is read line by line."""
    return " ".join(str(error).split())


async def together(*work: Coroutine[Any, Any, Any]) -> None:
    """Wait for all; the first error cancels the others and rises as it is."""
    try:
        async with asyncio.TaskGroup() as group:
            for one in work:
                group.create_task(one)
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None


def _original(error: RayTaskError) -> Exception:
    """What the method raised, with Ray's account of where it happened as a note."""
    cause = error.cause
    if not isinstance(cause, Exception):
        return error
    cause.add_note(str(error))
    return cause


async def _awaited(answer: Awaitable[Any]) -> Any:
    return await answer
