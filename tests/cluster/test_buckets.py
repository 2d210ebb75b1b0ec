"""Buckets are safetensors files in pieces, and share the memory of what they are made from."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.buckets import SharedFile, pack

KINDS = (torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.uint8)


@settings(max_examples=40, deadline=None)
@given(shapes=st.lists(st.tuples(st.sampled_from(KINDS), st.lists(st.integers(0, 4), max_size=3)), max_size=6))
def test_what_is_written_is_what_safetensors_reads(shapes: list[tuple[torch.dtype, list[int]]]) -> None:
    """Names, types and shapes, scalars and empty tensors too; from a file without a copy, and from bytes."""
    tensors = {f"layer.{i}": (torch.rand(shape) * 9).to(kind) for i, (kind, shape) in enumerate(shapes)}
    bucket = pack(tensors.items())
    file = SharedFile(bucket)
    try:
        for found in (safetensors.torch.load_file(file.path), safetensors.torch.load(b"".join(map(bytes, bucket)))):
            assert found.keys() == tensors.keys()
            for name, tensor in tensors.items():
                assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
    finally:
        file.close()


def test_a_mapping_in_another_process_outlives_the_file_and_nothing_is_left_on_disk() -> None:
    """What an engine does with a bucket; the worker that wrote it may die at any moment."""
    file = SharedFile(pack([("w", torch.arange(4.0))]))
    code = (
        "import sys; from safetensors import safe_open\n"
        "with safe_open(sys.argv[1], framework='pt') as bucket: weight = bucket.get_tensor('w')\n"
        "print('open', flush=True); input(); print(weight.tolist())"
    )
    command = [sys.executable, "-c", code, str(file.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as reader:
        assert reader.stdout is not None and reader.stdout.readline() == "open\n"
        file.close()
        assert not file.path.exists()
        assert reader.communicate("\n", timeout=60)[0] == "[0.0, 1.0, 2.0, 3.0]\n"


def test_a_bucket_is_no_copy_and_its_header_is_aligned() -> None:
    weight = torch.zeros(3, 5)
    header, part = pack([("w", weight)])
    weight[0, 0] = 1.0
    assert part.view(np.float32)[0] == 1.0 and part.size == 60
    assert header.size % 64 == 0


def test_a_transposed_weight_is_written_in_its_own_order() -> None:
    weight = torch.arange(6.0).view(2, 3).T
    _, part = pack([("w", weight)])
    assert part.view(np.float32).tolist() == [0, 3, 1, 4, 2, 5]


def test_a_type_without_a_name_is_refused() -> None:
    with pytest.raises(ValueError, match="weight 'w' is complex64; known: float64, float32"):
        pack([("w", torch.zeros(1, dtype=torch.complex64))])
