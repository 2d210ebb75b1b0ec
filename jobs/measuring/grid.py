"""A policy in several modes at several visual-token budgets: one record per question, mode and budget, kept as it
comes, so that an evaluation that was stopped goes on where it was."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from ergo_rl.actors.rollout_worker import EvalMode
from ergo_rl.episodes.images import UnreadableImage
from ergo_rl.episodes.parsing import BoxOutcome, parse_answer
from ergo_rl.episodes.types import Box, Outcome, Question
from ergo_rl.jobs.config import ConfigError, TrainConfig
from ergo_rl.jobs.measuring.evaluation import BoxSource, choose_box
from ergo_rl.jobs.pages.report_data import read_lines
from ergo_rl.jobs.players import NotPlayed, Play, Player
from ergo_rl.rewards.matching import matches

RECORDS, SETTINGS = "records.jsonl", "settings.json"


class Mode(StrEnum):
    """DIRECT: one turn, the answer from the coarse view alone. TWO_STAGE: look, zoom, answer. ORACLE: the same with the
    target's own box put into the policy's mouth (questions that say where their target is)."""

    DIRECT = "direct"
    TWO_STAGE = "two-stage"
    ORACLE = "oracle"


@dataclass(frozen=True, slots=True)
class Record:
    """One question in one mode at one budget. visual_tokens: of the coarse view and the crop, 0 where there was none;
    calls: requests to the model; covered: the crop holds every target, None where no target is known or no crop belongs
    to the mode; failure: why it could not be played (then it counts as wrong), empty where it was."""

    question: str
    category: str
    mode: Mode
    budget: int
    correct: bool
    said: str | None
    outcome: str
    box_outcome: str
    area_ratio: float | None
    covered: bool | None
    visual_tokens: tuple[int, int]
    calls: int
    seconds: float
    replies: tuple[str, ...]
    failure: str = ""

    @property
    def key(self) -> tuple[str, str, int]:
        return self.question, self.mode, self.budget


async def run_grid(
    questions: Sequence[Question],
    player: Player,
    config: TrainConfig,
    modes: Sequence[Mode],
    budgets: Sequence[int],
    out: Path,
    told: Mapping[str, Any],
    progress: Callable[[int, int], None],
) -> list[Record]:
    """All of it, or what is left of it; each record is in ``out/records.jsonl`` as soon as it is known.

    told: what the records depend on; an ``out`` of other settings is refused. An endpoint that did not answer is asked
    again the next time; for now its question counts as wrong. Raises ConfigError, OSError."""
    done = {record.key: record for record in _take_up(out, told)}
    wanted = [
        (question, mode, budget)
        for mode in modes
        for budget in budgets
        for question in questions
        if mode is not Mode.ORACLE or question.boxes
    ]
    left = [one for one in wanted if (one[0].id, one[1], one[2]) not in done]
    places, passing = asyncio.Semaphore(config.evaluation.in_flight), list[Record]()
    with (out / RECORDS).open("a", encoding="utf-8", buffering=1) as file:

        async def one(question: Question, mode: Mode, budget: int) -> None:
            async with places:
                found = await play(question, player, config, mode, budget)
            if isinstance(found, NotPlayed):
                record = _lost(question, mode, budget, found.reason)
                if found.passing:
                    passing.append(record)
                    return
            else:
                record = judge(question, found, player, config, mode, budget)
            done[record.key] = record
            file.write(json.dumps(asdict(record)) + "\n")
            progress(len(done) + len(passing), len(wanted))

        await asyncio.gather(*(one(*each) for each in left))
    every = done | {record.key: record for record in passing}
    return [every[question.id, mode, budget] for question, mode, budget in wanted]


async def play(question: Question, player: Player, config: TrainConfig, mode: Mode, budget: int) -> Play | NotPlayed:
    """One question in one mode. A picture that cannot be read is not played, in any mode."""
    box: Box | None = None
    if mode is Mode.ORACLE:
        try:
            box = await asyncio.to_thread(choose_box, question, BoxSource.ORACLE, config.evaluation)
        except UnreadableImage as error:
            return NotPlayed(f"UnreadableImage: {error}")
    return await player.play(question, EvalMode(budget, mode is Mode.DIRECT), box)


def judge(question: Question, found: Play, player: Player, config: TrainConfig, mode: Mode, budget: int) -> Record:
    """Right where the text of the last ``<answer>`` of the last turn matches; a reply that was cut off has not
    answered, and neither has one without a usable box."""
    trajectory, tokens = found.trajectory, found.visual_tokens(player.family)
    answered = trajectory.outcome is Outcome.ANSWERED
    said = parse_answer(trajectory.turns[-1].text) if answered else None
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
        seconds=found.seconds,
        replies=tuple(turn.text for turn in trajectory.turns),
    )


def usable(record: Record) -> bool:
    return bool(record.box_outcome) and BoxOutcome(record.box_outcome).usable


def _lost(question: Question, mode: Mode, budget: int, reason: str) -> Record:
    return Record(
        question.id, question.source, mode, budget, False, None, "", "", None, None, (0, 0), 0, 0.0, (), reason
    )


def _take_up(out: Path, told: Mapping[str, Any]) -> list[Record]:
    """What is in ``out`` already. Raises ConfigError where that was made with other settings."""
    out.mkdir(parents=True, exist_ok=True)
    settings = out / SETTINGS
    if settings.is_file():
        before = json.loads(settings.read_text(encoding="utf-8"))
        if differing := sorted(key for key in before.keys() | told.keys() if before.get(key) != told.get(key)):
            raise ConfigError(
                f"{out} holds an evaluation with another {', '.join(differing)}; name another folder with --out"
            )
    else:
        settings.write_text(json.dumps(dict(told), indent=1) + "\n", encoding="utf-8")
    lines = read_lines(out / RECORDS)
    # a last line without its end was cut off: what is added now must not be glued to it
    (out / RECORDS).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return [_record(line) for line in lines]


def _record(line: dict[str, Any]) -> Record:
    coarse, crop = line["visual_tokens"]
    return Record(
        **{
            **line,
            "mode": Mode(line["mode"]),
            "visual_tokens": (coarse, crop),
            "replies": tuple(line["replies"]),
        }
    )
