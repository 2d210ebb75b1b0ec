"""The table and the plot of an ablation."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ergo_rl.jobs.metrics import Metrics

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
    """The evaluations of one run, in the order of their ``step``; ``training_s``: seconds of its optimiser steps,
    without start and evaluations."""

    seed: int
    evaluations: Sequence[Metrics]
    training_s: float

    def last(self, name: str) -> float | None:
        return self.evaluations[-1].get(f"eval/{name}")


def write_report(
    out: Path, command: str, rows: Mapping[str, Sequence[str]], curves: Mapping[str, Sequence[Curve]], seeds: int
) -> list[Path]:
    """``ablation.md``, ``ablation.json`` and ``ablation.png`` in ``out``."""
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
    """A line per row: mean and sample deviation over the seeds, and the coverage and the training time of each seed."""
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
    """Each figure over the steps: a thin line per seed, a thick one for their mean."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(15, 5), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(1, len(_PLOTTED)), _PLOTTED.items(), strict=True):
        for number, (row, found) in enumerate(curves.items()):
            style = {"color": f"C{number % 10}", "linestyle": "-" if number < 10 else "--"}
            series = [([one["step"] for one in curve.evaluations], _series(curve, name)) for curve in found]
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
    return [one.get(f"eval/{name}", float("nan")) for one in curve.evaluations]
