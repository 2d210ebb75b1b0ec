"""Prompt templates -> text with ONE placeholder per image. Templates come from the config."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ergo_rl.episodes.families import ModelFamily
from ergo_rl.episodes.types import Question

_SLOT = re.compile(r"\{(question|options)\}")


class ReservedText(ValueError):
    """The text of a question spells out a special token of the model family."""


def letter_options(options: Sequence[str]) -> str:
    """``('red', 'blue')`` -> ``'\\nA. red\\nB. blue'``; no options, no text."""
    return "".join(f"\n{chr(ord('A') + place)}. {option}" for place, option in enumerate(options))


def around_image(template: str, question: Question) -> tuple[str, str]:
    """The words before and after the image, the question's words filled in. In one pass: braces in a question or
    an option stay as they are.

    Raises ValueError unless the template names ``{image}`` exactly once."""
    halves = template.split("{image}")
    if len(halves) != 2:
        raise ValueError(f"a prompt template needs {{image}} exactly once: {template!r}")
    words = {"question": question.text, "options": letter_options(question.options)}
    before, after = (_SLOT.sub(lambda slot: words[slot[1]], half) for half in halves)
    return before, after


def fill(template: str, question: Question, family: ModelFamily) -> str:
    """A template with the question's words in it. The only special tokens of the result are the template's own.

    Raises ReservedText when the question's text or options contain a special token, ValueError as
    ``around_image`` does."""
    words = "\n".join((question.text, *question.options))
    if (token := family.reserved_text(words)) is not None:
        raise ReservedText(f"question {question.id!r} contains the special token {token}")
    before, after = around_image(template, question)
    return before + family.image_placeholder + after
