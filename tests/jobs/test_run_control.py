"""The mailbox of a run, on a real Ray; the command from another process, as from another terminal."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ergo_rl.cluster.placement import Cluster
from ergo_rl.jobs.commands.scale import main
from ergo_rl.jobs.config import ConfigError
from ergo_rl.jobs.run_control import ADDRESS, WorkerCounts, ask, serve_run_control
from tests.conftest import ROOT


class SmallPool:
    def __init__(self) -> None:
        self.size = 1

    async def resize(self, workers: int) -> None:
        if workers > 3:
            raise TimeoutError("1 of 3 new workers did not start")
        self.size = workers


def crew(folder: Path) -> tuple[Any, Any, Any]:
    folder.mkdir(parents=True)
    return SimpleNamespace(folder=folder, view=SimpleNamespace(say=lambda text: None)), SmallPool(), SmallPool()


def test_run_obeys_requests_to_its_control_actor(ray_cluster: Cluster, tmp_path: Path) -> None:
    run, rollouts, rewards = crew(tmp_path / "panels")

    async def story() -> None:
        async with serve_run_control(run.folder, run.view, rollouts, rewards):
            assert await ask("panels", WorkerCounts(rollout=3)) == "3 rollout workers"
            assert (rollouts.size, rewards.size) == (3, 1)
            said = await ask("panels", WorkerCounts(rollout=4, reward=2))
            assert said == "rollout workers not changed: 1 of 3 new workers did not start; 2 reward workers"
            with pytest.raises(ConfigError, match=r"no run 'other' running in this cluster; give one of: .*panels"):
                await ask("other", WorkerCounts(reward=1))
        assert not (run.folder / ADDRESS).exists()
        with pytest.raises(ConfigError, match="give one of: none"):
            await ask("panels", WorkerCounts(reward=1))

    asyncio.run(story())


def test_scale_command_works_from_another_process(ray_cluster: Cluster, tmp_path: Path) -> None:
    run, rollouts, rewards = crew(tmp_path / "runs" / "panels-2")

    async def story() -> None:
        async with serve_run_control(run.folder, run.view, rollouts, rewards):
            command = [sys.executable, "-m", "ergo_rl.jobs", "scale", str(run.folder), "--rollout-workers", "2"]
            terminal = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
            process = await asyncio.to_thread(
                subprocess.run, command, cwd=ROOT, env=terminal, capture_output=True, text=True, timeout=100
            )
            assert process.returncode == 0, process.stderr
            assert process.stdout.strip() == "2 rollout workers" and rollouts.size == 2

    asyncio.run(story())


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (None, "has no cluster.json: this run is not going on here"),
        ('{"address": "127.0.0.1:9", "namespace": "x", "token": false}', "no Ray answers at 127.0.0.1:9 (Connection"),
        ('{"address": "[/INST]", "namespace": "x"}', "no Ray answers at [/INST]"),
        ("", "cluster.json cannot be read"),
        ('{"address": 5}', "cluster.json cannot be read"),
        ("[[[", "cluster.json cannot be read"),
    ],
)
def test_scale_of_a_run_that_is_not_going_on_says_so_at_once(
    written: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if written is not None:
        (tmp_path / ADDRESS).write_text(written)
    started = time.monotonic()
    assert main([str(tmp_path), "--rollout-workers", "2"]) == 1
    said = capsys.readouterr().err
    assert message in said and said.startswith("ergo-rl scale: ") and said.count("\n") == 1
    assert time.monotonic() - started < 10


def test_scale_to_an_address_where_nothing_listens_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    for address in ("127.0.0.1:9", "nowhere", "127.0.0.1:many", "127.0.0.1:99999"):
        assert main(["panels", "--rollout-workers", "2", "--address", address]) == 1
        assert f"no Ray answers at {address} " in capsys.readouterr().err


def test_scale_command_without_numbers_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in ([], ["--reward-workers", "0"]):
        with pytest.raises(SystemExit):
            main(["panels", *wrong])
        assert "at least 1" in capsys.readouterr().err
