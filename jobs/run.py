"""The run directory: config, metrics, samples, checkpoints; and the live view of it all."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from omegaconf import OmegaConf

from ergo_rl.actors.trajectory_store import Group
from ergo_rl.episodes.types import Trajectory
from ergo_rl.jobs.config import ConfigError, TrainConfig
from ergo_rl.jobs.credit import Advantages
from ergo_rl.jobs.exporters import Exporter, open_exporters, require_packages
from ergo_rl.jobs.guards import Guards
from ergo_rl.jobs.layout import CONFIG, ENDED, SAMPLES, folder_of
from ergo_rl.jobs.measuring.evaluation import Evaluation
from ergo_rl.jobs.metrics import Metrics
from ergo_rl.jobs.samples import write_group
from ergo_rl.jobs.saving.checkpoints import Shelf, name_of, step_of
from ergo_rl.jobs.saving.resume import CHECKPOINTS, Start, copies_of, find_start
from ergo_rl.jobs.saving.state import RECORDS, RunState, read_state, restore_learners, write_state
from ergo_rl.jobs.view import View as TerminalView
from ergo_rl.learners.learner_group import LearnerGroup

logger = logging.getLogger(__name__)


@dataclass
class StepReport:
    """The metrics of one step, gathered as it goes."""

    step: int
    metrics: Metrics = field(default_factory=dict)

    def add(self, metrics: Metrics) -> None:
        self.metrics.update(metrics)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.metrics[f"time/{phase}_s"] = time.monotonic() - started


class Run:
    """One run's folder. Open it with ``Run.open``; everything in it can be read while the run goes on."""

    def __init__(self, start: Start, config: TrainConfig, view: TerminalView) -> None:
        self.folder, self.config, self.view = start.folder, config, view
        self.shelf, self.copies = Shelf(start.folder / CHECKPOINTS), copies_of(config, start.folder)
        self._source = self._checkpoint = start.checkpoint
        self._records: dict[str, IO[str]] = {}
        self._exporters: list[Exporter] = []

    @classmethod
    @contextmanager
    def open(cls, config: TrainConfig) -> Iterator[Run]:
        """The folder ``runs_dir/name``: that of an unfinished run, or a new one, with a number behind the name where
        that one is taken (``jobs.saving.resume``). ``restore`` comes next."""
        require_packages(config)
        start = find_start(config)
        OmegaConf.save(OmegaConf.structured(config), start.folder / CONFIG)
        log_file = logging.FileHandler(start.folder / "run.log", encoding="utf-8")
        log_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logging.getLogger().addHandler(log_file)
        with start.lock, TerminalView(config.name, config.total_steps, start.folder) as view:
            run = cls(start, config, view)
            run.rewind(start.checkpoint)
            try:
                yield run
            except Exception as error:
                run.ended(done=False, why=f"{type(error).__name__}: {error}")
                run._close(failed=True)
                raise
            finally:
                run._close()
                logging.getLogger().removeHandler(log_file)
                log_file.close()

    def rewind(self, checkpoint: Path | None) -> None:
        """Records, alarms and picture as they were at a checkpoint; None: at the start. What came after is gone."""
        self._close()
        self._checkpoint = checkpoint
        for name in RECORDS:
            content = (checkpoint / name).read_bytes() if checkpoint and (checkpoint / name).exists() else b""
            aside = self.folder / f".{name}"
            aside.write_bytes(content)
            aside.replace(self.folder / name)
        (self.folder / ENDED).unlink(missing_ok=True)
        step = 0 if checkpoint is None else step_of(checkpoint.name)
        self._records = {name: (self.folder / name).open("a", encoding="utf-8", buffering=1) for name in RECORDS}
        self._exporters = open_exporters(self.config, self.folder, step)
        self._guards, self._alarms = Guards(self.config.alerts), set[str]()
        metrics, self._evaluations = self._lines("metrics.jsonl"), self._lines("evaluations.jsonl")
        for one in metrics:
            self._guards.watch(one)
        self.view.rewind(step, metrics, self._evaluations)

    async def last_checkpoint(self) -> Path | None:
        """A checked one; where this run has saved none yet, the one that it began from. Raises DamagedCheckpoint."""
        return await asyncio.to_thread(self.shelf.newest) or self._source

    async def restore(self, learners: LearnerGroup, rows: int) -> RunState:
        """The state at the checkpoint that this folder was brought to, with ``learners`` (fresh ones) brought to it;
        that of a new run where there is none. rows: of the training questions.

        Raises DamagedCheckpoint where the content cannot be read, ConfigError for other questions."""
        checkpoint = self._checkpoint
        if checkpoint is None:
            return RunState(rows=rows)
        with self.view.waiting(f"going on from {checkpoint}"):
            state = await asyncio.to_thread(read_state, checkpoint)
            if state.rows != rows:
                raise ConfigError(f"questions.paths had {state.rows} rows at {checkpoint}, now {rows}: other files")
            await restore_learners(learners, checkpoint)
        return state

    async def save(self, state: RunState, learners: LearnerGroup) -> None:
        """A checkpoint of a run between two steps; old ones are removed after it. Raises OSError."""
        figures = [one for one in self._evaluations if one["step"] == state.step]
        score = figures[-1].get(f"eval/{self.config.checkpoint.best}") if figures else None
        with self.shelf.draft(state.step, score) as draft:
            await write_state(draft, state, self.config, self.folder, learners)
        if self.copies is not None:
            await asyncio.to_thread(self.copies.put, self.shelf.folder / name_of(state.step))
        stay = await asyncio.to_thread(self.shelf.prune, self.config.checkpoint.keep)
        if self.copies is not None:
            await asyncio.to_thread(self.copies.prune, stay)

    def ended(self, done: bool, why: str) -> None:
        """``ended.json``: a run that is done is not gone on with."""
        (self.folder / ENDED).write_text(json.dumps({"done": done, "why": why}) + "\n")

    def _lines(self, name: str) -> list[Metrics]:
        return [json.loads(line) for line in (self.folder / name).read_text().splitlines()]

    def _close(self, failed: bool = False) -> None:
        for file in self._records.values():
            file.close()
        for exporter in self._exporters:
            exporter.close(failed)
        self._exporters = []

    def _export(self, step: int, metrics: Metrics) -> None:
        for exporter in self._exporters:
            exporter.log(step, metrics)

    @contextmanager
    def step(self, step: int) -> Iterator[StepReport]:
        """One optimiser update; its report is written when the block is left without an error."""
        report = StepReport(step)
        with report.timed("step"):
            yield report
        self._guard(report)
        self._record("metrics.jsonl", {"step": step, "time": time.time(), **report.metrics})
        self._export(step, report.metrics)
        self.view.show(step, report.metrics)

    def _guard(self, report: StepReport) -> None:
        """Alarms into the metrics and the view; the log has each of them when it comes on."""
        alarms, sentences = self._guards.watch(report.metrics)
        report.add(alarms)
        for name in sentences.keys() - self._alarms:
            logger.warning("step %d: alarm %s: %s", report.step, name, sentences[name])
        self._alarms = set(sentences)
        self.view.warn(sentences)

    def log_evaluation(self, step: int, evaluation: Evaluation) -> None:
        """Of the policy after ``step`` updates; a line of ``evaluations.jsonl``."""
        metrics = evaluation.metrics(self.config.metrics)
        for bad in evaluation.unplayable:
            logger.warning("held-out question %r cannot be played: %s", bad.question_id, bad.reason)
        self._record("evaluations.jsonl", {"step": step, **metrics})
        self._export(step, metrics)
        self.view.show_evaluation(step, metrics)
        self._evaluations.append({"step": step, **metrics})

    def evaluation_due(self, step: int) -> bool:
        """Of the policy after ``step`` updates; not where it was evaluated before the run was stopped."""
        due = self.config.evaluation.due(step, self.config.total_steps)
        return due and not any(one["step"] == step for one in self._evaluations)

    def log_questions(self, step: int, groups: Sequence[Group]) -> None:
        """A line of ``questions.jsonl``: what the learner has just learned from."""
        used = [
            {"number": one.number, "id": one.question.id, "samples": len(one.scores), "oldest": one.oldest_version}
            for one in groups
        ]
        self._record("questions.jsonl", {"step": step, "questions": used})

    def _record(self, name: str, line: dict[str, Any]) -> None:
        self._records[name].write(json.dumps(line) + "\n")

    def summary(self) -> str:
        """What the run changed on the held-out questions, in one line."""
        if len(self._evaluations) < 2:
            return "The run had no evaluation (evaluation.paths, evaluation.every)."
        before, after = self._evaluations[0], self._evaluations[-1]
        shown = [("target coverage", "coverage"), ("accuracy", "accuracy"), ("mean crop area", "area_ratio")]
        changes = [
            f"{title} {before[f'eval/{name}']:.1%} -> {after[f'eval/{name}']:.1%}"
            for title, name in shown
            if f"eval/{name}" in before and f"eval/{name}" in after
        ]
        return "Held-out questions, before -> after: " + ", ".join(changes)

    def due_samples(self, step: int) -> bool:
        return self.config.samples_every > 0 and step % self.config.samples_every == 0

    def write_samples(
        self, step: int, group: Group, trajectories: tuple[Trajectory, ...], advantages: Advantages
    ) -> None:
        """``samples/step-N/``: replies, reward parts and advantages of a group, its coarse view and each crop."""
        write_group(self.folder / SAMPLES / folder_of(step), step, group, trajectories, advantages)
