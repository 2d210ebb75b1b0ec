"""Buckets share the memory of what they are made from, and say what lies where in it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ergo_rl.cluster.buckets import pack, tensors_of

KINDS = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool, torch.uint8)
SHAPES = st.lists(st.tuples(st.sampled_from(KINDS), st.lists(st.integers(0, 4), max_size=3)), min_size=1, max_size=6)


@settings(max_examples=40, deadline=None)
@given(shapes=SHAPES)
def test_what_is_packed_is_what_is_found(shapes: list[tuple[torch.dtype, list[int]]]) -> None:
    """Names, types and shapes, scalars and empty tensors too."""
    tensors = {f"layer.{i}": (torch.rand(shape) * 9).to(kind) for i, (kind, shape) in enumerate(shapes)}
    bucket = pack(tensors.items())
    found = dict(tensors_of(torch.from_numpy(np.concatenate(bucket.parts)), bucket.layout))
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)


def test_large_tensors_are_no_copy_and_small_ones_are_one_part() -> None:
    large, *small = torch.zeros(256, 256), torch.ones(3), torch.full((2, 2), 2.0)
    tensors = {"small.1": small[0], "large": large, "small.2": small[1], "flag": torch.tensor([True])}
    bucket = pack(tensors.items())
    large[0, 0] = 5.0
    together, own, flag = bucket.parts
    assert bucket.layout.names == ("small.1", "small.2", "large", "flag"), "the widest first, of these the small ones"
    assert together.view(np.float32).tolist() == [1, 1, 1, 2, 2, 2, 2] and flag.tolist() == [1]
    assert own.size == 256 * 256 * 4 and own.view(np.float32)[0] == 5.0


def test_a_transposed_weight_is_written_in_its_own_order() -> None:
    weight = torch.arange(6.0).view(2, 3).T
    (part,) = pack([("w", weight)]).parts
    assert part.view(np.float32).tolist() == [0, 3, 1, 4, 2, 5]


def test_a_bucket_without_weights_is_refused() -> None:
    with pytest.raises(ValueError, match="without weights"):
        pack([])
