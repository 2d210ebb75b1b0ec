"""Run a policy in several modes at several visual-token budgets; every episode is a record on disk at once.

A grid that was stopped continues: records that are there are not made again. Its report: figures by category as table
and JSON, a plot of accuracy against visual tokens.
"""

from __future__ import annotations

import asyncio
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from ergo_rl.actors.rollout_worker import EvalMode, SkippedQuestion
from ergo_rl.episodes.images import UnreadableImage
from ergo_rl.episodes.prompts import answer_of
from ergo_rl.episodes.types import Box, BoxOutcome, Question
from ergo_rl.jobs.config import ConfigError, TrainConfig
from ergo_rl.jobs.evaluation import BoxSource, HeldOut, choose_box, for_each, wilson
from ergo_rl.jobs.fingerprints import of_question
from ergo_rl.jobs.policy_clients import EpisodeError, EpisodeResult, PolicyClient
from ergo_rl.jobs.report import read_lines
from ergo_rl.questions.dataset import DatasetError
from ergo_rl.rewards.matching import matches

RECORDS, SETTINGS = "records.jsonl", "settings.json"


class Mode(StrEnum):
    """How a question is answered."""

    DIRECT = "direct"
    """One turn: the answer from the coarse view alone."""
    TWO_STAGE = "two-stage"
    """Look, zoom, answer."""
    ORACLE = "oracle"
    """As two-stage, with the target's own box in place of the policy's; for questions that have boxes."""


@dataclass(frozen=True, slots=True)
class Record:
    """One question in one mode at one budget."""

    question: str
    category: str
    mode: Mode
    budget: int
    """Visual tokens of each view."""
    correct: bool
    said: str | None
    outcome: str
    box_outcome: str
    area_ratio: float | None
    covered: bool | None
    """Whether the crop holds every target; None where no target is known or the mode has no crop."""
    visual_tokens: tuple[int, int]
    """Of the coarse view and of the crop, 0 where there was none."""
    calls: int
    """Requests to the model."""
    seconds: float
    replies: tuple[str, ...]
    failure: str = ""
    """Why the episode could not be run (it then counts as wrong); empty where it was."""
    content: str = ""
    """Fingerprint of the question as it was asked, picture included; empty for a row that is none."""

    @property
    def key(self) -> tuple[str, str, int]:
        return self.question, self.mode, self.budget


async def run_grid(
    questions: HeldOut,
    client: PolicyClient,
    config: TrainConfig,
    modes: Sequence[Mode],
    budgets: Sequence[int],
    out: Path,
    settings: Mapping[str, Any],
    progress: Callable[[int, int], None],
) -> tuple[list[Record], int]:
    """Run what is missing of the grid; each record is appended to ``out/records.jsonl`` as soon as it is known. Every
    row of the held-out files has one record in each mode at each budget. Returns the records and how many of them an
    earlier call had made: those of the same questions, pictures included.

    settings: what the records depend on; a folder of other settings is refused. Episodes that failed for a transient
    reason are not written, so that the next call tries them again. progress: called with (episodes done, all of them).
    Raises ConfigError, OSError."""
    done = {record.key: record for record in _load_records(out, settings)}
    if done:
        contents = await _contents(questions, config.evaluation.in_flight)
        done = {key: record for key, record in done.items() if record.content == contents.get(record.question)}
    wanted = [(name, mode, budget) for mode in modes for budget in budgets for name in questions.names]
    before, unanswered = sum(key in done for key in wanted), dict[tuple[str, str, int], Record]()
    with (out / RECORDS).open("a", encoding="utf-8", buffering=1) as file:

        async def run(mode: Mode, budget: int, number: int, question: Question | SkippedQuestion) -> None:
            if (questions.names[number], mode, budget) in done:
                return
            try:
                record = await run_one(question, client, config, mode, budget)
            except EpisodeError as error:
                record = _failed(question, mode, budget, str(error))
                if error.transient:
                    unanswered[record.key] = record
                    return
            record = replace(record, content=await asyncio.to_thread(of_question, question))
            done[record.key] = record
            file.write(json.dumps(asdict(record)) + "\n")
            progress(len(done) + len(unanswered), len(wanted))

        for mode, budget in product(modes, budgets):
            if any((name, mode, budget) not in done for name in questions.names):
                await for_each(questions, config.evaluation.in_flight, partial(run, mode, budget))
    records = done | unanswered
    return [records[key] for key in wanted], before


async def _contents(questions: HeldOut, at_once: int) -> dict[str, str]:
    """The fingerprint of every row, by its name."""
    found: dict[str, str] = {}

    async def note(number: int, question: Question | SkippedQuestion) -> None:
        found[questions.names[number]] = await asyncio.to_thread(of_question, question)

    await for_each(questions, at_once, note)
    return found


async def run_one(
    question: Question | SkippedQuestion, client: PolicyClient, config: TrainConfig, mode: Mode, budget: int
) -> Record:
    """The record of one row. Raises EpisodeError where there is no episode of it."""
    if isinstance(question, SkippedQuestion):
        raise EpisodeError(question.reason)
    result = await run_mode(question, client, config, mode, budget)
    return score_episode(question, result, client, config, mode, budget)


async def run_mode(
    question: Question, client: PolicyClient, config: TrainConfig, mode: Mode, budget: int
) -> EpisodeResult:
    """Run one question in one mode. Raises EpisodeError, in every mode for an image that cannot be read."""
    box: Box | None = None
    if mode is Mode.ORACLE:
        try:
            box = await asyncio.to_thread(choose_box, question, BoxSource.ORACLE, config.evaluation)
        except (UnreadableImage, DatasetError) as error:
            raise EpisodeError(f"{type(error).__name__}: {error}") from error
    return await client.run_episode(question, EvalMode(budget, mode is Mode.DIRECT), box)


def score_episode(
    question: Question, result: EpisodeResult, client: PolicyClient, config: TrainConfig, mode: Mode, budget: int
) -> Record:
    """The record of an episode. It is correct where the text of the last ``<answer>`` of the last turn matches; a reply
    that was cut off, or an episode without a usable box, has no answer."""
    trajectory, tokens = result.trajectory, result.visual_tokens(client.family)
    said = answer_of(trajectory)
    crop = trajectory.crop
    return Record(
        question=question.id,
        category=question.source,
        mode=mode,
        budget=budget,
        correct=said is not None and matches(said, question, config.reward.number_tolerance),
        said=said,
        outcome=trajectory.outcome,
        box_outcome="" if mode is Mode.DIRECT else trajectory.box_outcome,
        area_ratio=trajectory.area_ratio,
        covered=None
        if mode is Mode.DIRECT or not question.boxes
        else crop is not None and all(crop.box.contains(box) for box in question.boxes),
        visual_tokens=(tokens[0], tokens[1] if len(tokens) > 1 else 0),
        calls=len(trajectory.turns),
        seconds=result.seconds,
        replies=tuple(turn.text for turn in trajectory.turns),
    )


def has_usable_box(record: Record) -> bool:
    return bool(record.box_outcome) and BoxOutcome(record.box_outcome).usable


def _failed(question: Question | SkippedQuestion, mode: Mode, budget: int, reason: str) -> Record:
    name, category = (
        (question.question_id, "") if isinstance(question, SkippedQuestion) else (question.id, question.source)
    )
    return Record(name, category, mode, budget, False, None, "", "", None, None, (0, 0), 0, 0.0, (), reason)


def _load_records(out: Path, settings: Mapping[str, Any]) -> list[Record]:
    """The records in ``out``, none where it is new. Raises ConfigError where they were made with other settings."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / SETTINGS
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        if differing := sorted(key for key in before.keys() | settings.keys() if before.get(key) != settings.get(key)):
            raise ConfigError(
                f"{out} holds an evaluation with another {', '.join(differing)}; name another folder with --out"
            )
    else:
        path.write_text(json.dumps(dict(settings), indent=1) + "\n", encoding="utf-8")
    lines = read_lines(out / RECORDS)
    # A last line without its end was cut off; drop it, or the next record would be glued to it.
    (out / RECORDS).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return [record for line in lines if (record := _record(line)) is not None]


def _record(line: Any) -> Record | None:
    """None for a line that is no record: its question is asked again."""
    try:
        coarse, crop = line["visual_tokens"]
        return Record(
            **{**line, "mode": Mode(line["mode"]), "visual_tokens": (coarse, crop), "replies": tuple(line["replies"])}
        )
    except (LookupError, TypeError, ValueError):
        return None


EVERY = "all"
"""Name of the category that holds every question."""
Figures = dict[str, Any]


def summarise(records: Sequence[Record]) -> list[Figures]:
    """Figures for each mode, budget and category, in the order of the records; the category ``all`` comes first."""
    cells: dict[tuple[Mode, int], list[Record]] = {}
    for record in records:
        cells.setdefault((record.mode, record.budget), []).append(record)
    summary = []
    for (mode, budget), here in cells.items():
        names = sorted({record.category for record in here if record.category})
        for name in [EVERY, *names] if len(names) > 1 else [EVERY]:
            some = [record for record in here if name in (EVERY, record.category)]
            summary.append({"mode": str(mode), "budget": budget, "category": name, **figures(some)})
    return summary


def figures(records: Sequence[Record]) -> Figures:
    """The figures of some records of one mode and budget.

    ``accuracy`` is the share of all records, failures counted as wrong, with its 95 % interval (Wilson). All others are
    over the episodes that were run: mean visual tokens, mean calls, median and 95th percentile of the seconds, mean
    area ratio of the crops, shares of bad boxes (two-stage) and of covered targets (questions with boxes)."""
    finished = [record for record in records if not record.failure]
    right = sum(record.correct for record in records)
    low, high = wilson(right, len(records))
    values: Figures = {
        "questions": len(records),
        "failures": len(records) - len(finished),
        "accuracy": right / len(records),
        "accuracy_low": low,
        "accuracy_high": high,
    }
    if not finished:
        return values
    seconds = sorted(record.seconds for record in finished)
    values |= {
        "coarse_tokens": statistics.mean(record.visual_tokens[0] for record in finished),
        "crop_tokens": statistics.mean(record.visual_tokens[1] for record in finished),
        "visual_tokens": statistics.mean(sum(record.visual_tokens) for record in finished),
        "calls": statistics.mean(record.calls for record in finished),
        "seconds_median": statistics.median(seconds),
        "seconds_p95": seconds[min(len(seconds) - 1, round(0.95 * (len(seconds) - 1)))],
    }
    ratios = [record.area_ratio for record in finished if record.area_ratio is not None]
    if ratios:
        values["area_ratio"] = statistics.mean(ratios)
    if boxed := [record for record in finished if record.mode is Mode.TWO_STAGE]:
        values["bad_box_rate"] = statistics.mean(not has_usable_box(record) for record in boxed)
    if known := [record.covered for record in finished if record.covered is not None]:
        values["coverage"] = statistics.mean(known)
    return values


def write_report(out: Path, settings: Mapping[str, Any], records: Sequence[Record]) -> list[Path]:
    """Write ``evaluation.json``, ``evaluation.md`` and ``evaluation.png`` into ``out``; returns their paths."""
    summary = summarise(records)
    failures = [
        {"question": record.question, "mode": str(record.mode), "budget": record.budget, "why": record.failure}
        for record in records
        if record.failure
    ]
    paths = [out / f"evaluation.{kind}" for kind in ("json", "md", "png")]
    paths[0].write_text(
        json.dumps({"settings": dict(settings), "figures": summary, "failures": failures}, indent=1) + "\n",
        encoding="utf-8",
    )
    paths[1].write_text(as_markdown(settings, summary, failures), encoding="utf-8")
    _plot([line for line in summary if line["category"] == EVERY], paths[2])
    return paths


_COLUMNS = ("mode", "budget", "category", "questions", "accuracy", "visual tokens", "latency", "calls", "area",
            "bad box", "coverage", "failed")  # fmt: skip


def as_markdown(settings: Mapping[str, Any], summary: Sequence[Figures], failures: Sequence[Mapping[str, Any]]) -> str:
    """A table with a line per mode, budget and category, followed by every failure."""
    lines = [
        f"Policy: `{settings['policy']}`. Accuracy with its 95 % interval; questions that failed count as wrong. "
        f"Visual tokens: coarse + crop = total, means. Latency: median and 95th percentile, "
        f"{settings['in_flight']} questions in flight.",
        "",
        f"| {' | '.join(_COLUMNS)} |",
        f"|{'---|' * len(_COLUMNS)}",
    ]
    for line in summary:
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
        lines += ["", "Failed:", ""]
        lines += [
            f"- {_plain(failure['question'])}, {failure['mode']}, {failure['budget']}: {_plain(failure['why'])}"
            for failure in failures
        ]
    return "\n".join(lines) + "\n"


def _plain(text: str) -> str:
    """The text on one line, escaped for a cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _plot(summary: Sequence[Figures], path: Path) -> None:
    """Plot accuracy against visual tokens, a line per mode, with rings around the points of the Pareto front."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    points = [line for line in summary if "visual_tokens" in line]
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
    front: list[tuple[float, float]] = []
    for cost, value in sorted(set(points), key=lambda point: (point[0], -point[1])):
        if not front or value > front[-1][1]:
            front.append((cost, value))
    return front
