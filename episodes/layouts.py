"""Published data sets -> questions: which column is what, how boxes are written, where options are.

One ``Layout`` for each, by the data set cards and the evaluation code that they name (``Layout.card``). To add one: a
line in ``LAYOUTS``. Where a column has had several names, the first that a row has counts.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import PurePosixPath
from typing import Any

from ergo_rl.episodes import images
from ergo_rl.episodes.archives import NoPicture, Pictures
from ergo_rl.episodes.families import FAMILIES
from ergo_rl.episodes.records import Cells
from ergo_rl.episodes.types import Box, Question

FIELDS = ("id", "image", "text", "options", "answer", "boxes", "source")


class Corners(StrEnum):
    """What the four numbers of a box are: two corners, or a corner with width and height."""

    XYXY = "xyxy"
    XYWH = "xywh"


class Unit(StrEnum):
    """Of the numbers of a box: pixels of the original, shares of its sides (0 to 1), or thousandths of them."""

    PIXELS = "pixels"
    SHARE = "share"
    THOUSANDTHS = "thousandths"


class Unusable(ValueError):
    """A row is no question. column: of ours; the message says why."""

    def __init__(self, column: str, reason: str) -> None:
        self.column = column
        super().__init__(f"{column}: {reason}")


@dataclass(frozen=True, slots=True)
class Layout:
    """columns: for each of FIELDS the names that it may have; first: changes a row before its columns are read."""

    title: str
    card: str
    columns: Mapping[str, Sequence[str]]
    corners: Corners = Corners.XYXY
    unit: Unit = Unit.PIXELS
    first: Callable[[Cells, Pictures], Cells] = field(default=lambda cells, pictures: cells)

    def renamed(self, columns: Mapping[str, str]) -> Layout:
        """With other columns for some of FIELDS. Raises ValueError for what is none of them."""
        if unknown := sorted(columns.keys() - set(FIELDS)):
            raise ValueError(f"{', '.join(unknown)}: a question has no such field, it has {', '.join(FIELDS)}")
        return replace(self, columns={**self.columns, **{name: (column,) for name, column in columns.items()}})


@dataclass(frozen=True, slots=True)
class Converted:
    """clipped: boxes that left the image by a margin and were cut to it."""

    question: Question
    clipped: int


def convert(
    cells: Cells, layout: Layout, pictures: Pictures, number: int, source: str, whole: bool = False
) -> Converted:
    """One row as a question, its picture as bytes. number, source: make its id where the row has none.
    whole: decode the picture to its end, not its header only.

    Raises Unusable for a row that is no question."""
    cells = layout.first(cells, pictures)
    found = {name: _first(cells, layout.columns.get(name, ())) for name in FIELDS}
    text, options = _options(_text("text", found["text"]), found["options"], cells)
    encoded = _picture(found["image"], pictures)
    try:
        width, height = images.size(encoded)
        if whole:
            images.decode(encoded)
    except images.UnreadableImage as error:
        raise Unusable("image", str(error)) from error
    boxes = [_box(one, layout, width, height) for one in _list_of_boxes(found["boxes"])]
    question = Question(
        id=f"{source}-{number}" if found["id"] is None else _text("id", found["id"]),
        image=encoded,
        text=text,
        answer=_answer(found["answer"], options),
        options=options,
        boxes=tuple(box for box, _ in boxes),
        source=source if found["source"] is None else _text("source", found["source"]),
    )
    for words in (question.text, question.answer, *question.options):
        for family in FAMILIES.values():
            if (token := family().reserved_text(words)) is not None:
                raise Unusable("text", f"contains the special token {token}")
    return Converted(question, sum(clipped for _, clipped in boxes))


def _first(cells: Cells, names: Sequence[str]) -> Any:
    return next((cells[name] for name in names if cells.get(name) not in (None, "")), None)


def _text(column: str, value: Any) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise Unusable(column, "is missing" if value is None else f"should be text, is {value!r:.60}")
    return value.strip()


# --- options and answers ---------------------------------------------------------------------------------------------

_LETTERED = re.compile(r"\s*(?:\(([A-Z])\)|([A-Z])[.):])\s*(.*\S)\s*")
_INSTRUCTION = re.compile(
    r"\s*(?:(?:please )?(?:answer|respond|select|choose)\b.*\b(?:option|choice|letter)s?\b.*|options?:|choices:)\s*",
    re.IGNORECASE,
)
_NOTHING = ("", "nan", "none", "null")


def split_options(text: str) -> tuple[str, tuple[str, ...]]:
    """A text with lines ``(A) ...``, ``(B) ...`` (or ``A. ...``) -> the question without them, and the options without
    their letters. What stands behind them and asks for a letter is left out: prompts say that in words of their own.
    Lines that do not count on from A are no options."""
    stem, options = list[str](), list[str]()
    for line in text.splitlines():
        lettered = _LETTERED.fullmatch(line)
        if lettered and (lettered[1] or lettered[2]) == string.ascii_uppercase[len(options) % 26]:
            options.append(lettered[3])
        else:
            stem.append(line)
    if len(options) < 2:
        return text.strip(), ()
    return "\n".join(line for line in stem if not _INSTRUCTION.fullmatch(line)).strip(), tuple(options)


def _options(text: str, given: Any, cells: Cells) -> tuple[str, tuple[str, ...]]:
    """From a column of their own, from columns A, B, C, ..., or from the text itself."""
    text = text.replace("<image>", "").strip()
    if given is None and "A" in cells:
        given = [cells[letter] for letter in string.ascii_uppercase if letter in cells]
        while given and str(given[-1] if given[-1] is not None else "").strip().lower() in _NOTHING:
            given.pop()
    if given is None or given == []:
        text, options = split_options(text)
    else:
        listed = _json("options", given) if isinstance(given, str) else given
        listed = list(listed.values()) if isinstance(listed, dict) else listed
        if not isinstance(listed, list):
            raise Unusable("options", f"should be a list, is {given!r:.60}")
        options = tuple(_unlettered(_text("options", one), place) for place, one in enumerate(listed))
    if len(options) == 1 or len(options) > 26:
        raise Unusable("options", f"there are {len(options)}, need 2 to 26 or none")
    if not text:
        raise Unusable("text", "is empty")
    return text, options


def _unlettered(option: str, place: int) -> str:
    lettered = _LETTERED.fullmatch(option)
    return lettered[3] if lettered and (lettered[1] or lettered[2]) == string.ascii_uppercase[place % 26] else option


def _answer(value: Any, options: tuple[str, ...]) -> str:
    """The letter where there are options."""
    answer = _text("answer", value[0] if isinstance(value, list) and value else value)
    if not options:
        return answer
    letters = string.ascii_uppercase[: len(options)]
    if (bare := re.fullmatch(r"\(?([A-Za-z])\)?[.:]?", answer)) and bare[1].upper() in letters:
        return bare[1].upper()
    same = [place for place, option in enumerate(options) if option.casefold() == answer.casefold()]
    if len(same) != 1 and (lettered := _LETTERED.fullmatch(answer)):
        same = [place for place, option in enumerate(options) if option.casefold() == lettered[3].casefold()]
    if len(same) != 1:
        raise Unusable("answer", f"{answer!r:.60} is none of the {len(options)} options")
    return letters[same[0]]


# --- pictures --------------------------------------------------------------------------------------------------------

_BASE64 = re.compile(r"[A-Za-z0-9+/\s]+={0,2}\s*")
_BEGINNINGS = ("/9j/", "iVBOR", "UklGR", "R0lGOD", "Qk", "SUkq", "TU0A")
"""Of JPEG, PNG, WebP, GIF, BMP and TIFF in base64."""


def _picture(value: Any, pictures: Pictures) -> bytes:
    if isinstance(value, list):
        names = {one.partition("###")[0] if isinstance(one, str) else repr(one) for one in value}
        if len(names) != 1:
            raise Unusable("image", f"{len(names)} pictures; a question has one")
        value = value[0].partition("###")[0] if isinstance(value[0], str) else value[0]
    if isinstance(value, dict):  # Hugging Face datasets: {"bytes": ..., "path": ...}
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes) and value:
        return value
    if not isinstance(value, str) or not value.strip():
        raise Unusable("image", "is missing" if not value else f"should be bytes or text, is {type(value).__name__}")
    value = value.strip()
    if value.startswith("data:"):
        return _decoded(value.partition(",")[2])
    if value.startswith(_BEGINNINGS) and _BASE64.fullmatch(value):
        return _decoded(value)
    try:
        return pictures(value)
    except NoPicture as error:
        raise Unusable("image", f"{error!s:.200}") from error


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except binascii.Error as error:
        raise Unusable("image", f"is no base64: {error}") from error


# --- boxes -----------------------------------------------------------------------------------------------------------


def _json(column: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise Unusable(column, f"is no JSON: {text!r:.60}") from error


def _list_of_boxes(value: Any) -> list[Any]:
    """One box, a list of them, or a list of objects that have one; also as JSON text."""
    if isinstance(value, str):
        value = _json("boxes", value)
    if value is None:
        return []
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise Unusable("boxes", f"should be a list, is {value!r:.60}")
    if value and all(isinstance(one, int | float) for one in value):
        value = [value]
    return [_first(one, ("bbox", "bbox_2d", "box")) if isinstance(one, dict) else one for one in value]


def _box(numbers: Any, layout: Layout, width: int, height: int) -> tuple[Box, bool]:
    """Rounded outwards, cut to the image; whether more than the rounding was cut off."""
    plain = isinstance(numbers, list | tuple) and len(numbers) == 4
    if not plain or not all(
        isinstance(one, int | float) and not isinstance(one, bool) and math.isfinite(one) for one in numbers
    ):
        raise Unusable("boxes", f"should be four numbers, is {numbers!r:.60}")
    x1, y1, x2, y2 = map(float, numbers)
    if layout.corners is Corners.XYWH:
        x2, y2 = x1 + x2, y1 + y2
    if layout.unit is not Unit.PIXELS:
        scale = 1 if layout.unit is Unit.SHARE else 1000
        x1, y1, x2, y2 = x1 * width / scale, y1 * height / scale, x2 * width / scale, y2 * height / scale
    left, top = max(0, math.floor(x1)), max(0, math.floor(y1))
    right, bottom = min(width, math.ceil(x2)), min(height, math.ceil(y2))
    if not (x1 < x2 and y1 < y2 and left < right and top < bottom):
        raise Unusable("boxes", f"{list(numbers)} is empty or outside of the image of {width} x {height}")
    clipped = x1 < -0.5 or y1 < -0.5 or x2 > width + 0.5 or y2 > height + 0.5
    return Box(left, top, right, bottom), clipped


# --- the data sets ---------------------------------------------------------------------------------------------------


def _with_sidecar(cells: Cells, pictures: Pictures) -> Cells:
    """V* keeps the boxes of a picture in a JSON file beside it, [x, y, width, height] each."""
    name = cells.get("image")
    if not isinstance(name, str):
        return cells
    try:
        beside = json.loads(pictures(str(PurePosixPath(name).with_suffix(".json"))))
    except (NoPicture, ValueError):
        return cells  # without boxes a question can be played as well
    return {**cells, "bbox": beside.get("bbox")} if isinstance(beside, dict) else cells


_ASKS_FOR_BOX = re.compile(r"\s*Please provide the bounding box coordinate of the region.*", re.DOTALL)


def _with_conversation(cells: Cells, pictures: Pictures) -> Cells:
    """Visual-CoT's LLaVA-style rows: question, box, answer as a conversation; the box in pixels behind the second
    mention of the picture, ``name.jpg###[x1, y1, x2, y2]``."""
    talk = cells.get("conversations")
    if not isinstance(talk, list) or not all(isinstance(one, dict) for one in talk) or len(talk) < 2:
        return cells
    words = {"question": _ASKS_FOR_BOX.sub("", str(talk[0].get("value", ""))), "answer": talk[-1].get("value")}
    mentions = cells["image"] if isinstance(cells.get("image"), list) else []
    boxes = [_json("boxes", one.partition("###")[2]) for one in mentions if isinstance(one, str) and "###" in one]
    return {**cells, **words, "bboxs": boxes}


_BOXES = ("bboxs", "bboxes", "boxes", "bbox", "target_instances", "gt_bboxes")
_ANY: dict[str, Sequence[str]] = {
    "id": ("id", "question_id", "Question_id", "index", "sample_id"),
    "image": ("image", "images", "Image", "image_path", "img_path", "file_name"),
    "text": ("text", "question", "Text", "problem", "query", "prompt"),
    "options": ("options", "choices", "Answer choices", "multi-choice options"),
    "answer": ("answer", "label", "Ground truth", "solution", "possible_answers"),
    "boxes": _BOXES,
    "source": ("source", "dataset", "category", "Category"),
}
LAYOUTS: dict[str, Layout] = {
    "vstar": Layout(
        "V* Bench: test_questions.jsonl with its image folders, boxes in a .json beside each picture",
        "https://huggingface.co/datasets/craigwu/vstar_bench",
        {"id": ("question_id",), "image": ("image",), "text": ("text",), "answer": ("label",), "boxes": ("bbox",),
         "source": ("category",)},
        Corners.XYWH, first=_with_sidecar,
    ),
    "hrbench": Layout(
        "HR-Bench 4K and 8K: TSV or Parquet, pictures in base64, options in columns A to D",
        "https://huggingface.co/datasets/DreamMr/HR-Bench",
        {"id": ("index",), "image": ("image",), "text": ("question",), "answer": ("answer",), "source": ("category",)},
    ),
    "mme-realworld": Layout(
        "MME-RealWorld and -Lite: JSON with an archive of pictures, or TSV/Parquet with pictures in base64",
        "https://huggingface.co/datasets/yifanzhang114/MME-RealWorld-Lite",
        {"id": ("Question_id", "question_id", "index"), "image": ("bytes", "image", "Image", "path"),
         "text": ("Text", "question"), "options": ("Answer choices", "multi-choice options", "multi_choice_options"),
         "answer": ("Ground truth", "answer"), "source": ("Subtask", "Category", "category")},
    ),
    "viscot": Layout(
        "Visual-CoT: *_cot_train.jsonl (bboxs in pixels), or viscot_363k.json (conversations)",
        "https://huggingface.co/datasets/deepcs233/Visual-CoT",
        {"id": ("id", "question_id"), "image": ("image",), "text": ("question",),
         "answer": ("answer", "possible_answers"), "boxes": ("bboxs",), "source": ("dataset",)},
        first=_with_conversation,
    ),
    "treevgr": Layout(
        "TreeVGR's and TreeBench's kind: JSONL, TSV or Parquet whose rows know the boxes of their targets, in pixels",
        "https://github.com/Haochen-Wang409/TreeVGR",
        {**_ANY, "text": ("problem", "question", "query"), "boxes": ("target_instances", *_BOXES)},
    ),
    "any": Layout("JSONL, JSON, CSV, TSV or Parquet with common column names (--map for others)", "", _ANY),
}  # fmt: skip
