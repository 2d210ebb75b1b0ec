"""Checkpoints on disk: complete or not there at all, verified when read, old ones removed last.

There is one folder per step. It is written under another name (``.writing-...``), every file is forced to the disk, a
manifest with sizes and checksums comes last, then the folder is renamed, then ``LATEST`` moves, and only then are old
checkpoints removed. Copies behind a URL are in ``jobs.remote_store``.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import math
import os
import re
import reprlib
import shutil
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from ergo_rl.errors import ErgoError
from ergo_rl.jobs.run_paths import replace_file, step_folder, sync_folder

logger = logging.getLogger(__name__)

FORMAT = 1
MANIFEST = "manifest.json"
LATEST = "LATEST"
RUN_ID = ".run-id"
"""Names the run that writes into the folder; every manifest repeats it, so that copies of another run are known."""
STATE_BYTES = 16 << 20
"""Largest manifest that is read, in bytes: one of ours has 100 for each file."""
_NAME = re.compile(r"step-(\d{6,18})", re.ASCII)
_FILE = re.compile(r"\w[\w.-]{0,199}", re.ASCII)
_DIGEST = re.compile(r"[0-9a-f]{64}")
_WRITING, FETCHED = ".writing-", ".fetched-"
_OLD = ".old-"
"""Prefix of a checkpoint that is being replaced by another one of the same step."""
_REMOVING = ".gone-"


class DamagedCheckpoint(ErgoError, ValueError):
    """A checkpoint is not what its manifest says; the message names the folder, the file and the difference."""


class NewerCheckpoint(DamagedCheckpoint):
    """A checkpoint of a format that this version does not know. It is neither loaded nor removed."""


@dataclass(frozen=True, slots=True)
class Manifest:
    step: int
    score: float | None
    """Of the evaluation after this step, where there was one."""
    files: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Size in bytes and blake2b digest (hex), by name."""
    format: int = FORMAT
    run: str = ""
    """Id of the run that wrote it; empty for a version that noted none."""


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
        sync_folder(target.parent)

    def link(self, path: Path, source: Path) -> None:
        """Give a file that does not change a second name; where the disk has no such thing, copy it."""
        try:
            os.link(source, path)
        except OSError:
            shutil.copyfile(source, path)

    def remove(self, path: Path) -> None:
        """Remove a file or a link, or a folder and all that is in it, if it exists."""
        if path.is_dir() and not path.is_symlink():
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

    def share(self, name: str, earlier: Path, entry: tuple[int, str]) -> None:
        """Take a file over from an ``earlier`` checkpoint, whose manifest has this ``entry`` for it."""
        self._files.link(self.folder / name, earlier / name)
        self.files[name] = entry


class CheckpointStore:
    """The checkpoints of a run, in a folder of their own.

    Example::

        store = CheckpointStore(run / "checkpoints")
        with store.write(step=50) as checkpoint:
            checkpoint.write("state.json", b"{}")
        store.newest()  # run/checkpoints/step-000050
    """

    def __init__(self, folder: Path, files: FileSystem | None = None) -> None:
        self.folder, self._files = folder, files or FileSystem()

    @property
    def run_id(self) -> str:
        """Id of the run that writes here; made when it is asked for the first time. Raises OSError."""
        with contextlib.suppress(FileNotFoundError):
            if re.fullmatch(r"[0-9a-f]{32}", found := _text(self.folder / RUN_ID)):
                return found
            logger.warning("%s holds no id of a run and is written anew", self.folder / RUN_ID)
        return self.adopt(uuid.uuid4().hex)

    def adopt(self, run_id: str) -> str:
        """Go on as the run of this id, on a machine that did not begin it. Raises OSError."""
        self.folder.mkdir(parents=True, exist_ok=True)
        replace_file(self.folder / RUN_ID, run_id.encode() + b"\n")
        return run_id

    @contextmanager
    def write(self, step: int, score: float | None = None) -> Iterator[CheckpointWriter]:
        """Write a checkpoint within the block; it exists, and is ``LATEST``, once the block was left without an error.

        Another checkpoint of the same step is replaced. After an error all that was written is removed.

        Raises OSError."""
        temporary = self.folder / (_WRITING + step_folder(step))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._files.remove(temporary)
            self._files.make(temporary)
            writer = CheckpointWriter(temporary, self._files)
            yield writer
            self.publish(temporary, Manifest(step, score, writer.files, run=self.run_id))
        except (Exception, asyncio.CancelledError):
            with contextlib.suppress(OSError):  # else the remains of a save would keep a full disk full
                self._files.remove(temporary)
            raise

    def publish(self, temporary: Path, manifest: Manifest) -> Path:
        """Turn a folder that holds the files of ``manifest`` into a checkpoint, and return its path. Raises OSError."""
        name = step_folder(manifest.step)
        old, final = self.folder / (_OLD + name), self.folder / name
        with self._files.create(temporary / MANIFEST) as file:
            file.write(as_json(manifest))
        sync_folder(temporary)
        self._step_aside(final)
        if os.path.lexists(final):
            self._files.remove(old)
            self._files.rename(final, old)
        self._files.rename(temporary, final)
        try:
            self._set_latest(name)
        except OSError:
            self._files.rename(final, temporary)
            if os.path.lexists(old):
                self._files.rename(old, final)
            raise
        return final

    def _step_aside(self, folder: Path) -> None:
        """Rename a checkpoint of a newer version that has the name of one that is about to be written."""
        try:
            read_manifest(folder)
        except NewerCheckpoint as error:
            aside = folder.with_name(f"{folder.name}.newer-{uuid.uuid4().hex[:8]}")
            logger.warning("%s; it is kept as %s", error, aside.name)
            self._files.rename(folder, aside)
        except DamagedCheckpoint:
            return

    def _set_latest(self, name: str) -> None:
        temporary = self.folder / (_WRITING + LATEST)
        self._files.remove(temporary)
        try:
            with self._files.create(temporary) as file:
                file.write(name.encode() + b"\n")
            self._files.rename(temporary, self.folder / LATEST)
        except OSError:
            self._files.remove(temporary)
            raise

    def names(self) -> list[str]:
        """Return the names in the order in which to try them: ``LATEST``, then from the newest step to the oldest.

        They are not verified."""
        return in_order((path.name for path in _below(self.folder, "step-")), self.latest)

    @property
    def latest(self) -> str:
        """The name in ``LATEST``; empty where there is none."""
        try:
            return _text(self.folder / LATEST)
        except OSError as error:
            if not isinstance(error, FileNotFoundError):
                logger.warning("%s cannot be read (%s); the newest step counts", self.folder / LATEST, error)
            return ""

    def newest(self) -> Path | None:
        """Return the first of ``names`` that is intact; None where there are no checkpoints. Damaged ones are logged.

        Raises DamagedCheckpoint where there are checkpoints and none is intact."""
        problems = []
        for old in _below(self.folder, _OLD + "step-"):
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

    def tidy(self) -> None:
        """Remove what was left half written."""
        for prefix in (_WRITING, _REMOVING, FETCHED, _OLD):
            for leftover in _below(self.folder, prefix):
                if prefix != _OLD or (self.folder / leftover.name.removeprefix(_OLD)).exists():
                    self._files.remove(leftover)

    def prune(self, keep: int, busy: Collection[str] = ()) -> list[str]:
        """Remove all but the ``keep`` newest steps, the one with the best score, ``LATEST`` and those that are
        ``busy``; and what was left half written. Returns the names that stay.

        Checkpoints of another run or of a newer version, and what cannot be read for the moment, are left alone."""
        self.tidy()
        intact, damaged = {}, []
        for name in self.names():
            try:
                intact[name] = read_manifest(self.folder / name)
            except DamagedCheckpoint as error:
                if _is_rubbish(error):
                    logger.warning("removing a damaged checkpoint: %s", error)
                    damaged.append(name)
        mine = {name: manifest for name, manifest in intact.items() if manifest.run in ("", self.run_id)}
        newest = sorted(mine, key=step_of, reverse=True)
        scores = {name: manifest.score for name, manifest in mine.items() if manifest.score is not None}
        best = max(scores, key=lambda name: (scores[name], step_of(name)), default=None)
        stay = [name for name in newest if name in (*newest[:keep], best, self.latest, *busy)]
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


def in_order(found: Iterator[str], latest: str) -> list[str]:
    """Return those that are names of checkpoints, in the order in which to try them; other names are foreign."""
    names = sorted(filter(_NAME.fullmatch, found), key=step_of, reverse=True)
    return sorted(names, key=lambda name: name != latest)


def read_manifest(folder: Path) -> Manifest:
    """Raises DamagedCheckpoint where it is missing or no manifest, or names a file outside; NewerCheckpoint."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise DamagedCheckpoint(f"{folder} is no folder")
    try:
        with (folder / MANIFEST).open("rb") as file:
            content = file.read(STATE_BYTES + 1)
    except OSError as error:
        raise DamagedCheckpoint(f"{folder}: {MANIFEST} cannot be read ({type(error).__name__}: {error})") from error
    return parse_manifest(content, str(folder))


def parse_manifest(content: bytes, place: str) -> Manifest:
    """Return the manifest of the checkpoint at ``place``. Raises as ``read_manifest``."""
    try:
        if len(content) > STATE_BYTES:
            raise ValueError(f"it has more than {STATE_BYTES} bytes")
        cells = json.loads(content)
        version = _whole("format", cells["format"])
        if version > FORMAT:  # all else may be different in it
            raise NewerCheckpoint(f"{place}: format {version}, this version reads {FORMAT}; it is left alone")
        files = {name: (_whole("size", size), digest) for name, (size, digest) in cells["files"].items()}
        manifest = Manifest(_whole("step", cells["step"]), _score(cells["score"]), files, version, cells.get("run", ""))
        if not files or not isinstance(manifest.run, str):
            raise ValueError("it names no files" if not files else "its run is no text")
        if outside := [name for name in files if not _FILE.fullmatch(name) or name == MANIFEST]:
            raise DamagedCheckpoint(
                f"{place}: {MANIFEST} names {reprlib.repr(outside)}, which are no files of its own"
            ) from ValueError("names")
        if wrong := next((repr(digest) for _, digest in files.values() if not _is_digest(digest)), ""):
            raise ValueError(f"{wrong[:80]} is no checksum")
    except DamagedCheckpoint:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise DamagedCheckpoint(f"{place}: {MANIFEST} cannot be read ({reason})") from error
    return manifest


def verify_checkpoint(folder: Path) -> Manifest:
    """Read every file and compare it with the manifest. Raises DamagedCheckpoint naming the first that differs.

    Records that differ are logged: checkpoints share them (``jobs.record_parts``), and the run needs none of them."""
    manifest = read_manifest(folder)
    if step_folder(manifest.step) != folder.name:
        raise DamagedCheckpoint(f"{folder}: {MANIFEST} is of step {manifest.step}")
    for name, (size, digest) in manifest.files.items():
        if not (problem := _difference(folder / name, size, digest)):
            continue
        if not name.endswith(".jsonl"):
            raise DamagedCheckpoint(f"{folder}: {problem}")
        logger.warning("%s: %s; all but this record is whole", folder, problem)
    return manifest


def _difference(path: Path, size: int, digest: str) -> str:
    """Say how a file differs from its entry in the manifest; empty where it does not."""
    if not path.is_file() or path.is_symlink():
        return f"{path.name} is missing"
    try:
        with path.open("rb") as file:
            if (there := os.fstat(file.fileno()).st_size) != size:
                return f"{path.name} has {there} bytes, not {size}"
            if hashlib.file_digest(file, new_digest).hexdigest() != digest:
                return f"the checksum of {path.name} differs"
    except OSError as error:
        return f"{path.name} cannot be read: {error}"
    return ""


def as_json(manifest: Manifest) -> bytes:
    return (json.dumps(asdict(manifest), indent=1) + "\n").encode()


def new_digest() -> Any:
    return hashlib.blake2b(digest_size=32)


class _HashedFile:
    """Counts and digests what is written to a file."""

    closed = False

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.size, self.digest = file, 0, new_digest()

    def write(self, content: bytes) -> int:
        self.digest.update(content)
        self.size += len(memoryview(content).cast("B"))
        return self._file.write(content)

    def flush(self) -> None:
        self._file.flush()


def _whole(what: str, value: object) -> int:
    if type(value) is not int or not 0 <= value < 10**18:
        raise ValueError(f"{what} is {reprlib.repr(value)}, not a whole number")
    return value


def _score(value: object) -> float | None:
    """A figure that is no number is no score: older versions wrote NaN."""
    if value is not None and (not isinstance(value, int | float) or isinstance(value, bool)):
        raise ValueError(f"score is {reprlib.repr(value)}, not a number")
    return value if value is not None and math.isfinite(value) else None


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None


def _is_rubbish(error: DamagedCheckpoint) -> bool:
    """Whether what was refused may be removed: not what is newer, a link or a file, or on a disk that fails."""
    cause = error.__cause__
    return cause is not None and (isinstance(cause, FileNotFoundError) or not isinstance(cause, OSError))


def _below(folder: Path, prefix: str) -> list[Path]:
    """What is in ``folder`` under names that begin with ``prefix``; nothing where there is no folder."""
    return [path for path in folder.iterdir() if path.name.startswith(prefix)] if folder.is_dir() else []


def _text(path: Path) -> str:
    """The first line of a small file, whatever is in it. Raises OSError."""
    with path.open("rb") as file:
        return file.read(300).decode(errors="replace").strip()
