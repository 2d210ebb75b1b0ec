"""What a run reports while it trains: records, alerts, console, trackers and the user's callbacks."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ergo_rl.actors.trajectory_store import Group
from ergo_rl.jobs.config import AlertsConfig, MetricsConfig
from ergo_rl.jobs.console_display import ConsoleDisplay
from ergo_rl.jobs.evaluation import Evaluation
from ergo_rl.jobs.metrics import Alerts, Metrics
from ergo_rl.jobs.probe import Probe
from ergo_rl.jobs.run_paths import EVALUATIONS, METRICS, QUESTIONS, RECORDS
from ergo_rl.jobs.trackers import Tracker, open_trackers

logger = logging.getLogger(__name__)

Callback = Callable[[int, Metrics], None]
"""Called with (step, metrics) after each step and each evaluation, as a tracker is."""


@dataclass
class StepReport:
    """The metrics of one step, collected while it runs."""

    step: int
    metrics: Metrics = field(default_factory=dict)

    def add(self, metrics: Metrics) -> None:
        self.metrics.update(metrics)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the seconds of the block as ``time/PHASE_s``."""
        started = time.monotonic()
        yield
        self.metrics[f"time/{phase}_s"] = time.monotonic() - started


class Monitor:
    """Records metrics in the folder of a run and passes them on.

    Example::

        with Monitor(folder, config.metrics, config.alerts, console) as monitor:
            monitor.rewind(step=0)
            with monitor.step(0) as report:
                with report.timed("learn"):
                    report.add(await learners.update(batch))
    """

    def __init__(
        self,
        folder: Path,
        metrics: MetricsConfig,
        alerts: AlertsConfig,
        console: ConsoleDisplay,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.console = console
        self._folder, self._metrics_config, self._alerts_config, self._callbacks = folder, metrics, alerts, callbacks
        self._records: dict[str, _RecordFile] = {}
        self._trackers: list[Tracker] = []
        self._skipped = 0.0
        self.evaluations: list[Metrics] = []
        """Every evaluation so far, with its ``step``."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(failed=isinstance(error, Exception))

    def rewind(self, step: int) -> None:
        """Start, or start again, from the records in the folder, which end before ``step``."""
        self.close()
        self._records = {name: _RecordFile(self._folder / name) for name in RECORDS}
        self._trackers = open_trackers(self._metrics_config, self._folder, step)
        self._alerts, self._active_alerts = Alerts(self._alerts_config), set[str]()
        metrics, self.evaluations = self._read(METRICS), self._read(EVALUATIONS)
        for record in metrics:
            self._alerts.watch(record)
        self.console.rewind(step, metrics, self.evaluations)

    def close(self, failed: bool = False) -> None:
        for file in self._records.values():
            file.close()
        for tracker in self._trackers:
            try:
                tracker.close(failed)
            except OSError as error:
                logger.warning("%s lost its last values: %s", type(tracker).__name__, error)
        self._trackers = []

    @contextmanager
    def step(self, step: int) -> Iterator[StepReport]:
        """Collect the metrics of one optimiser update; they are recorded if the block is left without an error.

        A skipped update is no step: it raises its alarm at once, and is counted in the record of the step after it."""
        report = StepReport(step)
        with report.timed("step"):
            yield report
        if skipped := report.metrics.get("learner/skipped"):
            self._skipped += skipped
            return self._check_alerts(report)
        if self._skipped:
            report.add({"learner/skipped": self._skipped})
            self._skipped = 0.0
        self._check_alerts(report)
        self._record(METRICS, {"step": step, "time": time.time(), **report.metrics})
        self._publish(step, report.metrics)
        self.console.show(step, report.metrics)

    def record_evaluation(self, step: int, evaluation: Evaluation, probe: Probe | None = None) -> None:
        """Record an evaluation of the policy after ``step`` updates. Intervals, which a probe has, are in the file
        only."""
        metrics, intervals = evaluation.metrics(self._metrics_config), Metrics()
        for failed in evaluation.failed:
            logger.warning("held-out question %r failed: %s", failed.question_id, failed.reason)
        if probe is not None:
            metrics |= evaluation.costs() | probe.metrics()
            intervals = probe.intervals()
            for failure in probe.failures():
                logger.warning("held-out question %s", failure)
        self._record(EVALUATIONS, {"step": step, **metrics, **intervals})
        self._publish(step, metrics)
        self.console.show_evaluation(step, metrics)
        self.evaluations.append({"step": step, **metrics})

    def was_evaluated(self, step: int) -> bool:
        """Whether the policy after ``step`` updates was evaluated, perhaps before the run was resumed."""
        return any(record["step"] == step for record in self.evaluations)

    def record_questions(self, step: int, groups: Sequence[Group]) -> None:
        """Record what the learner has just learned from, a line of ``questions.jsonl``."""
        used = [
            {"number": group.number, "id": group.question.id, "samples": len(group.scores),
             "oldest": group.oldest_version}
            for group in groups
        ]  # fmt: skip
        self._record(QUESTIONS, {"step": step, "questions": used})

    def summary(self) -> str:
        """Say in one line what the run changed on the held-out questions."""
        if len(self.evaluations) < 2:
            return "The run had no evaluation (evaluation.paths, evaluation.every)."
        before, after = self.evaluations[0], self.evaluations[-1]
        shown = [("target coverage", "coverage"), ("accuracy", "accuracy"), ("mean crop area", "area_ratio")]
        changes = [
            f"{title} {before[f'eval/{name}']:.1%} -> {after[f'eval/{name}']:.1%}"
            for title, name in shown
            if f"eval/{name}" in before and f"eval/{name}" in after
        ]
        return "Held-out questions, before -> after: " + ", ".join(changes)

    def _check_alerts(self, report: StepReport) -> None:
        """Add alerts to the metrics and show them; the log gets each of them once, when it comes on."""
        alerts, sentences = self._alerts.watch(report.metrics)
        report.add(alerts)
        for name in sentences.keys() - self._active_alerts:
            logger.warning("step %d: alarm %s: %s", report.step, name, sentences[name])
        self._active_alerts = set(sentences)
        self.console.warn(sentences)

    def _publish(self, step: int, metrics: Metrics) -> None:
        for tracker in list(self._trackers):
            try:
                tracker.log(step, metrics)
            except OSError as error:  # a full disk ends its file, not the run
                logger.warning("%s gets nothing more: %s", type(tracker).__name__, error)
                self._trackers.remove(tracker)
        for callback in self._callbacks:
            callback(step, dict(metrics))

    def _record(self, name: str, line: dict[str, Any]) -> None:
        self._records[name].append(json.dumps(line) + "\n")

    def _read(self, name: str) -> list[Metrics]:
        return [json.loads(line) for line in (self._folder / name).read_text().splitlines()]


class _RecordFile:
    """A file that lines are added to. What a full disk does not take is kept and written with the next line."""

    def __init__(self, path: Path) -> None:
        self._path, self._file, self._pending = path, path.open("ab", buffering=0), b""

    def append(self, line: str) -> None:
        self._pending += line.encode()
        try:
            while self._pending:
                self._pending = self._pending[self._file.write(self._pending) :]
        except OSError as error:
            logger.warning("%s: %s; %d bytes wait to be written", self._path, error, len(self._pending))

    def close(self) -> None:
        self.append("")
        self._file.close()
