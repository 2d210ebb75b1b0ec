"""Copies of checkpoints behind ``checkpoint.url``, for machines that come and go: ``URL/RUN/step-...``.

Object stores cannot rename, so a copy exists when its manifest does: of all its files it is uploaded last and removed
first. Whatever is there belongs to a run, whose id is in the manifest; only copies of the own run are replaced or
removed. Who may write is settled by an owner record (``jobs.lease``).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from ergo_rl.errors import ErgoError
from ergo_rl.jobs.checkpoint_store import (
    FETCHED,
    LATEST,
    MANIFEST,
    RUN_ID,
    CheckpointStore,
    DamagedCheckpoint,
    Manifest,
    NewerCheckpoint,
    in_order,
    parse_manifest,
    read_manifest,
    step_of,
    verify_checkpoint,
)
from ergo_rl.jobs.config import CheckpointConfig
from ergo_rl.jobs.lease import Lease, RunTakenOver
from ergo_rl.jobs.run_paths import ENDED
from ergo_rl.jobs.storage import FIRST_WAIT_S, MAX_WAIT_S, Storage, first_line, patiently

logger = logging.getLogger(__name__)


class RemoteRuns:
    """All runs under ``checkpoint.url``."""

    def __init__(self, config: CheckpointConfig) -> None:
        """Raises ConfigError for a URL that cannot be used here, OSError where nothing can be written there."""
        self._storage, self._deadline_s = Storage.open(config.url), config.outage_deadline_s
        patiently(self._probe, f"write to {config.url}", self._deadline_s)

    def names(self) -> list[str]:
        return patiently(self._storage.names, f"list {self._storage.url}", self._deadline_s)

    def run(self, name: str) -> RemoteStore:
        return RemoteStore(self._storage.below(name), self._deadline_s)

    def _probe(self) -> None:
        name = f".probe-{uuid.uuid4().hex}"  # two runs may start at once
        self._storage.write(name, b"ergo-rl\n")
        self._storage.remove(name)


class RemoteStore:
    """The copies of one run. Reading waits for a storage that does not answer; ``upload`` and ``prune`` do not."""

    def __init__(self, storage: Storage | str, deadline_s: float = 0.0) -> None:
        """Raises ConfigError for a URL that cannot be used here."""
        self._storage = Storage.open(storage) if isinstance(storage, str) else storage
        self._deadline_s = deadline_s
        self.url = self._storage.url
        self.lease: Lease | None = None
        self._run = ""
        self.last_progress = time.monotonic()
        """When a file was uploaded last."""

    def acquire(self) -> None:
        """Become the only one who writes here. Raises RunInUse, OSError."""
        self.lease = patiently(lambda: Lease.acquire(self._storage), f"own {self.url}", self._deadline_s)

    def names(self) -> list[str]:
        """Return the copies that have a manifest, in the order in which to try them."""

        def find() -> list[str]:
            latest = (self._storage.read(LATEST) or b"")[:300].decode(errors="replace").strip()
            found = in_order(iter(self._storage.names()), latest)
            return [name for name in found if MANIFEST in self._storage.below(name).names()]

        return patiently(find, f"list {self.url}", self._deadline_s)

    def readable(self) -> list[tuple[str, Manifest]]:
        """Return the copies that this version can read by their manifests, the highest step first."""
        found = []
        for name in sorted(self.names(), key=step_of, reverse=True):
            try:
                manifest = patiently(lambda name=name: self._manifest(name), f"read {self.url}", self._deadline_s)  # type: ignore[misc]
            except DamagedCheckpoint as error:
                logger.warning("checkpoint refused: %s", error)
                continue
            if manifest is not None:
                found.append((name, manifest))
        return found

    def is_done(self) -> bool:
        """Whether the run has said that it is finished."""
        content = patiently(lambda: self._storage.read(ENDED), f"read {self.url}/{ENDED}", self._deadline_s)
        try:
            return content is not None and json.loads(content)["done"] is True
        except (ValueError, LookupError, TypeError, RecursionError):
            logger.warning("%s/%s cannot be read; the checkpoints decide", self.url, ENDED)
            return False

    def mark_ended(self, content: bytes) -> None:
        """Say how the run ended. Raises as ``upload``."""
        self._check_owner()
        self._storage.write(ENDED, content)

    def download(self, store: CheckpointStore, above: int = -1, adopt: bool = False) -> Path | None:
        """Copy the newest intact checkpoint of more than ``above`` steps to ``store`` and return its folder; None where
        there are none.

        adopt: go on as the run that wrote it, else as the run of ``store``. Raises DamagedCheckpoint where there are
        checkpoints and none is intact, OSError."""
        names, problems = [name for name in self.names() if step_of(name) > above], []
        for name in names:
            try:
                return patiently(
                    lambda name=name: self._download(name, store, adopt),  # type: ignore[misc]
                    f"fetch {self.url}/{name}",
                    self._deadline_s,
                )
            except DamagedCheckpoint as error:
                logger.warning("checkpoint refused: %s", error)
                problems.append(str(error))
        if problems:
            raise DamagedCheckpoint("no checkpoint is intact: " + "; ".join(problems))
        return None

    def upload(self, folder: Path) -> None:
        """Copy one checkpoint, then move ``LATEST``. Raises RunTakenOver, and what the storage raises."""
        self._check_owner()
        manifest, target = read_manifest(folder), self._storage.below(folder.name)
        self._run = manifest.run
        try:
            there = self._manifest(folder.name)
        except NewerCheckpoint as error:
            logger.warning("%s; %s is not copied", error, folder)
            return
        except DamagedCheckpoint:
            there = None
        if there is not None and there.run not in ("", manifest.run):
            raise RunTakenOver(f"{target.url} was written by another run ({there.run:.8}); it is not replaced")
        if there != manifest:
            target.write(RUN_ID, manifest.run.encode())
            target.remove(MANIFEST)
            for name in (*manifest.files, MANIFEST):
                target.upload(folder / name, name)
                self.last_progress = time.monotonic()
        self._storage.write(LATEST, folder.name.encode() + b"\n")

    def prune(self, stay: Sequence[str]) -> None:
        """Remove the copies of the run that was uploaded last, also unfinished ones, except ``stay``.

        Raises as ``upload``."""
        self._check_owner()
        for name in in_order(iter(self._storage.names()), ""):
            copy = self._storage.below(name)
            if name not in stay and self._run and (copy.read(RUN_ID) or b"").decode(errors="replace") == self._run:
                copy.remove(MANIFEST)
                copy.remove_folder()

    def close(self) -> None:
        if self.lease is not None:
            self.lease.release()

    def _check_owner(self) -> None:
        if self.lease is not None:
            self.lease.check()

    def _manifest(self, name: str) -> Manifest | None:
        place = self._storage.below(name)
        content = place.read(MANIFEST)
        return None if content is None else parse_manifest(content, place.url)

    def _download(self, name: str, store: CheckpointStore, adopt: bool) -> Path:
        source, temporary = self._storage.below(name), store.folder / (FETCHED + name) / name
        shutil.rmtree(temporary.parent, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            if (manifest := self._manifest(name)) is None:
                raise DamagedCheckpoint(f"{source.url}: {MANIFEST} is missing")
            source.download(MANIFEST, temporary / MANIFEST)
            for file in manifest.files:
                with contextlib.suppress(FileNotFoundError):  # it is missed below
                    source.download(file, temporary / file)
            manifest = verify_checkpoint(temporary)
            (temporary / MANIFEST).unlink()
            run = store.adopt(manifest.run) if adopt and manifest.run else store.run_id
            return store.publish(temporary, replace(manifest, run=run))
        finally:
            shutil.rmtree(temporary.parent, ignore_errors=True)


class BackgroundCopies:
    """Copies checkpoints while training goes on, the newest one where several wait. An outage is waited for.

    A thread of its own, because a call to a storage that hangs cannot be cancelled; it ends with the process."""

    def __init__(
        self, remote: RemoteStore, store: CheckpointStore, deadline_s: float, say: Callable[[str], None]
    ) -> None:
        self._remote, self._store, self._deadline_s, self._say = remote, store, deadline_s, say
        self._copy: tuple[str, list[str]] | None = None
        self._ended: bytes | None = None
        self._error: Exception | None = None
        self._changed = threading.Condition()
        self._closed = False
        threading.Thread(target=self._run, name="checkpoint-copies", daemon=True).start()

    @property
    def busy(self) -> list[str]:
        """Names of what is still to be written there."""
        return [*([self._copy[0]] if self._copy else []), *([ENDED] if self._ended else [])]

    def copy(self, name: str, stay: list[str]) -> None:
        """Have a checkpoint copied, and then all other copies but ``stay`` removed."""
        self._want(copy=(name, stay))

    def mark_ended(self, content: bytes) -> None:
        """Have ``ended.json`` written, behind the last copy."""
        self._want(ended=content)

    def check(self) -> None:
        """Raises RunTakenOver, and OSError where nothing could be written for ``deadline_s``."""
        if self._error is not None:
            raise self._error
        if self.busy and time.monotonic() - self._remote.last_progress > self._deadline_s:
            raise OSError(
                f"checkpoint.url: nothing could be written to {self._remote.url} for {self._deadline_s:.0f} s "
                "(checkpoint.outage_deadline_s); the checkpoints are in the run's own folder"
            )

    async def finish(self, patience_s: float = math.inf) -> None:
        """Wait for what is to be written. Raises as ``check``, TimeoutError after ``patience_s``."""
        until = time.monotonic() + patience_s
        while self.busy:
            self.check()
            if time.monotonic() > until:
                raise TimeoutError(f"{', '.join(self.busy)} is not at {self._remote.url} yet; the next start copies it")
            await asyncio.sleep(0.02)
        self.check()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _want(self, copy: tuple[str, list[str]] | None = None, ended: bytes | None = None) -> None:
        with self._changed:
            if not self.busy:
                self._remote.last_progress = time.monotonic()
            self._copy, self._ended = copy or self._copy, ended or self._ended
            self._changed.notify_all()

    def _run(self) -> None:
        failing_since, wait_s = 0.0, FIRST_WAIT_S
        while not self._closed:
            with self._changed:
                self._changed.wait_for(lambda: self.busy or self._closed)
                copy, ended = self._copy, self._ended
            try:
                self._write(copy, ended)
            except ErgoError as error:
                self._error = error
                return
            except Exception as error:  # storage packages raise errors of their own
                failing_since = failing_since or time.monotonic()
                left = self._deadline_s - (time.monotonic() - self._remote.last_progress)
                self._say(
                    f"checkpoint.url: {', '.join(self.busy)} cannot be written to {self._remote.url}: "
                    f"{first_line(error)}; the run goes on, trying again for another {max(0.0, left):.0f} s"
                )
                with self._changed:
                    self._changed.wait_for(lambda: self._closed, timeout=wait_s)
                wait_s = min(2 * wait_s, MAX_WAIT_S)
                continue
            if failing_since:
                self._say(f"{self._remote.url} answers again after {time.monotonic() - failing_since:.0f} s")
            failing_since, wait_s = 0.0, FIRST_WAIT_S

    def _write(self, copy: tuple[str, list[str]] | None, ended: bytes | None) -> None:
        if copy is not None:
            name, stay = copy
            self._remote.upload(self._store.folder / name)
            self._remote.prune([*stay, name])
        elif ended is not None:
            self._remote.mark_ended(ended)
        with self._changed:
            if copy is not None and self._copy == copy:
                self._copy = None
            elif copy is None and self._ended == ended:
                self._ended = None
