"""Graceful shutdown: the first SIGTERM or Ctrl-C ends the run saved, the second ends the process at once."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from ergo_rl.errors import ErgoError
from ergo_rl.jobs.console_display import ConsoleDisplay

T = TypeVar("T")
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(ErgoError):
    """The run was asked to stop."""

    number: int
    """Of the signal."""

    def __init__(self, number: int) -> None:
        self.number = number
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
        self._console, self._number = console, 0
        self._requested = asyncio.Event()

    @classmethod
    @contextmanager
    def on_signals(cls, console: ConsoleDisplay) -> Iterator[GracefulShutdown]:
        """Handle signals within the block. Enter it after Ray was started, which sets a handler for SIGTERM, too."""
        shutdown, loop = cls(console), asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, shutdown.request, number)
        try:
            yield shutdown
        finally:
            for number in SIGNALS:
                loop.remove_signal_handler(number)

    def request(self, number: int) -> None:
        """Ask the run to stop as if by signal ``number``. The second request ends the process without saving."""
        if self._requested.is_set():
            self._console.close()
            print("quitting at once; what was not saved is lost", file=sys.stderr, flush=True)
            os._exit(128 + number)
        self._number = number
        self._requested.set()
        self._console.say(
            "[yellow]stopping:[/yellow] this step is finished, or dropped where it has not learned yet, then the run "
            "is saved; Ctrl-C once more quits at once"
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
