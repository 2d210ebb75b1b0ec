"""Pictures by name, from folders and from archives that hold many: zip and tar."""

from __future__ import annotations

import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ergo_rl.episodes.questions import DatasetError

Fetch = Callable[[str], bytes | None]
"""A picture by the name it has in a place, None where it is not there."""


class NoPicture(LookupError):
    """The picture is in none of the places."""


@dataclass(frozen=True, slots=True)
class Pictures:
    """Looks through all places in their order."""

    places: tuple[tuple[Path, Fetch], ...]

    def __call__(self, name: str) -> bytes:
        """The encoded picture. Raises NoPicture where there is none of this name, or the name leaves its folder."""
        clean = PurePosixPath(name.replace("\\", "/"))
        if clean.is_absolute() or ".." in clean.parts or not clean.name:
            raise NoPicture(f"the path {name!r} leaves its folder")
        for _, fetch in self.places:
            if (found := fetch(str(clean))) is not None:
                return found
        raise NoPicture(
            f"no {name!r} in {', '.join(str(path) for path, _ in self.places) or 'no place: give --images'}"
        )


@contextmanager
def open_pictures(paths: Sequence[Path], aside: Path) -> Iterator[Pictures]:
    """Folders, ``.zip``, ``.tar``; a compressed tar, which cannot be read here and there, is unpacked below the folder
    ``aside`` for as long as the block lasts.

    Archives often hold everything below one folder more (or less) than the rows say: a name that is the end of exactly
    one member is taken for it. Raises DatasetError for a place that is not there or is no archive."""
    with ExitStack() as stack:
        yield Pictures(tuple((path, _open(path, aside, stack)) for path in paths))


def _open(path: Path, aside: Path, stack: ExitStack) -> Fetch:
    if path.is_dir():
        return lambda name: _from_folder(path, name)
    if not path.is_file():
        raise DatasetError(f"there is no folder or archive {path}")
    try:
        if zipfile.is_zipfile(path):
            return _zip(stack.enter_context(zipfile.ZipFile(path)))
        if path.suffix == ".tar":
            return _tar(stack.enter_context(tarfile.open(path, "r:")))
        if tarfile.is_tarfile(path):
            return _unpacked(path, aside, stack)
    except (tarfile.TarError, zipfile.BadZipFile) as error:
        raise DatasetError(f"{path} cannot be read: {error}") from error
    raise DatasetError(f"{path} is no folder, zip or tar; parts of a split archive must be put together first")


def _from_folder(root: Path, name: str) -> bytes | None:
    path = root / name
    return path.read_bytes() if path.is_file() and path.resolve().is_relative_to(root.resolve()) else None


def _zip(archive: zipfile.ZipFile) -> Fetch:
    find = _finder([one.filename for one in archive.infolist() if not one.is_dir()])

    def fetch(name: str) -> bytes | None:
        member = find(name)
        return None if member is None else archive.read(member)

    return fetch


def _tar(archive: tarfile.TarFile) -> Fetch:
    members = {one.name.removeprefix("./"): one for one in archive if one.isfile()}
    find = _finder(list(members))

    def fetch(name: str) -> bytes | None:
        member = find(name)
        file = None if member is None else archive.extractfile(members[member])
        return None if file is None else file.read()

    return fetch


def _unpacked(path: Path, aside: Path, stack: ExitStack) -> Fetch:
    """Into numbered files, so that no member's name becomes a path (tarfile's own filters are of Python 3.11.4)."""
    folder = Path(tempfile.mkdtemp(prefix=".unpacked-", dir=aside))
    stack.callback(shutil.rmtree, folder)
    files: dict[str, Path] = {}
    with tarfile.open(path) as archive:
        for number, member in enumerate(archive):
            if member.isfile() and (content := archive.extractfile(member)) is not None:
                place = files[member.name.removeprefix("./")] = folder / str(number)
                with place.open("wb") as file:
                    shutil.copyfileobj(content, file)
    find = _finder(list(files))

    def fetch(name: str) -> bytes | None:
        member = find(name)
        return None if member is None else files[member].read_bytes()

    return fetch


def _finder(members: Sequence[str]) -> Callable[[str], str | None]:
    by_file: dict[str, list[str]] = {}
    for member in members:
        by_file.setdefault(PurePosixPath(member).name, []).append(member)

    def find(name: str) -> str | None:
        same = by_file.get(PurePosixPath(name).name, [])
        if name in same:
            return name
        close = [one for one in same if f"/{one}".endswith(f"/{name}") or f"/{name}".endswith(f"/{one}")]
        return close[0] if len(close) == 1 else None

    return find
