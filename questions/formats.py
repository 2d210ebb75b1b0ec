"""Published data sets -> questions: which column is what, and what a row needs before its columns can be read.

There is one ``DatasetFormat`` for each, by the data set card (``DatasetFormat.card``) and the evaluation code that it
names. To add one, add an entry to ``FORMATS``. What data sets write in several ways (options, answers, boxes) is
decided in ``conventions``, from all rows.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import PurePosixPath
from typing import Any

from ergo_rl.episodes import images
from ergo_rl.episodes.types import Box, Question
from ergo_rl.questions.conventions import (
    LETTERS,
    BoxCorners,
    BoxUnit,
    Conventions,
    Option,
    Options,
    Survey,
    answer_text,
    list_of_boxes,
    listed_options,
    parsed,
    read_answer,
    row_options,
    split_options,
)
from ergo_rl.questions.image_store import LONGEST_NAME, ImageNotFound, ImageStore
from ergo_rl.questions.rows import (
    BadCell,
    Cells,
    Unreadable,
    element,
    four_numbers,
    image_cell,
    image_size,
    read_question,
    read_text,
    shorten,
)

FIELDS = ("id", "image", "text", "options", "answer", "boxes", "source")


@dataclass(frozen=True, slots=True)
class DatasetFormat:
    """How a data set writes its questions."""

    title: str
    card: str
    """Address of the data set card; empty for no data set in particular."""
    columns: Mapping[str, Sequence[str]]
    """For each of FIELDS the columns that may hold it: the first that a row has counts. A dot leads into a column that
    is an object or a list: ``reward_model.ground_truth``, ``images.0``."""
    corners: BoxCorners = BoxCorners.XYXY
    unit: BoxUnit = BoxUnit.PIXELS
    """What the card says; rows that cannot be so are refused (``conventions``)."""
    rewrite: Callable[[Cells, ImageStore], Cells] = field(default=lambda cells, store: cells)
    """Changes a row before its columns are read."""

    def renamed(self, columns: Mapping[str, str]) -> DatasetFormat:
        """Return this format with other columns for some of FIELDS. Raises ValueError for what is none of them."""
        if unknown := sorted(columns.keys() - set(FIELDS)):
            raise ValueError(f"{', '.join(unknown)}: a question has no such field, it has {', '.join(FIELDS)}")
        return replace(self, columns={**self.columns, **{name: (column,) for name, column in columns.items()}})

    @property
    def image_columns(self) -> tuple[str, ...]:
        """Columns with images, which a survey of the rows leaves out."""
        others = {name.partition(".")[0] for key, names in self.columns.items() if key != "image" for name in names}
        return tuple(name for name in self.columns["image"] if name not in others)

    def find(self, cells: Cells, name: str) -> tuple[str, Any]:
        """Return (column, value) of one of FIELDS; ("", None) where no column holds it. Raises BadCell for a cell that
        could not be read."""
        for column in self.columns.get(name, ()):
            value = _reach(cells, column)
            if isinstance(value, Unreadable):
                raise BadCell(name, value.reason)
            if value is not None and not (isinstance(value, str | list) and len(value) == 0):
                return column, value
        return "", None


def _reach(cells: Cells, column: str) -> Any:
    """The value of a column, by its name or by a way into it. A number of pandas' for "nothing" is nothing."""
    if column in cells:
        value = cells[column]
        return None if isinstance(value, float) and math.isnan(value) else value
    value = cells
    for step in column.split("."):
        if isinstance(value, Mapping) and step in value:
            value = value[step]
        elif isinstance(value, list) and step.isdecimal() and int(step) < len(value):
            value = value[int(step)]
        else:
            return value if isinstance(value, Unreadable) else None
    return value


# --- one row ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ConvertedRow:
    """A row that is a question."""

    question: Question
    """Its image as bytes."""
    clipped: int
    """How many of its boxes left the image by a margin and were cut to it."""
    columns: Mapping[str, str]
    """Where each of FIELDS was found."""


def see_row(cells: Cells, dataset: DatasetFormat, store: ImageStore, survey: Survey, sizes: bool = False) -> None:
    """Count one row in a survey; ``sizes``: compare its boxes with the size of its image instead.

    Raises BadCell for a row that will be skipped."""
    with element("row"):
        cells = _with_conversation(dataset.rewrite(cells, store))
        boxes = list_of_boxes(dataset.find(cells, "boxes")[1])
        if not sizes:
            _, options = _text_and_options(cells, dataset)
            survey.see(options, dataset.find(cells, "answer")[1], boxes, cells)
        elif boxes:
            width, height = image_size(_load_image(store, dataset.find(cells, "image")[1]))
            for numbers in boxes:
                survey.see_size(numbers, width, height)


def convert_row(
    cells: Cells,
    dataset: DatasetFormat,
    store: ImageStore,
    number: int,
    source: str,
    conventions: Conventions,
    decode: bool = False,
) -> ConvertedRow:
    """Convert one row. ``number`` and ``source`` make its id where the row has none; ``decode``: decode the image to
    its end, not its header only.

    Raises BadCell for a row that is no question, whatever the reason."""
    with element("row"):
        cells = _with_conversation(dataset.rewrite(cells, store))
        found = {name: dataset.find(cells, name) for name in FIELDS}
        text, listed = _text_and_options(cells, dataset, conventions)
        options = row_options(listed, conventions)
        clipped: list[bool] = []
        question = read_question(
            {
                "id": f"{source}-{number}" if found["id"][1] is None else _text("id", found["id"][1]),
                "image": found["image"][1],
                "text": text,
                "options": [option.text for option in options],
                "answer": read_answer(answer_text(found["answer"][1]), options, conventions),
                "boxes": list_of_boxes(found["boxes"][1]),
                "source": source if found["source"][1] is None else _text("source", found["source"][1]),
            },
            load_image=partial(_load_image, store),
            read_box=partial(_clipped_box, conventions, clipped),
        )
        if decode:
            with element("image", "does not decode"):
                images.decode(question.image)
        return ConvertedRow(question, sum(clipped), {name: column for name, (column, _) in found.items()})


def _text(column: str, value: Any) -> str:
    """Text without blanks around it, also of a number."""
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        value = str(value)
    return read_text(column, value).strip()


def _text_and_options(
    cells: Cells, dataset: DatasetFormat, conventions: Conventions | None = None
) -> tuple[str, Options]:
    """The question without its options, and these: from a column of their own, from columns A, B, C, ..., or from the
    text itself."""
    text = _text("text", dataset.find(cells, "text")[1]).replace("<image>", "").strip()
    none = (conventions or Conventions()).none
    options = listed_options(dataset.find(cells, "options")[1], cells, none)
    stem, lines = split_options(text)
    if not options.items:
        return stem, Options(tuple(map(Option, LETTERS, lines)), labelled=bool(lines))
    repeated = len(lines) == len(options.items)  # they stand in the text, too: prompts add them again
    return stem if repeated else text, options


def _with_conversation(cells: Cells) -> Cells:
    """Add ``conversation.question`` and ``conversation.answer``: the first exchange of a conversation, as LLaVA,
    ShareGPT, ms-swift and verl write it (``conversations``, ``messages``, ``prompt``), also as JSON text."""
    for column in ("conversations", "messages", "prompt"):
        talk = cells.get(column)
        if isinstance(talk, str):
            talk = parsed(talk)
        if isinstance(talk, list) and talk and all(isinstance(turn, Mapping) for turn in talk):
            turns = [(_role(turn), _said(turn)) for turn in talk]
            asked = next((place for place, (role, _) in enumerate(turns) if role in ("human", "user")), None)
            if asked is not None:
                reply = turns[asked + 1][1] if asked + 1 < len(turns) else None
                return {**cells, column: talk, "conversation": {"question": turns[asked][1], "answer": reply}}
    return cells


def _role(turn: Mapping[str, Any]) -> str:
    return str(turn.get("from") or turn.get("role") or "").lower()


def _said(turn: Mapping[str, Any]) -> str | None:
    value = turn.get("value") if turn.get("value") is not None else turn.get("content")
    if isinstance(value, list):
        value = "\n".join(str(part["text"]) for part in value if isinstance(part, Mapping) and part.get("text"))
    return value if isinstance(value, str) else None


# --- images ----------------------------------------------------------------------------------------------------------

_BASE64 = re.compile(r"[A-Za-z0-9+/]+={0,2}")
_BEGINNINGS = ("/9j/", "iVBOR", "UklGR", "R0lGOD", "Qk", "SUkq", "TU0A", "AAAAIGZ0eX", "AAAAHGZ0eX")
"""Of JPEG, PNG, WebP, GIF, BMP, TIFF and AVIF in base64."""


class Names(tuple[str, ...]):
    """Names of one image; the first that is there counts."""


def _load_image(store: ImageStore, value: Any) -> bytes:
    """The encoded image of bytes, base64, a data URL or a name; also of a list that means the same image throughout."""
    if isinstance(value, Names):
        return _stored(store, *value)
    encoded = image_cell(_only_image(value) if isinstance(value, list) else value)
    if isinstance(encoded, bytes):
        return encoded
    encoded = encoded.strip()
    if encoded.startswith("data:"):
        return _decoded(encoded.partition(",")[2])
    if encoded.startswith(_BEGINNINGS) or len(encoded) > LONGEST_NAME:
        packed = "".join(encoded.split())
        if _BASE64.fullmatch(packed) and (len(encoded) > 255 or len(packed) % 4 == 0):
            return _decoded(packed)
    return _stored(store, encoded.removeprefix("file://"))


def _only_image(value: list[Any]) -> Any:
    names = {item.partition("###")[0] if isinstance(item, str) else repr(item) for item in value}
    if len(names) != 1:
        raise BadCell("image", f"are several, a question has one: {len(names)}")
    return value[0].partition("###")[0] if isinstance(value[0], str) else value[0]


def _stored(store: ImageStore, *names: str) -> bytes:
    for name in names[:-1]:
        with suppress(ImageNotFound):
            return store(name)
    try:
        return store(names[-1])
    except ImageNotFound as error:
        raise BadCell("image", f"{error!s:.400}") from error


def _decoded(text: str) -> bytes:
    packed = "".join(text.split())
    with element("image", "is no base64"):
        return base64.b64decode(packed + "=" * (-len(packed) % 4), validate=True)


# --- boxes -----------------------------------------------------------------------------------------------------------


def _clipped_box(conventions: Conventions, clipped: list[bool], numbers: Any, width: int, height: int) -> Box:
    """Round a box outwards and cut it to its image; add to ``clipped`` whether more than the rounding was cut off."""
    x1, y1, x2, y2 = map(float, four_numbers(numbers))
    if conventions.corners is BoxCorners.XYWH:
        x2, y2 = x1 + x2, y1 + y2
    if conventions.boxes is not BoxUnit.PIXELS:
        scale = 1 if conventions.boxes is BoxUnit.SHARES else 1000
        x1, y1, x2, y2 = x1 * width / scale, y1 * height / scale, x2 * width / scale, y2 * height / scale
    if not (x1 < x2 and y1 < y2 and x1 < width and y1 < height and x2 > 0 and y2 > 0):
        raise BadCell("boxes", f"is empty or outside of the image: {shorten(numbers)} in {width} x {height}")
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
    except Exception:  # a question needs no boxes: no such file, no JSON, nested without end
        return cells
    return {**cells, "bbox": beside.get("bbox")} if isinstance(beside, dict) else cells


_ASKS_FOR_BOX = "Please provide the bounding box coordinate of the region"
_FOLDERS = {"visual7w": "v7w"}
"""Visual-CoT's data sets whose folder has another name."""


def _viscot(cells: Cells, store: ImageStore) -> Cells:
    """Visual-CoT: bare names lie in the folder of their data set; LLaVA-style rows have question, box and answer as a
    conversation, the box in pixels behind the second mention of the image, ``name.jpg###[x1, y1, x2, y2]``."""
    given = cells.get("image")
    mentions = given if isinstance(given, list) else [given] if isinstance(given, str) else []
    if mentions and all(isinstance(name, str) for name in mentions):
        name, dataset = str(mentions[0]).partition("###")[0].removeprefix("cot/"), str(cells.get("dataset"))
        folders = (dataset, _FOLDERS.get(dataset, dataset)) if "/" not in name else ()
        cells = {**cells, "image": Names((*(f"{folder}/{name}" for folder in folders), name))}
    talk = cells.get("conversations")
    if not isinstance(talk, list) or not all(isinstance(turn, Mapping) for turn in talk) or len(talk) < 2:
        return cells
    question = str(talk[0].get("value", "")).partition(_ASKS_FOR_BOX)[0].rstrip()
    boxes = [name.partition("###")[2] for name in mentions if isinstance(name, str) and "###" in name]
    parsed = [numbers for one in boxes for numbers in list_of_boxes(one)]
    return {**cells, "question": question, "answer": talk[-1].get("value"), "bboxs": parsed}


_BOXES = ("bboxs", "bboxes", "boxes", "bbox", "target_instances", "gt_bboxes", "objects.bbox")
_ANY: dict[str, Sequence[str]] = {
    "id": ("id", "question_id", "Question_id", "index", "sample_id", "qid", "extra_info.index"),
    "image": ("image", "images", "Image", "image_path", "img_path", "file_name"),
    "text": ("text", "question", "Text", "problem", "query", "extra_info.question", "conversation.question", "prompt"),
    "options": ("options", "choices", "Answer choices", "multi-choice options"),
    "answer": (
        "answer",
        "label",
        "Ground truth",
        "solution",
        "possible_answers",
        "reward_model.ground_truth",
        "extra_info.answer",
        "ground_truth",
        "response",
        "conversation.answer",
    ),
    "boxes": _BOXES,
    "source": ("source", "dataset", "data_source", "category", "Category"),
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
        rewrite=_viscot,
    ),
    "treevgr": DatasetFormat(
        "TreeVGR's and TreeBench's kind: JSONL, TSV or Parquet whose rows know the boxes of their targets, in pixels",
        "https://github.com/Haochen-Wang409/TreeVGR",
        {**_ANY, "text": ("problem", "question", "query"), "boxes": ("target_instances", *_BOXES)},
    ),
    "any": DatasetFormat(
        "JSONL, JSON, CSV, TSV or Parquet with common column names (--map for others), also verl's, LLaVA's, "
        "ShareGPT's and ms-swift's",
        "", _ANY,
    ),
}  # fmt: skip
