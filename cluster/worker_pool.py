"""A pool of identical Ray actors: spreads calls, replaces dead and hung workers, retries their calls, resizes."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorUnavailableError, OutOfMemoryError, RayActorError, RayTaskError

from ergo_rl.errors import ErgoError

logger = logging.getLogger(__name__)

Spawn = Callable[[int], ActorHandle]
"""Creates the actor with this index. The actor has an async method ``start()`` that returns when it is ready."""
Prepare = Callable[[ActorHandle], Awaitable[None]]
"""Brings a started worker up to date before it is used (its weights, say)."""
LONGEST_BACKOFF_S = 60.0


class PoolExhausted(ErgoError, RuntimeError):
    """Workers kept dying until the budget of restarts was spent."""


class WorkerDied(RuntimeError):
    """Raised by a worker's method: its engine is gone, so replace the worker. If it went on answering with errors it
    would attract all calls, because it answers at once."""


DEAD = (RayActorError, OutOfMemoryError, WorkerDied)
"""Errors that mean a worker is gone: Ray's two (the second when its memory monitor ended the actor), and its own."""


@dataclass(frozen=True, slots=True)
class Faults:
    """What a pool does about workers that fail."""

    restarts: int = 3
    """Replacements before the pool gives up."""
    hang_timeout_s: float = 900.0
    """A worker that has calls and finishes none of them for so long counts as dead."""
    backoff_s: float = 2.0
    """Wait before the second replacement in a row; doubled each time, ``LONGEST_BACKOFF_S`` at most. A finished call
    ends the row."""


class _Hung(Exception):
    """A worker has calls and finishes none of them."""


@dataclass(eq=False)
class _Worker:
    index: int
    actor: ActorHandle
    started: Awaitable[Any]
    """The answer of its ``start``, which is called when it is created, not when somebody waits for it: so pools start
    side by side."""
    load: int = 0
    progress: float = 0.0
    """When it last got its first call or finished one (``time.monotonic``)."""
    in_a_row: int = 0
    """Replacements since it last finished a call."""
    found_dead: float | None = None
    """When, until its replacement has finished its first call."""
    starting: bool = False
    """Its replacement is not up yet, perhaps for long: the cluster may have no room for it."""
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    repair: asyncio.Task[None] | None = None


class WorkerPool:
    """Calls go to the least loaded worker. One asyncio loop owns the pool.

    Callers never see a dead or hung worker: the call is retried on another one while it is replaced, until the budget
    of restarts is spent (PoolExhausted). Other errors of a method are raised as they are."""

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
        self._workers = [_Worker(index, *self._launch(index)) for index in range(size)]
        self._next_index = size
        self._changed = asyncio.Condition()
        self._resizing = asyncio.Lock()

    def __len__(self) -> int:
        return len(self._workers)

    async def ready(self, deadline_s: float) -> None:
        """Wait until every worker has started; replacements get the same deadline. One whose machine is lost meanwhile
        is placed on another.

        Raises TimeoutError with what is free in the cluster, PoolExhausted if a worker dies by itself."""
        self._start_deadline_s = deadline_s
        try:
            await asyncio.wait_for(gather_or_cancel(*(self._start(worker) for worker in self._workers)), deadline_s)
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
        """Call ``method`` on the least loaded worker. References among ``args`` are passed to Ray as they are.

        With ``num_returns`` above 1 only the first return value is awaited; the others are references owned by this
        process, so they outlive the worker."""
        while True:
            worker = await self._least_loaded()
            actor = worker.actor
            try:
                answer = getattr(actor, method).options(num_returns=num_returns).remote(*args)
                first = await self._watched(worker, answer if num_returns == 1 else answer[0])
                self._note_recovery(worker)
                return first if num_returns == 1 else (first, *answer[1:])
            except (*DEAD, _Hung) as error:
                self._replace(worker, actor, error)

    async def call_all(self, method: str, *args: Any) -> list[Any]:
        """Call ``method`` on every worker that is up, at least one. A replacement that has not started is left out
        while others are up, because after the loss of a machine there may be no room for it; it is prepared when it
        starts."""
        workers = list(self._workers)
        answers = await asyncio.gather(*(self._call_one(worker, method, args) for worker in workers))
        return [answer[0] for answer in answers if answer]

    def up(self) -> tuple[ActorHandle, ...]:
        """Return the actors that take calls now."""
        return tuple(worker.actor for worker in self._workers if worker.ready.is_set())

    async def resize(self, size: int) -> None:
        """Grow or shrink. New workers take calls once started and prepared; removed ones finish their calls.

        Raises TimeoutError if a new one does not start within the deadline of ``ready``; it is removed then."""
        if size < 1:
            raise ValueError(f"a pool of {self.name} needs at least one worker, got {size}")
        async with self._resizing:
            await self._resized(size)

    async def _resized(self, size: int) -> None:
        removed, self._workers = self._workers[size:], self._workers[:size]
        indices = range(self._next_index, self._next_index + size - len(self._workers))
        added = [_Worker(index, *self._launch(index)) for index in indices]
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

    def _launch(self, index: int) -> tuple[ActorHandle, Awaitable[Any]]:
        actor = self._spawn(index)
        return actor, actor.start.remote()

    async def _join(self, worker: _Worker) -> None:
        """List a new worker only once it has started: so ``call_all`` does not wait for its start, and from then on
        cannot miss it."""
        await self._started(worker)
        self._workers.append(worker)
        await self._admit(worker)

    async def _start(self, worker: _Worker) -> None:
        await self._started(worker)
        # From here on ``call_all`` waits for it: what it is being prepared with may be out of date by then.
        worker.starting = False
        await self._admit(worker)

    async def _started(self, worker: _Worker) -> None:
        """Wait for its ``start``. Where its machine is lost meanwhile, nothing is wrong with the worker: it is placed
        anew, on another machine as soon as Ray knows of the loss."""
        while True:
            try:
                return await self._begin(worker.started)
            except RayActorError as error:
                if not (self._restarts_left and machine_is_lost(error)):
                    raise
                self._count_restart(worker, error)
                ray.kill(worker.actor)  # its machine may only have been out of reach
                worker.actor, worker.started = self._launch(worker.index)

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
        """Return (answer,), or () if the worker is left out."""
        while True:
            if worker.starting and any(other.ready.is_set() for other in self._workers):
                return ()
            await self._until_ready(worker)
            actor = worker.actor
            try:
                return (await self._watched(worker, getattr(actor, method).remote(*args)),)
            except (*DEAD, _Hung) as error:
                self._replace(worker, actor, error)

    async def _until_ready(self, worker: _Worker) -> None:
        async with self._changed:
            while not worker.ready.is_set():
                if self._exhausted:
                    raise PoolExhausted(self._exhausted)
                await self._changed.wait()

    async def _watched(self, worker: _Worker, answer: ray.ObjectRef) -> Any:
        """Await the answer. Raises _Hung if no call of this worker, of several that may run, has ended for
        ``hang_timeout_s``."""
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
            ray.cancel(answer)  # nobody waits for it any more, so free the worker
            raise
        finally:
            worker.load -= 1
            waiting.cancel()

    def _replace(self, worker: _Worker, dead: ActorHandle, error: Exception) -> None:
        """Begin to replace a dead actor, once, however many callers see its death."""
        if worker.actor is dead and worker.repair is None:
            worker.ready.clear()
            worker.found_dead = time.monotonic()
            worker.starting = True
            worker.repair = asyncio.create_task(self._repair(worker, error))

    async def _repair(self, worker: _Worker, error: Exception) -> None:
        try:
            while self._restarts_left:
                self._count_restart(worker, error)
                ray.kill(worker.actor)  # a hung one, or what is left of it
                if worker.in_a_row:
                    wait_s = self._faults.backoff_s * 2 ** (worker.in_a_row - 1)
                    await asyncio.sleep(min(wait_s, LONGEST_BACKOFF_S))
                worker.in_a_row += 1
                worker.starting = True
                worker.actor, worker.started = self._launch(worker.index)
                try:
                    await asyncio.wait_for(self._start(worker), self._start_deadline_s)
                    return
                except Exception as another:  # whatever it is, the budget limits the attempts
                    error = another
            why = f"{type(error).__name__} {on_one_line(error)}"
            self._exhausted = f"{self.name}: worker {worker.index} died and no restarts are left: {why}"
            logger.error(self._exhausted)
        finally:
            worker.repair = None
            async with self._changed:
                self._changed.notify_all()

    def _count_restart(self, worker: _Worker, error: Exception) -> None:
        self._restarts_left -= 1
        self.restarts += 1
        logger.warning(
            "%s: worker %d died (%s: %s); replacing it (%d left)",
            self.name, worker.index, type(error).__name__, on_one_line(error)[:300], self._restarts_left,
        )  # fmt: skip

    def _note_recovery(self, worker: _Worker) -> None:
        if worker.found_dead is not None and worker.ready.is_set():
            waited, worker.found_dead = time.monotonic() - worker.found_dead, None
            logger.warning(
                "%s: worker %d has done its first work, %.1f s after it was found dead", self.name, worker.index, waited
            )

    async def _drain(self, worker: _Worker) -> None:
        while worker.load:
            await asyncio.sleep(0.1)
        ray.kill(worker.actor)


def machine_is_lost(error: RayActorError) -> bool:
    """Whether an actor is gone because its machine is: preempted, drained, or without a word, which looks at first like
    an actor that cannot be reached."""
    text = str(error)  # Ray has no type or field for it
    told = error.preempted or "its node has died" in text or "node was terminated" in text
    return told or isinstance(error, ActorUnavailableError)


def on_one_line(error: BaseException) -> str:
    """Join the lines of Ray's long messages, because logs are read line by line."""
    return " ".join(str(error).split())


async def gather_or_cancel(*work: Coroutine[Any, Any, Any]) -> list[Any]:
    """Wait for all and return their results. The first error cancels the others, whose end is waited for, and is raised
    as it is."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(coroutine) for coroutine in work]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


def _original(error: RayTaskError) -> Exception:
    """Return what the method raised, with Ray's traceback as a note."""
    cause = error.cause
    if not isinstance(cause, Exception):
        return error
    cause.add_note(str(error))
    return cause


async def _awaited(answer: Awaitable[Any]) -> Any:
    return await answer
