"""The two turns, and the one path from text to pixels: the box contract."""

from __future__ import annotations

import asyncio
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from ergo_rl.episodes.config import BoxNotation, EpisodeConfig, OnBadBox
from ergo_rl.episodes.episode import CoarseToFine, Generate, TurnRefused, read_box
from ergo_rl.episodes.families import Corners, Qwen25VL, Tokenizer
from ergo_rl.episodes.images import UnreadableImage, view
from ergo_rl.episodes.prompts import ReservedText
from ergo_rl.episodes.types import Box, BoxOutcome, Completion, Finish, Outcome, Question, Trajectory, View

FAMILY = Qwen25VL()
DOCUMENT = Path(__file__).parents[2] / "docs" / "boxes.md"

# --- the box contract --------------------------------------------------------------------------------------------

NUMBERS = st.one_of(
    st.integers(-50, 250).map(str),
    st.floats(-50, 250).map(lambda number: f"{number:.3f}"),
    st.floats().map(repr),
    st.integers().map(str),
    st.sampled_from(["nan", "NaN", "inf", "-inf", "Infinity", "1e400", "-1e400", "1e-400", "1e308", "0", "-0", "0.0"]),
    st.sampled_from(["", "+", "-", ".", "1.", ".5", "1e", "0x10", "1_000", "1,000", "١٢", "９", "½", "ten", "9" * 350]),  # noqa: RUF001
)
LISTS = st.builds(
    lambda numbers, opening, separator, closing: opening + separator.join(numbers) + closing,
    st.lists(NUMBERS, min_size=4, max_size=4) | st.lists(NUMBERS, max_size=6),
    st.sampled_from(["[", "(", "", "[[", "{", " [ "]),
    st.sampled_from([", ", ",", " , ", " ", ";", ",\n"]),
    st.sampled_from(["]", ")", "", "]]", "}", " ] "]),
)
TAGGED = st.builds(
    lambda before, opening, box, closing, after: before + opening + box + closing + after,
    st.sampled_from(["", "<think>there</think>", "<think>", "[1, 2, 3, 4] ", "<zoom>"]),
    st.sampled_from(["<zoom>", "<zoom>", "<zoom>", "<Zoom>", "", "<zoom><zoom>"]),
    LISTS,
    st.sampled_from(["</zoom>", "</zoom>", "</zoom>", "", "</zoom></zoom>", "<zoom>"]),
    st.sampled_from(["", "\n", "<zoom>[1, 2, 3, 4]</zoom>", "<answer>B</answer>"]),
)
PLAIN = st.lists(st.integers(-40, 220), min_size=4, max_size=4).map(lambda box: f"<zoom>{box}</zoom>")
REPLIES = st.text() | TAGGED | PLAIN
SCENES = st.sampled_from([(168, 168, 168, 168), (672, 672, 168, 168), (8000, 300, 1400, 56), (1, 200, 28, 140)])


@given(REPLIES, SCENES)
@settings(max_examples=2000, suppress_health_check=[HealthCheck.too_slow])
def test_read_box_keeps_the_contract_on_any_text(reply: str, scene: tuple[int, int, int, int]) -> None:
    width, height, coarse_width, coarse_height = scene
    coarse = View(Box(0, 0, width, height), np.zeros((coarse_height, coarse_width, 3), np.uint8))
    box, outcome = read_box(reply, coarse, FAMILY)
    assert isinstance(outcome, BoxOutcome)
    assert outcome.usable == (box is not None)
    if box is not None:
        assert coarse.box.contains(box)
        fitted = FAMILY.fit(box.width, box.height, 36)  # what is usable can be cropped
        assert fitted[0] * fitted[1] <= 36 * FAMILY.multiple**2


def test_examples_of_the_documentation_are_true() -> None:
    documented, coarse = set(), View(Box(0, 0, 672, 672), np.zeros((168, 168, 3), np.uint8))
    rows = [line.split(" | ") for line in DOCUMENT.read_text().splitlines() if line.startswith("| ")]
    outcome = ""
    for name, _, examples, box_column in (row for row in rows if len(row) == 4 and "`" in row[2]):
        outcome = name.strip("| `") or outcome
        for example in re.findall(r"`(.+?)`", examples):
            box, found = read_box(example, coarse, FAMILY)
            corners = "none" if box is None else f"({box.x1}, {box.y1}, {box.x2}, {box.y2})"
            assert (found, corners) == (outcome, box_column.strip(" |")), example
        documented.add(outcome)
    assert documented == {str(outcome) for outcome in BoxOutcome}


UNITS = st.floats(0, 1)


@given(st.tuples(UNITS, UNITS, UNITS, UNITS), SCENES)
def test_shares_of_the_image_are_refused_by_a_family_that_writes_pixels(
    corners: tuple[float, ...], scene: tuple[int, int, int, int]
) -> None:
    width, height, coarse_width, coarse_height = scene
    coarse = View(Box(0, 0, width, height), np.zeros((coarse_height, coarse_width, 3), np.uint8))
    written = f"<zoom>[{', '.join(map(str, corners))}]</zoom>"
    box, outcome = read_box(written, coarse, FAMILY)
    assert box is None and outcome in (BoxOutcome.SHARES, BoxOutcome.EMPTY)
    by_shares = read_box(written, coarse, Shares())
    assert by_shares[1] is not BoxOutcome.SHARES and (by_shares[0] is None or coarse.box.contains(by_shares[0]))


class Shares(Qwen25VL):
    """A family that writes boxes as shares of the image."""

    shares = True

    def read_corners(self, written: Corners, coarse: View) -> Corners:
        x1, y1, x2, y2 = written
        return x1 * coarse.width, y1 * coarse.height, x2 * coarse.width, y2 * coarse.height


@given(REPLIES, SCENES)
def test_read_box_in_any_notation_keeps_the_contract(reply: str, scene: tuple[int, int, int, int]) -> None:
    width, height, coarse_width, coarse_height = scene
    coarse = View(Box(0, 0, width, height), np.zeros((coarse_height, coarse_width, 3), np.uint8))
    box, outcome = read_box(reply, coarse, FAMILY, BoxNotation.ANY)
    assert outcome.usable == (box is not None) and (box is None or coarse.box.contains(box))


# --- the episode -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reply:
    """A completion of a scripted policy."""

    text: str
    token_ids: tuple[int, ...]
    stopped: bool = True
    prompt_length: int = 0
    weight_version: int = 3
    updates: tuple[tuple[int, int], ...] = ()
    cached_tokens: int = 0

    @property
    def logprobs(self) -> tuple[float, ...]:
        return tuple(-0.5 for _ in self.token_ids)


@dataclass
class Script:
    """A ``generate`` function that returns given replies and keeps what it was asked."""

    tokenizer: Tokenizer
    replies: Sequence[tuple[str, bool]]
    asked: list[tuple[list[int], list[View], int]] = field(default_factory=list)

    async def generate(self, token_ids: Sequence[int], views: Sequence[View], turn: int) -> Reply:
        self.asked.append((list(token_ids), list(views), turn))
        text, stopped = self.replies[turn]
        ids = self.tokenizer.encode(text + ("<|im_end|>" if stopped else ""), add_special_tokens=False)
        return Reply(text, tuple(ids), stopped, prompt_length=1000 + turn)


def scene_image() -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (672, 672, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


QUESTION = Question("q1", scene_image(), "Which mark?", "A", ("cross", "ring"))
LOOK = "<think>left</think><zoom>[10, 20, 52, 62]</zoom>"
READ = "<think>a cross</think><answer>A</answer>"


def run_episode(
    tokenizer: Tokenizer, *replies: tuple[str, bool], on_bad_box: OnBadBox = OnBadBox.STOP
) -> tuple[Trajectory, Script]:
    config = EpisodeConfig(coarse_tokens=36, fine_tokens=36, on_bad_box=on_bad_box)
    episodes, script = CoarseToFine(FAMILY, tokenizer, config), Script(tokenizer, replies)
    return asyncio.run(episodes.run(episodes.prepare(QUESTION), 5, script.generate)), script


def test_run_answers_in_two_turns(tokenizer: Tokenizer) -> None:
    trajectory, script = run_episode(tokenizer, (LOOK, True), (READ, True))
    assert (trajectory.question_id, trajectory.sample) == ("q1", 5)
    assert (trajectory.outcome, trajectory.box_outcome) == (Outcome.ANSWERED, BoxOutcome.OK)
    assert trajectory.crop is not None and trajectory.crop.box == Box(40, 80, 208, 248)
    assert (trajectory.crop.width, trajectory.crop.height) == (168, 168)  # original resolution: not one pixel changed
    assert (trajectory.crop.pixels == view_of_original(trajectory.crop.box)).all()
    look, read = trajectory.turns
    assert (look.text, look.finish, look.policy_version, look.engine_prompt_length) == (LOOK, Finish.STOP, 3, 1000)
    assert (read.text, read.finish, read.policy_version, read.engine_prompt_length) == (READ, Finish.STOP, 3, 1001)
    assert [turn for *_, turn in script.asked] == [0, 1]


def view_of_original(box: Box) -> np.ndarray:
    pixels = np.asarray(Image.open(io.BytesIO(scene_image())))
    return view(pixels, box, FAMILY, 36).pixels


def test_run_sends_the_whole_conversation_and_each_image_once(tokenizer: Tokenizer) -> None:
    trajectory, script = run_episode(tokenizer, (LOOK, True), (READ, True))
    (first, first_views, _), (second, second_views, _) = script.asked
    look, read = trajectory.turns
    assert first == look.prompt_ids.tolist()
    assert second == [*look.prompt_ids.tolist(), *look.completion_ids.tolist(), *read.prompt_ids.tolist()]
    assert trajectory.token_ids.tolist() == [*second, *read.completion_ids.tolist()]
    assert first_views == [trajectory.views[0]] and second_views == list(trajectory.views)
    image_pad = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert (first.count(image_pad), second.count(image_pad)) == (1, 2)
    assert look.prompt_ids.tolist().count(image_pad) == read.prompt_ids.tolist().count(image_pad) == 1


def test_newline_after_the_end_of_turn_belongs_to_the_next_prompt(tokenizer: Tokenizer) -> None:
    trajectory, _ = run_episode(tokenizer, (LOOK, True), (READ, True))
    look, read = trajectory.turns
    assert tokenizer.decode(look.completion_ids.tolist(), skip_special_tokens=False) == LOOK + "<|im_end|>"
    assert tokenizer.decode(read.prompt_ids.tolist(), skip_special_tokens=False).startswith("\n<|im_start|>user\n")
    whole = tokenizer.decode(trajectory.token_ids.tolist(), skip_special_tokens=False)
    assert f"{LOOK}<|im_end|>\n<|im_start|>user\n" in whole
    sampled = trajectory.token_ids[trajectory.loss_mask].tolist()
    assert tokenizer.decode(sampled, skip_special_tokens=False) == f"{LOOK}<|im_end|>{READ}<|im_end|>"


def test_options_come_with_the_fine_turn(tokenizer: Tokenizer) -> None:
    trajectory, _ = run_episode(tokenizer, (LOOK, True), (READ, True))
    coarse, fine = (tokenizer.decode(turn.prompt_ids.tolist(), skip_special_tokens=False) for turn in trajectory.turns)
    assert "Which mark?" in coarse and "cross" not in coarse
    assert "\nA. cross\nB. ring" in fine


@pytest.mark.parametrize(
    ("reply", "outcome"),
    [
        ("I would look left", BoxOutcome.NO_TAG),
        ("<zoom>left</zoom>", BoxOutcome.MALFORMED),
        ("<zoom>[1, 1, 9, 9]</zoom><zoom>[1, 1, 9, 9]</zoom>", BoxOutcome.SEVERAL),
        ("<zoom>[nan, 1, 9, 9]</zoom>", BoxOutcome.NOT_FINITE),
        ("<zoom>[9, 1, 9, 9]</zoom>", BoxOutcome.EMPTY),
        ("<zoom>[200, 1, 900, 9]</zoom>", BoxOutcome.OUTSIDE),
        ("<zoom>[0, 0, 0.2, 168]</zoom>", BoxOutcome.SLIVER),
    ],
)
def test_run_with_a_bad_box_stops_or_takes_the_whole_image(
    tokenizer: Tokenizer, reply: str, outcome: BoxOutcome
) -> None:
    stopped, script = run_episode(tokenizer, (reply, True), (READ, True))
    assert (stopped.outcome, stopped.box_outcome, len(script.asked)) == (Outcome.BAD_BOX, outcome, 1)
    assert stopped.crop is None and stopped.area_ratio is None

    fallen, script = run_episode(tokenizer, (reply, True), (READ, True), on_bad_box=OnBadBox.WHOLE_IMAGE)
    assert (fallen.outcome, fallen.box_outcome, len(script.asked)) == (Outcome.ANSWERED, outcome, 2)
    assert fallen.crop is not None and fallen.crop.box == fallen.original and fallen.area_ratio == 1.0


def test_run_with_a_truncated_reply_stops(tokenizer: Tokenizer) -> None:
    first, script = run_episode(tokenizer, (LOOK, False), (READ, True))
    assert (first.outcome, len(first.turns), len(script.asked)) == (Outcome.TRUNCATED, 1, 1)
    assert first.turns[0].finish is Finish.LENGTH
    second, _ = run_episode(tokenizer, (LOOK, True), (READ, False))
    assert (second.outcome, second.box_outcome, len(second.turns)) == (Outcome.TRUNCATED, BoxOutcome.OK, 2)
    assert second.turns[1].finish is Finish.LENGTH


def test_run_with_a_refused_turn_costs_that_sample_alone(tokenizer: Tokenizer) -> None:
    """Turn 1 of sample 3 is so long that turn 2 has no room; a refused turn 1 leaves no trajectory at all."""
    episodes = CoarseToFine(FAMILY, tokenizer, EpisodeConfig(coarse_tokens=36, fine_tokens=36))
    prepared = episodes.prepare(QUESTION)

    def refusing(sample: int, refused: int) -> Generate:
        script = Script(tokenizer, [(LOOK, True), (READ, True)])

        async def generate(token_ids: Sequence[int], views: Sequence[View], turn: int) -> Completion:
            if (sample, turn) == (3, refused):
                raise TurnRefused("longer than the maximum model length of 512")
            return await script.generate(token_ids, views, turn)

        return generate

    async def group(refused: int) -> list[Trajectory]:
        return await asyncio.gather(*(episodes.run(prepared, n, refusing(n, refused)) for n in range(4)))

    found = asyncio.run(group(1))
    assert [(one.outcome, len(one.turns)) for one in found] == [(Outcome.ANSWERED, 2)] * 3 + [(Outcome.TRUNCATED, 1)]
    with pytest.raises(TurnRefused):
        asyncio.run(group(0))


def test_run_with_a_box_that_cannot_be_shown_names_it(tokenizer: Tokenizer) -> None:
    episodes = CoarseToFine(FAMILY, tokenizer, EpisodeConfig(coarse_tokens=36, fine_tokens=36))
    script = Script(tokenizer, [(LOOK, True), (READ, True)])
    with pytest.raises(UnreadableImage, match="cannot be shown"):
        asyncio.run(episodes.run(episodes.prepare(QUESTION), 0, script.generate, Box(0, 0, 400, 1)))


def test_samples_of_a_question_share_its_pixels(tokenizer: Tokenizer) -> None:
    episodes = CoarseToFine(FAMILY, tokenizer, EpisodeConfig(coarse_tokens=36, fine_tokens=36))
    scene = episodes.prepare(QUESTION)

    async def group() -> list[Trajectory]:
        script = Script(tokenizer, [(LOOK, True), (READ, True)])
        return await asyncio.gather(*(episodes.run(scene, sample, script.generate) for sample in range(4)))

    trajectories = asyncio.run(group())
    assert [each.sample for each in trajectories] == [0, 1, 2, 3]
    assert all(each.views[0] is scene.coarse for each in trajectories)


def test_prepare_refuses_a_question_before_any_turn(tokenizer: Tokenizer) -> None:
    episodes = CoarseToFine(FAMILY, tokenizer, EpisodeConfig(coarse_tokens=36, fine_tokens=36))
    with pytest.raises(UnreadableImage):
        episodes.prepare(Question("q2", b"no image", "Which?", "A"))
    with pytest.raises(ReservedText, match="'q3'"):
        episodes.prepare(Question("q3", QUESTION.image, "What does <|image_pad|> mean?", "A"))
