"""Parquet questions: checked, shuffled, sharded, streamed row group by row group, resumable by a cursor.

Columns: ``id`` (text or whole number), ``image`` (encoded bytes, a path, or Hugging Face's struct of both), ``text``,
``options`` (list of texts, empty or null for an open question), ``answer``; optional: ``boxes`` (list of
``[x1, y1, x2, y2]`` in original pixels) and ``source``.
"""

from __future__ import annotations

import logging
import math
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ergo_rl.episodes import images
from ergo_rl.episodes.config import OnBadRow, QuestionsConfig
from ergo_rl.episodes.families import FAMILIES, ModelFamily
from ergo_rl.episodes.types import Box, Question

logger = logging.getLogger(__name__)

SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "image": pa.binary(),
        "text": pa.string(),
        "options": pa.list_(pa.string()),
        "answer": pa.string(),
        "boxes": pa.list_(pa.list_(pa.int32())),
        "source": pa.string(),
    }
)
"""What we write; what we read may be wider."""
_REQUIRED = ("id", "image", "text", "options", "answer")
_WARNINGS = 10
"""Bad rows that are logged one by one; later ones are only counted."""
_SHOWN = 200
"""Characters of a value that a message shows."""


class DatasetError(ValueError):
    """The data set cannot be read; the message names the file and what is wrong with it."""


class BadRow(DatasetError):
    """A row that is no question; the message names the file, the row, its id and the column."""


class _BadCell(Exception):
    def __init__(self, column: str, reason: str) -> None:
        self.column, self.reason = column, reason
        super().__init__(reason)


@dataclass(frozen=True, slots=True)
class Cursor:
    """Where a stream stands: ``position`` rows of an epoch are behind it, bad ones and other shards' included."""

    epoch: int = 0
    position: int = 0


@dataclass(frozen=True, slots=True)
class _RowGroup:
    file: pq.ParquetFile
    path: Path
    index: int
    first_row: int
    rows: int


class QuestionStream(Iterator[Question]):
    """Endless: epoch after epoch, each a permutation of the rows. Shard ``rank`` of ``world`` gets every ``world``-th
    row of the same order, so shards never overlap and together are everything.

    ``skipped`` counts bad rows by column; ``reasons`` holds the last of their messages.

    Where no ``family`` is given, the special tokens of every known family are refused in texts.
    Raises DatasetError (no files, no such file, not Parquet, no rows, a missing column); while iterating BadRow (with
    ``on_bad_row: error``) and DatasetError when a whole epoch had no usable row."""

    def __init__(
        self, config: QuestionsConfig, family: ModelFamily | None = None, rank: int = 0, world: int = 1
    ) -> None:
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} of {world} shards")
        if not config.paths:
            raise DatasetError("questions.paths is empty; name at least one Parquet file")
        self.config, self.rank, self.world = config, rank, world
        self._families = [family] if family else [known() for known in FAMILIES.values()]
        self.skipped: Counter[str] = Counter()
        self.reasons: deque[str] = deque(maxlen=20)
        self._groups = [group for path in config.paths for group in _open(Path(path))]
        self._rows = sum(group.rows for group in self._groups)
        self.restore(Cursor())

    def __len__(self) -> int:
        """Rows of one epoch, all shards and bad rows included."""
        return self._rows

    @property
    def cursor(self) -> Cursor:
        """Save it; ``restore`` then goes on with exactly the question that would have come next."""
        return Cursor(self._epoch, self._position)

    def restore(self, cursor: Cursor) -> None:
        if cursor.epoch < 0 or not 0 <= cursor.position <= self._rows:
            raise ValueError(f"{cursor} does not fit {self._rows} rows; was it saved with other files?")
        self._epoch, self._position = cursor.epoch, cursor.position
        self._usable = cursor.position > 0  # of the part behind a restored cursor nothing is known
        self._walk = self._rows_from(cursor)

    def __next__(self) -> Question:
        while True:
            try:
                self._position, group, table, row = next(self._walk)
            except StopIteration:
                self._next_epoch()
                continue
            try:
                question = self._read(group, table, row)
            except _BadCell as bad:
                self._skip(bad, f"{group.path}, row {group.first_row + row} (id {_identity(table, row)})")
                continue
            self._usable = True
            return question

    def take(self, count: int) -> list[Question]:
        return [next(self) for _ in range(count)]

    def _next_epoch(self) -> None:
        if not self._usable:
            raise DatasetError(
                f"no usable row for shard {self.rank} of {self.world} in {', '.join(self.config.paths)}; "
                f"{self.skipped.total()} bad rows, the last: {self.reasons[-1] if self.reasons else 'none'}"
            )
        self.restore(Cursor(self._epoch + 1))

    def _rows_from(self, cursor: Cursor) -> Iterator[tuple[int, _RowGroup, pa.Table, int]]:
        """(position behind the row, its group, the group's table, row in the table), of this shard."""
        position = 0
        for number in self._order(len(self._groups), cursor.epoch):
            group = self._groups[number]
            if position + group.rows <= cursor.position:
                position += group.rows
                continue
            table = _table(group)
            for row in self._order(group.rows, cursor.epoch, number):
                mine = position % self.world == self.rank
                position += 1
                if mine and position > cursor.position:
                    yield position, group, table, int(row)

    def _order(self, count: int, *stream: int) -> Sequence[int]:
        if not self.config.shuffle:
            return range(count)
        order: list[int] = np.random.default_rng([self.config.seed, len(stream), *stream]).permutation(count).tolist()
        return order

    def _read(self, group: _RowGroup, table: pa.Table, row: int) -> Question:
        cells = {name: _cell(table, name, row) for name in table.column_names}
        root = Path(self.config.image_root) if self.config.image_root else group.path.parent
        identity = cells["id"]
        if isinstance(identity, int) and not isinstance(identity, bool):
            identity = str(identity)
        image = _image(cells["image"], root)
        size = _size(image, self.config.max_image_pixels)
        return Question(
            id=_text("id", identity),
            image=image,
            text=self._words("text", cells["text"]),
            answer=self._words("answer", cells["answer"]),
            options=tuple(self._words("options", option) for option in _items("options", cells["options"])),
            boxes=tuple(_box(corners, *size) for corners in _items("boxes", cells.get("boxes"))),
            source=_text("source", cells.get("source") or "", empty=True),
        )

    def _words(self, column: str, value: object) -> str:
        words = _text(column, value)
        for family in self._families:
            if (token := family.reserved_text(words)) is not None:
                raise _BadCell(column, f"contains the special token {token}")
        return words

    def _skip(self, bad: _BadCell, where: str) -> None:
        message = f"{where}, column {bad.column!r}: {bad.reason}"
        if self.config.on_bad_row is OnBadRow.ERROR:
            raise BadRow(message) from bad
        self.skipped[bad.column] += 1
        self.reasons.append(message)
        count = self.skipped.total()
        if count <= _WARNINGS:
            logger.warning(
                "bad row skipped: %s%s", message, "; further ones are only counted" if count == _WARNINGS else ""
            )


def write_questions(
    path: Path, questions: Iterator[Question], rows_per_group: int = 64, group_bytes: int = 64 << 20
) -> int:
    """Write a Parquet file that ``QuestionStream`` reads; returns the number of rows. Images must be bytes.

    A row group, which is read as a whole, ends after ``rows_per_group`` rows or ``group_bytes`` of images."""
    count = 0
    with pq.ParquetWriter(path, SCHEMA) as writer:
        for batch in _grouped(questions, rows_per_group, group_bytes):
            writer.write_table(pa.Table.from_pylist([_row(question) for question in batch], SCHEMA))
            count += len(batch)
    return count


def _grouped(questions: Iterator[Question], rows: int, size: int) -> Iterator[list[Question]]:
    batch: list[Question] = []
    held = 0
    for question in questions:
        batch.append(question)
        held += len(question.image) if isinstance(question.image, bytes) else 0
        if len(batch) == rows or held >= size:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def _row(question: Question) -> dict[str, Any]:
    boxes = [[box.x1, box.y1, box.x2, box.y2] for box in question.boxes]
    cells = {name: getattr(question, name) for name in ("id", "image", "text", "answer", "source")}
    return {**cells, "options": list(question.options), "boxes": boxes}


def _open(path: Path) -> list[_RowGroup]:
    if not path.is_file():
        raise DatasetError(f"there is no file {path}")
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(f"{path} is not a Parquet file, or damaged: {error}") from error
    names = file.schema_arrow.names
    if missing := [name for name in _REQUIRED if name not in names]:
        raise DatasetError(f"{path} has no column {', '.join(map(repr, missing))}; its columns are {', '.join(names)}")
    if not file.metadata.num_rows:
        raise DatasetError(f"{path} has no rows")
    groups: list[_RowGroup] = []
    first = 0
    for index in range(file.metadata.num_row_groups):
        rows = file.metadata.row_group(index).num_rows
        groups.append(_RowGroup(file, path, index, first, rows))
        first += rows
    return groups


def _table(group: _RowGroup) -> pa.Table:
    try:
        table = group.file.read_row_group(group.index, columns=_columns(group.file))
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(f"{group.path} is damaged, its row group {group.index} cannot be read: {error}") from error
    if table.num_rows != group.rows:
        raise DatasetError(
            f"{group.path} is damaged: its row group {group.index} has {table.num_rows} rows, not {group.rows}"
        )
    return table


def _cell(table: pa.Table, name: str, row: int) -> Any:
    try:
        return table.column(name)[row].as_py()
    except (pa.ArrowException, ValueError, OverflowError) as error:  # text that is not UTF-8, a day in the year 10^11
        raise _BadCell(name, f"cannot be read: {error}") from error


def _identity(table: pa.Table, row: int) -> str:
    """For messages."""
    try:
        return _short(_cell(table, "id", row))
    except _BadCell:
        return "unreadable"


def _short(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."


def _columns(file: pq.ParquetFile) -> list[str]:
    return [name for name in (*_REQUIRED, "boxes", "source") if name in file.schema_arrow.names]


def _text(column: str, value: object, empty: bool = False) -> str:
    if not isinstance(value, str):
        raise _BadCell(column, "is null" if value is None else f"should be text, is {type(value).__name__}")
    if not empty and not value.strip():
        raise _BadCell(column, "is empty")
    return value


def _items(column: str, value: object) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise _BadCell(column, f"should be a list, is {type(value).__name__}")
    return value


def _image(value: object, root: Path) -> bytes | Path:
    if isinstance(value, dict):  # Hugging Face datasets: {"bytes": ..., "path": ...}
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes) and value:
        return value
    if not isinstance(value, str) or not value:
        raise _BadCell("image", f"should be bytes or a path, is {'empty' if not value else type(value).__name__}")
    home = root.resolve()
    try:
        path = (home / value).resolve()
        inside, there = path.is_relative_to(home), path.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # too long, a null character, links in a circle
        raise _BadCell("image", f"the path {_short(value)} cannot be followed: {error}"[: 2 * _SHOWN]) from error
    if not inside:
        raise _BadCell("image", f"the path {_short(value)} leaves {root}")
    if not there:
        raise _BadCell("image", f"no file {_short(str(path))}")
    return path


def _size(image: bytes | Path, max_pixels: int) -> tuple[int, int]:
    try:
        return images.size(image, max_pixels)
    except images.UnreadableImage as error:
        raise _BadCell("image", str(error)) from error


def _box(corners: object, width: int, height: int) -> Box:
    """Fractions are rounded outwards."""
    if not isinstance(corners, list) or len(corners) != 4 or not all(_finite(corner) for corner in corners):
        raise _BadCell("boxes", f"should be four finite numbers, is {_short(corners)}")
    x1, y1, x2, y2 = math.floor(corners[0]), math.floor(corners[1]), math.ceil(corners[2]), math.ceil(corners[3])
    if not (0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height):
        raise _BadCell("boxes", f"{corners} is empty or leaves the image of {width} x {height}")
    return Box(x1, y1, x2, y2)


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
