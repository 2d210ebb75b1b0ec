"""Weights on their way: the pieces of a safetensors file that are never put together in memory.

A bucket is a header and one array per tensor, which one after the other are a safetensors file. The arrays of a tensor
on the CPU are the tensor's own memory: Ray copies them into its object store, readers see them there, and the file is
written from there. So a weight is copied once into the object store and once into the file, and nowhere else.
"""

from __future__ import annotations

import json
import math
import os
import struct
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor, dtype

Bucket = Sequence[NDArray[np.uint8]]
"""uint8[header], then uint8[bytes] of each tensor."""

_DTYPES = {
    "float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
_ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class Layout:
    """What lies one after the other in a bucket that is sent as one array, the widest types first, so that every tensor
    lies at a multiple of its own width. dtypes: by torch's names; sizes: bytes."""

    names: Sequence[str]
    dtypes: Sequence[str]
    shapes: Sequence[Sequence[int]]
    sizes: Sequence[int]

    @classmethod
    def of(cls, weights: Iterable[tuple[str, dtype, Sequence[int]]]) -> Layout:
        """From name, torch's type and shape of each. Raises ValueError where there is none."""
        ordered = sorted(weights, key=lambda one: -one[1].itemsize)
        if not ordered:
            raise ValueError("a bucket without weights")
        names, dtypes, shapes = zip(*ordered, strict=True)
        sizes = tuple(kind.itemsize * math.prod(shape) for kind, shape in zip(dtypes, shapes, strict=True))
        kinds = tuple(str(kind).removeprefix("torch.") for kind in dtypes)
        return cls(names, kinds, tuple(tuple(shape) for shape in shapes), sizes)

    @property
    def bytes(self) -> int:
        return sum(self.sizes)


def pack(tensors: Iterable[tuple[str, Tensor]]) -> list[NDArray[np.uint8]]:
    """Tensors on the CPU as a bucket that shares their memory: use it before they change.

    Raises ValueError for a type that safetensors has no name for here."""
    import torch

    header: dict[str, dict[str, object]] = {}
    parts, start = [], 0
    # The widest first, as safetensors does, so that every tensor lies at a multiple of its own width.
    for name, tensor in sorted(tensors, key=lambda pair: -pair[1].element_size()):
        kind = str(tensor.dtype).removeprefix("torch.")
        if kind not in _DTYPES:
            raise ValueError(f"weight {name!r} is {kind}; known: {', '.join(_DTYPES)}")
        stop = start + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[kind], "shape": list(tensor.shape), "data_offsets": [start, stop]}
        parts.append(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
        start = stop
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return [np.frombuffer(struct.pack("<Q", len(text)) + text, np.uint8), *parts]


class SharedFile:
    """A bucket as a safetensors file in memory: processes of this machine and user map ``path`` instead of receiving
    it. It lives until ``close``, or the end of the process that made it, and in the mappings of others: nobody's sudden
    death leaves it behind."""

    def __init__(self, bucket: Bucket) -> None:
        self._file: IO[bytes]
        if sys.platform == "linux":
            self._file = os.fdopen(os.memfd_create("ergo-rl-weights"), "wb", buffering=0)
            self.path = Path(f"/proc/{os.getpid()}/fd/{self._file.fileno()}")
        else:
            self._file = tempfile.NamedTemporaryFile(prefix="ergo-rl-", buffering=0)  # noqa: SIM115
            self.path = Path(self._file.name)
        for part in bucket:
            rest = part.data
            while rest:  # a raw file may take less than it is given
                rest = rest[self._file.write(rest) :]

    def close(self) -> None:
        self._file.close()
