"""Who writes a run's copies behind ``checkpoint.url``: an owner record with a lease.

The record is renewed while its process lives. A process that wants the run watches it: one that changes belongs to
somebody alive, and the second is refused; one that does not change for ``LEASE_S`` is taken over. So no two clocks are
compared, and a machine that is gone costs its successor that long. A record whose process has ended on this very
machine is taken over at once, and a run that ends removes its record.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ergo_rl.errors import ErgoError
from ergo_rl.jobs.storage import Storage, first_line

logger = logging.getLogger(__name__)

OWNER = "owner.json"
LEASE_S = 90.0
"""A record that is not renewed for so long is nobody's."""
RENEW_S = 15.0
SETTLE_S = 1.0
"""Wait after taking over, before looking whether another one took over at the same moment: stores have no locks."""


class RunInUse(ErgoError):
    """Another living process writes the run's copies; the message names it and says what to do."""


class RunTakenOver(ErgoError):
    """Another process has taken the run over, because this one could not renew its record. It must not write there."""


class Lease:
    """The right to write a run's copies. Renewed by a thread until it is released."""

    def __init__(self, storage: Storage, record: dict[str, Any]) -> None:
        self._storage, self._record = storage, record
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="checkpoint-lease", daemon=True)

    @classmethod
    def acquire(cls, storage: Storage) -> Lease:
        """Become the owner. Blocks for ``LEASE_S`` where the last owner may be alive.

        Raises RunInUse, and what the storage raises."""
        if before := storage.read(OWNER):
            _wait_until_lapsed(storage, before)
        lease = cls(storage, _about_this_process())
        lease._write()
        time.sleep(SETTLE_S)
        lease.check(RunInUse)
        lease._thread.start()
        return lease

    def check(self, kind: type[ErgoError] = RunTakenOver) -> None:
        """Raises RunTakenOver (or ``kind``) where the record is another's, and what the storage raises."""
        record = _parse(self._storage.read(OWNER) or b"")
        if record.get("life", self._record["life"]) != self._record["life"]:
            raise kind(
                f"{self._storage.url} is written by {_named(record)}: this process must not write there; what it has "
                "saved itself is in its own folder. End one of the two, or give one another name"
            )

    def release(self) -> None:
        """Stop renewing and remove the record, if it is still this process's and the storage answers soon."""
        self._released.set()
        self._thread.join(timeout=5)

    def _renew(self) -> None:
        while not self._released.wait(RENEW_S):
            try:
                self.check()
                if not self._released.is_set():
                    self._write()
            except RunTakenOver as error:
                logger.error("%s", error)
                return
            except Exception as error:  # storage packages raise errors of their own
                logger.info("the owner record of %s could not be renewed: %s", self._storage.url, first_line(error))
        with contextlib.suppress(Exception):  # the record lapses by itself
            self.check()
            self._storage.remove(OWNER)
            self._storage.remove_if_empty()

    def _write(self) -> None:
        renewed = datetime.now(UTC).isoformat(timespec="milliseconds")
        self._storage.write(OWNER, (json.dumps({**self._record, "renewed": renewed}) + "\n").encode())


def _wait_until_lapsed(storage: Storage, before: bytes) -> None:
    """Return when the owner whose record is ``before`` is known to be gone. Raises RunInUse."""
    record, since = _parse(before), time.monotonic()
    if _has_ended(record):
        return
    if _is_here(record):
        raise _in_use(storage, record)
    logger.warning(
        "%s has the owner record of %s; it is watched for %.0f s, and taken over if nobody renews it",
        storage.url, _named(record), LEASE_S,
    )  # fmt: skip
    while time.monotonic() - since < LEASE_S:
        time.sleep(min(LEASE_S / 20, 5.0))
        if (now := storage.read(OWNER)) is None:
            return
        if now != before:
            raise _in_use(storage, _parse(now))
    logger.warning("%s: nobody has renewed the record of %s; the run is taken over", storage.url, _named(record))


def _in_use(storage: Storage, record: dict[str, Any]) -> RunInUse:
    return RunInUse(
        f"{storage.url} is written by {_named(record)}, which is alive. Wait for its end or stop it and start again: a "
        "process that dies is followed "
        f"{LEASE_S:.0f} s later. Or begin a run of its own beside it: another name, or resume=never"
    )


def _named(record: dict[str, Any]) -> str:
    """Say whose record it is, from content that may be anything."""
    cells = {key: str(record.get(key, "unknown"))[:100] for key in ("host", "pid", "since", "life")}
    return "process {pid} on {host} since {since} (life {life:.8})".format(**cells)


def _about_this_process() -> dict[str, Any]:
    pid = os.getpid()
    return {
        "life": uuid.uuid4().hex,
        "host": socket.gethostname(),
        "pid": pid,
        "started": _started(pid),
        "machine": _machine(),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _is_here(record: dict[str, Any]) -> bool:
    """Whether the process of a record can be seen from here."""
    return bool(record.get("machine")) and record["machine"] == _machine() and isinstance(record.get("pid"), int)


def _has_ended(record: dict[str, Any]) -> bool:
    return _is_here(record) and _started(record["pid"]) != record.get("started")


def _machine() -> str:
    """Name the kernel and the process namespace: only there does a process id mean the same. Empty: unknown."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> str:
    """When a living process was started, in the kernel's ticks; empty where there is none. Ids are used again."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def _parse(content: bytes) -> dict[str, Any]:
    try:
        record = json.loads(content)
    except (ValueError, RecursionError):
        record = None
    return record if isinstance(record, dict) else {}
