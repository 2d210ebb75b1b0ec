"""Copies of a run's checkpoints behind a URL (fsspec): for machines that come and go."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from ergo_rl.jobs.saving.checkpoints import (
    FETCHED,
    LATEST,
    MANIFEST,
    DamagedCheckpoint,
    Shelf,
    check,
    name_of,
    read_manifest,
    step_of,
)

logger = logging.getLogger(__name__)

ATTEMPTS = 4
BACKOFF_S = 2.0
T = TypeVar("T")


class Copies:
    """The checkpoints of one run under ``url``. Object stores cannot rename, so a checkpoint is there when its manifest
    is: it is the last of its files that is copied, and the first that is removed."""

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
        except Exception as error:  # every storage library has errors of its own
            raise OSError(f"checkpoint.url: cannot write to {self.url}: {type(error).__name__}: {error}") from error

    def put(self, folder: Path) -> None:
        """Copy one whole checkpoint, then move ``LATEST``. Raises OSError after a few attempts."""
        target = f"{self._root}/{folder.name}"
        names = [*read_manifest(folder).files, MANIFEST]

        def copy() -> None:
            self._remote.makedirs(target, exist_ok=True)
            if self._remote.exists(f"{target}/{MANIFEST}"):  # of another life of this run
                self._remote.rm_file(f"{target}/{MANIFEST}")
            for name in names:
                self._remote.put_file(str(folder / name), f"{target}/{name}")
            self._remote.pipe_file(f"{self._root}/{LATEST}", folder.name.encode() + b"\n")

        self._attempt(copy, f"copy {folder} to {self.url}")

    def names(self) -> list[str]:
        """Those with a manifest, in the order in which they should be tried."""
        if not self._remote.exists(self._root):
            return []
        found = [Path(path).parent.name for path in self._remote.glob(f"{self._root}/step-*/{MANIFEST}")]
        pointer = f"{self._root}/{LATEST}"
        latest = self._remote.cat_file(pointer).decode().strip() if self._remote.exists(pointer) else ""
        return sorted(sorted(found, key=step_of, reverse=True), key=lambda name: name != latest)

    def fetch(self, shelf: Shelf) -> Path | None:
        """Bring the first whole one to ``shelf``; None where there is none.

        Raises DamagedCheckpoint where there are checkpoints and not one is whole, OSError."""
        problems = []
        for name in self._attempt(self.names, f"list {self.url}"):
            try:
                return self._attempt(partial(self._bring, name, shelf), f"fetch {self.url}/{name}")
            except DamagedCheckpoint as error:
                logger.warning("checkpoint refused: %s", error)
                problems.append(str(error))
        if problems:
            raise DamagedCheckpoint("no checkpoint is whole: " + "; ".join(problems))
        return None

    def prune(self, stay: list[str]) -> None:
        """Remove all but these. Raises OSError after a few attempts."""

        def remove() -> None:
            for name in self.names():
                if name not in stay:
                    self._remote.rm_file(f"{self._root}/{name}/{MANIFEST}")
                    self._remote.rm(f"{self._root}/{name}", recursive=True)

        self._attempt(remove, f"remove old checkpoints from {self.url}")

    def _bring(self, name: str, shelf: Shelf) -> Path:
        source = f"{self._root}/{name}"
        aside = shelf.folder / (FETCHED + name) / name
        aside.mkdir(parents=True, exist_ok=True)
        self._remote.get_file(f"{source}/{MANIFEST}", str(aside / MANIFEST))
        for file in read_manifest(aside).files:
            self._remote.get_file(f"{source}/{file}", str(aside / file))
        manifest = check(aside)
        with shelf.draft(manifest.step, manifest.score) as draft:
            for file in manifest.files:
                with draft.create(file) as target, (aside / file).open("rb") as whole:
                    while piece := whole.read(1 << 24):
                        target.write(piece)
        for leftover in [*aside.iterdir(), aside, aside.parent]:
            leftover.rmdir() if leftover.is_dir() else leftover.unlink()
        return shelf.folder / name_of(manifest.step)

    @staticmethod
    def _attempt(work: Callable[[], T], what: str) -> T:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return work()
            except DamagedCheckpoint:
                raise
            except Exception as error:  # every storage library has errors of its own
                message = f"could not {what}: {type(error).__name__}: {error}"
                if attempt == ATTEMPTS:
                    raise OSError(f"{message} ({ATTEMPTS} attempts)") from error
                logger.warning("%s; trying again", message)
                time.sleep(BACKOFF_S * 2 ** (attempt - 1))
        raise AssertionError("unreachable")
