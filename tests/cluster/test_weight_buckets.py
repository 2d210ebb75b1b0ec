"""Buckets share the memory of what they are made from and say what lies where; files in shared memory are used again,
but never while another process reads them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ergo_rl.cluster.weight_buckets import BucketSpec, SharedFiles, flat_tensors, map_file, pack, unpack

KINDS = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool, torch.uint8)
SHAPES = st.lists(st.tuples(st.sampled_from(KINDS), st.lists(st.integers(0, 4), max_size=3)), min_size=1, max_size=6)


@settings(max_examples=40)
@given(shapes=SHAPES)
def test_pack_then_unpack_returns_the_same_tensors(shapes: list[tuple[torch.dtype, list[int]]]) -> None:
    """Names, types and shapes, scalars and empty tensors too."""
    tensors = {f"layer.{i}": (torch.rand(shape) * 9).to(kind) for i, (kind, shape) in enumerate(shapes)}
    bucket = pack(tensors.items())
    found = dict(unpack(torch.from_numpy(np.concatenate(bucket.parts)), bucket.spec))
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)


def test_pack_shares_large_tensors_and_joins_small_ones() -> None:
    large, *small = torch.zeros(256, 256), torch.ones(3), torch.full((2, 2), 2.0)
    tensors = {"small.1": small[0], "large": large, "small.2": small[1], "flag": torch.tensor([True])}
    bucket = pack(tensors.items())
    large[0, 0] = 5.0
    together, own, flag = bucket.parts
    assert bucket.spec.names == ("small.1", "small.2", "large", "flag"), "the widest first, of these the small ones"
    assert together.view(np.float32).tolist() == [1, 1, 1, 2, 2, 2, 2] and flag.tolist() == [1]
    assert own.size == 256 * 256 * 4 and own.view(np.float32)[0] == 5.0


def test_pack_transposed_weight_is_made_contiguous() -> None:
    weight = torch.arange(6.0).view(2, 3).T
    (part,) = pack([("w", weight)]).parts
    assert part.view(np.float32).tolist() == [0, 3, 1, 4, 2, 5]


def test_pack_nothing_raises() -> None:
    with pytest.raises(ValueError, match="without weights"):
        pack([])


def test_bucket_spec_orders_by_width() -> None:
    """The widest first, so that each begins at a multiple of its width: 8 + 3 x 2 + 1 bytes."""
    some = {"a": torch.zeros(1, dtype=torch.uint8), "b": torch.zeros(3, dtype=torch.bfloat16), "c": torch.tensor(5)}
    spec = BucketSpec.of((name, tensor.dtype, tensor.shape) for name, tensor in some.items())
    assert spec == BucketSpec(("c", "b", "a"), ("int64", "bfloat16", "uint8"), ((), (3,), (1,)), (8, 6, 1))
    assert torch.cat(flat_tensors(some, spec)).tolist() == [5] + [0] * 14 and spec.bytes == 15
    with pytest.raises(ValueError, match="without weights"):
        BucketSpec.of([])


def parts(*values: int) -> list[np.ndarray]:
    """One of four bytes for each value, and an empty one."""
    return [np.full(4, value, np.uint8) for value in values] + [np.zeros(0, np.uint8)]


@pytest.fixture
def files() -> Iterator[SharedFiles]:
    files = SharedFiles()
    yield files
    files.close()


def test_shared_file_is_reused_and_grows(files: SharedFiles) -> None:
    for values in ((1, 2), (3,), (4, 5, 6), ()):
        file = files.acquire(parts(*values))
        size = 4 * len(values)
        assert map_file(file.path, size).tolist() == [value for value in values for _ in range(4)]
        files.release(file)
    assert len(files) == 1


def test_acquire_skips_used_files_and_takes_the_best_fit(files: SharedFiles) -> None:
    first, second = files.acquire(parts(1, 1, 1)), files.acquire(parts(2))
    third = files.acquire(parts(3))
    assert len({first.path, second.path, third.path}) == 3
    for file in (first, second, third):
        files.release(file)
    kept = map_file(third.path, 4)
    weight = kept.view(torch.int32)  # of the same memory
    del kept
    assert files.acquire(parts(4)) is second
    assert files.acquire(parts(5)) is first, "larger than needed"
    assert files.acquire(parts(6)) not in (first, second, third)
    assert weight.view(torch.uint8).tolist() == [3] * 4
    del weight
    assert files.acquire(parts(7)) is third


def test_map_file_writes_stay_private(files: SharedFiles) -> None:
    file = files.acquire(parts(1))
    mine = map_file(file.path, 4)
    mine += 1
    assert mine.tolist() == [2] * 4 and map_file(file.path, 4).tolist() == [1] * 4


READER = """
import sys
from ergo_rl.cluster.weight_buckets import map_file
flat = map_file(sys.argv[1], 4)
print("open", flush=True)
input()
print(flat.tolist(), flush=True)
del flat
print("closed", flush=True)
input()
"""


class Reader:
    """What an engine's worker does, in a process of its own."""

    def __init__(self, path: Path) -> None:
        command = [sys.executable, "-c", READER, str(path)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdin is not None and self.process.stdout is not None
        self._in: IO[str] = self.process.stdin
        self._out: IO[str] = self.process.stdout

    def says(self) -> str:
        return self._out.readline().strip()

    def go_on(self) -> None:
        self._in.write("\n")
        self._in.flush()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


def test_acquire_while_another_process_reads_takes_another_file(files: SharedFiles) -> None:
    file = files.acquire(parts(1))
    with Reader(file.path) as reader:
        assert reader.says() == "open"
        files.release(file)
        other = files.acquire(parts(2))
        assert other is not file and file.has_readers()
        reader.go_on()
        assert reader.says() == "[1, 1, 1, 1]" and reader.says() == "closed"
        assert files.acquire(parts(3)) is file


def test_has_readers_after_the_reader_dies_is_false(files: SharedFiles) -> None:
    file = files.acquire(parts(1))
    with Reader(file.path) as reader:
        assert reader.says() == "open" and file.has_readers()
    assert not file.has_readers()


def test_mapping_after_close_stays_valid_and_leaves_no_file(files: SharedFiles) -> None:
    """The worker that wrote it may die at any moment."""
    file = files.acquire(parts(1))
    with Reader(file.path) as reader:
        assert reader.says() == "open"
        files.close()
        assert not file.path.exists()
        with pytest.raises(FileNotFoundError):
            map_file(file.path, 4)
        reader.go_on()
        assert reader.says() == "[1, 1, 1, 1]"
