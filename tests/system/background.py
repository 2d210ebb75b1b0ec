"""Long stories of processes of their own, told in the background while the tests run on the other core.

They wait most of their time: for engines that start, for what is killed to be replaced. A test module offers its story
as ``story(folder)``, and its test asks the fixture ``background`` for the result; where few tests are run, the story is
told when it is asked for.
"""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from benchmarks.lives import LIVING

STORIES = ("tests.system.test_chaos", "tests.examples.test_quickstart", "tests.system.test_resume")
"""In this order, one after the other: two runs and the tests do not fit into 24 GB."""
WAITING = ("tests.system.test_schedulers",)
"""Beside those: they wait for minutes of a scheduler's own and need no memory."""
LATE = ("tests.system.test_pretrain", "tests.system.test_ablate", "tests.system.test_installed")
"""After those, when the shared engines have ended: a command of the tests and one of these leave no core idle."""
FEW = 200
"""Fewer quick tests than this end before a story does: then nothing is gained."""


class Background:
    """Tells the stories of the collected tests, from the moment when the first test runs."""

    def __init__(self, folder: Path, items: Sequence[pytest.Item]) -> None:
        modules = {getattr(item, "module", None).__name__ for item in items if getattr(item, "module", None)}  # type: ignore[union-attr]
        quick = sum(item.get_closest_marker("system") is None for item in items)
        wanted = [name for name in (*WAITING, *STORIES) if name in modules] if quick >= FEW else []
        self._late = [name for name in LATE if name in modules] if quick >= FEW else []
        self._folder, self._threads = folder, ThreadPoolExecutor(1, "stories")
        self._waiting = ThreadPoolExecutor(1, "waiting stories")
        self._told = {name: self._start(name) for name in wanted}

    def _start(self, name: str) -> Future[None]:
        return (self._waiting if name in WAITING else self._threads).submit(self._tell, name)

    def _tell(self, name: str) -> None:
        folder = self._folder / name.rpartition(".")[2]
        folder.mkdir(parents=True)
        importlib.import_module(name).story(folder)
        shutil.rmtree(folder)

    def begin_late(self) -> None:
        """The shared engines have ended."""
        while self._late:
            name = self._late.pop(0)
            self._told[name] = self._start(name)

    def result(self, name: str) -> None:
        """Returns when the story has been told to its end. Raises what the story raised; its folder is kept then."""
        told = self._told.get(name) or self._start(name)
        told.result()

    def close(self) -> None:
        """What is still being told ends: its processes are killed."""
        for threads in (self._threads, self._waiting):
            threads.shutdown(wait=False, cancel_futures=True)
        for process in list(LIVING):
            process.kill()
        with suppress(OSError):  # not empty: a story failed
            self._folder.rmdir()
