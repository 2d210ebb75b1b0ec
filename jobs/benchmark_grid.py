"""Run a policy in several modes at several visual-token budgets; every episode is a record on disk at once.

A grid that was stopped continues: records that are there are not made again.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from ergo_rl.actors.rollout_worker import Manner
from ergo_rl.episodes.images import UnreadableImage
from ergo_rl.episodes.parsing import BoxOutcome, parse_answer
from ergo_rl.episodes.types import Box, Outcome, Question
from ergo_rl.jobs.config import ConfigError, TrainConfig
from ergo_rl.jobs.evaluation import BoxSource, choose_box
from ergo_rl.jobs.policy_clients import EpisodeError, EpisodeResult, PolicyClient
from ergo_rl.jobs.report_data import read_lines
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

    @property
    def key(self) -> tuple[str, str, int]:
        return self.question, self.mode, self.budget


async def run_grid(
    questions: Sequence[Question],
    client: PolicyClient,
    config: TrainConfig,
    modes: Sequence[Mode],
    budgets: Sequence[int],
    out: Path,
    settings: Mapping[str, Any],
    progress: Callable[[int, int], None],
) -> list[Record]:
    """Run what is missing of the grid; each record is appended to ``out/records.jsonl`` as soon as it is known.

    settings: what the records depend on; a folder of other settings is refused. Episodes that failed for a transient
    reason are not written, so that the next call tries them again. progress: called with (episodes done, all of them).
    Raises ConfigError, OSError."""
    done = {record.key: record for record in _load_records(out, settings)}
    wanted = [
        (question, mode, budget)
        for mode in modes
        for budget in budgets
        for question in questions
        if mode is not Mode.ORACLE or question.boxes
    ]
    missing = [cell for cell in wanted if (cell[0].id, cell[1], cell[2]) not in done]
    slots, unanswered = asyncio.Semaphore(config.evaluation.in_flight), dict[tuple[str, str, int], Record]()
    with (out / RECORDS).open("a", encoding="utf-8", buffering=1) as file:

        async def run(question: Question, mode: Mode, budget: int) -> None:
            async with slots:
                try:
                    result = await run_mode(question, client, config, mode, budget)
                except EpisodeError as error:
                    record = _failed(question, mode, budget, str(error))
                    if error.transient:
                        unanswered[record.key] = record
                        return
                else:
                    record = score_episode(question, result, client, config, mode, budget)
            done[record.key] = record
            file.write(json.dumps(asdict(record)) + "\n")
            progress(len(done) + len(unanswered), len(wanted))

        await asyncio.gather(*(run(*cell) for cell in missing))
    records = done | unanswered
    return [records[question.id, mode, budget] for question, mode, budget in wanted]


async def run_mode(
    question: Question, client: PolicyClient, config: TrainConfig, mode: Mode, budget: int
) -> EpisodeResult:
    """Run one question in one mode. Raises EpisodeError, in every mode for an image that cannot be read."""
    box: Box | None = None
    if mode is Mode.ORACLE:
        try:
            box = await asyncio.to_thread(choose_box, question, BoxSource.ORACLE, config.evaluation)
        except UnreadableImage as error:
            raise EpisodeError(f"UnreadableImage: {error}") from error
    return await client.run_episode(question, Manner(budget, mode is Mode.DIRECT), box)


def score_episode(
    question: Question, result: EpisodeResult, client: PolicyClient, config: TrainConfig, mode: Mode, budget: int
) -> Record:
    """The record of an episode. It is correct where the text of the last ``<answer>`` of the last turn matches; a reply
    that was cut off, or an episode without a usable box, has no answer."""
    trajectory, tokens = result.trajectory, result.visual_tokens(client.family)
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
        seconds=result.seconds,
        replies=tuple(turn.text for turn in trajectory.turns),
    )


def has_usable_box(record: Record) -> bool:
    return bool(record.box_outcome) and BoxOutcome(record.box_outcome).usable


def _failed(question: Question, mode: Mode, budget: int, reason: str) -> Record:
    return Record(
        question.id, question.source, mode, budget, False, None, "", "", None, None, (0, 0), 0, 0.0, (), reason
    )


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
    return [_record(line) for line in lines]


def _record(line: dict[str, Any]) -> Record:
    coarse, crop = line["visual_tokens"]
    return Record(
        **{**line, "mode": Mode(line["mode"]), "visual_tokens": (coarse, crop), "replies": tuple(line["replies"])}
    )
