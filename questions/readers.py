"""The rows of published data sets: JSONL, JSON, TSV, CSV, Parquet.

Rows are read one at a time, so that memory does not grow with the file; a row that cannot be read is a ``Broken``
record, not the end of the file.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ergo_rl.errors import first_line
from ergo_rl.questions.dataset import READ_BUFFER, DatasetError
from ergo_rl.questions.rows import Unreadable

CHUNK = 1 << 20
"""Characters of a JSON file that are read at once."""
PARQUET_BATCH = 8
"""Rows of a Parquet file that are in memory at once: one may hold an image of 20 MB."""
LONGEST_ROW = 256 << 20
"""Bytes of a line and characters of an object: what is longer is no row."""
MOST_LINES, MOST_BYTES = 256, 64 << 20
"""Of one row of a table behind its first line: a quote that nothing closes does not swallow the rest of the file."""


@dataclass(frozen=True, slots=True)
class Record:
    """A row that could be read."""

    number: int
    """Of the row in its file, from 1."""
    cells: dict[str, Any]
    done: float
    """Share of the file that is read, 0 to 1."""


@dataclass(frozen=True, slots=True)
class Broken:
    """A row that could not be read, and why."""

    number: int
    reason: str
    done: float


ROW_FILES = (".parquet", ".jsonl", ".tsv", ".csv", ".json")
"""Endings of files with rows; of a folder the first kind that it has is read (a ``.json`` may be anything)."""


def read_records(path: Path, leave_out: Sequence[str] = ()) -> Iterator[Record | Broken]:
    """Read all rows of ``path``, whose suffix says what it is; of a Parquet file without the columns ``leave_out``.

    Raises DatasetError for a file that is not there, is of another kind, or has no rows at all that could be read."""
    if not path.is_file():
        raise DatasetError(f"there is no file {path}")
    suffix = path.suffix.lower()
    readers: dict[str, Callable[[Path], Iterator[Record | Broken]]] = {
        ".jsonl": _jsonl, ".json": _json, ".tsv": _table, ".csv": _table,
        ".parquet": lambda path: _parquet(path, leave_out),
    }  # fmt: skip
    if suffix not in readers:
        raise DatasetError(f"{path}: its rows can be read from {', '.join(readers)} files only")
    return readers[suffix](path)


def _jsonl(path: Path) -> Iterator[Record | Broken]:
    size, behind, number = max(1, path.stat().st_size), 0, 0
    with path.open("rb") as file:
        while line := file.readline(LONGEST_ROW):
            number, behind = number + 1, behind + len(line)
            if len(line) == LONGEST_ROW:
                while (rest := file.readline(LONGEST_ROW)) and not rest.endswith(b"\n"):
                    behind += len(rest)
                yield Broken(number, f"is too long: more than {LONGEST_ROW} bytes", min(1.0, behind / size))
                continue
            if not line.strip():
                continue
            try:
                yield _record(number, json.loads(line.decode("utf-8-sig")), behind / size)
            except Exception as error:  # also nested without end, a number of 5,000 digits
                yield Broken(number, f"is no JSON: {first_line(error)}", behind / size)


def _json(path: Path) -> Iterator[Record | Broken]:
    """A list of objects, decoded one by one; or JSONL under this name.

    By hand, because ijson refuses what Python's own json writes: NaN, and whole numbers of more than 64 bits."""
    decoder, size = json.JSONDecoder(), max(1, path.stat().st_size)
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:  # what is not UTF-8 costs its row only
        text, number, behind, more = file.read(CHUNK).lstrip(), 0, 0, True
        if text.startswith("{") and _first_line_is_an_object(text):
            yield from _jsonl(path)
            return
        if not text.startswith("["):
            raise DatasetError(f"{path} is no list of objects: it begins with {text[:20]!r}")
        text = text[1:]
        while True:
            text = text.lstrip().removeprefix(",").lstrip()
            if text.startswith("]"):
                return
            found = _value(decoder, text, at_end=not more)
            if found is None and more and len(text) < LONGEST_ROW:
                added = file.read(max(CHUNK, len(text)))  # as much again: an object is decoded log(n) times at most
                more, text = bool(added), text + added
                continue
            if found is None:
                yield Broken(number + 1, f"is not whole: the file breaks off with {text[-40:]!r}", 1.0)
                return
            value, end = found
            number, text, behind = number + 1, text[end:], behind + end
            done = min(1.0, behind / size)
            yield Broken(number, value.reason, done) if isinstance(value, Unreadable) else _record(number, value, done)


def _first_line_is_an_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text.partition("\n")[0]), dict)
    except (ValueError, RecursionError):
        return False


def _value(decoder: json.JSONDecoder, text: str, at_end: bool) -> tuple[Any, int] | None:
    """Return the JSON value that ``text`` begins with, or why it is none, and where it ends; None where more of the
    file is needed to know."""
    try:
        value, end = decoder.raw_decode(text)
    except Exception as error:  # JSONDecodeError, RecursionError, ValueError: a number of 5,000 digits
        closed = _end_of_value(text)
        return None if closed is None else (Unreadable(f"is no JSON: {first_line(error)}"), closed)
    if end == len(text) and not at_end and not isinstance(value, dict | list):  # a number may continue
        return None
    return value, end


_MARK = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[][{},"]', re.DOTALL)


def _end_of_value(text: str) -> int | None:
    """Return where the value ends that ``text`` begins with, by its brackets alone; None where it goes on."""
    depth = 0
    for token in _MARK.finditer(text):
        mark = token[0]
        if mark == '"':  # a string that goes on
            return None
        depth += (mark in "[{") - (mark in "]}")
        if (mark == "," and depth == 0) or (mark == "]" and depth < 0):
            return token.start()
        if mark in "]}" and depth <= 0:
            return token.end()
    return None


# --- tables ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Dialect:
    """How a table separates cells, and whether cells that begin with a quote are quoted."""

    delimiter: str
    quoted: bool


def _table(path: Path) -> Iterator[Record | Broken]:
    """Rows below a line of column names. A short ``image`` cell stands for the image of the row with that ``index``, as
    in the TSV files of VLMEvalKit; only where rows begin is remembered."""
    csv.field_size_limit((1 << 31) - 1)  # an image in base64 is one cell, and csv's limit holds for the whole process
    dialect = _dialect(path)
    size, places, number = max(1, path.stat().st_size), dict[str, int](), 0
    with path.open("rb") as file:
        if (names := _cells_of(file, dialect, None)) is None:
            return
        if isinstance(names, Unreadable):
            raise DatasetError(f"{path}: the line of column names {names.reason}")
        names = [name.removeprefix("\ufeff") for name in names]
        if twice := sorted({name for name in names if name and names.count(name) > 1}):
            raise DatasetError(f"{path} has several columns {', '.join(map(repr, twice))}; rename all but one")
        while True:
            start = file.tell()
            try:
                values = _cells_of(file, dialect, len(names))
            except Exception as error:
                values = Unreadable(f"is no row of a table: {first_line(error)}")
            if values is None:
                return
            if values == []:
                continue
            number, done = number + 1, file.tell() / size
            if isinstance(values, Unreadable):
                yield Broken(number, values.reason, done)
            elif len(values) != len(names):
                yield Broken(number, f"has not one cell for each column: {len(values)} for {len(names)}", done)
            else:
                cells: dict[str, Any] = dict(zip(names, values, strict=True))
                places[cells.get("index", "")] = start
                yield _with_shared_image(Record(number, cells, done), path, names, dialect, places)


def _dialect(path: Path) -> _Dialect:
    """Decide for the whole file whether quotes are quotes: in a table that was written without quoting, a cell may
    begin with one and mean it. There every line is a row; quoted cells with delimiters or line breaks tear lines."""
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    mark, plain, whole, torn, columns = delimiter.encode(), 0, 0, 0, 0
    with path.open("rb") as file:
        for line in file:
            cells = line.rstrip(b"\r\n").split(mark)
            columns = columns or len(cells)
            torn += len(cells) != columns and cells != [b""]
            quoted = [_is_quoted(cell) for cell in cells if cell.startswith(b'"')]
            plain, whole = plain + (False in quoted), whole + (True in quoted)
    return _Dialect(delimiter, quoted=plain <= 20 * torn or plain < whole)


def _is_quoted(cell: bytes) -> bool:
    return len(cell) > 1 and cell.endswith(b'"') and b'"' not in cell[1:-1].replace(b'""', b"")


def _cells_of(file: io.BufferedReader, dialect: _Dialect, columns: int | None) -> list[str] | Unreadable | None:
    """Read the row that begins where ``file`` stands, and leave it behind that row; None at the end, an empty list for
    an empty line. Where lines do not make up a row of ``columns`` cells, only the first of them is given up."""
    if not (first := file.readline()):
        return None
    behind = file.tell()
    if not first.strip(b"\r\n"):
        return []
    if not dialect.quoted:
        values = first.rstrip(b"\r\n").decode("utf-8", "surrogateescape").split(dialect.delimiter)
    else:
        lines = _Lines(first, file)
        try:
            values = next(csv.reader(lines, delimiter=dialect.delimiter, strict=True))
        except csv.Error:  # a quote within a cell: one of this line's own, or of another row
            alone = [first.decode("utf-8", "surrogateescape")] if lines.taken == 1 else []
            values = next(csv.reader(alone, delimiter=dialect.delimiter), [])
        if lines.ended or (lines.taken > 1 and columns is not None and len(values) != columns):
            file.seek(behind)
            return Unreadable("has a quote that is not closed: " + repr(first[:60].decode("utf-8", "replace")))
    try:
        "".join(values).encode()
    except UnicodeEncodeError:
        return Unreadable("is not UTF-8: " + repr(first[:60].decode("utf-8", "replace")))
    return values


class _Lines(Iterator[str]):
    """The first line of a row, and as many more as csv asks for, up to the limits."""

    def __init__(self, first: bytes, file: io.BufferedReader) -> None:
        self.first, self.file = first, file
        self.taken = self.held = 0
        self.ended = False

    def __next__(self) -> str:
        line = self.file.readline() if self.taken else self.first
        self.held += len(line) if self.taken else 0
        self.taken += 1
        if not line or self.taken > MOST_LINES or self.held > MOST_BYTES:
            self.ended = True
            raise StopIteration
        return line.decode("utf-8", "surrogateescape")


LONGEST_INDEX = 64
"""Characters; no image is that short in base64."""


def _with_shared_image(
    record: Record, path: Path, names: list[str], dialect: _Dialect, places: dict[str, int]
) -> Record | Broken:
    cell = record.cells.get("image", "")
    if not cell or "index" not in names or len(cell) > LONGEST_INDEX or not cell.isdigit():
        return record
    if (place := places.get(cell)) is None:
        return Broken(record.number, f"shares an image that is not before it: of row {cell}", record.done)
    with path.open("rb") as file:
        file.seek(place)
        values = _cells_of(file, dialect, len(names))
    assert isinstance(values, list)  # it was read before
    return Record(record.number, record.cells | {"image": dict(zip(names, values, strict=True))["image"]}, record.done)


# --- Parquet ---------------------------------------------------------------------------------------------------------


def _parquet(path: Path, leave_out: Sequence[str]) -> Iterator[Record | Broken]:
    """Row group by row group, a few rows at once, and each column by itself: a damaged page costs the cells of its
    column in its row group, and only the rows that need one of them."""
    try:
        file = pq.ParquetFile(path, buffer_size=READ_BUFFER, pre_buffer=False)
        names = [name for name in file.schema_arrow.names if name not in leave_out]
        counts = [file.metadata.row_group(index).num_rows for index in range(file.metadata.num_row_groups)]
    except Exception as error:
        raise DatasetError(f"{path} is not a readable Parquet file: {first_line(error)}") from error
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DatasetError(f"{path} has several columns {', '.join(map(repr, twice))}; rename all but one")
    number, rows = 0, max(1, sum(counts))
    with file:
        for index, count in enumerate(counts):
            columns = {name: _column(file, index, name, count) for name in names}
            for _ in range(count):
                number += 1
                yield Record(number, {name: next(cells) for name, cells in columns.items()}, number / rows)


def _column(file: pq.ParquetFile, index: int, name: str, count: int) -> Iterator[Any]:
    """Yield the ``count`` cells of a column of a row group; those that cannot be read as Unreadable."""
    given = 0
    try:
        for batch in file.iter_batches(PARQUET_BATCH, row_groups=[index], columns=[name]):
            for cell in _values(batch.column(0)):
                yield cell
                given += 1
    except Exception as error:
        reason = f"cannot be read: {first_line(error)}"
    else:
        reason = f"is damaged: the column has {given} cells, not {count}"
    for _ in range(count - given):
        yield Unreadable(reason)


def _values(cells: pa.Array) -> list[Any]:
    try:
        return list(cells.to_pylist())
    except Exception:
        return [_as_python(cells, place) for place in range(len(cells))]


def _as_python(cells: pa.Array, place: int) -> Any:
    try:
        return cells[place].as_py()
    except Exception as error:  # text that is not UTF-8, a day in the year 10^11
        return Unreadable(f"cannot be read: {first_line(error)}")


def _record(number: int, value: object, done: float) -> Record | Broken:
    if not isinstance(value, dict):
        return Broken(number, f"should be an object: is {type(value).__name__}", done)
    return Record(number, value, done)
