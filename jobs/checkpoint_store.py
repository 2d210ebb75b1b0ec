"""Checkpoints on disk and behind a URL: complete or not there at all, verified when read, old ones removed last.

There is one folder per step. It is written under another name (``.writing-...``), every file is forced to the disk, a
manifest with sizes and checksums comes last, then the folder is renamed, then ``LATEST`` moves, and only then are old
checkpoints removed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeVar

from ergo_rl.errors import ErgoError
from ergo_rl.jobs.run_paths import step_folder

logger = logging.getLogger(__name__)

FORMAT = 1
MANIFEST = "manifest.json"
LATEST = "LATEST"
ATTEMPTS, BACKOFF_S = 4, 2.0
"""To reach a remote store; the wait is doubled each time."""
T = TypeVar("T")
_NAME = re.compile(r"step-(\d{6,})")
_FETCHED, _WRITING = ".fetched-", ".writing-"
_OLD = ".old-"
"""Prefix of a checkpoint that is being replaced by another one of the same step."""
_REMOVING = ".gone-"


class DamagedCheckpoint(ErgoError, ValueError):
    """A checkpoint is not what its manifest says; the message names the folder, the file and the difference."""


@dataclass(frozen=True, slots=True)
class Manifest:
    step: int
    score: float | None
    """Of the evaluation after this step, where there was one."""
    files: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Size in bytes and blake2b digest (hex), by name."""
    format: int = FORMAT


class FileSystem:
    """Every kind of change that a save makes on disk, a method each, so that a test can fail at any of them."""

    def make(self, folder: Path) -> None:
        folder.mkdir(parents=True)

    @contextmanager
    def create(self, path: Path) -> Iterator[IO[bytes]]:
        """Create a file; it is on the disk when the block is left."""
        with path.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())

    def rename(self, path: Path, target: Path) -> None:
        """Rename atomically; the new name is on the disk when this returns."""
        path.replace(target)
        _sync_folder(target.parent)

    def remove(self, path: Path) -> None:
        """Remove a file, or a folder and all that is in it, if it exists."""
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


class CheckpointWriter:
    """Writes the files of one checkpoint."""

    def __init__(self, folder: Path, files: FileSystem) -> None:
        self.folder, self._files = folder, files
        self.files: dict[str, tuple[int, str]] = {}

    @contextmanager
    def create(self, name: str) -> Iterator[IO[bytes]]:
        """Create a file; its size and checksum are computed while it is written."""
        with self._files.create(self.folder / name) as file:
            hashed = _HashedFile(file)
            yield hashed  # type: ignore[misc]
        self.files[name] = (hashed.size, hashed.digest.hexdigest())

    def write(self, name: str, content: bytes) -> None:
        with self.create(name) as file:
            file.write(content)


class CheckpointStore:
    """The checkpoints of one run in a local folder.

    Example::

        store = CheckpointStore(run / "checkpoints")
        with store.write(step=50) as checkpoint:
            checkpoint.write("state.json", b"{}")
        store.newest()  # run/checkpoints/step-000050
    """

    def __init__(self, folder: Path, files: FileSystem | None = None) -> None:
        self.folder, self._files = folder, files or FileSystem()

    @contextmanager
    def write(self, step: int, score: float | None = None) -> Iterator[CheckpointWriter]:
        """Write a checkpoint within the block; it exists, and is ``LATEST``, once the block was left without an error.

        Another checkpoint of the same step is replaced.

        Raises OSError."""
        name = step_folder(step)
        temporary, old, final = self.folder / (_WRITING + name), self.folder / (_OLD + name), self.folder / name
        self.folder.mkdir(parents=True, exist_ok=True)
        self._files.remove(temporary)
        self._files.make(temporary)
        writer = CheckpointWriter(temporary, self._files)
        yield writer
        manifest = Manifest(step, score, writer.files)
        with self._files.create(temporary / MANIFEST) as file:
            file.write(as_json(manifest))
        _sync_folder(temporary)
        if final.exists():
            self._files.remove(old)
            self._files.rename(final, old)
        self._files.rename(temporary, final)
        self._set_latest(name)
        self._files.remove(old)

    def _set_latest(self, name: str) -> None:
        temporary = self.folder / (_WRITING + LATEST)
        self._files.remove(temporary)
        with self._files.create(temporary) as file:
            file.write(name.encode() + b"\n")
        self._files.rename(temporary, self.folder / LATEST)

    def names(self) -> list[str]:
        """Return the names in the order in which to try them: ``LATEST``, then from the newest step to the oldest.

        They are not verified."""
        found = [path.name for path in self.folder.glob("step-*") if _NAME.fullmatch(path.name)]
        found.sort(key=step_of, reverse=True)
        latest = self.latest
        return sorted(found, key=lambda name: name != latest)

    @property
    def latest(self) -> str:
        """The name in ``LATEST``; empty where there is none."""
        pointer = self.folder / LATEST
        return pointer.read_text().strip() if pointer.is_file() else ""

    def newest(self) -> Path | None:
        """Return the first of ``names`` that is intact; None where there are no checkpoints. Damaged ones are logged.

        Raises DamagedCheckpoint where there are checkpoints and none is intact."""
        problems = []
        for old in self.folder.glob(_OLD + "step-*"):
            if not (final := self.folder / old.name.removeprefix(_OLD)).exists():
                self._files.rename(old, final)  # stopped before the new checkpoint was renamed
        for name in self.names():
            try:
                verify_checkpoint(self.folder / name)
            except DamagedCheckpoint as error:
                logger.warning("checkpoint refused: %s", error)
                problems.append(str(error))
                continue
            return self.folder / name
        if problems:
            raise DamagedCheckpoint("no checkpoint is intact: " + "; ".join(problems))
        return None

    def prune(self, keep: int) -> list[str]:
        """Remove all but the ``keep`` newest steps, the one with the best score and ``LATEST``; and what was left half
        written. Returns the names that stay."""
        for prefix in (_WRITING, _OLD, _REMOVING, _FETCHED):
            for leftover in self.folder.glob(prefix + "*"):
                self._files.remove(leftover)
        intact, damaged = {}, []
        for name in self.names():
            try:
                intact[name] = read_manifest(self.folder / name)
            except DamagedCheckpoint as error:
                logger.warning("removing a damaged checkpoint: %s", error)
                damaged.append(name)
        newest = sorted(intact, key=step_of, reverse=True)
        scores = {name: manifest.score for name, manifest in intact.items() if manifest.score is not None}
        best = max(scores, key=lambda name: (scores[name], step_of(name)), default=None)
        stay = [name for name in newest if name in newest[:keep] or name in (best, self.latest)]
        for name in [*damaged, *(name for name in newest if name not in stay)]:
            # Renamed first, so that no half-removed folder has the name of a checkpoint.
            self._files.rename(self.folder / name, self.folder / (_REMOVING + name))
            self._files.remove(self.folder / (_REMOVING + name))
        return stay


def step_of(name: str) -> int:
    """Return the step of a checkpoint's name. Raises ValueError for another name."""
    if (match := _NAME.fullmatch(name)) is None:
        raise ValueError(f"{name!r} is not the name of a checkpoint (step-000050)")
    return int(match[1])


def read_manifest(folder: Path) -> Manifest:
    """Raises DamagedCheckpoint where it is missing, not JSON, of another format, or names a file outside."""
    try:
        content: Any = json.loads((folder / MANIFEST).read_bytes())
        files = {str(name): (int(size), str(digest)) for name, (size, digest) in content["files"].items()}
        manifest = Manifest(int(content["step"]), content["score"], files, int(content["format"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(f"{folder}: {MANIFEST} cannot be read ({type(error).__name__}: {error})") from error
    if manifest.format != FORMAT:
        raise DamagedCheckpoint(f"{folder}: format {manifest.format}, this version reads {FORMAT}")
    if outside := [name for name in files if Path(name).name != name or name in ("", ".", "..")]:
        raise DamagedCheckpoint(f"{folder}: {MANIFEST} names {outside}, which are no files of its own")
    return manifest


def verify_checkpoint(folder: Path) -> Manifest:
    """Read every file and compare it with the manifest. Raises DamagedCheckpoint naming the first that differs."""
    manifest = read_manifest(folder)
    if step_folder(manifest.step) != folder.name:
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


class RemoteStore:
    """RemoteStore of a run's checkpoints under an fsspec URL, for machines that come and go.

    Object stores cannot rename, so a checkpoint exists when its manifest does: of all files it is uploaded last and
    removed first."""

    def __init__(self, url: str) -> None:
        """Raises ValueError or ImportError for a protocol that fsspec does not know or has no package for."""
        import fsspec

        self.url = url.rstrip("/")
        found: tuple[Any, str] = fsspec.core.url_to_fs(self.url)
        self._remote, self._root = found

    def probe(self) -> None:
        """Raises OSError, naming the URL, where nothing can be written there."""
        try:
            self._remote.makedirs(self._root, exist_ok=True)
            self._remote.pipe_file(f"{self._root}/.probe", b"ergo-rl\n")
            self._remote.rm_file(f"{self._root}/.probe")
        except Exception as error:  # storage libraries raise errors of their own
            raise OSError(f"checkpoint.url: cannot write to {self.url}: {type(error).__name__}: {error}") from error

    def upload(self, folder: Path) -> None:
        """Copy one checkpoint, then move ``LATEST``. Raises OSError after a few attempts."""
        target = f"{self._root}/{folder.name}"
        names = [*read_manifest(folder).files, MANIFEST]

        def copy() -> None:
            self._remote.makedirs(target, exist_ok=True)
            if self._remote.exists(f"{target}/{MANIFEST}"):  # uploaded before the run was resumed
                self._remote.rm_file(f"{target}/{MANIFEST}")
            for name in names:
                self._remote.put_file(str(folder / name), f"{target}/{name}")
            self._remote.pipe_file(f"{self._root}/{LATEST}", folder.name.encode() + b"\n")

        self._retry(copy, f"copy {folder} to {self.url}")

    def names(self) -> list[str]:
        """Return the checkpoints that have a manifest, in the order in which to try them."""
        if not self._remote.exists(self._root):
            return []
        found = [Path(path).parent.name for path in self._remote.glob(f"{self._root}/step-*/{MANIFEST}")]
        pointer = f"{self._root}/{LATEST}"
        latest = self._remote.cat_file(pointer).decode().strip() if self._remote.exists(pointer) else ""
        return sorted(sorted(found, key=step_of, reverse=True), key=lambda name: name != latest)

    def download(self, store: CheckpointStore) -> Path | None:
        """Copy the first intact checkpoint to ``store`` and return its folder; None where there are none.

        Raises DamagedCheckpoint where there are checkpoints and none is intact, OSError."""
        problems = []
        for name in self._retry(self.names, f"list {self.url}"):
            try:
                return self._retry(partial(self._download, name, store), f"fetch {self.url}/{name}")
            except DamagedCheckpoint as error:
                logger.warning("checkpoint refused: %s", error)
                problems.append(str(error))
        if problems:
            raise DamagedCheckpoint("no checkpoint is intact: " + "; ".join(problems))
        return None

    def prune(self, stay: list[str]) -> None:
        """Remove all but ``stay``. Raises OSError after a few attempts."""

        def remove() -> None:
            for name in self.names():
                if name not in stay:
                    self._remote.rm_file(f"{self._root}/{name}/{MANIFEST}")
                    self._remote.rm(f"{self._root}/{name}", recursive=True)

        self._retry(remove, f"remove old checkpoints from {self.url}")

    def _download(self, name: str, store: CheckpointStore) -> Path:
        source = f"{self._root}/{name}"
        temporary = store.folder / (_FETCHED + name) / name
        temporary.mkdir(parents=True, exist_ok=True)
        self._remote.get_file(f"{source}/{MANIFEST}", str(temporary / MANIFEST))
        for file in read_manifest(temporary).files:
            self._remote.get_file(f"{source}/{file}", str(temporary / file))
        manifest = verify_checkpoint(temporary)
        with store.write(manifest.step, manifest.score) as writer:
            for file in manifest.files:
                with writer.create(file) as target, (temporary / file).open("rb") as source_file:
                    while piece := source_file.read(1 << 24):
                        target.write(piece)
        for leftover in [*temporary.iterdir(), temporary, temporary.parent]:
            leftover.rmdir() if leftover.is_dir() else leftover.unlink()
        return store.folder / step_folder(manifest.step)

    @staticmethod
    def _retry(work: Callable[[], T], what: str) -> T:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return work()
            except DamagedCheckpoint:
                raise
            except Exception as error:  # storage libraries raise errors of their own
                message = f"could not {what}: {type(error).__name__}: {error}"
                if attempt == ATTEMPTS:
                    raise OSError(f"{message} ({ATTEMPTS} attempts)") from error
                logger.warning("%s; trying again", message)
                time.sleep(BACKOFF_S * 2 ** (attempt - 1))
        raise AssertionError("unreachable")


class _HashedFile:
    """Counts and digests what is written to a file."""

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
    """Force the names in ``folder`` to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
