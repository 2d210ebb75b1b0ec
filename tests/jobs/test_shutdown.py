"""Signals: the first is a request, the second ends the process at once."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ergo_rl.jobs.shutdown import GracefulShutdown, Stopped
from tests.conftest import ROOT

CONSOLE: Any = SimpleNamespace(say=print, close=lambda: None)


def test_run_or_stop_cancels_waiting_work_on_a_signal_and_returns_finished_work() -> None:
    cancelled = []

    async def work(seconds: float) -> str:
        try:
            await asyncio.sleep(seconds)
        except asyncio.CancelledError:
            cancelled.append(seconds)
            raise
        return "done"

    async def story() -> None:
        with GracefulShutdown.on_signals(CONSOLE) as shutdown:
            assert await shutdown.run_or_stop(work(0)) == "done"
            shutdown.raise_if_requested()
            os.kill(os.getpid(), signal.SIGTERM)
            with pytest.raises(Stopped, match="stopped by SIGTERM") as caught:
                await shutdown.run_or_stop(work(100))
            assert caught.value.exit_status == 128 + signal.SIGTERM and cancelled == [100]
            with pytest.raises(Stopped):
                shutdown.raise_if_requested()
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL

    asyncio.run(story())


def test_signal_that_is_passed_on_is_one_request_and_nohup_is_obeyed() -> None:
    """Slurm tells every process, and its script tells the driver once more: the second must not drop what is saved."""

    async def story() -> None:
        with GracefulShutdown.on_signals(CONSOLE) as shutdown:
            for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGHUP):
                os.kill(os.getpid(), number)
                await asyncio.sleep(0.05)
            with pytest.raises(Stopped, match="stopped by SIGTERM"):
                shutdown.raise_if_requested()
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            with GracefulShutdown.on_signals(CONSOLE) as shutdown:
                os.kill(os.getpid(), signal.SIGHUP)
                await asyncio.sleep(0.05)
                shutdown.raise_if_requested()
        finally:
            signal.signal(signal.SIGHUP, signal.SIG_DFL)

    asyncio.run(story())


def test_second_signal_ends_the_process_at_once(tmp_path: Path) -> None:
    """Even where the first one is being obeyed slowly, in a thread that nobody can cancel."""
    script = tmp_path / "slow.py"
    script.write_text(
        "import asyncio, time\n"
        "from tests.jobs.test_shutdown import CONSOLE, GracefulShutdown\n"
        "async def main():\n"
        "    with GracefulShutdown.on_signals(CONSOLE):\n"
        "        print('up', flush=True)\n"
        "        await asyncio.to_thread(time.sleep, 60)\n"
        "asyncio.run(main())\n"
    )
    process = subprocess.Popen(
        [sys.executable, str(script)], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "up\n"
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130 and time.monotonic() - started < 20
    assert "quitting at once; what was not saved is lost" in said
