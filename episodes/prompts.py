"""Text in and out of the policy: prompt templates -> text with ONE placeholder per image; replies -> box or answer.

Parsing raises on no text. The box contract (docs/boxes.md): exactly one ``<zoom>[x1, y1, x2, y2]</zoom>``, numbers
whole or decimal. Reversed corners are put in order: what was meant is plain, and refusing would teach nothing about
places. Several boxes are refused: which of them was meant is not plain.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from ergo_rl.episodes.families import Corners, ModelFamily
from ergo_rl.episodes.types import BoxOutcome, Outcome, Question, Trajectory
from ergo_rl.errors import ErgoError

_CHARACTERS_PER_TOKEN = 16
"""No language has so many on average."""
LONGEST_CONTEXT = 32_768
"""Tokens: what a model is taken to read where its own limit is not known."""
LONGEST_TEXT = _CHARACTERS_PER_TOKEN * LONGEST_CONTEXT
"""Characters of a text in a row."""
_SLOT = re.compile(r"\{(question|options)\}")


class ReservedText(ErgoError, ValueError):
    """The text of a question cannot be a part of a prompt: it spells out a special token of the model family, or is too
    long for any."""


def letter_options(options: Sequence[str]) -> str:
    """Letter options on lines of their own: ``('red', 'blue')`` -> ``'\\nA. red\\nB. blue'``; empty for no options."""
    return "".join(f"\n{chr(ord('A') + place)}. {option}" for place, option in enumerate(options))


def around_image(template: str, question: Question) -> tuple[str, str]:
    """Return the text before and after the image, with the question's words filled in.

    Slots are filled in one pass: braces in a question or an option stay as they are.

    Raises ValueError unless the template names ``{image}`` exactly once."""
    halves = template.split("{image}")
    if len(halves) != 2:
        raise ValueError(f"a prompt template needs {{image}} exactly once: {template!r}")
    words = {"question": question.text, "options": letter_options(question.options)}
    before, after = (_SLOT.sub(lambda slot: words[slot[1]], half) for half in halves)
    return before, after


def too_long(question: Question, max_model_len: int = LONGEST_CONTEXT) -> str:
    """Why the text cannot fit a model; empty where it may. Asked before it is tokenized, which takes about 1 KB of
    memory for each token."""
    characters, limit = len(question.text) + sum(map(len, question.options)), _CHARACTERS_PER_TOKEN * max_model_len
    if characters <= limit:
        return ""
    return f"the question has {characters} characters; at most {limit} could fit the model's {max_model_len} tokens"


def fill(template: str, question: Question, family: ModelFamily) -> str:
    """Return a template with the question's words in it. Its only special tokens are the template's own.

    Raises ReservedText when the question's text or options contain a special token or are too long, ValueError as
    ``around_image`` does."""
    if reason := too_long(question):
        raise ReservedText(f"question {question.id!r}: {reason}")
    if (token := family.reserved_text("\n".join((question.text, *question.options)))) is not None:
        raise ReservedText(f"question {question.id!r} contains the special token {token}")
    before, after = around_image(template, question)
    return before + family.image_placeholder + after


_NUMBER = r"\s*([+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?|[+-]?(?:nan|inf(?:inity)?))\s*"
_BOX = re.compile(rf"\s*[\[(]?{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}[\])]?\s*", re.IGNORECASE | re.ASCII)
_MAX_BOX_TEXT = 400


def parse_zoom(reply: str) -> Corners | BoxOutcome:
    """Return the four numbers of the only ``<zoom>`` in a reply, in the convention of the model family, or why there
    are none."""
    openings = reply.count("<zoom>")
    if openings > 1:
        return BoxOutcome.SEVERAL
    written, closing, _ = reply.partition("<zoom>")[2].partition("</zoom>")
    if not openings or not closing:
        return BoxOutcome.NO_TAG
    match = _BOX.fullmatch(written) if len(written) <= _MAX_BOX_TEXT else None
    if match is None:
        return BoxOutcome.MALFORMED
    x1, y1, x2, y2 = (float(number) for number in match.groups())
    return x1, y1, x2, y2


_OPEN, _CLOSE = r"[\[(]\s*", r"[\])]\s*"
_ANY_BOX = re.compile(
    rf"{_OPEN}{_NUMBER},{_NUMBER}(?:{_CLOSE},?\s*{_OPEN}|,){_NUMBER},{_NUMBER}[\])]", re.IGNORECASE | re.ASCII
)
_MAX_REPLY_TEXT = 2000


def parse_box(reply: str) -> Corners | BoxOutcome:
    """As ``parse_zoom``, and also from JSON, nested lists and two points, in the tag or, without one, behind the
    thought: ``[{"bbox_2d": [1, 2, 3, 4]}]``, ``[[1, 2], [3, 4]]``, ``(1, 2), (3, 4)``."""
    strict = parse_zoom(reply)
    if not isinstance(strict, BoxOutcome) or strict is BoxOutcome.SEVERAL:
        return strict
    tagged = reply.partition("<zoom>")[2].partition("</zoom>")[0]
    written = tagged if strict is BoxOutcome.MALFORMED else reply.rpartition("</think>")[2]
    boxes = {tuple(map(float, match)) for match in _ANY_BOX.findall(written[-_MAX_REPLY_TEXT:])}
    if len(boxes) != 1:
        return BoxOutcome.SEVERAL if boxes else strict
    x1, y1, x2, y2 = boxes.pop()
    return x1, y1, x2, y2


def parse_answer(reply: str) -> str | None:
    """Return the text of the last ``<answer>`` in a reply, stripped; None where there is none or it is empty."""
    before, closing, _ = reply.rpartition("</answer>")
    _, opening, answer = before.rpartition("<answer>")
    return (answer.strip() or None) if closing and opening else None


def answer_of(trajectory: Trajectory) -> str | None:
    """Return the answer of an episode that came to its end; None of one that was cut off or had no box."""
    return parse_answer(trajectory.turns[-1].text) if trajectory.outcome is Outcome.ANSWERED else None
