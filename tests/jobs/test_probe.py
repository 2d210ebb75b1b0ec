"""Gain, harm and reliance of policies that read the crop or do not, in numbers one can check by hand."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ergo_rl.actors.config import RolloutConfig
from ergo_rl.actors.rollout_pool import Rollout
from ergo_rl.actors.rollout_worker import GroupResult, SkippedQuestion, summarize
from ergo_rl.episodes.config import EpisodeConfig
from ergo_rl.episodes.episode import CoarseToFine
from ergo_rl.episodes.probe import Replacement, replay_each
from ergo_rl.episodes.types import Box, Completion, Question, View
from ergo_rl.jobs.config import EvaluationConfig
from ergo_rl.jobs.evaluation import Evaluation, evaluate, wilson
from ergo_rl.jobs.policy_clients import CodepointTokenizer
from ergo_rl.jobs.probe import DONORS, Probe, probe
from tests.episodes.test_episode import Reply
from tests.factories import FAMILY

TARGET = Box(0, 0, 56, 56)
COLOURS = {"red": (255, 0, 0), "blue": (0, 0, 255), "grey": (128, 128, 128)}
"""The mean of noise is grey."""


def picture(colour: str) -> bytes:
    """Grey, but for the target."""
    pixels = np.full((224, 224, 3), 128, np.uint8)
    pixels[:56, :56] = COLOURS[colour]
    Image.fromarray(pixels).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


PICTURES = {colour: picture(colour) for colour in ("red", "blue")}
LOOKS = {"elsewhere": "<zoom>[112, 112, 168, 168]</zoom>", "no box": "there"}
"""What turn 1 says, where it is not the target."""


def question(name: str, colour: str, boxes: tuple[Box, ...] = (TARGET,)) -> Question:
    return Question(name, PICTURES[colour], "Which colour?", colour, boxes=boxes)


ROWS: tuple[Question | SkippedQuestion, ...] = (
    question("0", "red"), question("1", "blue"), question("2", "red"), question("3", "blue"),
    question("elsewhere", "red"), question("no box", "red"), SkippedQuestion("bad", "no picture"),
    question("no target", "red", boxes=()),
)  # fmt: skip
"""With the crop five are right, "elsewhere" reads grey, "no box" reads nothing, "bad" fails."""


def seen(view: View) -> str:
    """The colour that the view has most of, the grey of the scene left out where it has another."""
    means = view.pixels[: view.height // 4, : view.width // 4].reshape(-1, 3).mean(0)
    return min(COLOURS, key=lambda name: float(np.abs(means - COLOURS[name]).sum()))


def reads_the_crop(views: Sequence[View]) -> str:
    return seen(views[1]) if len(views) > 1 else "nothing"


def ignores_the_crop(views: Sequence[View]) -> str:
    return seen(views[0])


def prefers_the_crop(views: Sequence[View]) -> str:
    return seen(views[-1])


@dataclass
class Policy:
    """Real episodes of a policy that is a function: views of turn 2 -> answer."""

    answer: Callable[[Sequence[View]], str]
    lost: set[str] = field(default_factory=set)
    """Questions whose turn 2 cannot be played again."""
    config: RolloutConfig = field(default_factory=RolloutConfig)
    turns: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.episodes = CoarseToFine(FAMILY, CodepointTokenizer(), EpisodeConfig(coarse_tokens=64, fine_tokens=64))

    def generate(self, name: str) -> Any:
        async def generate(ids: Sequence[int], views: Sequence[View], turn: int) -> Completion:
            self.turns.append(turn)
            look = LOOKS.get(name, "<zoom>[0, 0, 56, 56]</zoom>")
            text = f"<answer>{self.answer(views)}</answer>" if turn else look
            return Reply(text, tuple(map(ord, text)))

        return generate

    async def rollout(self, asked: Question, **_: Any) -> Any:
        played = (await self.episodes.run(self.episodes.prepare(asked), 0, self.generate(asked.id)),)
        return Rollout(GroupResult(asked.id, tuple(map(summarize, played))), played)  # type: ignore[arg-type]

    async def replay(self, asked: Question, played: Any, other: Any, target: Box | None) -> Any:
        if asked.id in self.lost:
            return SkippedQuestion(asked.id, "gone")
        donor = other and other[0]
        return await replay_each(
            self.episodes, self.episodes.prepare(asked), played[0], donor, target, self.generate(asked.id)
        )


def probed(policy: Any, rows: Iterable[Any] = ROWS, in_flight: int = 64) -> tuple[Evaluation, Probe]:
    config = EvaluationConfig(in_flight=in_flight, oracle_margin=0.0)

    async def both() -> tuple[Evaluation, Probe]:
        played = await evaluate(rows, policy, None, config, 0.01)
        return played, await probe(rows, played, policy, config, 0.01)

    return asyncio.run(both())


def shares(found: Probe, how: Replacement) -> list[float]:
    metrics = found.metrics()
    return [metrics[f"eval/probe_{how}_{name}"] for name in ("accuracy", "gain", "harm", "reliance")]


def counts(found: Probe, how: Replacement) -> list[float]:
    metrics = found.metrics()
    return [metrics[f"eval/probe_{how}_{name}"] for name in ("replaced", "failed", "left_out")]


def test_probe_of_a_policy_that_reads_the_crop_gains_what_it_gets_right() -> None:
    """Five of eight right. Noise reads as grey, which "elsewhere" had said before; another image's crop has another
    colour; the oracle's shows "elsewhere" its target."""
    policy = Policy(reads_the_crop)
    played, found = probed(policy)
    assert found.metrics()["eval/accuracy"] == 5 / 8 and [*played.right].count(True) == 5
    assert shares(found, Replacement.NOISE) == [0, 5 / 8, 0, 5 / 6]
    assert shares(found, Replacement.OTHER) == [0, 5 / 8, 0, 1]
    assert shares(found, Replacement.ORACLE) == [5 / 7, 0, 1 / 7, 1 / 5]
    assert shares(found, Replacement.NONE) == [0, 5 / 8, 0, 1]
    assert counts(found, Replacement.ORACLE) == [5, 1, 1] and counts(found, Replacement.NONE) == [6, 1, 0]
    assert policy.turns.count(0) == 7, "turn 1 is played once"
    assert policy.turns.count(1) == 6 + 3 * 6 + 5


def test_probe_of_a_policy_that_ignores_the_crop_finds_nothing() -> None:
    _, found = probed(Policy(ignores_the_crop))
    assert [shares(found, how) for how in (Replacement.NOISE, Replacement.OTHER, Replacement.NONE)] == 3 * [
        [6 / 8, 0, 0, 0]
    ]
    assert shares(found, Replacement.ORACLE) == [5 / 7, 0, 0, 0], "without the row that has no target box"


def test_probe_of_a_policy_that_a_crop_misleads_finds_harm() -> None:
    """From the coarse view alone it would have been right about "elsewhere"."""
    _, found = probed(Policy(prefers_the_crop))
    assert shares(found, Replacement.NONE) == [6 / 8, 0, 1 / 8, 1 / 6]


@pytest.mark.parametrize("policy", [reads_the_crop, ignores_the_crop, prefers_the_crop])
def test_probe_counts_every_row_once_in_every_column(policy: Callable[[Sequence[View]], str]) -> None:
    """Right, wrong, failed or left out; and accuracy with the crop is that without it, and gain less harm."""
    _, found = probed(Policy(policy))
    assert [row.question for row in found.rows] == ["0", "1", "2", "3", "elsewhere", "no box", "bad", "no target"]
    metrics = found.metrics()
    for how in Replacement:
        cells = [row.replaced[how] for row in found.rows if how in row.replaced]
        right, failed = [sum(map(bool, flags)) for flags in zip(*((c.right, c.failure) for c in cells), strict=True)]
        wrong = sum(not (cell.right or cell.failure) for cell in cells)
        assert right + wrong + failed + metrics[f"eval/probe_{how}_left_out"] == len(ROWS)
        own = sum(row.own.right for row in found.rows if how in row.replaced) / len(cells)
        accuracy, gain, harm, _ = shares(found, how)
        assert own - accuracy == pytest.approx(gain - harm)


def test_probe_intervals_are_of_the_rows_of_their_column() -> None:
    bounds = probed(Policy(reads_the_crop))[1].intervals()
    for name, share in (("none_gain", (5, 8)), ("noise_reliance", (5, 6)), ("oracle_harm", (1, 7))):
        assert (bounds[f"eval/probe_{name}_low"], bounds[f"eval/probe_{name}_high"]) == wilson(*share)
    assert (bounds["eval/accuracy_low"], bounds["eval/accuracy_high"]) == wilson(5, 8)


def test_probe_replay_that_fails_is_wrong_but_neither_gain_nor_harm() -> None:
    _, found = probed(Policy(reads_the_crop, lost={"1"}))
    assert shares(found, Replacement.NONE) == [0, 4 / 8, 0, 1] and counts(found, Replacement.NONE) == [5, 2, 0]
    assert set(found.failures()) == {f"1, crop replaced ({how}): gone" for how in Replacement}


def test_probe_target_that_is_no_box_fails_in_its_column_alone() -> None:
    outside = question("outside", "blue", (Box(500, 500, 600, 600),))
    _, found = probed(Policy(reads_the_crop), [question("0", "red"), outside])
    assert counts(found, Replacement.ORACLE) == [1, 1, 0] and counts(found, Replacement.NOISE) == [2, 0, 0]
    (failure,) = found.failures()
    assert failure.startswith("outside, crop replaced (oracle): ValueError: not a box")


def test_probe_is_the_same_in_any_order_and_takes_crops_of_the_first_rows() -> None:
    rows = [question(str(number), ("red", "blue")[number == 3]) for number in range(DONORS + 6)]
    taken: list[list[str]] = []

    class Watched(Policy):
        async def replay(self, asked: Question, played: Any, other: Any, target: Box | None) -> Any:
            taken[-1].append(f"{asked.id}: {other and other[0].question_id}")
            return await super().replay(asked, played, other, target)

    found = []
    for in_flight in (1, 64):
        taken.append([])
        found.append(probed(Watched(reads_the_crop), rows, in_flight)[1])
    assert found[0] == found[1] and sorted(taken[0]) == sorted(taken[1])
    donors = dict(one.split(": ") for one in taken[0])
    assert {donors[str(number)] for number in range(DONORS + 6) if number != 3} == {"3"}, "of another image only"
    assert donors["3"] != "3" and int(donors["3"]) < DONORS


def test_probe_of_one_image_leaves_another_questions_crop_out() -> None:
    _, found = probed(Policy(reads_the_crop), [question("0", "red"), question("1", "red")])
    assert counts(found, Replacement.OTHER) == [0, 0, 2] and "eval/probe_other_gain" not in found.metrics()


def test_probe_of_nothing_has_no_shares() -> None:
    assert not any(map(bool, probed(Policy(reads_the_crop), [])[1].metrics().values()))


def test_answers_that_say_the_same_have_not_changed() -> None:
    """An option by its letter and by its words; reliance is about what is said, not how."""

    def answer(views: Sequence[View]) -> str:
        return "B" if len(views) > 1 else "blue."

    asked = replace(question("0", "blue"), answer="B", options=("red", "blue"))
    assert shares(probed(Policy(answer), [asked])[1], Replacement.NONE) == [1, 0, 0, 0]


def test_costs_are_those_of_the_questions_that_were_played() -> None:
    """Of seven; "no box" has no look. Visual tokens: tests/actors/test_rollout_worker.py."""
    policy = Policy(reads_the_crop)

    async def play() -> Evaluation:
        return await evaluate(ROWS, policy, None, EvaluationConfig(), 0.01)  # type: ignore[arg-type]

    costs = asyncio.run(play()).costs()
    assert costs["eval/looks"] == 6 / 7 and costs["eval/seconds_median"] == 0
    assert Evaluation((), (), ()).costs() == {}
