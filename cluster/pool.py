"""A pool of like Ray actors: spread calls, replace the dead, resubmit what they held, resize while running."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayTaskError

logger = logging.getLogger(__name__)

Spawn = Callable[[int], ActorHandle]
"""Creates the actor with this index. The actor has an async method ``start()`` that returns when it is ready."""
Prepare = Callable[[ActorHandle], Awaitable[None]]
"""Brings a started worker up to date before it is used (its weights, say)."""


class PoolExhausted(RuntimeError):
    """Workers kept dying and the budget of restarts is spent."""


@dataclass(eq=False)
class _Worker:
    index: int
    actor: ActorHandle
    load: int = 0
    ready: asyncio.Event = field(default_factory=asyncio.Event)


class Pool:
    """Calls go to the least loaded worker. One asyncio loop owns the pool.

    A worker's death is no caller's business: the worker is replaced and the call is made again, until the
    budget of ``restarts`` is spent (PoolExhausted). What a method raises rises here as it was raised."""

    def __init__(
        self, spawn: Spawn, size: int, restarts: int = 3, name: str = "workers", prepare: Prepare | None = None
    ):
        if size < 1:
            raise ValueError(f"a pool of {name} needs at least one worker, got {size}")
        self._spawn, self._prepare, self.name = spawn, prepare, name
        self._restarts_left = restarts
        self._exhausted = ""
        self.restarts = 0
        self._workers = [_Worker(index, spawn(index)) for index in range(size)]
        self._next_index = size
        self._changed = asyncio.Condition()

    def __len__(self) -> int:
        return len(self._workers)

    async def ready(self, deadline_s: float) -> None:
        """Wait until every worker has started. Raises TimeoutError with what is free in the cluster."""
        try:
            await asyncio.wait_for(together(*(self._start(worker) for worker in self._workers)), deadline_s)
        except TimeoutError:
            up = sum(worker.ready.is_set() for worker in self._workers)
            free = {k: v for k, v in ray.available_resources().items() if k in ("CPU", "GPU")}
            raise TimeoutError(
                f"only {up} of {len(self._workers)} {self.name} were ready after {deadline_s:.0f} s; "
                f"free in the cluster: {free}. Ask for fewer, or for less per worker."
            ) from None

    async def call(self, method: str, *args: Any, num_returns: int = 1) -> Any:
        """Call ``method`` on the least loaded worker. References among ``args`` go to Ray as they are.

        With ``num_returns`` above 1 only the first return value is awaited; the others come back as
        references owned by this process, so they outlive the worker."""
        while True:
            worker = await self._least_loaded()
            actor = worker.actor
            worker.load += 1
            try:
                answer = getattr(actor, method).options(num_returns=num_returns).remote(*args)
                if num_returns == 1:
                    return await answer
                return (await answer[0], *answer[1:])
            except RayTaskError as error:
                raise _original(error) from error
            except RayActorError as error:
                await self._replace(worker, actor, error)
            finally:
                worker.load -= 1

    async def call_all(self, method: str, *args: Any) -> list[Any]:
        """Call ``method`` on every worker; a worker that dies meanwhile is replaced, prepared and called again."""
        return list(await asyncio.gather(*(self._call_one(worker, method, args) for worker in list(self._workers))))

    async def resize(self, size: int) -> None:
        """Grow or shrink. New workers take calls once started and prepared; removed ones finish what they hold."""
        if size < 1:
            raise ValueError(f"a pool of {self.name} needs at least one worker, got {size}")
        added: list[_Worker] = []
        while len(self._workers) + len(added) < size:
            added.append(_Worker(self._next_index, self._spawn(self._next_index)))
            self._next_index += 1
        self._workers += added
        removed, self._workers = self._workers[size:], self._workers[:size]
        await asyncio.gather(*(self._start(worker) for worker in added), *(self._drain(worker) for worker in removed))

    async def close(self) -> None:
        for worker in self._workers:
            ray.kill(worker.actor)
        self._workers = []

    async def _start(self, worker: _Worker) -> None:
        try:
            await worker.actor.start.remote()
            if self._prepare is not None:
                await self._prepare(worker.actor)
        except RayTaskError as error:
            raise _original(error) from error
        worker.ready.set()
        async with self._changed:
            self._changed.notify_all()

    async def _least_loaded(self) -> _Worker:
        async with self._changed:
            while not (ready := [worker for worker in self._workers if worker.ready.is_set()]):
                if self._exhausted:
                    raise PoolExhausted(self._exhausted)
                await self._changed.wait()
        return min(ready, key=lambda worker: (worker.load, worker.index))

    async def _call_one(self, worker: _Worker, method: str, args: tuple[Any, ...]) -> Any:
        while True:
            await worker.ready.wait()
            actor = worker.actor
            try:
                return await getattr(actor, method).remote(*args)
            except RayTaskError as error:
                raise _original(error) from error
            except RayActorError as error:
                await self._replace(worker, actor, error)

    async def _replace(self, worker: _Worker, dead: ActorHandle, error: RayActorError) -> None:
        """Replace a dead actor in its place; many callers may see one death, the first one acts."""
        if worker.actor is not dead:
            return
        worker.ready.clear()
        if self._restarts_left == 0:
            self._exhausted = f"{self.name}: worker {worker.index} died and no restarts are left: {error}"
            async with self._changed:
                self._changed.notify_all()
            raise PoolExhausted(self._exhausted) from error
        self._restarts_left -= 1
        self.restarts += 1
        logger.warning("%s: worker %d died (%s); replacing it", self.name, worker.index, type(error).__name__)
        worker.actor = self._spawn(worker.index)
        await self._start(worker)

    async def _drain(self, worker: _Worker) -> None:
        while worker.load:
            await asyncio.sleep(0.1)
        ray.kill(worker.actor)


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
