"""The run directory: resolved config, metrics, TensorBoard events, samples; and the live view of it all."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from omegaconf import OmegaConf
from PIL import Image, ImageDraw

from actors.trajectory_store import Group
from episodes.types import Score, Trajectory, View
from jobs.config import ConfigError, TrainConfig
from jobs.evaluation import Evaluation
from jobs.guards import Guards
from jobs.metrics import Metrics
from jobs.view import View as TerminalView

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

    def __init__(self, folder: Path, config: TrainConfig, view: TerminalView) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.folder, self.config, self.view = folder, config, view
        self._events = SummaryWriter(str(folder / "tensorboard"))
        self._evaluations: list[Metrics] = []
        self._guards, self._alarms = Guards(config.guards), set[str]()
        self._metrics = (folder / "metrics.jsonl").open("a", encoding="utf-8", buffering=1)

    @classmethod
    @contextmanager
    def open(cls, config: TrainConfig) -> Iterator[Run]:
        """Make the folder ``runs_dir/name``, a new number behind the name where that one is taken."""
        folder = _fresh_folder(Path(config.runs_dir), config.name)
        OmegaConf.save(OmegaConf.structured(config), folder / "config.yaml")
        log_file = logging.FileHandler(folder / "run.log", encoding="utf-8")
        log_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logging.getLogger().addHandler(log_file)
        with TerminalView(config.name, config.total_steps, folder) as view:
            run = cls(folder, config, view)
            try:
                yield run
            finally:
                run._metrics.close()
                run._events.close()
                logging.getLogger().removeHandler(log_file)
                log_file.close()

    @contextmanager
    def step(self, step: int) -> Iterator[StepReport]:
        """One optimiser update; its report is written when the block is left without an error."""
        report = StepReport(step)
        with report.timed("step"):
            yield report
        self._guard(report)
        self._metrics.write(json.dumps({"step": step, "time": time.time(), **report.metrics}) + "\n")
        for name, value in report.metrics.items():
            self._events.add_scalar(name, value, step)
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
        with (self.folder / "evaluations.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        for name, value in metrics.items():
            self._events.add_scalar(name, value, step)
        self.view.show_evaluation(step, metrics)
        self._evaluations.append(metrics)

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

    def write_samples(self, step: int, group: Group, trajectories: tuple[Trajectory, ...]) -> None:
        """``samples/step-N.jsonl`` with the replies and reward parts of a group, beside it the coarse view with
        every box (PNG) and each crop."""
        folder = self.folder / "samples" / f"step-{step:06d}"
        folder.mkdir(parents=True, exist_ok=True)
        _draw_boxes(trajectories).save(folder / "coarse.png")
        with (folder / "trajectories.jsonl").open("w", encoding="utf-8") as file:
            for trajectory, score in zip(trajectories, group.scores, strict=True):
                if trajectory.crop is not None:
                    Image.fromarray(trajectory.crop.pixels).save(folder / f"crop-{trajectory.sample:02d}.png")
                file.write(json.dumps(_readable(group, trajectory, score)) + "\n")


def _readable(group: Group, trajectory: Trajectory, score: object) -> dict[str, object]:
    crop = trajectory.crop
    return {
        "question_id": trajectory.question_id,
        "question": group.question.text,
        "answer": group.question.answer,
        "sample": trajectory.sample,
        "replies": [turn.text for turn in trajectory.turns],
        "policy_versions": [turn.policy_version for turn in trajectory.turns],
        "outcome": trajectory.outcome,
        "box_outcome": trajectory.box_outcome,
        "crop": None if crop is None else asdict(crop.box),
        "area_ratio": trajectory.area_ratio,
        "total": score.total if isinstance(score, Score) else None,
        "parts": dict(score.parts) if isinstance(score, Score) else None,
        "unscored": None if isinstance(score, Score) else getattr(score, "reason", None),
    }


def _draw_boxes(trajectories: tuple[Trajectory, ...], scale: int = 3) -> Image.Image:
    """The coarse view, enlarged, with the box of every trajectory on it."""
    coarse: View = trajectories[0].views[0]
    picture = Image.fromarray(coarse.pixels).resize(
        (coarse.width * scale, coarse.height * scale), Image.Resampling.NEAREST
    )
    draw = ImageDraw.Draw(picture)
    sx, sy = picture.width / coarse.box.width, picture.height / coarse.box.height
    for crop in (trajectory.crop for trajectory in trajectories):
        if crop is not None:
            box = crop.box
            edges = (box.x1 * sx, box.y1 * sy, box.x2 * sx - 1, box.y2 * sy - 1)
            draw.rectangle(edges, outline="black", width=4)  # white on black is seen on any background
            draw.rectangle(edges, outline="white", width=2)
    return picture


def _fresh_folder(runs: Path, name: str) -> Path:
    if not name or "/" in name or name.startswith("."):
        raise ConfigError(f"name {name!r} cannot be a folder name")
    for number in range(1, 10_000):
        folder = runs / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise ConfigError(f"there are too many runs called {name!r} in {runs}")
