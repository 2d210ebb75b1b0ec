"""Buckets of weights: what lies where in one, and the shared memory through which one reaches another process.

The parts of a bucket are the large tensors' own memory: Ray copies them into its object store, and readers see them
there. So a weight is copied once into the object store, once into a file that an engine's workers map, and nowhere
else.
"""

from __future__ import annotations

import fcntl
import itertools
import math
import mmap
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor, dtype

LARGE = 1 << 18
"""Tensors of at least so many bytes are not copied into a bucket."""


@dataclass(frozen=True, slots=True)
class BucketSpec:
    """Which tensors lie one after the other in a bucket. The widest types come first, so that every tensor starts at a
    multiple of its own width, and small tensors lie together."""

    names: Sequence[str]
    dtypes: Sequence[str]
    """By torch's names, such as ``bfloat16``."""
    shapes: Sequence[Sequence[int]]
    sizes: Sequence[int]
    """Bytes."""

    @classmethod
    def of(cls, weights: Iterable[tuple[str, dtype, Sequence[int]]]) -> BucketSpec:
        """Order ``weights``, each given as (name, dtype, shape). Raises ValueError if there are none."""
        sized = [(name, dtype, tuple(shape), dtype.itemsize * math.prod(shape)) for name, dtype, shape in weights]
        if not sized:
            raise ValueError("a bucket without weights")
        ordered = sorted(sized, key=lambda weight: (-weight[1].itemsize, weight[3] >= LARGE))
        names, dtypes, shapes, sizes = zip(*ordered, strict=True)
        return cls(names, tuple(str(dtype).removeprefix("torch.") for dtype in dtypes), shapes, sizes)

    @property
    def bytes(self) -> int:
        return sum(self.sizes)


@dataclass(frozen=True, slots=True)
class Bucket:
    spec: BucketSpec
    parts: Sequence[NDArray[np.uint8]]
    """uint8[bytes] each; one after the other they are what ``spec`` says."""


def pack(tensors: Iterable[tuple[str, Tensor]]) -> Bucket:
    """Make a bucket that shares the memory of large CPU tensors; use it before they change. Small ones are copied into
    one part, because Ray takes longer over an object the more arrays it has."""
    import torch

    by_name = dict(tensors)
    spec = BucketSpec.of((name, tensor.dtype, tensor.shape) for name, tensor in by_name.items())
    parts: list[NDArray[np.uint8]] = []
    for large, run in itertools.groupby(flat_tensors(by_name, spec), lambda part: part.numel() >= LARGE):
        members = list(run)
        parts += [part.numpy() for part in members] if large else [torch.cat(members).numpy()]
    return Bucket(spec, parts)


def flat_tensors(tensors: Mapping[str, Tensor], spec: BucketSpec) -> list[Tensor]:
    """View each tensor as uint8[bytes], in the order of ``spec``; only non-contiguous ones are copied."""
    import torch

    return [tensors[name].detach().contiguous().reshape(-1).view(torch.uint8) for name in spec.names]


def unpack(flat: Tensor, spec: BucketSpec) -> Iterator[tuple[str, Tensor]]:
    """Yield the named tensors of a bucket in one piece, uint8[bytes]. They share its memory."""
    import torch

    start = 0
    for name, dtype, shape, size in zip(spec.names, spec.dtypes, spec.shapes, spec.sizes, strict=True):
        # torch cannot view an empty slice as another type
        piece = flat[start : start + size] if size else flat.new_empty(0)
        yield name, piece.view(getattr(torch, dtype)).view(tuple(shape))
        start += size


# --- shared memory ----------------------------------------------------------------------------------------------------
# Getting fresh memory from the kernel costs several times what writing to it costs (``benchmarks.weights`` measures
# both), so files are kept and written again. A reader may keep its mapping for as long as it likes (vLLM keeps it until
# a layer has the last of its weights). It holds a shared ``flock`` that belongs to the mapping and goes with it, or
# with its process; a writer takes only files that nobody has locked.


class SharedFile:
    """Memory that other processes of this machine and user map by ``path``. Backed by memfd: freed when this object is
    closed or its process exits; existing mappings stay valid."""

    def __init__(self) -> None:
        self._file: IO[bytes]
        if sys.platform == "linux":
            self._file = os.fdopen(os.memfd_create("ergo-rl-weights"), "r+b", buffering=0)
            self.path = Path(f"/proc/{os.getpid()}/fd/{self._file.fileno()}")
        else:
            self._file = tempfile.NamedTemporaryFile(prefix="ergo-rl-", buffering=0)  # noqa: SIM115
            self.path = Path(self._file.name)
        self.size = 0
        self.in_use = False
        self._mapping: mmap.mmap | None = None

    def has_readers(self) -> bool:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        fcntl.flock(self._file, fcntl.LOCK_UN)
        return False

    def write(self, parts: Sequence[NDArray[np.uint8]]) -> None:
        """Write the parts one after the other from the beginning."""
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
    """As many files as are in use at once. Not thread-safe."""

    def __init__(self) -> None:
        self._files: list[SharedFile] = []

    def __len__(self) -> int:
        return len(self._files)

    def acquire(self, parts: Sequence[NDArray[np.uint8]]) -> SharedFile:
        """Return a file that holds these parts until it is released; a reader that has mapped it by then keeps it."""
        size = sum(part.size for part in parts)
        free = [file for file in self._files if not file.in_use and not file.has_readers()]
        # The smallest that is large enough, else the largest, which grows.
        file = min(free, key=lambda file: (file.size < size, abs(file.size - size)), default=None)
        if file is None:
            file = SharedFile()
            self._files.append(file)
        file.write(parts)
        file.in_use = True
        return file

    def release(self, file: SharedFile) -> None:
        file.in_use = False

    def close(self) -> None:
        for file in self._files:
            file.close()
        self._files = []


def map_file(path: str | Path, size: int) -> Tensor:
    """Map the first ``size`` bytes of a ``SharedFile`` as uint8[size], without a copy. They do not change while
    anything of the tensor is in use, and what is written into it stays in this process.

    Raises FileNotFoundError if the file, or the process that made it, is gone."""
    import torch

    if not size:
        return torch.empty(0, dtype=torch.uint8)
    with open(path, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        mapping = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)  # it keeps the open file, and so the lock
    return torch.frombuffer(mapping, dtype=torch.uint8)


def memory_domain() -> str:
    """Name what the processes that can map each other's files have in common: boot id and PID namespace, because
    readers open ``/proc/<pid>/fd/<n>``."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except FileNotFoundError:
        return os.uname().nodename
