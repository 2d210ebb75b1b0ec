"""Answers and ground truths: by hand, then by hypothesis."""

from __future__ import annotations

import json
import string
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ergo_rl.episodes.types import Question
from ergo_rl.rewards.matching import choice, matches, normalise, polarity, same

COLOURS = ("red", "blue", "dark red", "green")


CASES = [json.loads(line) for line in (Path(__file__).parent / "matching_cases.jsonl").read_text().splitlines()]
MOST_LOST = 0.02
"""The share of right answers that may be taken for wrong ones; the other way round none may be."""


def asked(answer: str, *options: str) -> Question:
    return Question("q", b"", "?", answer, options)


def test_hand_labelled_answers_are_judged_as_the_labels_say() -> None:
    judged = [(row, matches(row["reply"], asked(row["truth"], *row["options"]))) for row in CASES]
    assert len(judged) >= 400
    assert [row for row, right in judged if right and not row["right"]] == []
    lost = [row for row, right in judged if row["right"] and not right]
    assert len(lost) <= MOST_LOST * sum(row["right"] for row in CASES), lost


@pytest.mark.parametrize(
    "reply",
    [
        "B", "b", "(B)", "(b)", "[B]", "B.", "B)", "B:", " B \n", "**B**", "`B`", '"B"', "\\boxed{B}", "$B$",
        "\N{FULLWIDTH LATIN CAPITAL LETTER B}", "Option B", "B) blue", "B. blue", "B: blue", "B - blue", "B blue",
        "(B) blue", "B. The car is blue.", "The answer is B", "The answer is B.", "The answer is (B).", "Answer: B",
        "answer: b", "The correct option is B", "the correct answer is option (B)", "I choose B", "It's B.",
        "It is B because it shines", "B is correct", "blue", "Blue.", "BLUE", "the blue", "It is blue.",
        "The colour is blue", "<answer>B", "<think></think> B",
    ],
)  # fmt: skip
def test_choice_is_b_for_every_way_to_say_it(reply: str) -> None:
    assert choice(reply, COLOURS) == 1
    assert matches(reply, asked("B", *COLOURS)) and matches(reply, asked("blue", *COLOURS))
    assert not matches(reply, asked("A", *COLOURS)) and not matches(reply, asked("green", *COLOURS))


@pytest.mark.parametrize(
    "reply",
    [
        "", " ", "?", "\x00", "E", "F)", "ABCD", "A, B, C, D", "A or B", "B or C", "B, or maybe C", "A/B", "(A) (B)",
        "A. red B. blue C. dark red D. green", "red, blue, dark red, green", "red or blue", "not blue", "It isn't blue",
        "(B) is not correct", "B is wrong", "B) red", "vitamin C", "plan B12", "X-ray of C-section", "bluebird",
        "none of them", "I do not know",
    ],
)  # fmt: skip
def test_choice_is_none_when_no_option_is_committed_to(reply: str) -> None:
    assert choice(reply, COLOURS) is None
    assert not any(matches(reply, asked(answer, *COLOURS)) for answer in (*"ABCD", *COLOURS))


def test_choice_tells_an_article_from_the_letter_a() -> None:
    options = ("a blue car", "a red car")
    for reply in (
        "a red car",
        "A red car",
        "A red car.",
        "It is a red car",
        "The answer is a red car",
        "This is A red car",
    ):
        assert choice(reply, options) == 1, reply
    for reply in ("A", "a", "A.", "A) a blue car", "The answer is A", "A is right", "a blue car"):
        assert choice(reply, options) == 0, reply
    assert choice("a dog", options) is None and choice("A dog", options) is None


def test_choice_tells_the_pronoun_i_from_the_letter_i() -> None:
    options = tuple(f"item {number}" for number in range(10))
    assert choice("I think it is item 4", options) == 4
    assert choice("I", options) == 8
    assert choice("I think so", options) is None


def test_choice_of_a_longer_option_does_not_name_a_shorter_one() -> None:
    assert choice("dark red", COLOURS) == 2
    assert choice("It is dark red.", COLOURS) == 2
    assert choice("It is red.", COLOURS) == 0


def test_choice_ignores_letters_inside_option_texts() -> None:
    gates = ("Gate B", "Gate C", "Gate A")
    assert choice("It is Gate B", gates) == 0
    assert choice("gate a", gates) == 2
    assert choice("C) Gate A", gates) == 2
    assert choice("B", gates) == 1


def test_choice_among_numbers() -> None:
    numbers = ("2", "5", "-5", "2.5", "1,000")
    for reply, place in [("2", 0), ("2.0", 0), ("-5", 2), ("it is 2.5", 3), ("1000", 4), ("5 dogs", 1), ("B", 1)]:
        assert choice(reply, numbers) == place, reply
    assert choice("2 or 5", numbers) is None and choice("25", numbers) is None


def test_choice_among_yes_and_no() -> None:
    for reply, place in [("Yes", 0), ("no.", 1), ("No, it is not.", 1), ("B", 1), ("B) No", 1), ("Answer: no", 1)]:
        assert choice(reply, ("Yes", "No")) == place, reply
    for reply in ("I have no idea", "yes and no", "There is no sign; yes."):
        assert choice(reply, ("Yes", "No")) is None, reply


def test_choice_among_options_that_differ_in_signs_only() -> None:
    assert choice("<5", ("<5", ">5")) == 0 and choice("> 5", ("<5", "> 5")) == 1


def test_choice_tells_equal_options_apart_by_letter_only() -> None:
    assert choice("B", ("red", "red")) == 1 and choice("red", ("red", "red")) is None


def test_ground_truth_outside_its_options_is_matched_as_text() -> None:
    assert matches("teal", asked("teal", *COLOURS)) and not matches("B", asked("teal", *COLOURS))


@pytest.mark.parametrize(
    ("truth", "reply"),
    [
        ("red car", "The red car."), ("red car", "Red  Car!"), ("the red car", "red car"), ("café", "CAFE\u0301"),
        ("ONE WAY", "one way"), ("STOP", "The answer is STOP"), ("?", "?"), ("10:30", "10:30"), ("3/4", "3/4"),
        ("7", "7"), ("7", "7.0"), ("7", "There are 7 cars."), ("7", "about 7"), ("7 cars", "7"),
        ("1234", "1,234"), ("1,234", "1234"), ("1,000.5", "1000.5"), ("$5", "5 dollars"), ("50%", "50"),
        ("50%", "50 %"), ("-5", "\N{MINUS SIGN}5"), ("2e3", "2000"),
        ("12 cm", "12cm"), ("12 cm", "it is 12 cm long"), ("yes", "Yes, it is"), ("No", "no."), ("true", "Yes"),
        ("no", "No, it isn't"),
    ],
)  # fmt: skip
def test_matches_free_answers_that_are_equal(truth: str, reply: str) -> None:
    assert matches(reply, asked(truth))


@pytest.mark.parametrize(
    ("truth", "reply"),
    [
        ("red car", "red"), ("red", "red, blue, green"), ("red car", "blue car"), ("?", "!"), ("red", ""),
        ("7", "8"), ("7", "7 or 8"), ("7", "6, 7, 8"), ("7", "7-8"), ("7", "17"), ("7", "B7"), ("7", "7.5"),
        ("3.14", "3.15"), ("100.0", "100.9"),
        ("7", "1,7"), ("1998", "1999"), ("100", "101"), ("3.14", "3.2"), ("100.0", "102"), ("5", "-5"), ("10", "10:30"),
        ("3", "3/4"), ("12 cm", "12 m"), ("12 cm", "it is 12 m long"), ("50%", "0.5"), ("1e400", "1e500"),
        ("1.5", "nan"), ("1.5", "inf"), ("yes", "no"), ("no", "I have no idea"), ("yes", "yes and no"),
        ("no", "There is no car"), ("yes", ""),
    ],
)  # fmt: skip
def test_matches_no_free_answers_that_differ(truth: str, reply: str) -> None:
    assert not matches(reply, asked(truth))


def test_tolerance_is_relative_and_for_decimals_only() -> None:
    assert not same("10.01", "10.0") and same("10.0", "10.00")  # exact by default
    assert same("10.4", "10.0", tolerance=0.05) and not same("10.4", "10.0", tolerance=0.01)
    assert not same("11", "10", tolerance=0.5)


def test_normalise_and_polarity_by_hand() -> None:
    assert normalise("  The QUICK-brown\tfox, 1,000.50 -3! ") == "quick brown fox 1,000.50 -3"
    assert normalise("A") == "a"  # an article alone is a word
    assert (polarity("Yes, sir"), polarity("False"), polarity("maybe"), polarity("")) == (True, False, None, None)


PIECES = [
    *"ABCD(). ,:/-",
    *COLOURS,
    "the answer is ",
    "option ",
    "not ",
    " or ",
    "7",
    "1e999",
    "yes",
    "no",
    "a ",
    "**",
    "\x00",
]
TEXTS = st.text() | st.lists(st.sampled_from(PIECES)).map("".join)


@settings(deadline=None)  # the machine may be busy; times have a test of their own
@given(TEXTS, TEXTS, st.lists(TEXTS, max_size=30))
def test_matches_and_choice_raise_on_no_text(reply: str, answer: str, options: list[str]) -> None:
    assert matches(reply, asked(answer, *options)) in (True, False)
    place = choice(reply, options)
    assert place is None or 0 <= place < len(options)


WORD = st.text(string.ascii_lowercase, min_size=2, max_size=12).filter(lambda word: normalise(word) == word)


@settings(deadline=None)
@given(st.lists(WORD, min_size=2, max_size=8, unique=True), st.data())
def test_choice_takes_letter_and_text_of_any_option(options: list[str], data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(options) - 1))
    letter = string.ascii_uppercase[place]
    for reply in (
        letter,
        f"({letter})",
        f"{letter}.",
        f"{letter}) {options[place]}",
        options[place],
        options[place].upper(),
    ):
        assert choice(reply, options) == place
        assert matches(reply, asked(letter, *options)) and matches(reply, asked(options[place], *options))


@settings(deadline=None)
@given(st.lists(WORD, min_size=2, max_size=8, unique=True))
def test_choice_is_none_when_every_option_is_listed(options: list[str]) -> None:
    letters = string.ascii_uppercase[: len(options)]
    assert (
        choice(" ".join(f"{letter}. {option}" for letter, option in zip(letters, options, strict=True)), options)
        is None
    )
    assert choice(", ".join(letters), options) is None
    assert choice("(" + ") (".join(letters) + ")", options) is None


@given(st.integers(-(10**9), 10**9))
def test_whole_number_matches_itself_with_separators_only(number: int) -> None:
    assert same(f"{number:,}", str(number)) and same(f"It is {number}.", str(number))
    assert not same(str(number + 1), str(number))


@given(TEXTS.filter(normalise))
def test_any_text_matches_itself(text: str) -> None:
    assert same(text, text)


@pytest.mark.parametrize(
    "piece",
    [
        "is ",
        "A ",
        "(A",
        "red ",
        "red,",
        "not ",
        "1,000 ",
        "1.",
        "- ",
        "answer: ",
        "the answer is ",
        "\\boxed{",
        "$",
        "{",
        "\\frac{",
        "one ",
        "hundred ",
        "A. ",
        "C++ ",
        "7 ",
        "的",
        "\ue001",
        '1"',
        "\u200b",
    ],
)
def test_long_answers_take_no_long_time(piece: str) -> None:
    started = time.process_time()
    matches((piece * 2000)[:2000], asked("A", *COLOURS))
    matches((piece * 2000)[:2000], asked("7.5"))
    matches(piece * 100_000, asked("A", *COLOURS))
    assert time.process_time() - started < 0.5
