"""One row -> one question, or the column that is wrong and why: the only place that decides what a question is.

Training (``dataset``) and the conversion of published data (``formats``) both read rows through here; they differ in
where images come from and in what happens to a box that leaves its image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ergo_rl.episodes import images
from ergo_rl.episodes.config import MAX_PIXELS
from ergo_rl.episodes.families import FAMILIES
from ergo_rl.episodes.types import Box, Question
from ergo_rl.errors import ErgoError

Cells = Mapping[str, Any]
"""A row: values by column."""
_SHOWN = 200
"""Characters of a value that a message shows."""


class BadCell(ErgoError, ValueError):
    """A row that is no question, because of one of its columns."""

    def __init__(self, column: str, reason: str) -> None:
        self.column, self.reason = column, reason
        super().__init__(f"{column}: {reason}")


def strict_box(numbers: object, width: int, height: int) -> Box:
    """Check a box ``[x1, y1, x2, y2]`` in pixels of the original; fractions are rounded outwards.

    Raises BadCell where it is empty or leaves the image."""
    corners = four_numbers(numbers)
    x1, y1, x2, y2 = math.floor(corners[0]), math.floor(corners[1]), math.ceil(corners[2]), math.ceil(corners[3])
    if not (0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height):
        raise BadCell("boxes", f"{numbers} is empty or leaves the image of {width} x {height}")
    return Box(x1, y1, x2, y2)


def read_question(
    cells: Cells,
    load_image: Callable[[Any], bytes | Path],
    read_box: Callable[[Any, int, int], Box] = strict_box,
    max_pixels: int = MAX_PIXELS,
) -> Question:
    """Check a row with the columns of ``dataset``.

    ``load_image`` turns the cell ``image`` into encoded bytes or a path, ``read_box`` an item of ``boxes`` into a box
    of an image of (width, height); both raise BadCell. Only the header of the image is read.

    Raises BadCell for the first column that is wrong: a text that is missing or spells out a special token of a model
    family, an image that is unreadable or has more than ``max_pixels``, a box that ``read_box`` refuses."""
    identity = cells.get("id")
    if isinstance(identity, int) and not isinstance(identity, bool):
        identity = str(identity)
    image = load_image(cells.get("image"))
    try:
        width, height = images.size(image, max_pixels)
    except images.UnreadableImage as error:
        raise BadCell("image", str(error)) from error
    return Question(
        id=read_text("id", identity),
        image=image,
        text=_prompt_text("text", cells.get("text")),
        answer=_prompt_text("answer", cells.get("answer")),
        options=tuple(_prompt_text("options", option) for option in read_list("options", cells.get("options"))),
        boxes=tuple(read_box(numbers, width, height) for numbers in read_list("boxes", cells.get("boxes"))),
        source=read_text("source", cells["source"], blank=True) if cells.get("source") else "",
    )


def read_text(column: str, value: object, blank: bool = False) -> str:
    """Return ``value`` if it is text, and more than blanks unless ``blank``. Raises BadCell."""
    if not isinstance(value, str):
        raise BadCell(column, "is missing" if value is None else f"should be text, is {type(value).__name__}")
    if not blank and not value.strip():
        raise BadCell(column, "is empty")
    return value


def read_list(column: str, value: object) -> list[Any]:
    """Return ``value`` if it is a list; None counts as an empty one. Raises BadCell."""
    if value is None:
        return []
    if not isinstance(value, list):
        raise BadCell(column, f"should be a list, is {type(value).__name__}")
    return value


def image_cell(value: object) -> bytes | str:
    """Return the encoded bytes or the text in a cell, also out of Hugging Face's ``{"bytes": ..., "path": ...}``.

    Raises BadCell."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if value is None:
        raise BadCell("image", "is missing")
    if not isinstance(value, bytes | str):
        raise BadCell("image", f"should be bytes or a path, is {type(value).__name__}")
    if not value or (isinstance(value, str) and not value.strip()):
        raise BadCell("image", "is empty")
    return value


def four_numbers(value: object) -> tuple[float, float, float, float]:
    """Return the four numbers of a box, of whatever unit. Raises BadCell."""
    if not isinstance(value, list | tuple) or len(value) != 4 or not all(_finite(number) for number in value):
        raise BadCell("boxes", f"should be four finite numbers, is {shorten(value)}")
    a, b, c, d = value
    return a, b, c, d


def shorten(value: object) -> str:
    """Return ``value`` as a message shows it, at most about 200 characters."""
    shown = repr(value)
    return shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."


def _prompt_text(column: str, value: object) -> str:
    """Text that becomes a part of a prompt: a special token in it would be taken for the template's own."""
    text = read_text(column, value)
    for family in FAMILIES.values():
        if (token := family().reserved_text(text)) is not None:
            raise BadCell(column, f"contains the special token {token}")
    return text


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
