"""Parquet questions: checked, shuffled, streamed row group by row group, resumable by a cursor.

Columns: ``id`` (text or whole number), ``image`` (encoded bytes, a path, or Hugging Face's struct of both), ``text``,
``options`` (list of texts, empty or null for an open question), ``answer``; optional: ``boxes`` (list of
``[x1, y1, x2, y2]`` in original pixels) and ``source``.
"""

from __future__ import annotations

import fcntl
import glob
import logging
import os
import re
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ergo_rl.episodes.config import OnBadRow, QuestionsConfig
from ergo_rl.episodes.types import Question
from ergo_rl.errors import ErgoError, first_line
from ergo_rl.questions.rows import BadCell, Cells, element, image_cell, path_below, read_question, shorten

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
LARGE_GROUP, PART = 256 << 20, 64 << 20
"""Bytes: a row group larger than the one is read in parts of about the other. Published files hold all they have in one
row group of some gigabytes; above 2 GB a column of images cannot be read in one piece at all."""
_SHARING = 4
"""So many times the bytes of its images a row group may be in memory, where rows share them (HR-Bench: four rows)."""
READ_BUFFER = 1 << 20
"""Bytes of a file that are read ahead; without it Parquet reads a whole column of a row group at once."""
_PLACE = re.compile(r"(\d+)/([^/]+)/\d+(?:: |\Z)")
"""How ids begin that rows got because several had the same one: number and name of the file."""


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
    """A row group, or a part of a large one."""

    file: pq.ParquetFile
    path: Path
    index: int
    first_row: int
    """In the file."""
    rows: int
    before: int = 0
    """Rows of the same row group before this part."""
    number: int = 0
    """Of the file among those of the stream."""

    def place(self, row: int) -> str:
        """Where a row of this group is: no other row of the stream has that."""
        return f"{self.number}/{self.path.name}/{self.first_row + row}"


class QuestionStream(Iterator[Question]):
    """Endless questions: epoch after epoch, each a permutation of the rows.

    A path may be a file, a pattern (``data/*.parquet``) or a folder. Rows whose id is met twice, in one file or in
    several, get ids ``FILE NUMBER/NAME/ROW: ID``. A row group above 256 MB is read, and its rows are shuffled, in parts
    of about 64 MB. ``skipped`` counts bad rows by column (``row group``: what cannot be read as a whole); ``reasons``
    holds the last of their messages.

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
        paths = expand_paths([Path(path) for path in config.paths], (".parquet",))
        self._groups = [group for number, path in enumerate(paths, 1) for group in _open(path, number)]
        self._rows = sum(group.rows for group in self._groups)
        met = Counter(identity for _, identity in _ids(self._groups) if identity)
        self._shared = frozenset(identity for identity, times in met.items() if times > 1)
        if self._shared:
            logger.warning(
                "%d ids stand for several rows each: these are told apart by file and row", len(self._shared)
            )
        self.restore(Cursor())

    def __len__(self) -> int:
        """Rows of one epoch, bad ones included."""
        return self._rows

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The ids of all rows in the order of the files, no two the same; a row without a readable one has its place
        alone."""
        return tuple(self._name(place, identity) for place, identity in _ids(self._groups))

    def rows(self) -> Iterator[Question | BadRow]:
        """Yield every row once in the order of the files, whatever the cursor, and why where it is no question."""
        for group in self._groups:
            table = _table(group)
            for row in range(group.rows):
                try:
                    yield self._read(group, table, row)
                except BadCell as bad:
                    yield BadRow(_message(bad, group, table, row))

    def has_boxes(self) -> bool:
        """Whether a row says where its target is; one that cannot be read does not."""
        whole = (group for group in self._groups if not group.before and "boxes" in _columns(group.file))
        return any(cell for group in whole for cell in _column_of(group, "boxes"))

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
                self._skip(bad, _message(bad, group, table, row))
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

    def _rows_from(self, cursor: Cursor) -> Iterator[tuple[int, _RowGroup, pa.Table | BadCell, int]]:
        """Yield (position behind the row, its group, the group's table or why there is none, row in the table)."""
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

    def _read(self, group: _RowGroup, table: pa.Table | BadCell, row: int) -> Question:
        if isinstance(table, BadCell):
            raise table
        with element("row"):
            cells: Cells = {name: _cell(table, name, row) for name in table.column_names}
            root = Path(self.config.image_root) if self.config.image_root else group.path.parent
            question = read_question(cells, partial(_image_below, root), max_pixels=self.config.max_image_pixels)
        return replace(question, id=self._name(group.place(row), question.id))

    def _name(self, place: str, identity: str) -> str:
        """The id of a row; one that several rows have, or that looks like a place, gets its place in front."""
        if not identity:
            return place
        like = _PLACE.match(identity)
        as_ours = like and any(like.groups() == (str(group.number), group.path.name) for group in self._groups)
        return f"{place}: {identity}" if identity in self._shared or as_ours else identity

    def _skip(self, bad: BadCell, message: str) -> None:
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
    path: Path,
    questions: Iterator[Question],
    rows_per_group: int = 64,
    group_bytes: int = 64 << 20,
    metadata: Callable[[], Mapping[str, str]] = dict,
) -> int:
    """Write a Parquet file that ``QuestionStream`` reads; return the number of rows. Images must be bytes.

    A row group, which is read as a whole, ends after ``rows_per_group`` rows or ``group_bytes`` of images. An image
    that several rows of a group share is stored once. ``metadata`` is asked when all rows are written."""
    count = 0
    with pq.ParquetWriter(path, SCHEMA, dictionary_pagesize_limit=_SHARING * group_bytes) as writer:
        for batch in _grouped(questions, rows_per_group, group_bytes):
            writer.write_table(pa.Table.from_pylist([_row(question) for question in batch], SCHEMA))
            count += len(batch)
        writer.add_key_value_metadata(dict(metadata()))
    return count


@contextmanager
def written_aside(out: Path) -> Iterator[Path]:
    """Give the name that ``out`` is written under, to be renamed when it is whole. One process at a time has it, others
    wait. It is gone afterwards; one that a killed process left is written over."""
    aside = out.with_name(f".{out.name}.writing")

    def is_mine(file: IO[bytes]) -> bool:
        return aside.exists() and os.path.samestat(os.fstat(file.fileno()), aside.stat())

    while True:
        with aside.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not is_mine(file):  # whoever had it renamed or removed it
                continue
            try:
                yield aside
            finally:
                if is_mine(file):
                    aside.unlink()
            return


def _grouped(questions: Iterator[Question], rows: int, size: int) -> Iterator[list[Question]]:
    batch: list[Question] = []
    stored = held = 0  # bytes of images, once and as often as rows have them
    for question in questions:
        shared = bool(batch) and batch[-1].image == question.image
        batch.append(question)
        length = len(question.image) if isinstance(question.image, bytes) else 0
        stored, held = stored + (0 if shared else length), held + length
        if len(batch) == rows or stored >= size or held >= _SHARING * size:
            yield batch
            batch, stored, held = [], 0, 0
    if batch:
        yield batch


def _row(question: Question) -> dict[str, Any]:
    boxes = [[box.x1, box.y1, box.x2, box.y2] for box in question.boxes]
    cells = {name: getattr(question, name) for name in ("id", "image", "text", "answer", "source")}
    return {**cells, "options": list(question.options), "boxes": boxes}


def expand_paths(paths: Sequence[Path], suffixes: Sequence[str]) -> list[Path]:
    """Return the files that paths, patterns (``data/*.parquet``) and folders name, in order.

    Of a folder these are the files with the first of ``suffixes`` that any has, directly in it or in its folder
    ``data``. Raises DatasetError where there is none."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            found += _files_in(path, suffixes)
        elif glob.has_magic(str(path)) and not path.exists():
            matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
            if not matches:
                raise DatasetError(f"there is no file {path}")
            found += matches
        else:
            found.append(path)
    return found


def _files_in(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    for place in (folder, folder / "data"):
        names = sorted(one for one in place.glob("*") if one.is_file() and not one.name.startswith("."))
        for suffix in suffixes:
            if files := [one for one in names if one.suffix.lower() == suffix and not one.match("*.report.json")]:
                return files
    raise DatasetError(f"there is no {' or '.join(suffixes)} file in the folder {folder} or in {folder / 'data'}")


def _open(path: Path, number: int = 0) -> list[_RowGroup]:
    if not path.is_file():
        raise DatasetError(f"there is no file {path}")
    try:
        file = pq.ParquetFile(path, buffer_size=READ_BUFFER, pre_buffer=False)
        names = file.schema_arrow.names
        sizes = [file.metadata.row_group(index) for index in range(file.metadata.num_row_groups)]
        large = [(group.num_rows, group.total_byte_size > LARGE_GROUP, group.total_byte_size) for group in sizes]
    except Exception as error:
        raise DatasetError(f"{path} is not a Parquet file, or damaged: {first_line(error)}") from error
    if missing := [name for name in _REQUIRED if name not in names]:
        raise DatasetError(f"{path} has no column {', '.join(map(repr, missing))}; its columns are {', '.join(names)}")
    if twice := [name for name in _columns(file) if names.count(name) > 1]:
        raise DatasetError(f"{path} has several columns {', '.join(map(repr, twice))}; rename or remove all but one")
    if not file.metadata.num_rows:
        raise DatasetError(f"{path} has no rows")
    groups: list[_RowGroup] = []
    first = 0
    for index, (rows, is_large, size) in enumerate(large):
        step = max(1, rows * PART // size) if is_large else max(1, rows)
        for before in range(0, rows, step):
            part = min(step, rows - before)
            groups.append(_RowGroup(file, path, index, first + before, part, before, number))
        first += rows
    return groups


def _ids(groups: Sequence[_RowGroup]) -> Iterator[tuple[str, str]]:
    """Yield the place and the id of every row; an empty one where there is none, or none that can be read: the row says
    so when it is its turn."""
    for group in (group for group in groups if not group.before):
        cells = _column_of(group, "id")
        for row in range(group.file.metadata.row_group(group.index).num_rows):
            identity = next(cells, None)
            known = isinstance(identity, str | int) and not isinstance(identity, bool) and str(identity).strip()
            yield group.place(row), str(identity) if known else ""


def _column_of(group: _RowGroup, column: str) -> Iterator[Any]:
    """Yield the cells of a column of the whole row group, None for one that cannot be read; fewer where it is
    damaged."""
    try:
        for batch in group.file.iter_batches(batch_size=1 << 16, row_groups=[group.index], columns=[column]):
            yield from _values(batch.column(0))
    except Exception as error:
        logger.warning("%s: the column %s of row group %d is damaged: %s", group.path, column, group.index, error)


def _values(cells: pa.Array) -> Iterator[Any]:
    try:
        yield from cells.to_pylist()
    except Exception:  # one that is no UTF-8 among them
        yield from map(_value, cells)


def _value(cell: pa.Scalar) -> Any:
    try:
        return cell.as_py()
    except Exception:
        return None


def _table(group: _RowGroup) -> pa.Table | BadCell:
    """Read a row group, or a part of one; the BadCell of all its rows where that fails."""
    try:
        with element("row group", f"is damaged: {group.index} of {group.path}"):
            whole = group.rows == group.file.metadata.row_group(group.index).num_rows
            table = group.file.read_row_group(group.index, columns=_columns(group.file)) if whole else _part(group)
            if table.num_rows != group.rows:
                raise BadCell("row group", f"is damaged: it has {table.num_rows} rows, not {group.rows}")
            return table
    except BadCell as bad:
        return bad


def _part(group: _RowGroup) -> pa.Table:
    """Read a part of a row group batch by batch, and no more of the group's rows at once."""
    pa.default_memory_pool().release_unused()  # of the part before: a page of a published file may have some 100 MB
    found, at, end = [], 0, group.before + group.rows
    batches = group.file.iter_batches(group.rows, row_groups=[group.index], columns=_columns(group.file))
    for batch in batches:
        start, stop = max(group.before - at, 0), min(end - at, batch.num_rows)
        if start < stop:
            found.append(batch.slice(start, stop - start))
        at += batch.num_rows
        if at >= end:
            break
    return pa.Table.from_batches(found)


def _cell(table: pa.Table, name: str, row: int) -> Any:
    with element(name):  # text that is not UTF-8, a day in the year 10^11
        return table.column(name)[row].as_py()


def _message(bad: BadCell, group: _RowGroup, table: pa.Table | BadCell, row: int) -> str:
    where = f"{group.path}, row {group.first_row + row} (id {_identity(table, row)})"
    return f"{where}, column {bad.column!r}: {bad.reason}"


def _identity(table: pa.Table | BadCell, row: int) -> str:
    """The row's id as messages show it."""
    try:
        return "unreadable" if isinstance(table, BadCell) else shorten(_cell(table, "id", row))
    except BadCell:
        return "unreadable"


def _columns(file: pq.ParquetFile) -> list[str]:
    return [name for name in (*_REQUIRED, "boxes", "source") if name in file.schema_arrow.names]


def _image_below(root: Path, value: object) -> bytes | Path:
    """The bytes of an image, or its path inside of the folder ``root``."""
    name = image_cell(value)
    if isinstance(name, bytes):
        return name
    path = path_below(root, name)
    if not path.is_file():
        raise BadCell("image", f"no file {shorten(str(path))}")
    return path
