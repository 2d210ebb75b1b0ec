"""Templates with a question's words in them, one image placeholder; replies as numbers, answers or named reasons."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ergo_rl.episodes.config import PromptTemplates
from ergo_rl.episodes.families import Qwen25VL
from ergo_rl.episodes.prompts import ReservedText, fill, letter_options, parse_answer, parse_box, parse_zoom
from ergo_rl.episodes.types import BoxOutcome, Question

FAMILY = Qwen25VL()
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


def question(text: str = "Which mark?", options: tuple[str, ...] = ("cross", "ring")) -> Question:
    return Question("q1", b"", text, "A", options)


def test_options_are_lettered_on_lines_of_their_own() -> None:
    assert letter_options(("cross", "ring")) == "\nA. cross\nB. ring"
    assert letter_options(()) == ""


def test_fill_puts_words_and_placeholder_in() -> None:
    assert fill("{image}{question}{options}!", question(), FAMILY) == IMAGE + "Which mark?\nA. cross\nB. ring!"
    assert fill("{question} {image}", question(options=()), FAMILY) == "Which mark? " + IMAGE


def test_coarse_prompt_does_not_show_the_options() -> None:
    prompts = PromptTemplates()
    assert "cross" not in fill(prompts.coarse, question(), FAMILY)
    assert "A. cross\nB. ring" in fill(prompts.fine, question(), FAMILY)
    assert "A. cross\nB. ring" in fill(prompts.verify, question(), FAMILY)


def test_fill_keeps_braces_of_a_question() -> None:
    tricky = question("What is {options} and {image}?", ("{question}", "{image}"))
    assert fill("{image}{question}{options}", tricky, FAMILY) == (
        IMAGE + "What is {options} and {image}?\nA. {question}\nB. {image}"
    )


def test_special_tokens_cannot_be_put_together_from_pieces() -> None:
    """An option's braces once were filled in again: "<|" + the question's "image_pad" + "|>"."""
    filled = fill("{image}{question}{options}", question("image_pad", ("<|{question}|>",)), FAMILY)
    assert filled.count("<|image_pad|>") == 1


@pytest.mark.parametrize("token", FAMILY.vision_tokens + FAMILY.control_tokens)
def test_special_tokens_in_a_question_are_refused_by_name(token: str) -> None:
    for bad in (question(f"What is {token}?"), question(options=("cross", f"{token}ring"))):
        with pytest.raises(ReservedText, match="'q1' contains the special token") as error:
            fill("{image}{question}", bad, FAMILY)
        assert token in str(error.value)


@pytest.mark.parametrize("template", ["{question}", "{image}{image}{question}"])
def test_template_without_exactly_one_image_is_refused(template: str) -> None:
    with pytest.raises(ValueError, match=r"\{image\} exactly once"):
        fill(template, question(), FAMILY)


WORDS = st.text() | st.lists(
    st.sampled_from(["{image}", "{question}", "{options}", "<|", "|>", "image_pad", "{", "}"])
).map("".join)


@given(WORDS, st.lists(WORDS, max_size=3))
def test_fill_makes_one_placeholder_from_any_question(text: str, options: list[str]) -> None:
    try:
        filled = fill(PromptTemplates().fine, question(text, tuple(options)), FAMILY)
    except ReservedText:
        assert FAMILY.reserved_text("\n".join((text, *options))) is not None
    else:
        assert filled.count(FAMILY.image_pad) == 1
        assert text in filled and all(option in filled for option in options)


@pytest.mark.parametrize(
    ("written", "corners"),
    [
        ("[1, 2, 3, 4]", (1, 2, 3, 4)),
        ("(1,2,3,4)", (1, 2, 3, 4)),
        ("1, 2, 3, 4", (1, 2, 3, 4)),
        ("\n [ 1 ,\t2 , 3 , 4 ] \n", (1, 2, 3, 4)),
        ("[1.5, .5, 3., 4e1]", (1.5, 0.5, 3.0, 40.0)),
        ("[-1, +2, 3, 4]", (-1, 2, 3, 4)),
        ("[007, 2, 3, 4]", (7, 2, 3, 4)),
        ("[inf, -Infinity, 1e400, 4]", (float("inf"), float("-inf"), float("inf"), 4)),
    ],
)
def test_parse_zoom_reads_four_numbers(written: str, corners: tuple[float, ...]) -> None:
    assert parse_zoom(f"<think>there</think>\n<zoom>{written}</zoom>") == corners


@pytest.mark.parametrize(
    ("reply", "outcome"),
    [
        ("", BoxOutcome.NO_TAG),
        ("[1, 2, 3, 4]", BoxOutcome.NO_TAG),
        ("<zoom>[1, 2, 3, 4]", BoxOutcome.NO_TAG),
        ("[1, 2, 3, 4]</zoom>", BoxOutcome.NO_TAG),
        ("</zoom><zoom>", BoxOutcome.NO_TAG),
        ("<ZOOM>[1, 2, 3, 4]</ZOOM>", BoxOutcome.NO_TAG),
        ("<zoom>[1, 2, 3, 4]</zoom> or <zoom>[5, 6, 7, 8]</zoom>", BoxOutcome.SEVERAL),
        ("<zoom>[1, 2, 3, 4]</zoom><zoom>[1, 2, 3, 4]</zoom>", BoxOutcome.SEVERAL),
        ("<zoom><zoom>[1, 2, 3, 4]</zoom></zoom>", BoxOutcome.SEVERAL),
        ("<zoom>[1, 2, 3, 4]</zoom> <zoom>", BoxOutcome.SEVERAL),
        ("<zoom></zoom>", BoxOutcome.MALFORMED),
        ("<zoom>[]</zoom>", BoxOutcome.MALFORMED),
        ("<zoom>[1, 2, 3]</zoom>", BoxOutcome.MALFORMED),
        ("<zoom>[1, 2, 3, 4, 5]</zoom>", BoxOutcome.MALFORMED),
        ("<zoom>[1, 2, 3, 4], [5, 6, 7, 8]</zoom>", BoxOutcome.MALFORMED),
        ("<zoom>[1 2 3 4]</zoom>", BoxOutcome.MALFORMED),
        ("<zoom>[one, 2, 3, 4]</zoom>", BoxOutcome.MALFORMED),
        ("<zoom>[1_0, 2, 3, 4]</zoom>", BoxOutcome.MALFORMED),
        ("<zoom>[0x1, 2, 3, 4]</zoom>", BoxOutcome.MALFORMED),
        ("<zoom>[１, ２, ３, ４]</zoom>", BoxOutcome.MALFORMED),  # noqa: RUF001
        ("<zoom>[١, ٢, ٣, ٤]</zoom>", BoxOutcome.MALFORMED),  # noqa: RUF001
        (f"<zoom>[1, 2, 3, {'9' * 400}]</zoom>", BoxOutcome.MALFORMED),
        ("<zoom><think>[1, 2, 3, 4]</think></zoom>", BoxOutcome.MALFORMED),
    ],
)
def test_parse_zoom_names_why_there_is_no_box(reply: str, outcome: BoxOutcome) -> None:
    assert parse_zoom(reply) is outcome
    assert not outcome.usable


def test_exactly_three_outcomes_are_usable() -> None:
    assert {outcome.value for outcome in BoxOutcome if outcome.usable} == {"ok", "reordered", "clamped"}


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("<think>x</think><answer>B</answer>", "B"),
        ("<answer> B\n</answer>", "B"),
        ("<answer>A</answer> no: <answer>B</answer>", "B"),
        ("<answer>A</answer> <answer>B", "A"),
        ("<answer>A <answer>B</answer>", "B"),
        ("<answer></answer>", None),
        ("<answer>A</answer><answer> </answer>", None),
        ("<answer>B", None),
        ("</answer>B<answer>", None),
        ("B", None),
        ("", None),
    ],
)
def test_parse_answer_takes_the_last_answer(reply: str, answer: str | None) -> None:
    assert parse_answer(reply) == answer


@given(
    st.text() | st.lists(st.sampled_from(["<zoom>", "</zoom>", "<answer>", "</answer>", "[1,2,3,4]", "B"])).map("".join)
)
def test_parsing_raises_on_no_text(reply: str) -> None:
    corners, answer = parse_zoom(reply), parse_answer(reply)
    assert isinstance(corners, BoxOutcome) or all(isinstance(number, float) for number in corners)
    assert answer is None or answer == answer.strip() != ""


@pytest.mark.parametrize("piece", ["<zoom>", "</zoom>", "<answer>", "</answer>", "<zoom>[", "1,", "[1, 2, 3, 4]"])
def test_parsing_a_long_reply_is_fast(piece: str) -> None:
    """The parsers run on the event loop of all episodes: 50,000 repetitions in well under a second of CPU."""
    started = time.process_time()
    for reply in (piece * 50_000, f"<zoom>{piece * 50_000}</zoom>"):
        parse_zoom(reply)
        parse_answer(reply)
    assert time.process_time() - started < 0.5


# --- boxes in other notations ------------------------------------------------------------------------------------

FOUR = (10.0, 20.5, 30.0, 40.0)


@pytest.mark.parametrize(
    "written",
    [
        "<zoom>[10, 20.5, 30, 40]</zoom>", '<zoom>{"bbox_2d": [10, 20.5, 30, 40]}</zoom>',
        "<zoom>[[10, 20.5, 30, 40]]</zoom>",
        "<zoom>[[10, 20.5], [30, 40]]</zoom>", "<zoom>(10, 20.5), (30, 40)</zoom>", "<zoom>(10,20.5)(30,40)</zoom>",
        '[{"bbox_2d": [10, 20.5, 30, 40], "label": "mug"}]', '{"bbox": [10, 20.5, 30, 40]}', "(10,20.5),(30,40)",
        "[10, 20.5, 30, 40]", "The region is [10, 20.5, 30, 40].", "[10, 20.5, 30, 40] and again [10, 20.5, 30, 40]",
        "<think>[1, 2, 3, 4] is too small</think>[10, 20.5, 30, 40]",
        '<think>there</think>\n```json\n[\n  {"bbox_2d": [10, 20.5, 30, 40], "label": "the mug"}\n]\n```',
    ],
)  # fmt: skip
def test_parse_box_reads_other_notations(written: str) -> None:
    assert parse_box(written) == FOUR


@pytest.mark.parametrize(
    ("written", "outcome"),
    [
        ("", BoxOutcome.NO_TAG), ("upper left", BoxOutcome.NO_TAG), ("[1, 2, 3]", BoxOutcome.NO_TAG),
        ("10, 20, 30, 40", BoxOutcome.NO_TAG), ("<zoom>upper left</zoom>", BoxOutcome.MALFORMED),
        ("<zoom>upper left</zoom> [1, 2, 3, 4]", BoxOutcome.MALFORMED),
        ("[1, 2, 3, 4], [5, 6, 7, 8]", BoxOutcome.SEVERAL),
        ('[{"bbox_2d": [1, 2, 3, 4]}, {"bbox_2d": [5, 6, 7, 8]}]', BoxOutcome.SEVERAL),
        ("<zoom>[1, 2, 3, 4]</zoom><zoom>[1, 2, 3, 4]</zoom>", BoxOutcome.SEVERAL),
        ("<think>[1, 2, 3, 4]</think>nowhere", BoxOutcome.NO_TAG),
    ],
)  # fmt: skip
def test_parse_box_names_why_there_is_no_box(written: str, outcome: BoxOutcome) -> None:
    assert parse_box(written) is outcome


@given(
    st.tuples(*[st.integers(-(10**6), 10**6)] * 4),
    st.sampled_from(["[{}, {}, {}, {}]", "[[{},{}],[{},{}]]", "({} ,{}), ({}, {})"]),
)
def test_parse_box_reads_any_four_numbers_in_any_notation(four: tuple[int, ...], notation: str) -> None:
    assert parse_box(f"<think>there</think>{notation.format(*four)}") == four
    assert parse_box(f"<zoom>{notation.format(*four)}</zoom>") == four


@given(
    st.text()
    | st.lists(st.sampled_from(["[", "(", "1", "2.5", ",", " ", "]", ")", "nan", "<zoom>", "</zoom>"])).map("".join)
)
def test_parse_box_agrees_with_parse_zoom_where_that_reads_a_box(reply: str) -> None:
    strict, found = parse_zoom(reply), parse_box(reply)
    assert found == strict or isinstance(strict, BoxOutcome) or any(number != number for number in strict)


@pytest.mark.parametrize("piece", ["[", "[ ", "(1,", "[1, 2, 3, ", "1" * 50, " ", "[1,2],["])
def test_parse_box_takes_no_long_time(piece: str) -> None:
    started = time.process_time()
    parse_box(piece * 20_000)
    assert time.process_time() - started < 1.0
