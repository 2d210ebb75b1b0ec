"""Where figures go: the real packages, offline. W&B's and MLflow's tests run where these are installed."""

from __future__ import annotations

import json
import re
import sys
import time
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import ray

from ergo_rl.cluster.placement import Cluster
from ergo_rl.jobs.config import ConfigError, ExporterName, TrainConfig, load_config
from ergo_rl.jobs.trackers import MLflow, Prometheus, WeightsAndBiases, gauge_name, open_trackers
from tests.conftest import ROOT
from tests.jobs.test_run_folder import open_run

DASHBOARD = ROOT / "docs" / "grafana" / "ergo-rl.json"


def on_the_dashboard() -> set[str]:
    """The names of all metrics that it asks for."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    expressions = [target["expr"] for panel in panels for target in panel["targets"]]
    found = [re.fullmatch(r'(ray_ergo_rl_\w+)\{run=~"\$run"\}', one) for one in expressions]
    return {one[1] for one in found if one is not None} if all(found) else set()


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return load_config(
        ROOT / "configs" / "panels.yaml", [f"runs_dir={tmp_path}", "name=story", "metrics.project=tests"]
    )


def exporting(config: TrainConfig, *names: ExporterName) -> TrainConfig:
    return replace(config, metrics=replace(config.metrics, exporters=list(names)))


@pytest.mark.parametrize(("name", "extra"), [("wandb", "wandb"), ("mlflow", "mlflow")])
def test_missing_tracker_package_is_refused_before_there_is_a_run(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    message = (
        rf"metrics.exporters has {name}, but the package {name} is not installed: pip install 'ergo-rl\[{extra}\]'"
    )
    with pytest.raises(ConfigError, match=message), open_run(exporting(config, ExporterName(name))):
        pass
    assert not list(tmp_path.iterdir())


def test_trackers_are_chosen_by_name() -> None:
    config = load_config(ROOT / "configs" / "panels.yaml", ["metrics.exporters=[wandb,prometheus]"])
    assert config.metrics.exporters == [ExporterName.WANDB, ExporterName.PROMETHEUS]
    with pytest.raises(ConfigError, match=r"metrics\.exporters.*comet"):
        load_config(ROOT / "configs" / "panels.yaml", ["metrics.exporters=[comet]"])


def test_trackers_open_once_and_none_when_none_is_chosen(config: TrainConfig, tmp_path: Path) -> None:
    assert open_trackers(exporting(config).metrics, tmp_path, 0) == []
    twice = exporting(config, ExporterName.TENSORBOARD, ExporterName.TENSORBOARD)
    (only,) = open_trackers(twice.metrics, tmp_path, 0)
    only.log(0, {"reward/total": 1.5})
    only.close(failed=False)
    assert any((tmp_path / "tensorboard").iterdir())


def test_wandb_gets_the_metrics_offline(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The figures are in the run, which is the same one when the training goes on."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = exporting(config, ExporterName.WANDB)
    ids = []
    for step in range(2):
        with open_run(config) as (folder, monitor):
            (tracker,) = monitor._trackers
            assert isinstance(tracker, WeightsAndBiases)
            with monitor.step(step) as report:
                report.add({"reward/total": 1.5 + step})
            summary = dict(tracker._run.summary)
            assert (summary["step"], summary["reward/total"]) == (step, 1.5 + step)
            assert tracker._run.config["learner"]["loss"]["objective"] == "dapo"
            assert tracker._run.project == "tests" and tracker._run.name == "story"
            ids.append(tracker._run.id)
    assert ids[0] == ids[1] and len(list((folder.path / "wandb").glob("offline-run-*/*.wandb"))) == 2


def test_mlflow_gets_the_metrics_in_a_database(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy", reason="mlflow-skinny alone keeps no runs")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/runs.db")
    monkeypatch.chdir(tmp_path)  # where MLflow puts files
    config, client = exporting(config, ExporterName.MLFLOW), mlflow.MlflowClient(f"sqlite:///{tmp_path}/runs.db")
    for step in range(2):
        with open_run(config) as (_, monitor):
            (tracker,) = monitor._trackers
            assert isinstance(tracker, MLflow)
            with monitor.step(step) as report:
                report.add({"reward/total": 1.5 + step})
            assert client.get_run(tracker.run_id).info.status == "RUNNING"
    with pytest.raises(RuntimeError, match="in the middle"), open_run(config):
        raise RuntimeError("in the middle")
    (experiment,) = client.search_experiments(filter_string="name = 'tests'")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.run_name == "story" and found.info.status == "FAILED"
    history = client.get_metric_history(found.info.run_id, "reward/total")
    assert sorted((one.step, one.value) for one in history) == [(0, 1.5), (1, 2.5)]
    assert [one.path for one in client.list_artifacts(found.info.run_id)] == ["config.yaml"]


@pytest.mark.system
def test_prometheus_gauges_are_served_by_ray(ray_cluster: Cluster, config: TrainConfig, tmp_path: Path) -> None:
    tracker = Prometheus(config.metrics, tmp_path / "story", 0)
    tracker.log(7, {"reward/total": 1.5, "learner/turn1_entropy": 0.25})
    (node,) = ray.nodes()
    url, deadline = f"http://127.0.0.1:{node['MetricsExportPort']}/metrics", time.monotonic() + 60
    found: dict[str, float] = {}
    while len(found) < 3 and time.monotonic() < deadline:
        lines = httpx.get(url, trust_env=False).text.splitlines()
        mine = [line for line in lines if line.startswith("ray_ergo_rl_") and 'run="story"' in line]
        found = {line.partition("{")[0]: float(line.rpartition(" ")[2]) for line in mine}
        time.sleep(0.5)
    assert found == {"ray_ergo_rl_step": 7, "ray_ergo_rl_reward_total": 1.5, "ray_ergo_rl_learner_turn1_entropy": 0.25}


def test_dashboard_names_metrics() -> None:
    """That every name on it is one that a run has is held in tests/system/test_train.py, against a run."""
    names = on_the_dashboard()
    assert len(names) >= 20 and f"ray_{gauge_name('reward/total')}" in names
