"""A folder behind an fsspec URL: object stores, shared file systems, memory. No name in it is ever a pattern."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from ergo_rl.errors import ErgoError
from ergo_rl.jobs.config import ConfigError
from ergo_rl.jobs.run_paths import replace_file

logger = logging.getLogger(__name__)

FIRST_WAIT_S, MAX_WAIT_S = 2.0, 60.0
"""Between two attempts to reach the storage; doubled each time."""
SMALL_BYTES = 16 << 20
"""Largest file that is read into memory."""
_FINAL = (PermissionError, FileNotFoundError, NotADirectoryError, IsADirectoryError, FileExistsError, TypeError,
          ValueError, ImportError)  # fmt: skip
T = TypeVar("T")


class Storage:
    """One folder of it. Every method raises what the storage's package raises.

    Example::

        storage = Storage.open("s3://bucket/runs")
        storage.below("panels").write("LATEST", b"step-000050")
    """

    def __init__(self, files: Any, root: str, url: str) -> None:
        self._files, self._root, self.url = files, root.rstrip("/"), url.rstrip("/")

    @classmethod
    def open(cls, url: str) -> Storage:
        """Raises ConfigError where fsspec does not know the protocol, or its package or account is not there."""
        import fsspec

        try:
            files, root = fsspec.core.url_to_fs(url)
        except Exception as error:  # storage packages raise errors of their own
            raise ConfigError(
                f"checkpoint.url: {url} cannot be opened: {first_line(error)}; its package must be installed here "
                "(s3fs for s3://, gcsfs for gs://, adlfs for abfs://), its account in that package's own environment"
            ) from error
        return cls(files, root, url)

    def below(self, *names: str) -> Storage:
        return Storage(self._files, "/".join((self._root, *names)), "/".join((self.url, *names)))

    def names(self) -> list[str]:
        """Return what is in the folder; nothing where there is no folder."""
        self._files.invalidate_cache()  # another machine may have written
        try:
            paths = self._files.ls(self._root, detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted({path.rstrip("/").rpartition("/")[2] for path in paths} - {""})

    def read(self, name: str) -> bytes | None:
        """Return a small file; None where there is none. Raises ValueError for a large one."""
        path = f"{self._root}/{name}"
        self._files.invalidate_cache()
        try:
            if (size := int(self._files.size(path) or 0)) > SMALL_BYTES:
                raise ValueError(f"{self.url}/{name} has {size} bytes, more than {SMALL_BYTES}")
            return bytes(self._files.cat_file(path))
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None

    def write(self, name: str, content: bytes) -> None:
        self._files.makedirs(self._root, exist_ok=True)
        if "file" in (self._files.protocol, *self._files.protocol):  # object stores replace a file as a whole anyway
            replace_file(Path(self._root) / name, content)
        else:
            self._files.pipe_file(f"{self._root}/{name}", content)

    def upload(self, source: Path, name: str) -> None:
        self._files.makedirs(self._root, exist_ok=True)
        self._files.put_file(str(source), f"{self._root}/{name}")

    def download(self, name: str, target: Path) -> None:
        self._files.get_file(f"{self._root}/{name}", str(target))

    def remove(self, name: str) -> None:
        """Remove a file, if it exists."""
        with contextlib.suppress(FileNotFoundError):
            self._files.rm_file(f"{self._root}/{name}")

    def remove_folder(self) -> None:
        """Remove the files in this folder, and the folder where the storage has such a thing. Not what is below."""
        for name in sorted(self.names(), key=lambda name: name.startswith(".")):  # marks last: they say whose it is
            self.remove(name)
        self.remove_if_empty()

    def remove_if_empty(self) -> None:
        with contextlib.suppress(Exception):  # object stores have no folders, each says so in its own way
            self._files.rmdir(self._root)


def patiently(work: Callable[[], T], what: str, deadline_s: float) -> T:
    """Return what ``work`` returns, called again while the storage does not answer. Each wait is logged.

    Raises ErgoErrors of ``work`` at once; OSError where waiting cannot help (no permission, no bucket), and after
    ``deadline_s``."""
    since, wait_s = time.monotonic(), FIRST_WAIT_S
    while True:
        try:
            return work()
        except ErgoError:
            raise
        except Exception as error:  # storage packages raise errors of their own
            left = deadline_s - (time.monotonic() - since)
            message = f"checkpoint.url: cannot {what}: {first_line(error)}"
            if left <= 0 or waiting_is_vain(error):
                waited = "" if left > 0 else f" (after {deadline_s:.0f} s, checkpoint.outage_deadline_s)"
                raise OSError(f"{message}{waited}") from error
            logger.warning("%s; trying again for another %.0f s", message, left)
            time.sleep(min(wait_s, left))
            wait_s = min(2 * wait_s, MAX_WAIT_S)


def waiting_is_vain(error: BaseException) -> bool:
    """Whether an error of a storage package will come again: a wrong name, no permission, no account."""
    return isinstance(error, _FINAL) or "Credential" in type(error).__name__


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:400]}"
