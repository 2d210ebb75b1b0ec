"""Parquet questions: checked, shuffled, streamed row group by row group, resumable by a cursor.

Columns: ``id`` (text or whole number), ``image`` (encoded bytes, a path, or Hugging Face's struct of both), ``text``,
``options`` (list of texts, empty or null for an open question), ``answer``; optional: ``boxes`` (list of
``[x1, y1, x2, y2]`` in original pixels) and ``source``.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ergo_rl.episodes.config import OnBadRow, QuestionsConfig
from ergo_rl.episodes.types import Question
from ergo_rl.errors import ErgoError
from ergo_rl.questions.rows import BadCell, Cells, image_cell, read_question, shorten

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
"""What is written; what is read may have other types and further columns."""
_REQUIRED = ("id", "image", "text", "options", "answer")
_WARNINGS = 10
"""Bad rows that are logged one by one; later ones are only counted."""


class DatasetError(ErgoError, ValueError):
    """The data set cannot be read; the message names the file and what is wrong with it."""


class BadRow(DatasetError):
    """A row that is no question; the message names the file, the row, its id and the column."""


@dataclass(frozen=True, slots=True)
class Cursor:
    """Where a stream stands."""

    epoch: int = 0
    position: int = 0
    """Rows of this epoch that were read, bad ones included."""


@dataclass(frozen=True, slots=True)
class _RowGroup:
    file: pq.ParquetFile
    path: Path
    index: int
    first_row: int
    rows: int


class QuestionStream(Iterator[Question]):
    """Endless questions: epoch after epoch, each a permutation of the rows.

    ``skipped`` counts bad rows by column; ``reasons`` holds the last of their messages.

    Raises DatasetError (no files, no such file, not Parquet, no rows, a missing column); while iterating BadRow (with
    ``on_bad_row: error``) and DatasetError when a whole epoch had no usable row.

    Example::

        stream = QuestionStream(QuestionsConfig(["data/panels/train.parquet"]))
        batch = list(islice(stream, 64))
        saved = stream.cursor  # a new stream continues behind the batch after stream.restore(saved)
    """

    def __init__(self, config: QuestionsConfig) -> None:
        if not config.paths:
            raise DatasetError("questions.paths is empty; name at least one Parquet file")
        self.config = config
        self.skipped: Counter[str] = Counter()
        self.reasons: deque[str] = deque(maxlen=20)
        self._groups = [group for path in config.paths for group in _open(Path(path))]
        self._rows = sum(group.rows for group in self._groups)
        self.restore(Cursor())

    def __len__(self) -> int:
        """Rows of one epoch, bad ones included."""
        return self._rows

    @property
    def cursor(self) -> Cursor:
        """Save it: ``restore`` continues with exactly the question that would have come next."""
        return Cursor(self._epoch, self._position)

    def restore(self, cursor: Cursor) -> None:
        """Continue from a cursor of a stream of the same configuration. Raises ValueError for one of other files."""
        if cursor.epoch < 0 or not 0 <= cursor.position <= self._rows:
            raise ValueError(f"{cursor} does not fit {self._rows} rows; was it saved with other files?")
        self._epoch, self._position = cursor.epoch, cursor.position
        # Whether an earlier row of a half-read epoch was usable is not known; assume so, or a good data set could be
        # refused. The next epoch decides.
        self._usable = cursor.position > 0
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
            except BadCell as bad:
                self._skip(bad, f"{group.path}, row {group.first_row + row} (id {_identity(table, row)})")
                continue
            self._usable = True
            return question

    def _next_epoch(self) -> None:
        if not self._usable:
            raise DatasetError(
                f"no usable row in {', '.join(self.config.paths)}; "
                f"{self.skipped.total()} bad rows, the last: {self.reasons[-1] if self.reasons else 'none'}"
            )
        self.restore(Cursor(self._epoch + 1))

    def _rows_from(self, cursor: Cursor) -> Iterator[tuple[int, _RowGroup, pa.Table, int]]:
        """Yield (position behind the row, its group, the group's table, row in the table)."""
        position = 0
        for number in self._order(len(self._groups), cursor.epoch):
            group = self._groups[number]
            if position + group.rows <= cursor.position:
                position += group.rows
                continue
            table = _table(group)
            for row in self._order(group.rows, cursor.epoch, number):
                position += 1
                if position > cursor.position:
                    yield position, group, table, int(row)

    def _order(self, count: int, *stream: int) -> Sequence[int]:
        if not self.config.shuffle:
            return range(count)
        order: list[int] = np.random.default_rng([self.config.seed, len(stream), *stream]).permutation(count).tolist()
        return order

    def _read(self, group: _RowGroup, table: pa.Table, row: int) -> Question:
        cells: Cells = {name: _cell(table, name, row) for name in table.column_names}
        root = Path(self.config.image_root) if self.config.image_root else group.path.parent
        return read_question(cells, partial(_image_below, root), max_pixels=self.config.max_image_pixels)

    def _skip(self, bad: BadCell, where: str) -> None:
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
    """Write a Parquet file that ``QuestionStream`` reads; return the number of rows. Images must be bytes.

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
        raise BadCell(name, f"cannot be read: {error}") from error


def _identity(table: pa.Table, row: int) -> str:
    """The row's id as messages show it."""
    try:
        return shorten(_cell(table, "id", row))
    except BadCell:
        return "unreadable"


def _columns(file: pq.ParquetFile) -> list[str]:
    return [name for name in (*_REQUIRED, "boxes", "source") if name in file.schema_arrow.names]


def _image_below(root: Path, value: object) -> bytes | Path:
    """The bytes of an image, or its path inside of the folder ``root``."""
    name = image_cell(value)
    if isinstance(name, bytes):
        return name
    home = root.resolve()
    try:
        path = (home / name).resolve()
        inside, there = path.is_relative_to(home), path.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # too long, a null character, links in a circle
        raise BadCell("image", f"the path {shorten(name)} cannot be followed: {error!s:.400}") from error
    if not inside:
        raise BadCell("image", f"the path {shorten(name)} leaves {root}")
    if not there:
        raise BadCell("image", f"no file {shorten(str(path))}")
    return path
