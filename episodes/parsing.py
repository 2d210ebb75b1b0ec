"""From a reply to a value, or to a named reason why there is none. Nothing here raises on any text.

The box contract (docs/boxes.md): exactly one ``<zoom>[x1, y1, x2, y2]</zoom>``, numbers whole or decimal.
Reversed corners are put in order: what was meant is plain, and refusing would teach nothing about places.
Several boxes are refused: which one was meant is not plain.
"""

from __future__ import annotations

import re
from enum import StrEnum

from ergo_rl.episodes.families import Corners


class BoxOutcome(StrEnum):
    """What became of the box in a reply. The first three gave a box, the others did not."""

    OK = "ok"
    REORDERED = "reordered"
    CLAMPED = "clamped"
    NO_TAG = "no_tag"
    SEVERAL = "several"
    MALFORMED = "malformed"
    NOT_FINITE = "not_finite"
    EMPTY = "empty"
    OUTSIDE = "outside"
    SLIVER = "sliver"

    @property
    def usable(self) -> bool:
        return self in (BoxOutcome.OK, BoxOutcome.REORDERED, BoxOutcome.CLAMPED)


_NUMBER = r"\s*([+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?|[+-]?(?:nan|inf(?:inity)?))\s*"
_BOX = re.compile(rf"\s*[\[(]?{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}[\])]?\s*", re.IGNORECASE | re.ASCII)
_MAX_BOX_TEXT = 400


def parse_zoom(reply: str) -> Corners | BoxOutcome:
    """The four numbers of the only ``<zoom>`` in a reply, in the convention of the model family."""
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


def parse_answer(reply: str) -> str | None:
    """The text of the last ``<answer>`` in a reply, stripped; None where there is none or it is empty."""
    before, closing, _ = reply.rpartition("</answer>")
    _, opening, answer = before.rpartition("<answer>")
    return (answer.strip() or None) if closing and opening else None
