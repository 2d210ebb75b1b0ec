"""Is the crop used? An evaluation's episodes again from turn 2 on, with the policy's crop replaced by noise, by another
question's, by the oracle's, by none: what the crop gains and harms, and how far answers rely on it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from ergo_rl.actors.rollout_pool import RolloutPool
from ergo_rl.actors.rollout_worker import SkippedQuestion, derive_seed
from ergo_rl.actors.trajectory_store import Group
from ergo_rl.cluster.placement import Cluster
from ergo_rl.console import PlainConsole
from ergo_rl.episodes.families import family_of
from ergo_rl.episodes.probe import Replacement, Replay
from ergo_rl.episodes.types import Question
from ergo_rl.jobs.config import EvaluationConfig, TrainConfig
from ergo_rl.jobs.evaluation import (
    BoxSource,
    Evaluation,
    HeldOut,
    choose_box,
    ends,
    evaluate,
    for_each,
    wilson,
)
from ergo_rl.jobs.metrics import Metrics
from ergo_rl.jobs.policy_clients import EndpointClient, EndpointRollouts, endpoint_at, family_by_name
from ergo_rl.rewards.matching import matches

DONORS = 64
"""Another question's crop is that of one of the first so many rows, so that few have to be kept."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One row in one column: right, wrong or failed."""

    answer: str | None = None
    right: bool = False
    failure: str = ""
    """Why there is no answer to judge; it counts as wrong, but neither as gain nor as harm."""
    changed: bool | None = None
    """Whether the answer differs from that to the policy's own crop; None where no crop was replaced."""


@dataclass(frozen=True, slots=True)
class ProbedRow:
    """One row of the held-out files."""

    question: str
    own: Cell
    """With the policy's own crop."""
    replaced: Mapping[Replacement, Cell] = field(default_factory=dict)
    """Left out: the oracle's where no target box is known, another question's where no crop is of another image."""


@dataclass(frozen=True, slots=True)
class Probe:
    """Every row of an evaluation, in its order; in each column it is right, wrong, failed or left out."""

    rows: tuple[ProbedRow, ...]

    def metrics(self) -> Metrics:
        """Shares as ``eval/probe_REPLACEMENT_FIGURE``: accuracy, gain and harm of the rows of a column, reliance of the
        crops that were replaced; and how many were replaced, failed and left out."""
        found = {name: hits / count for name, (hits, count) in self._shares().items()}
        for how in Replacement:
            cells = [row.replaced[how] for row in self.rows if how in row.replaced]
            found[_name(how, "replaced")] = float(sum(cell.changed is not None for cell in cells))
            found[_name(how, "failed")] = float(sum(bool(cell.failure) for cell in cells))
            found[_name(how, "left_out")] = float(len(self.rows) - len(cells))
        return found

    def intervals(self) -> Metrics:
        """Ends of the 95 % intervals (Wilson) of the shares, as ``NAME_low`` and ``NAME_high``."""
        return ends({name: wilson(*share) for name, share in self._shares().items()})

    def failures(self) -> Iterator[str]:
        """What failed although the question was played."""
        for row in self.rows:
            for how, cell in row.replaced.items():
                if cell.failure and not row.own.failure:
                    yield f"{row.question}, crop replaced ({how}): {cell.failure}"

    def _shares(self) -> dict[str, tuple[int, int]]:
        """(hits, of how many) by name; without those of nothing."""
        shares = {"eval/accuracy": (sum(row.own.right for row in self.rows), len(self.rows))}
        for how in Replacement:
            pairs = [(row.own, row.replaced[how]) for row in self.rows if how in row.replaced]
            both = [(own.right, cell.right) for own, cell in pairs if not (own.failure or cell.failure)]
            changed = [cell.changed for _, cell in pairs if cell.changed is not None]
            shares[_name(how, "accuracy")] = (sum(cell.right for _, cell in pairs), len(pairs))
            shares[_name(how, "gain")] = (both.count((True, False)), len(pairs))
            shares[_name(how, "harm")] = (both.count((False, True)), len(pairs))
            shares[_name(how, "reliance")] = (sum(changed), len(changed))
        return {name: share for name, share in shares.items() if share[1]}


def _name(how: Replacement, figure: str) -> str:
    return f"eval/probe_{how}_{figure}"


async def probe(
    questions: Iterable[Question | SkippedQuestion],
    played: Evaluation,
    rollouts: RolloutPool | EndpointRollouts,
    config: EvaluationConfig,
    tolerance: float,
) -> Probe:
    """Play turn 2 of every episode of ``played`` again with each replacement of its crop; turn 1 stays as it was.

    questions: those of ``played``, read once more for their images. tolerance: ``reward.number_tolerance``."""
    groups = {group.number: (group, right) for group, right in zip(played.groups, played.right, strict=True)}
    reasons = {one.question_id: one.reason for one in played.failed}
    donors = await asyncio.to_thread(_donors, questions, [group for group, _ in groups.values()])
    replays = _Replays(donors, rollouts, config, tolerance)
    found: dict[int, ProbedRow] = {}

    async def record(number: int, row: Question | SkippedQuestion) -> None:
        name = row.question_id if isinstance(row, SkippedQuestion) else row.id
        if number in groups:
            group, right = groups[number]
            own = Cell(group.result.summaries[0].answer, right)
            found[number] = ProbedRow(name, own, await replays.cells(row, group, own))
        else:
            own = Cell(failure=reasons.get(name, "it was not played"))
            found[number] = ProbedRow(name, own, dict.fromkeys(replays.columns(row), own))

    await for_each(questions, config.in_flight, record)
    return Probe(tuple(found[number] for number in sorted(found)))


@dataclass(frozen=True, slots=True)
class _Donor:
    image: int
    """Hash of the image, to tell a crop of another one."""
    trajectories: Any
    """As in ``Group``."""


def _donors(questions: Iterable[Question | SkippedQuestion], groups: Sequence[Group]) -> list[_Donor]:
    """The first rows that have a crop. Reads their images, so call it in a thread."""
    cropped = {group.number: group for group in groups if group.result.summaries[0].crop is not None}
    return [
        _Donor(hash(row.image), cropped[number].trajectories)
        for number, row in enumerate(islice(questions, DONORS))
        if number in cropped and isinstance(row, Question)
    ]


@dataclass(frozen=True, slots=True)
class _Replays:
    """What the replays of all rows have in common."""

    donors: Sequence[_Donor]
    rollouts: RolloutPool | EndpointRollouts
    config: EvaluationConfig
    tolerance: float

    def columns(self, row: Question | SkippedQuestion) -> list[Replacement]:
        """Those in which the row counts."""
        if isinstance(row, SkippedQuestion):  # what it would have had is not known
            return list(Replacement)
        there = {Replacement.OTHER: self._donor(row) is not None, Replacement.ORACLE: bool(row.boxes)}
        return [how for how in Replacement if there.get(how, True)]

    async def cells(self, row: Question | SkippedQuestion, group: Group, own: Cell) -> dict[Replacement, Cell]:
        """A row that was played, in all its columns. Without a crop there is nothing to replace: it stays as it is."""
        columns = self.columns(row)
        if isinstance(row, SkippedQuestion):  # it was readable before
            return dict.fromkeys(columns, Cell(failure=row.reason))
        if group.result.summaries[0].crop is None:
            return dict.fromkeys(columns, own)
        donor, target, why = self._donor(row), None, ""
        try:
            if row.boxes:
                target = await asyncio.to_thread(choose_box, row, BoxSource.ORACLE, self.config)
        except ValueError as error:  # a box that is none, or not in the image
            why = f"{type(error).__name__}: {error}"
        other = donor.trajectories if donor else None
        found = await self.rollouts.replay(row, group.trajectories, other, target)
        if isinstance(found, SkippedQuestion):
            return dict.fromkeys(columns, Cell(failure=found.reason))
        return {how: self._judge(row, own, found.get(how, Replay(None, why))) for how in columns}

    def _donor(self, question: Question) -> _Donor | None:
        others = [donor for donor in self.donors if donor.image != hash(question.image)]
        return others[derive_seed("another crop", question.id) % len(others)] if others else None

    def _judge(self, question: Question, own: Cell, replay: Replay) -> Cell:
        if replay.failure:
            return Cell(failure=replay.failure)
        answer, right = replay.answer, False
        changed = (answer is None) != (own.answer is None)
        if answer is not None:
            right = matches(answer, question, self.tolerance)
            if own.answer is not None:
                changed = not matches(answer, replace(question, answer=own.answer), self.tolerance)
        return Cell(answer, right, changed=changed)


async def run_probe(
    config: TrainConfig, questions: HeldOut, console: PlainConsole, *, url: str, served_model: str, family: str
) -> tuple[Metrics, Probe]:
    """Play the held-out questions on engines of this job, or on the endpoint at ``url``, and probe them. No verifier is
    started. Returns all figures with their intervals, and the rows.

    Raises ConfigError, OSError, and what starting the workers raises."""
    async with AsyncExitStack() as stack:
        rollouts: RolloutPool | EndpointRollouts
        if url:
            client = EndpointClient(config, await endpoint_at(url, served_model, config), family_by_name(family))
            stack.push_async_callback(client.close)
            rollouts = EndpointRollouts(client, config, questions.names[:DONORS])
        else:
            family_of(config.rollout.engine.model, config.episode.family)  # a missing model is said at once
            cluster = stack.enter_context(Cluster.connect(config.cluster))
            rollouts = RolloutPool.launch(cluster, config.rollout, config.episode)
            with console.status("starting engines (20 to 60 s on a CPU)"):
                await rollouts.ready(config.start_deadline_s)
        tolerance = config.reward.number_tolerance
        with console.status(f"{len(questions)} questions, then their turn 2 with the crop replaced"):
            played = await evaluate(questions, rollouts, None, config.evaluation, tolerance)
            found = await probe(questions, played, rollouts, config.evaluation, tolerance)
    for failed in played.failed:
        console.say(f"failed: {failed.question_id}: {failed.reason}")
    for failure in found.failures():
        console.say(f"failed: {failure}")
    own = {name: value for name, value in played.metrics(config.metrics).items() if "unscored" not in name}
    return own | played.costs() | found.metrics() | found.intervals(), found
