"""From a reply to four numbers or a named reason; nothing raises."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ergo_rl.episodes.parsing import BoxOutcome, parse_answer, parse_zoom


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
def test_numbers_that_are_read(written: str, corners: tuple[float, ...]) -> None:
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
def test_named_refusals(reply: str, outcome: BoxOutcome) -> None:
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
def test_answers(reply: str, answer: str | None) -> None:
    assert parse_answer(reply) == answer


@given(
    st.text() | st.lists(st.sampled_from(["<zoom>", "</zoom>", "<answer>", "</answer>", "[1,2,3,4]", "B"])).map("".join)
)
def test_nothing_raises(reply: str) -> None:
    corners, answer = parse_zoom(reply), parse_answer(reply)
    assert isinstance(corners, BoxOutcome) or all(isinstance(number, float) for number in corners)
    assert answer is None or answer == answer.strip() != ""


@pytest.mark.parametrize("piece", ["<zoom>", "</zoom>", "<answer>", "</answer>", "<zoom>[", "1,", "[1, 2, 3, 4]"])
def test_a_long_reply_takes_no_long_time(piece: str) -> None:
    """The parsers run on the event loop of all episodes: 50,000 repetitions in well under a second of CPU."""
    started = time.process_time()
    for reply in (piece * 50_000, f"<zoom>{piece * 50_000}</zoom>"):
        parse_zoom(reply)
        parse_answer(reply)
    assert time.process_time() - started < 0.5
