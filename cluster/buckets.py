"""Weights on their way: what lies where in a bucket, and the memory that it is made of.

The parts of a bucket are the large tensors' own memory: Ray copies them into its object store, readers see them there.
So a weight is copied once into the object store, once into a file that an engine's workers map, and nowhere else.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor, dtype


LARGE = 1 << 18
"""Bytes from which on a tensor is not copied."""


@dataclass(frozen=True, slots=True)
class Layout:
    """What lies one after the other in a bucket, the widest types first, so that every tensor lies at a multiple of its
    own width, and small tensors together. dtypes: by torch's names; sizes: bytes."""

    names: Sequence[str]
    dtypes: Sequence[str]
    shapes: Sequence[Sequence[int]]
    sizes: Sequence[int]

    @classmethod
    def of(cls, weights: Iterable[tuple[str, dtype, Sequence[int]]]) -> Layout:
        """From name, torch's type and shape of each. Raises ValueError where there is none."""
        sized = [(name, kind, tuple(shape), kind.itemsize * math.prod(shape)) for name, kind, shape in weights]
        if not sized:
            raise ValueError("a bucket without weights")
        ordered = sorted(sized, key=lambda one: (-one[1].itemsize, one[3] >= LARGE))
        names, dtypes, shapes, sizes = zip(*ordered, strict=True)
        return cls(names, tuple(str(kind).removeprefix("torch.") for kind in dtypes), shapes, sizes)

    @property
    def bytes(self) -> int:
        return sum(self.sizes)


@dataclass(frozen=True, slots=True)
class Bucket:
    """parts: uint8[bytes] each, one after the other what ``layout`` says."""

    layout: Layout
    parts: Sequence[NDArray[np.uint8]]


def pack(tensors: Iterable[tuple[str, Tensor]]) -> Bucket:
    """Tensors on the CPU as a bucket that shares their memory, but for the small ones, which are put together (Ray
    takes longer over an object the more arrays it has): use it before they change."""
    import torch

    by_name = dict(tensors)
    layout = Layout.of((name, one.dtype, one.shape) for name, one in by_name.items())
    parts: list[NDArray[np.uint8]] = []
    for large, run in itertools.groupby(parts_of(by_name, layout), lambda part: part.numel() >= LARGE):
        members = list(run)
        parts += [part.numpy() for part in members] if large else [torch.cat(members).numpy()]
    return Bucket(layout, parts)


def parts_of(tensors: Mapping[str, Tensor], layout: Layout) -> list[Tensor]:
    """uint8[bytes] of each, in the order of ``layout``, on its own device; its own memory where it is contiguous."""
    import torch

    return [tensors[name].detach().contiguous().reshape(-1).view(torch.uint8) for name in layout.names]


def tensors_of(flat: Tensor, layout: Layout) -> Iterator[tuple[str, Tensor]]:
    """Out of a bucket in one piece, uint8[bytes]. The tensors share its memory."""
    import torch

    start = 0
    for name, dtype, shape, size in zip(layout.names, layout.dtypes, layout.shapes, layout.sizes, strict=True):
        piece = flat[start : start + size] if size else flat.new_empty(0)  # of nothing there is no view of another type
        yield name, piece.view(getattr(torch, dtype)).view(tuple(shape))
        start += size
