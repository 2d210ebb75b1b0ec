"""Where checkpoints lie: complete or not there at all, checked when read, the old ones removed last.

One folder per step. It is written aside (``.writing-...``), every file is forced to the disk, a manifest with sizes and
checksums comes last, then the folder gets its name, then ``LATEST`` moves, and only then old ones go.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

logger = logging.getLogger(__name__)

FORMAT = 1
MANIFEST = "manifest.json"
LATEST = "LATEST"
FETCHED = ".fetched-"
_NAME = re.compile(r"step-(\d{6,})")
_ASIDE = ".writing-"
_OLD = ".old-"
"""One of the same step, until the new one has its name."""
_GONE = ".gone-"
"""One that is being removed."""


class DamagedCheckpoint(ValueError):
    """A checkpoint is not what its manifest says; the message names the folder, the file and the difference."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """score: of the step's evaluation, where there was one; files: name -> (bytes, blake2b as hex)."""

    step: int
    score: float | None
    files: dict[str, tuple[int, str]] = field(default_factory=dict)
    format: int = FORMAT


class Disk:
    """Every change of a local disk that a save makes, one method each, so that a test can fail at any of them."""

    def make(self, folder: Path) -> None:
        folder.mkdir(parents=True)

    @contextmanager
    def create(self, path: Path) -> Iterator[IO[bytes]]:
        """A new file; on the disk when the block is left."""
        with path.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())

    def rename(self, path: Path, target: Path) -> None:
        """Atomic within a file system; on the disk when this returns."""
        path.replace(target)
        _sync_folder(target.parent)

    def remove(self, path: Path) -> None:
        """A folder with all that is in it, or a file; nothing where it is not there."""
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


class Draft:
    """A checkpoint that is being written."""

    def __init__(self, folder: Path, disk: Disk) -> None:
        self.folder, self._disk = folder, disk
        self.files: dict[str, tuple[int, str]] = {}

    @contextmanager
    def create(self, name: str) -> Iterator[IO[bytes]]:
        """A new file of the checkpoint; its size and checksum are noted while it is written."""
        with self._disk.create(self.folder / name) as file:
            noted = _Noted(file)
            yield noted  # type: ignore[misc]
        self.files[name] = (noted.size, noted.digest.hexdigest())

    def write(self, name: str, content: bytes) -> None:
        with self.create(name) as file:
            file.write(content)


class Shelf:
    """The checkpoints of one run in a local folder."""

    def __init__(self, folder: Path, disk: Disk | None = None) -> None:
        self.folder, self._disk = folder, disk or Disk()

    @contextmanager
    def draft(self, step: int, score: float | None = None) -> Iterator[Draft]:
        """Write a checkpoint inside the block; it is there, and ``LATEST``, when the block was left without an error.
        Another checkpoint of the same step is replaced.

        Raises OSError."""
        name = name_of(step)
        aside, old, place = self.folder / (_ASIDE + name), self.folder / (_OLD + name), self.folder / name
        self.folder.mkdir(parents=True, exist_ok=True)
        self._disk.remove(aside)
        self._disk.make(aside)
        draft = Draft(aside, self._disk)
        yield draft
        manifest = Manifest(step, score, draft.files)
        with self._disk.create(aside / MANIFEST) as file:
            file.write(as_json(manifest))
        _sync_folder(aside)
        if place.exists():
            self._disk.remove(old)
            self._disk.rename(place, old)
        self._disk.rename(aside, place)
        self.point(name)
        self._disk.remove(old)

    def point(self, name: str) -> None:
        """Move ``LATEST``."""
        aside = self.folder / (_ASIDE + LATEST)
        self._disk.remove(aside)
        with self._disk.create(aside) as file:
            file.write(name.encode() + b"\n")
        self._disk.rename(aside, self.folder / LATEST)

    def names(self) -> list[str]:
        """In the order in which they should be tried: what ``LATEST`` names, then from the newest step to the
        oldest. Whether they are whole says ``check``."""
        found = [path.name for path in self.folder.glob("step-*") if _NAME.fullmatch(path.name)]
        found.sort(key=step_of, reverse=True)
        latest = self.latest
        return sorted(found, key=lambda name: name != latest)

    @property
    def latest(self) -> str:
        """What ``LATEST`` names; empty where there is none."""
        pointer = self.folder / LATEST
        return pointer.read_text().strip() if pointer.is_file() else ""

    def newest(self) -> Path | None:
        """The first of ``names`` that is whole; the log names each one that is not. None where there is none.

        Raises DamagedCheckpoint where there are checkpoints and not one is whole."""
        problems = []
        for old in self.folder.glob(_OLD + "step-*"):
            if not (place := self.folder / old.name.removeprefix(_OLD)).exists():
                self._disk.rename(old, place)  # stopped before the new one got the name
        for name in self.names():
            try:
                check(self.folder / name)
            except DamagedCheckpoint as error:
                logger.warning("checkpoint refused: %s", error)
                problems.append(str(error))
                continue
            return self.folder / name
        if problems:
            raise DamagedCheckpoint("no checkpoint is whole: " + "; ".join(problems))
        return None

    def prune(self, keep: int) -> list[str]:
        """Remove all but the ``keep`` newest steps, the one with the best score and what ``LATEST`` names; and what
        was left half written. Returns the names of those that stay."""
        for prefix in (_ASIDE, _OLD, _GONE, FETCHED):
            for leftover in self.folder.glob(prefix + "*"):
                self._disk.remove(leftover)
        whole, broken = {}, []
        for name in self.names():
            try:
                whole[name] = read_manifest(self.folder / name)
            except DamagedCheckpoint as error:
                logger.warning("removing a damaged checkpoint: %s", error)
                broken.append(name)
        newest = sorted(whole, key=step_of, reverse=True)
        scores = {name: manifest.score for name, manifest in whole.items() if manifest.score is not None}
        best = max(scores, key=lambda name: (scores[name], step_of(name)), default=None)
        stay = [name for name in newest if name in newest[:keep] or name in (best, self.latest)]
        for name in [*broken, *(name for name in newest if name not in stay)]:
            self._disk.rename(self.folder / name, self.folder / (_GONE + name))  # never half of one by its name
            self._disk.remove(self.folder / (_GONE + name))
        return stay


def name_of(step: int) -> str:
    return f"step-{step:06d}"


def step_of(name: str) -> int:
    """Raises ValueError for a name that is no checkpoint's."""
    if (match := _NAME.fullmatch(name)) is None:
        raise ValueError(f"{name!r} is not the name of a checkpoint (step-000050)")
    return int(match[1])


def read_manifest(folder: Path) -> Manifest:
    """Raises DamagedCheckpoint where it is missing, not JSON, of another format, or names a file outside."""
    try:
        found: Any = json.loads((folder / MANIFEST).read_bytes())
        files = {str(name): (int(size), str(digest)) for name, (size, digest) in found["files"].items()}
        manifest = Manifest(int(found["step"]), found["score"], files, int(found["format"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(f"{folder}: {MANIFEST} cannot be read ({type(error).__name__}: {error})") from error
    if manifest.format != FORMAT:
        raise DamagedCheckpoint(f"{folder}: format {manifest.format}, this version reads {FORMAT}")
    if outside := [name for name in files if Path(name).name != name or name in ("", ".", "..")]:
        raise DamagedCheckpoint(f"{folder}: {MANIFEST} names {outside}, which are no files of its own")
    return manifest


def check(folder: Path) -> Manifest:
    """Read every file and compare. Raises DamagedCheckpoint naming the first that differs."""
    manifest = read_manifest(folder)
    if name_of(manifest.step) != folder.name:
        raise DamagedCheckpoint(f"{folder}: {MANIFEST} is of step {manifest.step}")
    for name, (size, digest) in manifest.files.items():
        path = folder / name
        if not path.is_file() or path.is_symlink():
            raise DamagedCheckpoint(f"{folder}: {name} is missing")
        if path.stat().st_size != size:
            raise DamagedCheckpoint(f"{folder}: {name} has {path.stat().st_size} bytes, not {size}")
        with path.open("rb") as file:
            if hashlib.file_digest(file, _digest).hexdigest() != digest:
                raise DamagedCheckpoint(f"{folder}: the checksum of {name} differs")
    return manifest


def as_json(manifest: Manifest) -> bytes:
    return (json.dumps(asdict(manifest), indent=1) + "\n").encode()


class _Noted:
    """A file that counts and digests what is written to it."""

    closed = False

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.size, self.digest = file, 0, _digest()

    def write(self, content: bytes) -> int:
        self.digest.update(content)
        self.size += len(memoryview(content).cast("B"))
        return self._file.write(content)

    def flush(self) -> None:
        self._file.flush()


def _digest() -> Any:
    return hashlib.blake2b(digest_size=32)


def _sync_folder(folder: Path) -> None:
    """Names are on the disk, too, after this."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
