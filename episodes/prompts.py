"""Prompt templates -> text with ONE placeholder per image. Templates come from the config."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from episodes.families import ModelFamily
from episodes.types import Question


@dataclass
class PromptTemplates:
    """``{image}``, ``{question}`` and ``{options}`` are filled in; options are lettered, one a line, and
    are shown in the fine turn only (METHOD: the released prompts ask turn 1 without them)."""

    system: str = "You are a helpful assistant."
    coarse: str = (
        "{image}{question}\nThe image is a small copy of a large one. Think about where to look, then name the one region "
        "that answers the question, in pixels of this image. Reply as "
        "<think>...</think><zoom>[x1, y1, x2, y2]</zoom>"
    )
    fine: str = (
        "{image}This is the region at full resolution. {question}{options}\n"
        "Reply as <think>...</think><answer>...</answer>. For a multiple-choice question answer with the letter."
    )
    verify: str = (
        "{image}{question}{options}\nAnswer from this image alone, as <answer>...</answer>. "
        "For a multiple-choice question answer with the letter."
    )


class ReservedText(ValueError):
    """The text of a question spells out a special token of the model family."""


def letter_options(options: Sequence[str]) -> str:
    """``('red', 'blue')`` -> ``'\\nA. red\\nB. blue'``; no options, no text."""
    return "".join(f"\n{chr(ord('A') + place)}. {option}" for place, option in enumerate(options))


def fill(template: str, question: Question, family: ModelFamily) -> str:
    """A template with the question's words in it. The only special tokens of the result are the template's own.

    Raises ReservedText when the question's text or options contain a special token."""
    options = letter_options(question.options)
    if (token := family.reserved_text(question.text + "\n" + options)) is not None:
        raise ReservedText(f"question {question.id!r} contains the special token {token}")
    parts = {"{image}": family.image_placeholder, "{question}": question.text, "{options}": options}
    filled = template
    for name in ("{image}", "{options}", "{question}"):  # the question last: its own braces stay as they are
        filled = filled.replace(name, parts[name])
    return filled
