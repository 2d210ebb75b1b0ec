"""Templates with a question's words in them, and one image placeholder."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ergo_rl.episodes.config import PromptTemplates
from ergo_rl.episodes.families import Qwen25VL
from ergo_rl.episodes.prompts import ReservedText, fill, letter_options
from ergo_rl.episodes.types import Question

FAMILY = Qwen25VL()
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


def question(text: str = "Which mark?", options: tuple[str, ...] = ("cross", "ring")) -> Question:
    return Question("q1", b"", text, "A", options)


def test_options_are_lettered_one_a_line() -> None:
    assert letter_options(("cross", "ring")) == "\nA. cross\nB. ring"
    assert letter_options(()) == ""


def test_fill_by_hand() -> None:
    assert fill("{image}{question}{options}!", question(), FAMILY) == IMAGE + "Which mark?\nA. cross\nB. ring!"
    assert fill("{question} {image}", question(options=()), FAMILY) == "Which mark? " + IMAGE


def test_the_coarse_turn_does_not_show_the_options() -> None:
    prompts = PromptTemplates()
    assert "cross" not in fill(prompts.coarse, question(), FAMILY)
    assert "A. cross\nB. ring" in fill(prompts.fine, question(), FAMILY)
    assert "A. cross\nB. ring" in fill(prompts.verify, question(), FAMILY)


def test_a_question_with_braces_keeps_them() -> None:
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
def test_a_template_shows_exactly_one_image(template: str) -> None:
    with pytest.raises(ValueError, match=r"\{image\} exactly once"):
        fill(template, question(), FAMILY)


WORDS = st.text() | st.lists(
    st.sampled_from(["{image}", "{question}", "{options}", "<|", "|>", "image_pad", "{", "}"])
).map("".join)


@given(WORDS, st.lists(WORDS, max_size=3))
def test_one_placeholder_whatever_the_question_says(text: str, options: list[str]) -> None:
    try:
        filled = fill(PromptTemplates().fine, question(text, tuple(options)), FAMILY)
    except ReservedText:
        assert FAMILY.reserved_text("\n".join((text, *options))) is not None
    else:
        assert filled.count(FAMILY.image_pad) == 1
        assert text in filled and all(option in filled for option in options)
