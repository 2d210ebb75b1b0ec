"""Graceful shutdown: the first SIGTERM, SIGHUP or Ctrl-C, or a stdout that nobody reads any more, ends the run saved,
the second ends the process at once; and asyncio from a script or a notebook."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from ergo_rl.errors import ErgoError
from ergo_rl.jobs.console_display import ConsoleDisplay

T = TypeVar("T")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SAME_REQUEST_S = 2.0
"""Schedulers and wrappers send a signal to a group of processes, and those pass it on: what comes within this time
is the same request. Not so Ctrl-C, which a person pressed twice."""


class Stopped(ErgoError):
    """The run was asked to stop."""

    def __init__(self, number: int) -> None:
        self.exit_status = 128 + number  # as shells have it
        super().__init__(f"stopped by {signal.Signals(number).name}")


class GracefulShutdown:
    """Whether the run was asked to stop. Without ``on_signals`` no signal handler is installed.

    Example::

        with GracefulShutdown.on_signals(console) as shutdown:
            groups = await shutdown.run_or_stop(scheduler.take(...))  # dropped when a signal arrives
            await learners.update(groups)  # finished even when a signal arrives
            shutdown.raise_if_requested()
    """

    def __init__(self, console: ConsoleDisplay) -> None:
        self._console, self._number, self._at = console, 0, 0.0
        self._requested = asyncio.Event()

    @classmethod
    @contextmanager
    def on_signals(cls, console: ConsoleDisplay) -> Iterator[GracefulShutdown]:
        """Handle signals within the block. Enter it after Ray was started, which sets a handler for SIGTERM, too."""
        shutdown, loop = cls(console), asyncio.get_running_loop()
        obeyed = [number for number in SIGNALS if number != signal.SIGHUP or not _ignored(number)]
        for number in obeyed:
            loop.add_signal_handler(number, shutdown.request, number)

        def closed() -> None:
            loop.call_soon_threadsafe(shutdown.request, signal.SIGPIPE)

        console.on_closed = closed
        try:
            yield shutdown
        finally:
            for number in obeyed:
                loop.remove_signal_handler(number)

    def request(self, number: int) -> None:
        """Ask the run to stop as if by signal ``number``. The second request ends the process without saving."""
        if self._requested.is_set():
            again = number == signal.SIGTERM and time.monotonic() < self._at + SAME_REQUEST_S
            if again or number in (signal.SIGHUP, signal.SIGPIPE):  # a terminal that goes asks for nothing more
                return
            self._console.close()
            with suppress(OSError):
                print("quitting at once; what was not saved is lost", file=sys.stderr, flush=True)
            os._exit(128 + number)
        self._number, self._at = number, time.monotonic()
        self._requested.set()
        self._console.say(
            ("stopping:", "yellow"),
            " this step is finished, or dropped where it has not learned yet, then the run is saved; Ctrl-C once more "
            "quits at once",
        )

    def raise_if_requested(self) -> None:
        """Raises Stopped."""
        if self._requested.is_set():
            raise Stopped(self._number)

    async def run_or_stop(self, work: Coroutine[Any, Any, T]) -> T:
        """Return what ``work`` returns. Raises Stopped, with ``work`` cancelled, where a request comes first."""
        task, requested = asyncio.ensure_future(work), asyncio.ensure_future(self._requested.wait())
        try:
            await asyncio.wait({task, requested}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise Stopped(self._number)
            return task.result()
        finally:
            requested.cancel()
            if not task.done():
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)


def _ignored(number: int) -> bool:
    """Whether whoever started this process wants it to live on, as nohup does for SIGHUP."""
    return signal.getsignal(number) == signal.SIG_IGN


def run_blocking(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """``asyncio.run``; in a thread of its own where this thread runs an event loop already, as notebooks do.

    Ctrl-C cancels the work and waits for it to clean up."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work())
    started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Task[T]]] = Future()

    async def main() -> T:
        task = asyncio.ensure_future(work())
        started.set_result((asyncio.get_running_loop(), task))
        return await task

    with ThreadPoolExecutor(max_workers=1) as threads:
        result = threads.submit(lambda: asyncio.run(main()))
        try:
            return result.result()
        except KeyboardInterrupt:
            loop, task = started.result()
            loop.call_soon_threadsafe(task.cancel)
            raise
