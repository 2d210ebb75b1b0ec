"""The folder of a run, its monitor, its samples, and the console."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray

from ergo_rl.actors.rollout_worker import summarize
from ergo_rl.actors.trajectory_store import Group, GroupResult
from ergo_rl.episodes.types import Box, Finish, Outcome, Question, Score, Trajectory, Turn, Unscored, View
from ergo_rl.jobs.checkpoint_store import step_of
from ergo_rl.jobs.config import ConfigError, TrainConfig, load_config
from ergo_rl.jobs.console_display import ConsoleDisplay, sparkline
from ergo_rl.jobs.monitor import Callback, Monitor
from ergo_rl.jobs.rollout_recorder import RolloutRecorder
from ergo_rl.jobs.run_folder import RunFolder
from tests.conftest import ROOT


@contextmanager
def open_run(config: TrainConfig, *callbacks: Callback) -> Iterator[tuple[RunFolder, Monitor]]:
    """The folder and the monitor of a run, as ``Trainer`` opens them."""
    with (
        RunFolder.open(config) as folder,
        ConsoleDisplay(config.name, config.total_steps, folder.path) as console,
        Monitor(folder.path, config.metrics, config.alerts, console, callbacks) as monitor,
    ):
        monitor.rewind(0 if folder.checkpoint is None else step_of(folder.checkpoint.name))
        yield folder, monitor


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return load_config(ROOT / "configs" / "panels.yaml", [f"runs_dir={tmp_path}", "name=story", "samples_every=2"])


def test_run_folder_gets_a_number_when_its_name_is_taken(config: TrainConfig, tmp_path: Path) -> None:
    config = replace(config, resume="never")
    for folder in ("story", "story-2", "story-3"):
        with open_run(config) as (opened, _):
            assert opened.path == tmp_path / folder
    with pytest.raises(ConfigError, match="cannot be a folder name"), open_run(replace(config, name="../story")):
        pass


def test_saved_config_loads_as_the_one_that_ran(config: TrainConfig) -> None:
    with open_run(config) as (folder, _):
        assert load_config(folder.path / "config.yaml") == config


def test_step_is_recorded_when_it_ends_and_not_when_it_fails(config: TrainConfig) -> None:
    with open_run(config) as (folder, monitor):
        with monitor.step(0) as report:
            with report.timed("learn"):
                pass
            report.add({"reward/total": 1.5})
        with pytest.raises(RuntimeError, match="in the middle"), monitor.step(1) as report:
            report.add({"reward/total": 9.0})
            raise RuntimeError("in the middle")
        (line,) = (folder.path / "metrics.jsonl").read_text().splitlines()
    found = json.loads(line)
    assert found["step"] == 0 and found["reward/total"] == 1.5 and found["time/step_s"] >= found["time/learn_s"] >= 0
    assert any((folder.path / "tensorboard").iterdir())


def test_recorded_samples_show_every_box_and_every_reward_part(config: TrainConfig) -> None:
    coarse = View(Box(0, 0, 560, 560), np.zeros((56, 56, 3), np.uint8))
    crop = View(Box(280, 280, 420, 420), np.full((56, 56, 3), 200, np.uint8))
    one = np.zeros(1, np.int32)
    turn = Turn(one, one, np.zeros(1, np.float32), "<zoom>[28, 28, 42, 42]</zoom>", Finish.STOP, 5, 3)
    found = Trajectory("q", 0, (coarse, crop), (turn, turn), Outcome.ANSWERED, "ok")
    lost = Trajectory("q", 1, (coarse,), (turn,), Outcome.BAD_BOX, "no_tag")
    scores = (Score(2.5, {"region": 1.0}), Unscored("timeout"))
    played = GroupResult("q", (summarize(found), summarize(lost)))
    group = Group(0, Question("q", b"", "Which?", "ring"), played, scores, ray.ObjectRef.nil())
    with open_run(config) as (run, _):
        recorder = RolloutRecorder(run.path / "samples", config.samples_every)
        assert [step for step in range(5) if recorder.is_due(step)] == [0, 2, 4]
        recorder.record(2, group, (found, lost), [(0.5, -0.25), (math.nan,)])
        folder = run.path / "samples" / "step-000002"
        first, second = map(json.loads, (folder / "trajectories.jsonl").read_text().splitlines())
        about = json.loads((folder / "group.json").read_text())
    assert first["crop"] == {"x1": 280, "y1": 280, "x2": 420, "y2": 420} and first["area_ratio"] == 0.0625
    assert first["total"] == 2.5 and first["parts"] == {"region": 1.0} and first["policy_versions"] == [3, 3]
    assert second["crop"] is None and second["total"] is None and second["unscored"] == "timeout"
    assert first["advantages"] == [0.5, -0.25] and second["advantages"] == [None], "NaN is no JSON"
    assert about["step"] == 2 and about["original"] == [560, 560] and about["question"]["answer"] == "ring"
    assert {path.name for path in folder.iterdir()} == {
        "coarse.png", "crop-00.png", "group.json", "trajectories.jsonl", "view.png",
    }  # fmt: skip


def test_sparkline_scales_the_last_values() -> None:
    assert sparkline([0.0, 1.0]) == "▁█"
    assert sparkline([0.0, 3.0, 7.0]) == "▁▄█"
    assert sparkline([2.0, 2.0]) == "▁▁", "no change, no slope"
    assert len(sparkline([float(n) for n in range(100)], width=40)) == 40
