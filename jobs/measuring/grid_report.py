"""What the records of a grid say: figures by category, a Markdown table, JSON, and accuracy against visual tokens."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ergo_rl.jobs.measuring.evaluation import wilson
from ergo_rl.jobs.measuring.grid import Mode, Record, usable

EVERY = "all"
"""The category of all questions."""
Figures = dict[str, Any]


def summarise(records: Sequence[Record]) -> list[Figures]:
    """A line of figures for each mode, budget and category, in the order of the records, ``all`` first."""
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
    """accuracy: share of all, what could not be played counts as wrong, with its 95 % interval (Wilson). The others
    are of what was played: mean visual tokens, mean calls, median and 95th percentile of the seconds, mean area ratio
    of the crops, shares of bad boxes (two-stage) and of covered targets (where there are boxes)."""
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
        found["bad_box_rate"] = statistics.mean(not usable(record) for record in boxed)
    if known := [record.covered for record in played if record.covered is not None]:
        found["coverage"] = statistics.mean(known)
    return found


def write_report(out: Path, told: Mapping[str, Any], records: Sequence[Record]) -> list[Path]:
    """``evaluation.json``, ``evaluation.md`` and ``evaluation.png`` in ``out``."""
    found = summarise(records)
    failures = [
        {"question": record.question, "mode": str(record.mode), "budget": record.budget, "why": record.failure}
        for record in records
        if record.failure
    ]
    paths = [out / f"evaluation.{kind}" for kind in ("json", "md", "png")]
    paths[0].write_text(
        json.dumps({"settings": dict(told), "figures": found, "failures": failures}, indent=1) + "\n", encoding="utf-8"
    )
    paths[1].write_text(as_markdown(told, found, failures), encoding="utf-8")
    _plot([one for one in found if one["category"] == EVERY], paths[2])
    return paths


_COLUMNS = ("mode", "budget", "category", "questions", "accuracy", "visual tokens", "latency", "calls", "area",
            "bad box", "coverage", "failed")  # fmt: skip


def as_markdown(told: Mapping[str, Any], found: Sequence[Figures], failures: Sequence[Mapping[str, Any]]) -> str:
    """A line per mode, budget and category, and every failure."""
    lines = [
        f"Policy: `{told['policy']}`. Accuracy with its 95 % interval; what could not be played counts as wrong. "
        f"Visual tokens: coarse + crop = total, means. Latency: median and 95th percentile, "
        f"{told['in_flight']} questions in flight.",
        "",
        f"| {' | '.join(_COLUMNS)} |",
        f"|{'---|' * len(_COLUMNS)}",
    ]
    for one in found:
        shown = [one["mode"], one["budget"], _plain(one["category"]), one["questions"]]
        shown.append(f"{one['accuracy']:.1%} ({one['accuracy_low']:.1%} to {one['accuracy_high']:.1%})")
        if "calls" in one:
            shown.append(f"{one['coarse_tokens']:.0f} + {one['crop_tokens']:.0f} = {one['visual_tokens']:.0f}")
            shown.append(f"{one['seconds_median']:.2f} s, {one['seconds_p95']:.2f} s")
            shown.append(f"{one['calls']:.2f}")
        else:
            shown += ["-"] * 3
        shown += [f"{one[name]:.1%}" if name in one else "-" for name in ("area_ratio", "bad_box_rate", "coverage")]
        lines.append(f"| {' | '.join(map(str, [*shown, one['failures']]))} |")
    if failures:
        lines += ["", "Could not be played:", ""]
        lines += [
            f"- {_plain(one['question'])}, {one['mode']}, {one['budget']}: {_plain(one['why'])}" for one in failures
        ]
    return "\n".join(lines) + "\n"


def _plain(text: str) -> str:
    """One line that does not break a table."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _plot(found: Sequence[Figures], path: Path) -> None:
    """Accuracy against the visual tokens that it cost, a line per mode; those on the Pareto front have a ring."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    known = [one for one in found if "visual_tokens" in one]
    for number, mode in enumerate(dict.fromkeys(one["mode"] for one in known)):
        line = sorted((one for one in known if one["mode"] == mode), key=lambda one: one["visual_tokens"])
        x, y = [one["visual_tokens"] for one in line], [one["accuracy"] for one in line]
        bars = [
            [one["accuracy"] - one["accuracy_low"] for one in line],
            [one["accuracy_high"] - one["accuracy"] for one in line],
        ]
        axes.errorbar(x, y, yerr=bars, marker="osD"[number % 3], capsize=3, label=mode, color=f"C{number}")
        for one in line:
            axes.annotate(str(one["budget"]), (one["visual_tokens"], one["accuracy"]), (5, -12),
                          textcoords="offset points", fontsize=8)  # fmt: skip
    front = pareto([(one["visual_tokens"], one["accuracy"]) for one in known])
    x, y = [cost for cost, _ in front], [value for _, value in front]
    axes.scatter(x, y, s=160, facecolors="none", edgecolors="black", label="Pareto front", zorder=3)
    axes.set(xlabel="visual tokens (mean of a question)", ylabel="accuracy", ylim=(-0.02, 1.02))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """(cost, value) pairs than which no other costs less or as much and is worth more, or costs less and is worth as
    much; by cost."""
    found: list[tuple[float, float]] = []
    for cost, value in sorted(set(points), key=lambda one: (one[0], -one[1])):
        if not found or value > found[-1][1]:
            found.append((cost, value))
    return found
