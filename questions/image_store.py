"""Images by the names that rows give them: out of folders, zip and tar archives.

Nothing is unpacked into a folder: members are read into memory, one at a time and bounded. A member that cannot be read
costs the rows that name it; an archive that breaks off keeps the members before the break.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import shutil
import stat
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import IO, Any

from ergo_rl.errors import ErgoError, first_line
from ergo_rl.questions.dataset import DatasetError
from ergo_rl.questions.rows import BadCell, path_below, shorten

Fetch = Callable[[str], bytes | None]
"""Returns an image by the name that it has in a place, None where it is not there; raises ImageNotFound where it is and
cannot be read, or is one of several."""
MAX_MEMBERS = 5_000_000
"""Files of one place."""
MAX_IMAGE_BYTES = 1 << 30
"""Of one image, as it is stored: one of 200 megapixels without any compression has 600 MB."""
MAX_RATIO, RATIO_FROM = 200, 64 << 20
"""What is larger than the one times its compressed bytes, and than the other in bytes, is no image but a bomb."""
LONGEST_NAME, MOST_FOLDERS = 4096, 32
"""Characters of a name; folders in it that are left out one by one in search of its end."""
MIN_FREE_BYTES = 256 << 20
"""Stay free on a disk that a compressed tar is unpacked to."""
_COMPRESSED: dict[bytes, Callable[..., Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}
"""First bytes of a compressed file -> what opens it."""


class ImageNotFound(ErgoError, LookupError):
    """No place has an image of this name that can be read."""


@dataclass(frozen=True, slots=True)
class ImageStore:
    """Images by name, looked for in every place in order."""

    places: tuple[tuple[Path, Fetch], ...]
    notes: list[str] = field(default_factory=list)
    """What is to be said about the places: an archive that breaks off."""

    def __call__(self, name: str) -> bytes:
        """Return the encoded image. Raises ImageNotFound where there is none, or where the name leaves its place."""
        clean = PurePosixPath(name.replace("\\", "/"))
        if len(name) > LONGEST_NAME:
            raise ImageNotFound(f"is no name of a file: {shorten(name)} has {len(name)} characters")
        if ".." in clean.parts or not clean.name:
            raise ImageNotFound(f"the path leaves its folder: {shorten(name)}")
        problems: list[str] = []
        for path, fetch in self.places:
            if (inside := _inside(clean, path)) is None:
                continue
            try:
                content = fetch(str(inside))
            except ImageNotFound as problem:
                problems.append(str(problem))
                continue
            if content is not None:
                return content
        if problems:
            raise ImageNotFound(problems[0])
        if clean.is_absolute():
            raise ImageNotFound(f"the path leaves its folder: {shorten(name)} is in no place that was given")
        raise ImageNotFound(
            f"is not there: no {shorten(name)} in {', '.join(str(path) for path, _ in self.places) or 'no place'}"
        )


def _inside(name: PurePosixPath, place: Path) -> PurePosixPath | None:
    """Return an absolute name relative to the place that it lies in, None where it lies elsewhere."""
    if not name.is_absolute():
        return name
    for folder in (PurePosixPath(os.path.abspath(place)), PurePosixPath(place.resolve())):
        if name.is_relative_to(folder):
            return name.relative_to(folder)
    return None


@contextmanager
def open_image_store(paths: Sequence[Path], scratch: Path) -> Iterator[ImageStore]:
    """Open folders, ``.zip`` and ``.tar`` files. A compressed tar is unpacked to a file in ``scratch`` for as long as
    the block lasts: compressed, it can only be read from its beginning.

    Data often hold everything below one folder more (or less) than the rows say: a name that is the end of exactly one
    file's is taken for it, and a name whose end is a file's as long as every row has the same beginning too many.

    Raises DatasetError for a place that is not there, is no archive, or is one of which nothing can be read."""
    notes: list[str] = []
    with ExitStack() as stack:
        yield ImageStore(tuple((path, _open_place(path, scratch, stack, notes)) for path in paths), notes)


def _open_place(path: Path, scratch: Path, stack: ExitStack, notes: list[str]) -> Fetch:
    if path.is_dir():
        return _Place(path, _Folder(path))
    if not path.is_file():
        raise DatasetError(f"there is no folder or archive {path}")
    try:
        if zipfile.is_zipfile(path):
            return _Place(path, _Zip(stack.enter_context(zipfile.ZipFile(path))))
        if path.suffix == ".tar" or _opener(path) is not None or tarfile.is_tarfile(path):
            return _Place(path, _Tar(path, _uncompressed(path, scratch, stack, notes), notes))
    except DatasetError:
        raise
    except Exception as error:  # whatever a damaged archive leads to
        raise DatasetError(f"{path} cannot be read: {first_line(error)}") from error
    raise DatasetError(f"{path} is no folder, zip or tar; parts of a split archive must be put together first")


class _Members:
    """The files of a place by their names in it."""

    def names(self) -> Iterator[str]:
        raise NotImplementedError

    def has(self, name: str) -> bool:
        raise NotImplementedError

    def read(self, name: str) -> bytes:
        raise NotImplementedError


@dataclass
class _Place:
    """A place with the search for names that have a folder more or fewer than the files."""

    path: Path
    members: _Members
    left_out: str | None = None
    """What names of rows have in front of those of the files, as soon as one had."""

    def __call__(self, name: str) -> bytes | None:
        if (found := name if self.members.has(name) else self._by_ending(name)) is None:
            return None
        try:
            return self.members.read(found)
        except ImageNotFound:
            raise
        except Exception as error:
            raise ImageNotFound(f"cannot be read: {shorten(name)} in {self.path}: {first_line(error)}") from error

    def _by_ending(self, name: str) -> str | None:
        parts = PurePosixPath(name).parts
        longer = [member for member in self._by_file.get(parts[-1], ()) if member.endswith(f"/{name}")]
        if len(longer) > 1:
            shown = ", ".join(sorted(longer)[:3])
            raise ImageNotFound(f"stands for several files: {shorten(name)} could be {shown} in {self.path}")
        if longer:
            return longer[0]
        for start in range(1, min(len(parts), MOST_FOLDERS)):
            if self.members.has(shorter := "/".join(parts[start:])):
                beginning = "/".join(parts[:start])
                self.left_out = self.left_out or beginning
                if self.left_out != beginning:
                    raise ImageNotFound(
                        f"stands for a file of another folder: {self.path} has {shorten(shorter)}, which is "
                        f"{self.left_out}/..., but not {shorten(name)}"
                    )
                return shorter
        return None

    @cached_property
    def _by_file(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for count, member in enumerate(self.members.names()):
            if count == MAX_MEMBERS:
                raise ImageNotFound(f"cannot be searched for: {self.path} has more than {MAX_MEMBERS} files")
            found.setdefault(member.rpartition("/")[2], []).append(member)
        return found


@dataclass
class _Folder(_Members):
    root: Path

    def names(self) -> Iterator[str]:
        """Of all files below, linked folders included, each folder once."""
        met: set[tuple[int, int]] = set()
        for folder, folders, files in os.walk(self.root, followlinks=True):
            entry = os.stat(folder)
            if (entry.st_dev, entry.st_ino) in met:
                folders.clear()
                continue
            met.add((entry.st_dev, entry.st_ino))
            folders.sort()
            below = os.path.relpath(folder, self.root)
            yield from (file if below == "." else f"{below}/{file}" for file in files)

    def has(self, name: str) -> bool:
        try:
            return path_below(self.root, name).is_file()
        except (BadCell, OSError):
            return False

    def read(self, name: str) -> bytes:
        path = path_below(self.root, name)
        _bounded(name, path.stat().st_size)
        return path.read_bytes()


class _Zip(_Members):
    def __init__(self, archive: zipfile.ZipFile) -> None:
        self.archive = archive
        files = (info for info in archive.infolist() if not info.is_dir() and not _is_link(info))
        self.infos = {info.filename.removeprefix("./"): info for info in files}

    def names(self) -> Iterator[str]:
        return iter(self.infos)

    def has(self, name: str) -> bool:
        return name in self.infos

    def read(self, name: str) -> bytes:
        info = self.infos[name]
        _bounded(name, info.file_size, info.compress_size)
        with self.archive.open(info) as file:
            return _all_of(file, name)


class _Tar(_Members):
    def __init__(self, path: Path, file: IO[bytes], notes: list[str]) -> None:
        self.archive = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115  # it holds nothing but ``file``
        self.infos: dict[str, tarfile.TarInfo] = {}
        try:
            for count, info in enumerate(self.archive):
                if count == MAX_MEMBERS:
                    raise DatasetError(f"{path} has more than {MAX_MEMBERS} members")
                if info.isfile() or info.islnk() or info.issym():
                    self.infos[info.name.removeprefix("./")] = info
        except DatasetError:
            raise
        except Exception as error:
            notes.append(f"{path} breaks off behind {len(self.infos)} files: {first_line(error)}")

    def names(self) -> Iterator[str]:
        return iter(self.infos)

    def has(self, name: str) -> bool:
        return name in self.infos

    def read(self, name: str) -> bytes:
        _bounded(name, self.infos[name].size)
        file = self.archive.extractfile(self.infos[name])  # follows links, and none out of the archive
        if file is None:
            raise ImageNotFound(f"is no file: {shorten(name)}")
        with file:
            return _all_of(file, name)


def _is_link(info: zipfile.ZipInfo) -> bool:
    return stat.S_ISLNK(info.external_attr >> 16)


def _bounded(name: str, size: int, compressed: int | None = None) -> None:
    if size > MAX_IMAGE_BYTES:
        raise ImageNotFound(f"is too large: {shorten(name)} has {size} bytes, at most {MAX_IMAGE_BYTES}")
    if compressed is not None and size > max(RATIO_FROM, MAX_RATIO * compressed):
        raise ImageNotFound(f"is too large: {shorten(name)} has {compressed} bytes and would become {size}")


def _all_of(file: IO[bytes], name: str) -> bytes:
    content = file.read(MAX_IMAGE_BYTES + 1)
    _bounded(name, len(content))
    return content


def _opener(path: Path) -> Callable[..., Any] | None:
    with path.open("rb") as file:
        beginning = file.read(8)
    return next((opener for magic, opener in _COMPRESSED.items() if beginning.startswith(magic)), None)


def _uncompressed(path: Path, scratch: Path, stack: ExitStack, notes: list[str]) -> IO[bytes]:
    """Open a tar: the file itself, or a temporary copy if it is compressed."""
    file = stack.enter_context(path.open("rb"))
    if (opener := _opener(path)) is None:
        return file
    copy = stack.enter_context(tempfile.TemporaryFile(dir=scratch))  # noqa: SIM115
    most = max(RATIO_FROM, MAX_RATIO * path.stat().st_size)
    try:
        with opener(file) as content:
            while piece := content.read1(1 << 20):  # what comes before a break is given
                copy.write(piece)
                if copy.tell() > most:
                    raise DatasetError(f"{path} is unpacked to more than {MAX_RATIO} times its size: it is no archive")
                if shutil.disk_usage(scratch).free < MIN_FREE_BYTES:
                    raise DatasetError(f"{path} cannot be unpacked: the disk of {scratch} is full")
    except DatasetError:
        raise
    except Exception as error:
        if not copy.tell():
            raise
        notes.append(f"{path} breaks off when it is unpacked: {first_line(error)}")
    copy.seek(0)
    return copy
