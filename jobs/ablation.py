"""Train every row of an ablation plan with every seed; report them as a table and a plot.

Every run is an ordinary ``ergo-rl train`` in a process of its own. Finished runs are kept, so that a stopped ablation
continues.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.progress import Progress, TaskID
from yaml import YAMLError

from ergo_rl.jobs.config import ConfigError, load_config
from ergo_rl.jobs.metrics import Metrics

DEFAULT_PLAN = "configs/ablations/panels.yaml"
_COLUMNS = {
    "coverage": "target coverage",
    "accuracy": "accuracy",
    "area_ratio": "crop area",
    "full_image_rate": "whole image",
    "tiny_box_rate": "tiny box",
    "region_precision": "region precision",
}
_PLOTTED = {"coverage": "target coverage", "accuracy": "accuracy", "area_ratio": "mean crop area"}


@dataclass(frozen=True, slots=True)
class Curve:
    """The evaluations of one run."""

    seed: int
    evaluations: Sequence[Metrics]
    """In the order of their ``step``."""
    training_s: float
    """Seconds of the optimiser steps, without start and evaluations."""

    def last(self, name: str) -> float | None:
        return self.evaluations[-1].get(f"eval/{name}")


@dataclass
class AblationPlan:
    """The runs of an ablation: every row with every seed."""

    recipe: str = MISSING
    """The recipe of every run."""
    overrides: list[str] = field(default_factory=list)
    """``key=value`` for every run."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    rows: dict[str, list[str]] = field(default_factory=dict)
    """Name of a row -> its ``key=value``."""


@dataclass(frozen=True, slots=True)
class AblationRun:
    """One row with one seed."""

    row: str
    seed: int
    recipe: str
    overrides: tuple[str, ...]
    folder: Path

    @property
    def result(self) -> Path:
        return self.folder / f"seed-{self.seed}.json"

    def settings(self) -> dict[str, object]:
        """The values given for this run: the recipe's with the overrides. An edited recipe makes another run; a new key
        of the program with its default does not."""
        given = OmegaConf.merge(OmegaConf.load(self.recipe), OmegaConf.from_dotlist(list(self.overrides)))
        return {"seed": self.seed, "given": OmegaConf.to_container(given)}

    def curve(self) -> Curve | None:
        """Its evaluations; None where it has not finished with these settings."""
        try:
            content = json.loads(self.result.read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        if content["settings"] != self.settings():
            return None
        return Curve(self.seed, content["evaluations"], content["training_s"])

    def steps_done(self) -> int:
        metrics = self.folder / f"seed-{self.seed}" / "metrics.jsonl"
        return len(metrics.read_bytes().splitlines()) if metrics.exists() else 0


def load_plan(path: Path, overrides: Sequence[str]) -> AblationPlan:
    """Load a plan and, once, the configuration of every row: a misspelt key is then reported before the first run.

    Raises ConfigError naming the row and key."""
    if not path.is_file():
        raise ConfigError(f"there is no plan {path}; configs/ablations/panels.yaml is an example")
    try:
        plan = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(AblationPlan), OmegaConf.load(path)))
    except (YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path}: {str(error).splitlines()[0]}") from error
    assert isinstance(plan, AblationPlan)
    plan.overrides += overrides
    if not plan.rows or not plan.seeds:
        raise ConfigError(f"{path}: rows and seeds must not be empty")
    for row, changes in plan.rows.items():
        try:
            load_config(Path(plan.recipe), [*plan.overrides, *changes])
        except ConfigError as error:
            raise ConfigError(f"{path}, row {row!r}: {error}") from error
    return plan


def runs_of(plan: AblationPlan, out: Path) -> list[AblationRun]:
    """All runs, row by row, so that a part of them already makes whole rows."""
    return [
        AblationRun(row, seed, plan.recipe, (*plan.overrides, *changes), out / slug(row))
        for row, changes in plan.rows.items()
        for seed in plan.seeds
    ]


def slug(row: str) -> str:
    """A folder name: lower case, with hyphens for everything except letters and digits."""
    return "-".join("".join(letter if letter.isalnum() else " " for letter in row.lower()).split())


async def run_all(runs: Sequence[AblationRun], at_once: int, progress: Progress) -> list[AblationRun]:
    """Train the runs that have not finished, at most ``at_once`` at a time; returns those that failed."""
    slots = asyncio.Semaphore(at_once)
    failed: list[AblationRun] = []

    async def train_one(run: AblationRun) -> None:
        async with slots:
            total = load_config(Path(run.recipe), run.overrides).total_steps
            task = progress.add_task(f"{run.row}, seed {run.seed}", total=total)
            if not await train(run, progress, task):
                failed.append(run)

    await asyncio.gather(*(train_one(run) for run in runs if run.curve() is None))
    return failed


async def train(run: AblationRun, progress: Progress, task: TaskID) -> bool:
    """Train one run in a process of its own, with its output in a file beside its folder; a run that was interrupted
    with the same settings resumes. False where it failed."""
    folder, begun = run.folder / f"seed-{run.seed}", run.result.with_suffix(".begun.json")
    if not begun.exists() or json.loads(begun.read_text()) != run.settings():
        shutil.rmtree(folder, ignore_errors=True)
    run.folder.mkdir(parents=True, exist_ok=True)
    begun.write_text(json.dumps(run.settings()) + "\n")
    names = [f"name={folder.name}", f"runs_dir={run.folder}", f"seed={run.seed}"]
    command = [sys.executable, "-m", "ergo_rl.jobs", "train", run.recipe, *run.overrides, *names]
    with folder.with_suffix(".log").open("ab") as log:
        process = await asyncio.create_subprocess_exec(
            *command, stdout=log, stderr=asyncio.subprocess.STDOUT, start_new_session=True
        )
        try:
            while process.returncode is None:
                progress.update(task, completed=run.steps_done())
                try:
                    await asyncio.wait_for(process.wait(), timeout=1.0)
                except TimeoutError:
                    continue
        finally:
            if process.returncode is None:  # Ctrl-C: pass it on, once, so that the run saves a checkpoint
                process.send_signal(signal.SIGINT)
                await process.wait()
    progress.update(task, completed=run.steps_done())
    if process.returncode:
        return False
    evaluations = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    spent = sum(step["time/step_s"] for step in steps)
    result = {"settings": run.settings(), "training_s": spent, "evaluations": evaluations}
    run.result.write_text(json.dumps(result, indent=1) + "\n")
    return True


# --- the report -------------------------------------------------------------------------------------------------------


def write_report(
    out: Path, command: str, rows: Mapping[str, Sequence[str]], curves: Mapping[str, Sequence[Curve]], seeds: int
) -> list[Path]:
    """Write ``ablation.md``, ``ablation.json`` and ``ablation.png`` into ``out``; returns their paths."""
    out.mkdir(parents=True, exist_ok=True)
    table, figures, plot = out / "ablation.md", out / "ablation.json", out / "ablation.png"
    table.write_text(as_markdown(command, rows, curves, seeds))
    every = {row: {curve.seed: list(curve.evaluations) for curve in found} for row, found in curves.items()}
    spent = {row: {curve.seed: curve.training_s for curve in found} for row, found in curves.items()}
    record = {"command": command, "rows": dict(rows), "training_s": spent, "evaluations": every}
    figures.write_text(json.dumps(record, indent=1) + "\n")
    _plot(curves, plot)
    return [table, figures, plot]


def as_markdown(
    command: str, rows: Mapping[str, Sequence[str]], curves: Mapping[str, Sequence[Curve]], seeds: int
) -> str:
    """A table with a line per row: mean and deviation over the seeds, coverage and training time of each seed."""
    head = ["row", *_COLUMNS.values(), "coverage by seed", "training"]
    lines = [f"Made by `{command}`.", "", f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    if first := next((found[0] for found in curves.values() if found), None):
        before = [_percent(first.evaluations[0].get(f"eval/{name}")) for name in _COLUMNS]
        lines.append(f"| *before RL* | {' | '.join(before)} | | |")
    for row, found in curves.items():
        cells = [_mean([curve.last(name) for curve in found]) for name in _COLUMNS]
        by_seed = ", ".join(f"{curve.seed}: {_percent(curve.last('coverage'))}" for curve in found)
        missing = f" ({len(found)} of {seeds} seeds)" if len(found) < seeds else ""
        minutes = ", ".join(f"{curve.training_s / 60:.1f} min" for curve in found)
        lines.append(f"| {row}{missing} | {' | '.join(cells)} | {by_seed} | {minutes} |")
    lines += ["", "What each row changes:", ""]
    lines += [f"- {row}: {' '.join(f'`{change}`' for change in changes) or 'nothing'}" for row, changes in rows.items()]
    return "\n".join(lines) + "\n"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if len(known) < 2:
        return _percent(known[0] if known else None)
    return f"{statistics.mean(known):.1%} ± {100 * statistics.stdev(known):.1f}"


def _plot(curves: Mapping[str, Sequence[Curve]], path: Path) -> None:
    """Plot each figure over the steps: a thin line per seed, a thick line for their mean."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(15, 5), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(1, len(_PLOTTED)), _PLOTTED.items(), strict=True):
        for number, (row, found) in enumerate(curves.items()):
            style = {"color": f"C{number % 10}", "linestyle": "-" if number < 10 else "--"}
            series = [
                ([evaluation["step"] for evaluation in curve.evaluations], _series(curve, name)) for curve in found
            ]
            for steps, values in series:
                axes.plot(steps, values, linewidth=0.6, alpha=0.5, **style)
            if series and all(steps == series[0][0] for steps, _ in series):
                means = [statistics.mean(values) for values in zip(*(values for _, values in series), strict=True)]
                axes.plot(series[0][0], means, linewidth=2, label=row, **style)
        axes.set(title=title, xlabel="optimiser steps")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.grid(alpha=0.3)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=9)
    figure.savefig(path, dpi=110)


def _series(curve: Curve, name: str) -> list[float]:
    return [evaluation.get(f"eval/{name}", float("nan")) for evaluation in curve.evaluations]
