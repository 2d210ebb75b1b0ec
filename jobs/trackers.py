"""Experiment trackers, which get the metrics of a run besides its own files: TensorBoard, Weights & Biases, MLflow,
Prometheus.

Chosen by ``metrics.exporters``. The packages of W&B and MLflow are extras and imported here only. Addresses, accounts
and keys are those of their own environment variables (WANDB_API_KEY, WANDB_ENTITY, WANDB_MODE; MLFLOW_TRACKING_URI):
a configuration is saved with the run, a key must not be.
"""

from __future__ import annotations

import importlib.util
import re
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from ergo_rl.jobs.config import ConfigError, ExporterName, MetricsConfig
from ergo_rl.jobs.metrics import Metrics
from ergo_rl.jobs.run_paths import CONFIG

_PACKAGES = {
    ExporterName.WANDB: ("wandb", "pip install 'ergo-rl[wandb]'"),
    ExporterName.MLFLOW: ("mlflow", "pip install 'ergo-rl[mlflow]', or mlflow itself to keep runs without a server"),
}


class Tracker(Protocol):
    def log(self, step: int, metrics: Metrics) -> None:
        """Send the metrics of a step, or of an evaluation after ``step`` updates. Does not wait for a network."""

    def close(self, failed: bool) -> None: ...


def require_packages(config: MetricsConfig) -> None:
    """Raises ConfigError where a chosen tracker is not installed. Call it before anything starts."""
    for name in config.exporters:
        package, how = _PACKAGES.get(name, ("", ""))
        if package and importlib.util.find_spec(package) is None:
            raise ConfigError(f"metrics.exporters has {name.value}, but the package {package} is not installed: {how}")


def open_trackers(config: MetricsConfig, folder: Path, step: int) -> list[Tracker]:
    """Open the chosen trackers for the run in ``folder``, which holds its ``config.yaml``.

    step: that the run resumes from. Raises ConfigError where one does not start."""
    kinds: dict[ExporterName, Callable[[MetricsConfig, Path, int], Tracker]] = {
        ExporterName.TENSORBOARD: TensorBoard,
        ExporterName.WANDB: WeightsAndBiases,
        ExporterName.MLFLOW: MLflow,
        ExporterName.PROMETHEUS: Prometheus,
    }
    return [kinds[name](config, folder, step) for name in dict.fromkeys(config.exporters)]


class TensorBoard:
    """Hides events after ``step`` that the run wrote before it was stopped."""

    def __init__(self, config: MetricsConfig, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._events: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=step)

    def log(self, step: int, metrics: Metrics) -> None:
        for name, value in metrics.items():
            self._events.add_scalar(name, value, step)

    def close(self, failed: bool) -> None:
        self._events.close()


class WeightsAndBiases:
    """A resumed run stays one run there.

    W&B accepts no step twice, so the step is a metric of its own along the x axis: steps that are repeated after a
    restart appear twice."""

    def __init__(self, config: MetricsConfig, folder: Path, step: int) -> None:
        import wandb
        from omegaconf import OmegaConf

        try:
            self._run: Any = wandb.init(
                project=config.project,
                id=_read_or_create_id(folder / ".wandb-run", lambda: f"{folder.name}-{time.time_ns():x}"),
                name=folder.name,
                dir=str(folder),
                resume="allow",
                config=OmegaConf.to_container(OmegaConf.load(folder / CONFIG)),
                settings=wandb.Settings(console="off"),
            )
        except wandb.Error as error:
            raise ConfigError(f"metrics.exporters: wandb did not start: {error}") from error
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: Metrics) -> None:
        self._run.log({"step": step, **metrics})

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class MLflow:
    """A resumed run stays one run there. MLflow sends in the background and logs what it could not send."""

    def __init__(self, config: MetricsConfig, folder: Path, step: int) -> None:
        import mlflow

        self._client: Any = mlflow.MlflowClient()
        try:
            self.run_id = _read_or_create_id(folder / ".mlflow-run", lambda: self._new_run(config.project, folder))
            self._client.update_run(self.run_id, status="RUNNING")
        except mlflow.exceptions.MlflowException as error:
            raise ConfigError(f"metrics.exporters: mlflow did not start: {error}") from error

    def _new_run(self, project: str, folder: Path) -> str:
        experiment = self._client.get_experiment_by_name(project)
        at = self._client.create_experiment(project) if experiment is None else experiment.experiment_id
        run_id: str = self._client.create_run(at, run_name=folder.name).info.run_id
        self._client.log_artifact(run_id, str(folder / CONFIG))
        return run_id

    def log(self, step: int, metrics: Metrics) -> None:
        from mlflow.entities import Metric

        now = time.time_ns() // 1_000_000
        values = [Metric(name, value, now, step) for name, value in metrics.items()]
        self._client.log_batch(self.run_id, metrics=values, synchronous=False)

    def close(self, failed: bool) -> None:
        import mlflow

        mlflow.flush_async_logging()
        self._client.set_terminated(self.run_id, "FAILED" if failed else "FINISHED")


class Prometheus:
    """Gauges at Ray's own metrics endpoint while the run lasts: ``ray_ergo_rl_reward_total{run="..."}``, ..."""

    def __init__(self, config: MetricsConfig, folder: Path, step: int) -> None:
        self._tags = {"run": folder.name}

    def log(self, step: int, metrics: Metrics) -> None:
        for name, value in {"step": step, **metrics}.items():
            _gauge(gauge_name(name)).set(value, self._tags)

    def close(self, failed: bool) -> None:
        """Gauges end with the driver."""


def gauge_name(metric: str) -> str:
    """``reward/total`` -> ``ergo_rl_reward_total``; Ray puts ``ray_`` in front."""
    return "ergo_rl_" + re.sub(r"\W", "_", metric)


@cache
def _gauge(name: str) -> Any:
    from ray.util.metrics import Gauge

    return Gauge(name, description="ergo-rl: docs/metrics.md", tag_keys=("run",))


def _read_or_create_id(path: Path, new: Callable[[], str]) -> str:
    """Return the id of the run at a tracker; created once and kept in the run's folder."""
    if not path.is_file():
        path.write_text(new())
    return path.read_text()
