"""What published data sets come in. Rows: JSONL, JSON, TSV, CSV, Parquet. Images: folders, zip and tar archives.

Rows are read one at a time, so that memory does not grow with the file; a row that cannot be read is a ``Broken``
record, not the end of the file.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem
from fsspec.implementations.tar import TarFileSystem
from fsspec.implementations.zip import ZipFileSystem

from ergo_rl.errors import ErgoError
from ergo_rl.questions.dataset import DatasetError

CHUNK = 1 << 20
"""Characters of a JSON file that are read at once."""
PARQUET_BATCH = 8
"""Rows of a Parquet file that are in memory at once: one may hold an image of 20 MB."""


# --- rows ------------------------------------------------------------------------------------------------------------


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


def read_records(path: Path) -> Iterator[Record | Broken]:
    """Read all rows of ``path``, whose suffix says what it is.

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
    """A list of objects, decoded one by one.

    By hand, because ijson refuses what Python's own json writes: NaN, and whole numbers of more than 64 bits."""
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
            if not isinstance(value, dict | list) and end == len(text):  # a number may continue
                text = _more(text, file, path)
                continue
            number, text, behind = number + 1, text[end:], behind + end
            yield _record(number, value, min(1.0, behind / size))


def _more(text: str, file: io.TextIOWrapper, path: Path) -> str:
    """Read as much again: an object of n characters is decoded log(n) times at most."""
    added = file.read(max(CHUNK, len(text)))
    if not added:
        raise DatasetError(f"{path} breaks off: {text[-40:]!r} is its end")
    return text + added


def _table(path: Path) -> Iterator[Record | Broken]:
    """Rows below a line of column names. A short ``image`` cell stands for the image of the row with that ``index``, as
    in the TSV files of VLMEvalKit; only where rows begin is remembered."""
    csv.field_size_limit((1 << 31) - 1)  # an image in base64 is one cell, and csv's limit holds for the whole process
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
                    cells: dict[str, Any] = dict(zip(names, values, strict=True))
                    places[cells.get("index", "")] = start
                    yield _with_shared_image(Record(number, cells, end / size), path, names, delimiter, places)
                elif values:
                    yield Broken(number, f"has {len(values)} cells, the file {len(names)} columns", end / size)
                start = end
        except (csv.Error, UnicodeDecodeError) as error:
            raise DatasetError(f"{path}, behind byte {start}: {error}") from error


def _lines(file: io.BufferedReader) -> Iterator[str]:
    """Read line by line, so that between two rows the file's position is where the next row begins."""
    first = True
    while line := file.readline():
        yield line.decode("utf-8-sig" if first else "utf-8")
        first = False


LONGEST_INDEX = 64
"""Characters; no image is that short in base64."""


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


# --- images ----------------------------------------------------------------------------------------------------------

Fetch = Callable[[str], bytes | None]
"""Returns an image by the name that it has in a place, None where it is not there."""
_COMPRESSED: dict[bytes, Callable[..., Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}
"""First bytes of a compressed file -> what opens it."""
_DAMAGED = (tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, zlib.error, EOFError, OSError)
"""What reading a damaged archive raises."""


class ImageNotFound(ErgoError, LookupError):
    """No place has an image of this name."""


@dataclass(frozen=True, slots=True)
class ImageStore:
    """Images by name, looked for in every place in order."""

    places: tuple[tuple[Path, Fetch], ...]

    def __call__(self, name: str) -> bytes:
        """Return the encoded image. Raises ImageNotFound where there is none, or where the name leaves its folder."""
        clean = PurePosixPath(name.replace("\\", "/"))
        if clean.is_absolute() or ".." in clean.parts or not clean.name:
            raise ImageNotFound(f"the path {name!r} leaves its folder")
        for _, fetch in self.places:
            if (content := fetch(str(clean))) is not None:
                return content
        raise ImageNotFound(
            f"no {name!r} in {', '.join(str(path) for path, _ in self.places) or 'no place: give --images'}"
        )


@contextmanager
def open_image_store(paths: Sequence[Path], scratch: Path) -> Iterator[ImageStore]:
    """Open folders, ``.zip`` and ``.tar`` files. A compressed tar is unpacked to a file in ``scratch`` for as long as
    the block lasts: compressed, it can only be read from its beginning.

    Archives often hold everything below one folder more (or less) than the rows say: a name that is the end of exactly
    one member, or whose end is one, is taken for it. Raises DatasetError for a place that is not there or no
    archive."""
    with ExitStack() as stack:
        yield ImageStore(tuple((path, _open_place(path, scratch, stack)) for path in paths))


def _open_place(path: Path, scratch: Path, stack: ExitStack) -> Fetch:
    if path.is_dir():
        return partial(_from_folder, path)
    if not path.is_file():
        raise DatasetError(f"there is no folder or archive {path}")
    try:
        if zipfile.is_zipfile(path):
            return _from_archive(ZipFileSystem(stack.enter_context(path.open("rb"))), stack)
        if path.suffix == ".tar" or tarfile.is_tarfile(path):
            return _from_archive(TarFileSystem(_uncompressed(path, scratch, stack)), stack)
    except _DAMAGED as error:
        raise DatasetError(f"{path} cannot be read: {error}") from error
    raise DatasetError(f"{path} is no folder, zip or tar; parts of a split archive must be put together first")


def _from_folder(root: Path, name: str) -> bytes | None:
    path = root / name
    try:
        inside = path.is_file() and path.resolve().is_relative_to(root.resolve())
    except (OSError, ValueError, RuntimeError):  # too long, a null character, links in a circle
        return None
    return path.read_bytes() if inside else None


def _uncompressed(path: Path, scratch: Path, stack: ExitStack) -> Any:
    """Open a tar: the file itself, or a temporary copy if it is compressed."""
    file = stack.enter_context(path.open("rb"))
    beginning = file.read(8)
    file.seek(0)
    opener = next((opener for magic, opener in _COMPRESSED.items() if beginning.startswith(magic)), None)
    if opener is None:
        return file
    copy = tempfile.NamedTemporaryFile(dir=scratch, prefix=".unpacked-", suffix=".tar")  # noqa: SIM115
    stack.enter_context(copy)  # it is there for as long as the store
    with opener(file) as content:
        shutil.copyfileobj(content, copy)
    copy.seek(0)
    return copy


def _from_archive(archive: AbstractFileSystem, stack: ExitStack) -> Fetch:
    stack.callback(archive.close)
    members = {name.removeprefix("./"): name for name in archive.find("")}
    by_file: dict[str, list[str]] = {}
    for member in members:
        by_file.setdefault(PurePosixPath(member).name, []).append(member)

    def fetch(name: str) -> bytes | None:
        same = by_file.get(PurePosixPath(name).name, [])
        close = [member for member in same if f"/{member}".endswith(f"/{name}") or f"/{name}".endswith(f"/{member}")]
        found = name if name in same else close[0] if len(close) == 1 else None
        if found is None:
            return None
        try:
            return bytes(archive.cat_file(members[found]))
        except (FileNotFoundError, KeyError):  # an absolute name; a link in a tar that leads out of it
            return None
        except (*_DAMAGED, RuntimeError) as error:  # RuntimeError: encrypted
            raise ImageNotFound(f"{name!r} cannot be read out of its archive: {error}") from error

    return fetch
