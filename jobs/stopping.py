"""SIGTERM and Ctrl-C: the step is finished or dropped, the run is saved. A second signal ends the process at once."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from ergo_rl.jobs.view import View

T = TypeVar("T")
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(Exception):
    """Somebody asked the run to stop. ``number``: of the signal."""

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(f"stopped by {signal.Signals(number).name}")


class Stop:
    """Whether the run was asked to stop."""

    def __init__(self, view: View) -> None:
        self._view, self._number = view, 0
        self._asked = asyncio.Event()

    @classmethod
    @contextmanager
    def on_signals(cls, view: View) -> Iterator[Stop]:
        """Within the block signals are requests. After Ray was started: it sets a handler for SIGTERM, too."""
        stop, loop = cls(view), asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, stop.ask, number)
        try:
            yield stop
        finally:
            for number in SIGNALS:
                loop.remove_signal_handler(number)

    def ask(self, number: int) -> None:
        if self._asked.is_set():
            self._view.leave()
            print("quitting at once; what was not saved is lost", file=sys.stderr, flush=True)
            os._exit(128 + number)
        self._number = number
        self._asked.set()
        self._view.say(
            "[yellow]stopping:[/yellow] this step is finished, or dropped where it has not learned yet, then the run "
            "is saved; Ctrl-C once more quits at once"
        )

    def check(self) -> None:
        """Raises Stopped where the run was asked to stop."""
        if self._asked.is_set():
            raise Stopped(self._number)

    async def unless(self, work: Coroutine[Any, Any, T]) -> T:
        """What ``work`` returns; Stopped, with ``work`` cancelled, where a request comes first."""
        task, asked = asyncio.ensure_future(work), asyncio.ensure_future(self._asked.wait())
        try:
            await asyncio.wait({task, asked}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise Stopped(self._number)
            return task.result()
        finally:
            asked.cancel()
            if not task.done():
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
