"""Summarise the records of a grid: figures by category as table and JSON, a plot of accuracy against tokens."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ergo_rl.jobs.benchmark_grid import Mode, Record, has_usable_box
from ergo_rl.jobs.evaluation import wilson

EVERY = "all"
"""Name of the category that holds every question."""
Figures = dict[str, Any]


def summarise(records: Sequence[Record]) -> list[Figures]:
    """Figures for each mode, budget and category, in the order of the records; the category ``all`` comes first."""
    cells: dict[tuple[Mode, int], list[Record]] = {}
    for record in records:
        cells.setdefault((record.mode, record.budget), []).append(record)
    found = []
    for (mode, budget), here in cells.items():
        names = sorted({record.category for record in here if record.category})
        for name in [EVERY, *names] if len(names) > 1 else [EVERY]:
            some = [record for record in here if name in (EVERY, record.category)]
            found.append({"mode": str(mode), "budget": budget, "category": name, **figures(some)})
    return found


def figures(records: Sequence[Record]) -> Figures:
    """The figures of some records of one mode and budget.

    ``accuracy`` is the share of all records, failures counted as wrong, with its 95 % interval (Wilson). All others are
    over the episodes that were run: mean visual tokens, mean calls, median and 95th percentile of the seconds, mean
    area ratio of the crops, shares of bad boxes (two-stage) and of covered targets (questions with boxes)."""
    played = [record for record in records if not record.failure]
    right = sum(record.correct for record in records)
    low, high = wilson(right, len(records))
    found: Figures = {
        "questions": len(records),
        "failures": len(records) - len(played),
        "accuracy": right / len(records),
        "accuracy_low": low,
        "accuracy_high": high,
    }
    if not played:
        return found
    seconds = sorted(record.seconds for record in played)
    found |= {
        "coarse_tokens": statistics.mean(record.visual_tokens[0] for record in played),
        "crop_tokens": statistics.mean(record.visual_tokens[1] for record in played),
        "visual_tokens": statistics.mean(sum(record.visual_tokens) for record in played),
        "calls": statistics.mean(record.calls for record in played),
        "seconds_median": statistics.median(seconds),
        "seconds_p95": seconds[min(len(seconds) - 1, round(0.95 * (len(seconds) - 1)))],
    }
    ratios = [record.area_ratio for record in played if record.area_ratio is not None]
    if ratios:
        found["area_ratio"] = statistics.mean(ratios)
    if boxed := [record for record in played if record.mode is Mode.TWO_STAGE]:
        found["bad_box_rate"] = statistics.mean(not has_usable_box(record) for record in boxed)
    if known := [record.covered for record in played if record.covered is not None]:
        found["coverage"] = statistics.mean(known)
    return found


def write_report(out: Path, settings: Mapping[str, Any], records: Sequence[Record]) -> list[Path]:
    """Write ``evaluation.json``, ``evaluation.md`` and ``evaluation.png`` into ``out``; returns their paths."""
    found = summarise(records)
    failures = [
        {"question": record.question, "mode": str(record.mode), "budget": record.budget, "why": record.failure}
        for record in records
        if record.failure
    ]
    paths = [out / f"evaluation.{kind}" for kind in ("json", "md", "png")]
    paths[0].write_text(
        json.dumps({"settings": dict(settings), "figures": found, "failures": failures}, indent=1) + "\n",
        encoding="utf-8",
    )
    paths[1].write_text(as_markdown(settings, found, failures), encoding="utf-8")
    _plot([line for line in found if line["category"] == EVERY], paths[2])
    return paths


_COLUMNS = ("mode", "budget", "category", "questions", "accuracy", "visual tokens", "latency", "calls", "area",
            "bad box", "coverage", "failed")  # fmt: skip


def as_markdown(settings: Mapping[str, Any], found: Sequence[Figures], failures: Sequence[Mapping[str, Any]]) -> str:
    """A table with a line per mode, budget and category, followed by every failure."""
    lines = [
        f"Policy: `{settings['policy']}`. Accuracy with its 95 % interval; what could not be played counts as wrong. "
        f"Visual tokens: coarse + crop = total, means. Latency: median and 95th percentile, "
        f"{settings['in_flight']} questions in flight.",
        "",
        f"| {' | '.join(_COLUMNS)} |",
        f"|{'---|' * len(_COLUMNS)}",
    ]
    for line in found:
        shown = [line["mode"], line["budget"], _plain(line["category"]), line["questions"]]
        shown.append(f"{line['accuracy']:.1%} ({line['accuracy_low']:.1%} to {line['accuracy_high']:.1%})")
        if "calls" in line:
            shown.append(f"{line['coarse_tokens']:.0f} + {line['crop_tokens']:.0f} = {line['visual_tokens']:.0f}")
            shown.append(f"{line['seconds_median']:.2f} s, {line['seconds_p95']:.2f} s")
            shown.append(f"{line['calls']:.2f}")
        else:
            shown += ["-"] * 3
        shown += [f"{line[name]:.1%}" if name in line else "-" for name in ("area_ratio", "bad_box_rate", "coverage")]
        lines.append(f"| {' | '.join(map(str, [*shown, line['failures']]))} |")
    if failures:
        lines += ["", "Could not be played:", ""]
        lines += [
            f"- {_plain(failure['question'])}, {failure['mode']}, {failure['budget']}: {_plain(failure['why'])}"
            for failure in failures
        ]
    return "\n".join(lines) + "\n"


def _plain(text: str) -> str:
    """The text on one line, escaped for a cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _plot(found: Sequence[Figures], path: Path) -> None:
    """Plot accuracy against visual tokens, a line per mode, with rings around the points of the Pareto front."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    points = [line for line in found if "visual_tokens" in line]
    for number, mode in enumerate(dict.fromkeys(point["mode"] for point in points)):
        line = sorted((point for point in points if point["mode"] == mode), key=lambda point: point["visual_tokens"])
        x, y = [point["visual_tokens"] for point in line], [point["accuracy"] for point in line]
        bars = [
            [point["accuracy"] - point["accuracy_low"] for point in line],
            [point["accuracy_high"] - point["accuracy"] for point in line],
        ]
        axes.errorbar(x, y, yerr=bars, marker="osD"[number % 3], capsize=3, label=mode, color=f"C{number}")
        for point in line:
            axes.annotate(str(point["budget"]), (point["visual_tokens"], point["accuracy"]), (5, -12),
                          textcoords="offset points", fontsize=8)  # fmt: skip
    front = pareto([(point["visual_tokens"], point["accuracy"]) for point in points])
    x, y = [cost for cost, _ in front], [value for _, value in front]
    axes.scatter(x, y, s=160, facecolors="none", edgecolors="black", label="Pareto front", zorder=3)
    axes.set(xlabel="visual tokens (mean of a question)", ylabel="accuracy", ylim=(-0.02, 1.02))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The Pareto front of (cost, value) points, by cost: no other point has a lower cost at the same or a higher
    value, or a higher value at the same cost."""
    found: list[tuple[float, float]] = []
    for cost, value in sorted(set(points), key=lambda point: (point[0], -point[1])):
        if not found or value > found[-1][1]:
            found.append((cost, value))
    return found
