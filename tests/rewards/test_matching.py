"""Does an answer equal the ground truth? By hand, then by hypothesis."""

from __future__ import annotations

import string
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ergo_rl.episodes.types import Question
from ergo_rl.rewards.matching import choice, matches, normalise, polarity, same

COLOURS = ("red", "blue", "dark red", "green")


def asked(answer: str, *options: str) -> Question:
    return Question("q", b"", "?", answer, options)


@pytest.mark.parametrize(
    "said",
    [
        "B", "b", "(B)", "(b)", "[B]", "B.", "B)", "B:", " B \n", "**B**", "`B`", '"B"', "\\boxed{B}", "$B$",
        "\N{FULLWIDTH LATIN CAPITAL LETTER B}", "Option B", "B) blue", "B. blue", "B: blue", "B - blue", "B blue",
        "(B) blue", "B. The car is blue.", "The answer is B", "The answer is B.", "The answer is (B).", "Answer: B",
        "answer: b", "The correct option is B", "the correct answer is option (B)", "I choose B", "It's B.",
        "It is B because it shines", "B is correct", "blue", "Blue.", "BLUE", "the blue", "It is blue.",
        "The colour is blue", "<answer>B", "<think></think> B",
    ],
)  # fmt: skip
def test_texts_that_choose_b(said: str) -> None:
    assert choice(said, COLOURS) == 1
    assert matches(said, asked("B", *COLOURS)) and matches(said, asked("blue", *COLOURS))
    assert not matches(said, asked("A", *COLOURS)) and not matches(said, asked("green", *COLOURS))


@pytest.mark.parametrize(
    "said",
    [
        "", " ", "?", "\x00", "E", "F)", "ABCD", "A, B, C, D", "A or B", "B or C", "B, or maybe C", "A/B", "(A) (B)",
        "A. red B. blue C. dark red D. green", "red, blue, dark red, green", "red or blue", "not blue", "It isn't blue",
        "(B) is not correct", "B is wrong", "B) red", "vitamin C", "plan B12", "X-ray of C-section", "bluebird",
        "none of them", "I do not know",
    ],
)  # fmt: skip
def test_texts_that_choose_nothing(said: str) -> None:
    assert choice(said, COLOURS) is None
    assert not any(matches(said, asked(answer, *COLOURS)) for answer in (*"ABCD", *COLOURS))


def test_an_article_is_not_the_letter_a() -> None:
    options = ("a blue car", "a red car")
    for said in (
        "a red car",
        "A red car",
        "A red car.",
        "It is a red car",
        "The answer is a red car",
        "This is A red car",
    ):
        assert choice(said, options) == 1, said
    for said in ("A", "a", "A.", "A) a blue car", "The answer is A", "A is right", "a blue car"):
        assert choice(said, options) == 0, said
    assert choice("a dog", options) is None and choice("A dog", options) is None


def test_the_pronoun_i_is_not_the_letter_i() -> None:
    options = tuple(f"item {number}" for number in range(10))
    assert choice("I think it is item 4", options) == 4
    assert choice("I", options) == 8
    assert choice("I think so", options) is None


def test_a_longer_option_does_not_name_a_shorter_one() -> None:
    assert choice("dark red", COLOURS) == 2
    assert choice("It is dark red.", COLOURS) == 2
    assert choice("It is red.", COLOURS) == 0


def test_letters_inside_option_texts_are_not_answers() -> None:
    gates = ("Gate B", "Gate C", "Gate A")
    assert choice("It is Gate B", gates) == 0
    assert choice("gate a", gates) == 2
    assert choice("C) Gate A", gates) == 2
    assert choice("B", gates) == 1


def test_options_that_are_numbers() -> None:
    numbers = ("2", "5", "-5", "2.5", "1,000")
    for said, place in [("2", 0), ("2.0", 0), ("-5", 2), ("it is 2.5", 3), ("1000", 4), ("5 dogs", 1), ("B", 1)]:
        assert choice(said, numbers) == place, said
    assert choice("2 or 5", numbers) is None and choice("25", numbers) is None


def test_options_that_are_yes_and_no() -> None:
    for said, place in [("Yes", 0), ("no.", 1), ("No, it is not.", 1), ("B", 1), ("B) No", 1), ("Answer: no", 1)]:
        assert choice(said, ("Yes", "No")) == place, said
    for said in ("I have no idea", "yes and no", "There is no sign; yes."):
        assert choice(said, ("Yes", "No")) is None, said


def test_options_that_differ_only_in_signs() -> None:
    assert choice("<5", ("<5", ">5")) == 0 and choice("> 5", ("<5", "> 5")) == 1


def test_equal_options_are_told_apart_by_letter_only() -> None:
    assert choice("B", ("red", "red")) == 1 and choice("red", ("red", "red")) is None


def test_a_ground_truth_outside_its_options_is_matched_as_text() -> None:
    assert matches("teal", asked("teal", *COLOURS)) and not matches("B", asked("teal", *COLOURS))


@pytest.mark.parametrize(
    ("truth", "said"),
    [
        ("red car", "The red car."), ("red car", "Red  Car!"), ("the red car", "red car"), ("café", "CAFE\u0301"),
        ("ONE WAY", "one way"), ("STOP", "The answer is STOP"), ("?", "?"), ("10:30", "10:30"), ("3/4", "3/4"),
        ("7", "7"), ("7", "7.0"), ("7", "There are 7 cars."), ("7", "about 7"), ("7 cars", "7"),
        ("1234", "1,234"), ("1,234", "1234"), ("1,000.5", "1000.5"), ("$5", "5 dollars"), ("50%", "50"),
        ("50%", "50 %"), ("3.14", "3.15"), ("100.0", "100.9"), ("-5", "\N{MINUS SIGN}5"), ("2e3", "2000"),
        ("12 cm", "12cm"), ("12 cm", "it is 12 cm long"), ("yes", "Yes, it is"), ("No", "no."), ("true", "Yes"),
        ("no", "No, it isn't"),
    ],
)  # fmt: skip
def test_free_answers_that_match(truth: str, said: str) -> None:
    assert matches(said, asked(truth))


@pytest.mark.parametrize(
    ("truth", "said"),
    [
        ("red car", "red"), ("red", "red, blue, green"), ("red car", "blue car"), ("?", "!"), ("red", ""),
        ("7", "8"), ("7", "7 or 8"), ("7", "6, 7, 8"), ("7", "7-8"), ("7", "17"), ("7", "B7"), ("7", "7.5"),
        ("7", "1,7"), ("1998", "1999"), ("100", "101"), ("3.14", "3.2"), ("100.0", "102"), ("5", "-5"), ("10", "10:30"),
        ("3", "3/4"), ("12 cm", "12 m"), ("12 cm", "it is 12 m long"), ("50%", "0.5"), ("1e400", "1e500"),
        ("1.5", "nan"), ("1.5", "inf"), ("yes", "no"), ("no", "I have no idea"), ("yes", "yes and no"),
        ("no", "There is no car"), ("yes", ""),
    ],
)  # fmt: skip
def test_free_answers_that_do_not_match(truth: str, said: str) -> None:
    assert not matches(said, asked(truth))


def test_the_tolerance_is_relative_and_for_decimals_only() -> None:
    assert same("10.4", "10.0", tolerance=0.05) and not same("10.4", "10.0", tolerance=0.01)
    assert not same("11", "10", tolerance=0.5)


def test_normalise_and_polarity() -> None:
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


@given(TEXTS, TEXTS, st.lists(TEXTS, max_size=30))
def test_nothing_raises(said: str, answer: str, options: list[str]) -> None:
    assert matches(said, asked(answer, *options)) in (True, False)
    place = choice(said, options)
    assert place is None or 0 <= place < len(options)


WORD = st.text(string.ascii_lowercase, min_size=2, max_size=12).filter(lambda word: normalise(word) == word)


@given(st.lists(WORD, min_size=2, max_size=8, unique=True), st.data())
def test_an_option_is_chosen_by_its_letter_and_by_its_text(options: list[str], data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(options) - 1))
    letter = string.ascii_uppercase[place]
    for said in (
        letter,
        f"({letter})",
        f"{letter}.",
        f"{letter}) {options[place]}",
        options[place],
        options[place].upper(),
    ):
        assert choice(said, options) == place
        assert matches(said, asked(letter, *options)) and matches(said, asked(options[place], *options))


@given(st.lists(WORD, min_size=2, max_size=8, unique=True))
def test_listing_every_option_chooses_none(options: list[str]) -> None:
    letters = string.ascii_uppercase[: len(options)]
    assert (
        choice(" ".join(f"{letter}. {option}" for letter, option in zip(letters, options, strict=True)), options)
        is None
    )
    assert choice(", ".join(letters), options) is None
    assert choice("(" + ") (".join(letters) + ")", options) is None


@given(st.integers(-(10**9), 10**9))
def test_a_whole_number_matches_itself_with_separators_and_nothing_else(number: int) -> None:
    assert same(f"{number:,}", str(number)) and same(f"It is {number}.", str(number))
    assert not same(str(number + 1), str(number))


@given(TEXTS.filter(normalise))
def test_a_text_matches_itself(text: str) -> None:
    assert same(text, text)


@pytest.mark.parametrize(
    "piece", ["is ", "A ", "(A", "red ", "red,", "not ", "1,000 ", "1.", "- ", "answer: ", "the answer is "]
)
def test_a_long_answer_takes_no_long_time(piece: str) -> None:
    started = time.process_time()
    matches((piece * 2000)[:2000], asked("A", *COLOURS))
    matches((piece * 2000)[:2000], asked("7.5"))
    matches(piece * 100_000, asked("A", *COLOURS))
    assert time.process_time() - started < 0.5
