"""One row -> one question, or the column that is wrong and why: the only place that decides what a question is.

Training (``dataset``) and the conversion of published data (``formats``) both read rows through here; they differ in
where images come from and in what happens to a box that leaves its image.
"""

from __future__ import annotations

import math
import os
import re
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ergo_rl.episodes import images
from ergo_rl.episodes.config import MAX_PIXELS
from ergo_rl.episodes.families import FAMILIES
from ergo_rl.episodes.prompts import LONGEST_TEXT
from ergo_rl.episodes.types import Box, Question
from ergo_rl.errors import ErgoError, first_line

Cells = Mapping[str, Any]
"""A row: values by column."""
_SHOWN = 200
"""Characters of a value that a message shows."""
MOST_OPTIONS = len(string.ascii_uppercase)


class BadCell(ErgoError, ValueError):
    """A row that is no question, because of one of its columns."""

    def __init__(self, column: str, reason: str) -> None:
        self.column, self.reason = column, reason
        super().__init__(f"{column}: {reason}")

    @property
    def kind(self) -> str:
        """What rows are counted by: the column and the reason up to its colon, behind which the value is shown."""
        return f"{self.column} {self.reason.partition(':')[0]}"[:_SHOWN]


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Stands in a row for a cell that could not be read, and says why: the row is lost only if that cell is needed."""

    reason: str


@contextmanager
def element(column: str, what: str = "cannot be read") -> Iterator[None]:
    """Whatever is raised while one element (row, cell, image, box) is handled becomes its BadCell: no library's error
    may cost more than the element that it met."""
    try:
        yield
    except BadCell:
        raise
    except Exception as error:
        raise BadCell(column, f"{what}: {first_line(error)}") from error


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
    with element("image"):
        image = load_image(cells.get("image"))
    width, height = image_size(image, max_pixels)
    options = tuple(_prompt_text("options", option) for option in read_list("options", cells.get("options")))
    check_number_of_options(options)
    with element("boxes"):
        boxes = tuple(read_box(numbers, width, height) for numbers in read_list("boxes", cells.get("boxes")))
    answer = _prompt_text("answer", cells.get("answer"))
    if options and not _is_one_of(answer, options):
        raise BadCell("answer", f"is none of the options: {shorten(answer)} of {shorten(list(options))}")
    return Question(
        id=read_text("id", identity),
        image=image,
        text=_prompt_text("text", cells.get("text")),
        answer=answer,
        options=options,
        boxes=boxes,
        source=read_text("source", cells["source"], blank=True) if cells.get("source") else "",
    )


def image_size(image: bytes | Path, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Return (width, height) of an image as shown. Raises BadCell."""
    try:
        return images.size(image, max_pixels)
    except images.UnreadableImage as error:
        raise BadCell("image", str(error)) from error


def _is_one_of(answer: str, options: Sequence[str]) -> bool:
    """Whether an answer begins with the letter of an option or is its text."""
    letters = string.ascii_uppercase[: len(options)]
    if (lettered := re.match(r"[\s(\[]*([A-Za-z])(?![^\W_])", answer)) and lettered[1].upper() in letters:
        return True
    return answer.strip().casefold() in (option.strip().casefold() for option in options)


def check_number_of_options(options: Sequence[object]) -> None:
    """Raise BadCell for a number of options that letters cannot tell apart."""
    if len(options) == 1 or len(options) > MOST_OPTIONS:
        raise BadCell("options", f"should be 2 to {MOST_OPTIONS} or none: there are {len(options)}")


def read_text(column: str, value: object, blank: bool = False) -> str:
    """Return ``value`` if it is text, and more than blanks unless ``blank``. Raises BadCell."""
    if not isinstance(value, str):
        raise BadCell(column, "is missing" if value is None else f"should be text, is {type(value).__name__}")
    if not blank and not value.strip():
        raise BadCell(column, "is empty")
    if len(value) > LONGEST_TEXT:
        raise BadCell(column, f"is too long: {len(value)} characters, at most {LONGEST_TEXT}")
    with element(column, "is no text that UTF-8 can hold"):  # half an emoji
        value.encode()
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


def path_below(root: Path, name: str) -> Path:
    """Return the path of an image that rows name, inside of the folder ``root``; absolute names must lie in it, too.

    A linked folder below ``root`` is followed: it is how its owner laid the data out. A single file that is a link may
    lead to the same folder or into the blobs of the Hugging Face hub's cache, and no further: what was downloaded must
    not bring other files of this machine into the data.

    Raises BadCell for a name that leaves ``root`` or cannot be followed."""
    with element("image", f"the path cannot be followed: {shorten(name)}"):
        home = Path(os.path.abspath(root))
        allowed = _where_links_may_lead(home)
        path = Path(os.path.normpath(home / name))
        if not (path.is_relative_to(home) or path.is_relative_to(allowed[0])):
            raise BadCell("image", f"the path leaves its folder: {shorten(name)} leaves {root}")
        target = path.resolve()
        if not any(target.is_relative_to(folder) for folder in (*allowed, path.parent.resolve())):
            raise BadCell("image", f"the path leaves its folder by a link: {shorten(name)} leads to {target}")
        return target


@lru_cache(maxsize=64)
def _where_links_may_lead(home: Path) -> tuple[Path, ...]:
    """The folder itself, resolved, and the blobs of the hub's cache that it lies in."""
    caches = (folder.parent for folder in (home, *home.parents) if folder.name == "snapshots")
    return (home.resolve(), *((cache / "blobs").resolve() for cache in caches))


def shorten(value: object) -> str:
    """Return ``value`` as a message shows it, at most about 200 characters."""
    shown = repr(value)
    return shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."


def _prompt_text(column: str, value: object) -> str:
    """Text that becomes a part of a prompt: a special token in it would be taken for the template's own."""
    text = read_text(column, value)
    for family in FAMILIES.values():
        if (token := family().reserved_text(text, tags=False)) is not None:
            raise BadCell(column, f"contains the special token {token}")
    return text


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
