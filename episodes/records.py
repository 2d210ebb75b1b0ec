"""Rows of published files, one at a time: JSONL, JSON, TSV, CSV, Parquet. Memory does not grow with the file.

A row that cannot be read is a ``Broken`` record, not the end of the file.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ergo_rl.episodes.questions import DatasetError

Cells = dict[str, Any]
CHUNK = 1 << 20
"""Characters of a JSON file that are read at once."""
PARQUET_BATCH = 8
"""Rows of a Parquet file that are in memory at once: one may hold a picture of 20 MB."""


@dataclass(frozen=True, slots=True)
class Record:
    """number: of the row in its file, from 1 on; done: share of the file that is read, 0 to 1."""

    number: int
    cells: Cells
    done: float


@dataclass(frozen=True, slots=True)
class Broken:
    """A row that is no record, and why."""

    number: int
    reason: str
    done: float


def read_records(path: Path) -> Iterator[Record | Broken]:
    """All rows of ``path``; its name's ending says what it is.

    Raises DatasetError for a file that is not there, is of another kind, or breaks off where no row ends."""
    if not path.is_file():
        raise DatasetError(f"there is no file {path}")
    readers = {".jsonl": _jsonl, ".json": _json, ".tsv": _table, ".csv": _table, ".parquet": _parquet}
    if (reader := readers.get(path.suffix.lower())) is None:
        raise DatasetError(f"{path}: its rows can be read from {', '.join(readers)} files only")
    return reader(path)


def _jsonl(path: Path) -> Iterator[Record | Broken]:
    size, behind = max(1, path.stat().st_size), 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            behind += len(line)
            if not line.strip():
                continue
            try:
                yield _record(number, json.loads(line.decode("utf-8-sig")), behind / size)
            except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
                yield Broken(number, f"is no JSON: {error}", behind / size)


def _json(path: Path) -> Iterator[Record | Broken]:
    """A list of objects, decoded one by one."""
    decoder, size = json.JSONDecoder(), max(1, path.stat().st_size)
    with path.open(encoding="utf-8-sig") as file:
        text, number, behind = _more("", file, path).lstrip(), 0, 0
        if not text.startswith("["):
            raise DatasetError(f"{path} is no list of objects: it begins with {text[:20]!r}")
        text = text[1:]
        while True:
            text = text.lstrip().removeprefix(",").lstrip()
            if text.startswith("]"):
                return
            try:
                value, end = decoder.raw_decode(text)
            except json.JSONDecodeError as error:
                if not error.msg.startswith("Unterminated string") and error.pos + 16 < len(text):
                    # it is wrong there, and not because what has been read ends there
                    raise DatasetError(f"{path}, object {number + 1}: {error}") from error
                text = _more(text, file, path)
                continue
            if not isinstance(value, dict | list) and end == len(text):  # a number may go on
                text = _more(text, file, path)
                continue
            number, text, behind = number + 1, text[end:], behind + end
            yield _record(number, value, min(1.0, behind / size))


def _more(text: str, file: io.TextIOWrapper, path: Path) -> str:
    """As much again: an object of n characters is tried log(n) times."""
    added = file.read(max(CHUNK, len(text)))
    if not added:
        raise DatasetError(f"{path} breaks off: {text[-40:]!r} is its end")
    return text + added


def _table(path: Path) -> Iterator[Record | Broken]:
    """With a line of column names. A short ``image`` cell stands for the image of the row with that ``index``, as in
    the TSV files of VLMEvalKit; only where rows begin is remembered."""
    csv.field_size_limit((1 << 31) - 1)  # a picture in base64 is one cell
    size, places, start = max(1, path.stat().st_size), dict[str, int](), 0
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    with path.open("rb") as file:
        rows = csv.reader(_lines(file), delimiter=delimiter)
        try:
            names = next(rows, None)
            if names is None:
                return
            number, start = 0, file.tell()
            for number, values in enumerate(rows, 1):
                end = file.tell()
                if len(values) == len(names):
                    cells: Cells = dict(zip(names, values, strict=True))
                    places[cells.get("index", "")] = start
                    yield _with_shared_image(Record(number, cells, end / size), path, names, delimiter, places)
                elif values:
                    yield Broken(number, f"has {len(values)} cells, the file {len(names)} columns", end / size)
                start = end
        except (csv.Error, UnicodeDecodeError) as error:
            raise DatasetError(f"{path}, behind byte {start}: {error}") from error


def _lines(file: io.BufferedReader) -> Iterator[str]:
    """Line by line, so that between two rows the file stands where the next one begins."""
    first = True
    while line := file.readline():
        yield line.decode("utf-8-sig" if first else "utf-8")
        first = False


LONGEST_INDEX = 64
"""No picture is that short, in base64."""


def _with_shared_image(
    record: Record, path: Path, names: list[str], delimiter: str, places: dict[str, int]
) -> Record | Broken:
    cell = record.cells.get("image", "")
    if not cell or "index" not in names or len(cell) > LONGEST_INDEX or not cell.isdigit():
        return record
    if (place := places.get(cell)) is None:
        return Broken(record.number, f"shares the image of row {cell}, which is not before it", record.done)
    with path.open("rb") as file:
        file.seek(place)
        shared = dict(zip(names, next(csv.reader(_lines(file), delimiter=delimiter)), strict=True))["image"]
    return Record(record.number, record.cells | {"image": shared}, record.done)


def _parquet(path: Path) -> Iterator[Record | Broken]:
    try:
        with pq.ParquetFile(path) as file:
            rows, number = max(1, file.metadata.num_rows), 0
            for batch in file.iter_batches(batch_size=PARQUET_BATCH):
                for cells in batch.to_pylist():
                    number += 1
                    yield Record(number, cells, number / rows)
    except pa.ArrowInvalid as error:
        raise DatasetError(f"{path} is not a readable Parquet file: {error}") from error


def _record(number: int, value: object, done: float) -> Record | Broken:
    if not isinstance(value, dict):
        return Broken(number, f"should be an object, is {type(value).__name__}", done)
    return Record(number, value, done)
