"""Prompt templates -> text with ONE placeholder per image. Templates come from the config."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ergo_rl.episodes.families import ModelFamily
from ergo_rl.episodes.types import Question


@dataclass
class PromptTemplates:
    """``{image}``, ``{question}`` and ``{options}`` are filled in; options are lettered, one a line, and
    are shown in the fine turn only (METHOD: the released prompts ask turn 1 without them)."""

    system: str = "You are a helpful assistant."
    coarse: str = (
        "{image}{question}\nThe image is a small copy of a large one. Think about where to look, then name the one "
        "region that answers the question, in pixels of this image. Reply as "
        "<think>...</think><zoom>[x1, y1, x2, y2]</zoom>"
    )
    fine: str = (
        "{image}This is the region at full resolution. {question}{options}\n"
        "Reply as <think>...</think><answer>...</answer>. For a multiple-choice question answer with the letter."
    )
    direct: str = (
        "{image}{question}{options}\nReply as <think>...</think><answer>...</answer>. "
        "For a multiple-choice question answer with the letter."
    )
    """Evaluation in mode direct: one turn, without a second look."""
    verify: str = (
        "{image}{question}{options}\nAnswer from this image alone, as <answer>...</answer>. "
        "For a multiple-choice question answer with the letter."
    )


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
