"""Published data sets -> questions: which column is what, how boxes are written, where options are.

There is one ``DatasetFormat`` for each, by the data set card (``DatasetFormat.card``) and the evaluation code that it
names. To add one, add an entry to ``FORMATS``.
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
from functools import partial
from pathlib import PurePosixPath
from typing import Any

from ergo_rl.episodes import images
from ergo_rl.episodes.types import Box, Question
from ergo_rl.questions.readers import ImageNotFound, ImageStore
from ergo_rl.questions.rows import BadCell, Cells, four_numbers, image_cell, read_question, read_text, shorten

FIELDS = ("id", "image", "text", "options", "answer", "boxes", "source")


class BoxCorners(StrEnum):
    """What the four numbers of a box are: two corners, or a corner with width and height."""

    XYXY = "xyxy"
    XYWH = "xywh"


class BoxUnit(StrEnum):
    """Unit of the numbers of a box: pixels of the original, shares of its sides (0 to 1), or thousandths of them."""

    PIXELS = "pixels"
    SHARE = "share"
    THOUSANDTHS = "thousandths"


@dataclass(frozen=True, slots=True)
class DatasetFormat:
    """How a data set writes its questions."""

    title: str
    card: str
    """Address of the data set card; empty for no data set in particular."""
    columns: Mapping[str, Sequence[str]]
    """For each of FIELDS the columns that may hold it: the first that a row has counts."""
    corners: BoxCorners = BoxCorners.XYXY
    unit: BoxUnit = BoxUnit.PIXELS
    rewrite: Callable[[Cells, ImageStore], Cells] = field(default=lambda cells, store: cells)
    """Changes a row before its columns are read."""

    def renamed(self, columns: Mapping[str, str]) -> DatasetFormat:
        """Return this format with other columns for some of FIELDS. Raises ValueError for what is none of them."""
        if unknown := sorted(columns.keys() - set(FIELDS)):
            raise ValueError(f"{', '.join(unknown)}: a question has no such field, it has {', '.join(FIELDS)}")
        return replace(self, columns={**self.columns, **{name: (column,) for name, column in columns.items()}})


@dataclass(frozen=True, slots=True)
class ConvertedRow:
    """A row that is a question."""

    question: Question
    """Its image as bytes."""
    clipped: int
    """How many of its boxes left the image by a margin and were cut to it."""


def convert_row(
    cells: Cells, dataset: DatasetFormat, store: ImageStore, number: int, source: str, decode: bool = False
) -> ConvertedRow:
    """Convert one row. ``number`` and ``source`` make its id where the row has none; ``decode``: decode the image to
    its end, not its header only.

    Raises BadCell for a row that is no question."""
    cells = dataset.rewrite(cells, store)
    found = {name: _first(cells, dataset.columns.get(name, ())) for name in FIELDS}
    text, options = _options(_text("text", found["text"]), found["options"], cells)
    clipped: list[bool] = []
    question = read_question(
        {
            "id": f"{source}-{number}" if found["id"] is None else _text("id", found["id"]),
            "image": found["image"],
            "text": text,
            "options": options,
            "answer": _answer(found["answer"], options),
            "boxes": _list_of_boxes(found["boxes"]),
            "source": source if found["source"] is None else _text("source", found["source"]),
        },
        load_image=partial(_load_image, store),
        read_box=partial(_clipped_box, dataset, clipped),
    )
    if decode:
        try:
            images.decode(question.image)
        except images.UnreadableImage as error:
            raise BadCell("image", str(error)) from error
    return ConvertedRow(question, sum(clipped))


def _first(cells: Cells, names: Sequence[str]) -> Any:
    return next((cells[name] for name in names if cells.get(name) not in (None, "")), None)


def _text(column: str, value: Any) -> str:
    """Text without blanks around it, also of a number."""
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        value = str(value)
    return read_text(column, value).strip()


# --- options and answers ---------------------------------------------------------------------------------------------

_LETTERED = re.compile(r"\s*(?:\(([A-Z])\)|([A-Z])[.):])\s*(.*\S)\s*")
_INSTRUCTION = re.compile(
    r"\s*(?:(?:please )?(?:answer|respond|select|choose)\b.*\b(?:option|choice|letter)s?\b.*|options?:|choices:)\s*",
    re.IGNORECASE,
)
_NOTHING = ("", "nan", "none", "null")


def split_options(text: str) -> tuple[str, list[str]]:
    """Split a text with lines ``(A) ...``, ``(B) ...`` (or ``A. ...``) into the question without them, and the options
    without their letters. A line that asks to answer with a letter is left out: prompts say that in words of their own.
    Lines that do not count up from A are no options."""
    stem, options = list[str](), list[str]()
    for line in text.splitlines():
        lettered = _LETTERED.fullmatch(line)
        if lettered and (lettered[1] or lettered[2]) == string.ascii_uppercase[len(options) % 26]:
            options.append(lettered[3])
        else:
            stem.append(line)
    if len(options) < 2:
        return text.strip(), []
    return "\n".join(line for line in stem if not _INSTRUCTION.fullmatch(line)).strip(), options


def _options(text: str, given: Any, cells: Cells) -> tuple[str, list[str]]:
    """(text, options): from a column of their own, from columns A, B, C, ..., or from the text itself."""
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
            raise BadCell("options", f"should be a list, is {given!r:.60}")
        options = [_unlettered(_text("options", option), place) for place, option in enumerate(listed)]
    if len(options) == 1 or len(options) > 26:
        raise BadCell("options", f"there are {len(options)}, need 2 to 26 or none")
    return text, options


def _unlettered(option: str, place: int) -> str:
    lettered = _LETTERED.fullmatch(option)
    return lettered[3] if lettered and (lettered[1] or lettered[2]) == string.ascii_uppercase[place % 26] else option


def _answer(value: Any, options: Sequence[str]) -> str:
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
        raise BadCell("answer", f"{answer!r:.60} is none of the {len(options)} options")
    return letters[same[0]]


# --- images ----------------------------------------------------------------------------------------------------------

_BASE64 = re.compile(r"[A-Za-z0-9+/\s]+={0,2}\s*")
_BEGINNINGS = ("/9j/", "iVBOR", "UklGR", "R0lGOD", "Qk", "SUkq", "TU0A")
"""Of JPEG, PNG, WebP, GIF, BMP and TIFF in base64."""


def _load_image(store: ImageStore, value: Any) -> bytes:
    """The encoded image of bytes, base64, a data URL or a name; also of a list that means the same image throughout."""
    if isinstance(value, list):
        names = {item.partition("###")[0] if isinstance(item, str) else repr(item) for item in value}
        if len(names) != 1:
            raise BadCell("image", f"{len(names)} images; a question has one")
        value = value[0].partition("###")[0] if isinstance(value[0], str) else value[0]
    encoded = image_cell(value)
    if isinstance(encoded, bytes):
        return encoded
    encoded = encoded.strip()
    if encoded.startswith("data:"):
        return _decoded(encoded.partition(",")[2])
    if encoded.startswith(_BEGINNINGS) and _BASE64.fullmatch(encoded):
        return _decoded(encoded)
    try:
        return store(encoded)
    except ImageNotFound as error:
        raise BadCell("image", f"{error!s:.200}") from error


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except binascii.Error as error:
        raise BadCell("image", f"is no base64: {error}") from error


# --- boxes -----------------------------------------------------------------------------------------------------------


def _json(column: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise BadCell(column, f"is no JSON: {text!r:.60}") from error


def _list_of_boxes(value: Any) -> list[Any]:
    """One box, a list of them, or a list of objects that have one; also as JSON text."""
    if isinstance(value, str):
        value = _json("boxes", value)
    if value is None:
        return []
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise BadCell("boxes", f"should be a list, is {value!r:.60}")
    if value and all(isinstance(item, int | float) for item in value):
        value = [value]
    return [_first(item, ("bbox", "bbox_2d", "box")) if isinstance(item, dict) else item for item in value]


def _clipped_box(dataset: DatasetFormat, clipped: list[bool], numbers: Any, width: int, height: int) -> Box:
    """Round a box outwards and cut it to its image; add to ``clipped`` whether more than the rounding was cut off."""
    x1, y1, x2, y2 = map(float, four_numbers(numbers))
    if dataset.corners is BoxCorners.XYWH:
        x2, y2 = x1 + x2, y1 + y2
    if dataset.unit is not BoxUnit.PIXELS:
        scale = 1 if dataset.unit is BoxUnit.SHARE else 1000
        x1, y1, x2, y2 = x1 * width / scale, y1 * height / scale, x2 * width / scale, y2 * height / scale
    if not (x1 < x2 and y1 < y2 and x1 < width and y1 < height and x2 > 0 and y2 > 0):
        raise BadCell("boxes", f"{shorten(numbers)} is empty or outside of the image of {width} x {height}")
    clipped.append(x1 < -0.5 or y1 < -0.5 or x2 > width + 0.5 or y2 > height + 0.5)
    left, top = math.floor(max(0, x1)), math.floor(max(0, y1))
    return Box(left, top, math.ceil(min(width, x2)), math.ceil(min(height, y2)))


# --- the data sets ---------------------------------------------------------------------------------------------------


def _with_sidecar(cells: Cells, store: ImageStore) -> Cells:
    """V* keeps the boxes of an image in a JSON file beside it, [x, y, width, height] each."""
    name = cells.get("image")
    if not isinstance(name, str):
        return cells
    try:
        beside = json.loads(store(str(PurePosixPath(name).with_suffix(".json"))))
    except (ImageNotFound, ValueError):
        return cells  # a question needs no boxes
    return {**cells, "bbox": beside.get("bbox")} if isinstance(beside, dict) else cells


_ASKS_FOR_BOX = re.compile(r"\s*Please provide the bounding box coordinate of the region.*", re.DOTALL)


def _with_conversation(cells: Cells, store: ImageStore) -> Cells:
    """Visual-CoT's LLaVA-style rows: question, box, answer as a conversation; the box in pixels behind the second
    mention of the image, ``name.jpg###[x1, y1, x2, y2]``."""
    talk = cells.get("conversations")
    if not isinstance(talk, list) or not all(isinstance(turn, dict) for turn in talk) or len(talk) < 2:
        return cells
    words = {"question": _ASKS_FOR_BOX.sub("", str(talk[0].get("value", ""))), "answer": talk[-1].get("value")}
    mentions = cells["image"] if isinstance(cells.get("image"), list) else []
    boxes = [_json("boxes", name.partition("###")[2]) for name in mentions if isinstance(name, str) and "###" in name]
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
FORMATS: dict[str, DatasetFormat] = {
    "vstar": DatasetFormat(
        "V* Bench: test_questions.jsonl with its image folders, boxes in a .json beside each image",
        "https://huggingface.co/datasets/craigwu/vstar_bench",
        {"id": ("question_id",), "image": ("image",), "text": ("text",), "answer": ("label",), "boxes": ("bbox",),
         "source": ("category",)},
        BoxCorners.XYWH, rewrite=_with_sidecar,
    ),
    "hrbench": DatasetFormat(
        "HR-Bench 4K and 8K: TSV or Parquet, images in base64, options in columns A to D",
        "https://huggingface.co/datasets/DreamMr/HR-Bench",
        {"id": ("index",), "image": ("image",), "text": ("question",), "answer": ("answer",), "source": ("category",)},
    ),
    "mme-realworld": DatasetFormat(
        "MME-RealWorld and -Lite: JSON with an archive of images, or TSV/Parquet with images in base64",
        "https://huggingface.co/datasets/yifanzhang114/MME-RealWorld-Lite",
        {"id": ("Question_id", "question_id", "index"), "image": ("bytes", "image", "Image", "path"),
         "text": ("Text", "question"), "options": ("Answer choices", "multi-choice options", "multi_choice_options"),
         "answer": ("Ground truth", "answer"), "source": ("Subtask", "Category", "category")},
    ),
    "viscot": DatasetFormat(
        "Visual-CoT: *_cot_train.jsonl (bboxs in pixels), or viscot_363k.json (conversations)",
        "https://huggingface.co/datasets/deepcs233/Visual-CoT",
        {"id": ("id", "question_id"), "image": ("image",), "text": ("question",),
         "answer": ("answer", "possible_answers"), "boxes": ("bboxs",), "source": ("dataset",)},
        rewrite=_with_conversation,
    ),
    "treevgr": DatasetFormat(
        "TreeVGR's and TreeBench's kind: JSONL, TSV or Parquet whose rows know the boxes of their targets, in pixels",
        "https://github.com/Haochen-Wang409/TreeVGR",
        {**_ANY, "text": ("problem", "question", "query"), "boxes": ("target_instances", *_BOXES)},
    ),
    "any": DatasetFormat("JSONL, JSON, CSV, TSV or Parquet with common column names (--map for others)", "", _ANY),
}  # fmt: skip
