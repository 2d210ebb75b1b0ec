"""Files in memory that are written over and over, and read by other processes of this machine without a copy.

Memory that the kernel has just given costs several times what writing to it costs (``benchmarks.weights`` has both). So
files are kept and written again; but a reader may hold on to what it maps for as long as it likes (vLLM: until a layer
has the last of its weights). Who reads holds a shared lock on the file (``flock``), which belongs to the mapping and
goes with it, or with its process; who writes takes only files that nobody has locked.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor


class SharedFile:
    """One of them. Other processes of this machine and user map what is at ``path``. It lives until it is closed, or
    until the process that made it ends, and in the mappings of others: nobody's sudden death leaves it behind."""

    def __init__(self) -> None:
        self._file: IO[bytes]
        if sys.platform == "linux":
            self._file = os.fdopen(os.memfd_create("ergo-rl-weights"), "r+b", buffering=0)
            self.path = Path(f"/proc/{os.getpid()}/fd/{self._file.fileno()}")
        else:
            self._file = tempfile.NamedTemporaryFile(prefix="ergo-rl-", buffering=0)  # noqa: SIM115
            self.path = Path(self._file.name)
        self.size = 0
        self.lent = False
        self._mapping: mmap.mmap | None = None

    def read_by_others(self) -> bool:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        fcntl.flock(self._file, fcntl.LOCK_UN)
        return False

    def write(self, parts: Sequence[NDArray[np.uint8]]) -> None:
        """The parts, one after the other, from the beginning."""
        if (needed := sum(part.size for part in parts)) > self.size:
            self._unmap()
            os.ftruncate(self._file.fileno(), needed)
            self._mapping, self.size = mmap.mmap(self._file.fileno(), needed), needed
        start = 0
        for part in parts:
            if part.size:
                np.copyto(np.frombuffer(self._mapping, np.uint8, part.size, start), part)  # type: ignore[arg-type]
            start += part.size

    def close(self) -> None:
        self._unmap()
        self._file.close()

    def _unmap(self) -> None:
        if self._mapping is not None:
            self._mapping.close()
        self._mapping = None


class SharedFiles:
    """As many as are in use at once. One thread at a time."""

    def __init__(self) -> None:
        self._files: list[SharedFile] = []

    def __len__(self) -> int:
        return len(self._files)

    def lend(self, parts: Sequence[NDArray[np.uint8]]) -> SharedFile:
        """A file with these parts in it, until it is given back; a reader that has mapped it by then keeps it."""
        size = sum(part.size for part in parts)
        free = [file for file in self._files if not file.lent and not file.read_by_others()]
        # The smallest that is large enough, else the largest, which grows.
        file = min(free, key=lambda one: (one.size < size, abs(one.size - size)), default=None)
        if file is None:
            file = SharedFile()
            self._files.append(file)
        file.write(parts)
        file.lent = True
        return file

    def give_back(self, file: SharedFile) -> None:
        file.lent = False

    def close(self) -> None:
        for file in self._files:
            file.close()
        self._files = []


def mapped(path: str | Path, size: int) -> Tensor:
    """uint8[size]: what a ``SharedFile`` holds, without a copy, and unchanged for as long as anything of it is in use.
    What is written into it stays here. Raises FileNotFoundError where the file, or the process that made it, is
    gone."""
    import torch

    if not size:
        return torch.empty(0, dtype=torch.uint8)
    with open(path, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        mapping = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)  # it keeps the open file, and so the lock
    return torch.frombuffer(mapping, dtype=torch.uint8)
