"""Files in memory that are written again, and never under the hands of who reads them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
import pytest
import torch

from ergo_rl.cluster.shared_memory import SharedFiles, mapped


def parts(*values: int) -> list[np.ndarray]:
    """One of four bytes for each value, and an empty one."""
    return [np.full(4, value, np.uint8) for value in values] + [np.zeros(0, np.uint8)]


@pytest.fixture
def files() -> Iterator[SharedFiles]:
    files = SharedFiles()
    yield files
    files.close()


def test_a_file_is_written_again_and_grows(files: SharedFiles) -> None:
    for values in ((1, 2), (3,), (4, 5, 6), ()):
        file = files.lend(parts(*values))
        size = 4 * len(values)
        assert mapped(file.path, size).tolist() == [value for value in values for _ in range(4)]
        files.give_back(file)
    assert len(files) == 1


def test_one_that_is_lent_or_read_is_left_alone_and_the_one_that_fits_best_is_taken(files: SharedFiles) -> None:
    first, second = files.lend(parts(1, 1, 1)), files.lend(parts(2))
    third = files.lend(parts(3))
    assert len({first.path, second.path, third.path}) == 3
    for file in (first, second, third):
        files.give_back(file)
    kept = mapped(third.path, 4)
    weight = kept.view(torch.int32)  # of the same memory
    del kept
    assert files.lend(parts(4)) is second
    assert files.lend(parts(5)) is first, "larger than needed"
    assert files.lend(parts(6)) not in (first, second, third)
    assert weight.view(torch.uint8).tolist() == [3] * 4
    del weight
    assert files.lend(parts(7)) is third


def test_what_is_written_into_a_mapping_stays_there(files: SharedFiles) -> None:
    file = files.lend(parts(1))
    mine = mapped(file.path, 4)
    mine += 1
    assert mine.tolist() == [2] * 4 and mapped(file.path, 4).tolist() == [1] * 4


READER = """
import sys
from ergo_rl.cluster.shared_memory import mapped
flat = mapped(sys.argv[1], 4)
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


def test_a_reader_in_another_process_keeps_its_file_until_it_lets_go(files: SharedFiles) -> None:
    file = files.lend(parts(1))
    with Reader(file.path) as reader:
        assert reader.says() == "open"
        files.give_back(file)
        other = files.lend(parts(2))
        assert other is not file and file.read_by_others()
        reader.go_on()
        assert reader.says() == "[1, 1, 1, 1]" and reader.says() == "closed"
        assert files.lend(parts(3)) is file


def test_a_reader_that_dies_lets_go(files: SharedFiles) -> None:
    file = files.lend(parts(1))
    with Reader(file.path) as reader:
        assert reader.says() == "open" and file.read_by_others()
    assert not file.read_by_others()


def test_a_mapping_outlives_the_file_and_nothing_is_left_on_disk(files: SharedFiles) -> None:
    """The worker that wrote it may die at any moment."""
    file = files.lend(parts(1))
    with Reader(file.path) as reader:
        assert reader.says() == "open"
        files.close()
        assert not file.path.exists()
        with pytest.raises(FileNotFoundError):
            mapped(file.path, 4)
        reader.go_on()
        assert reader.says() == "[1, 1, 1, 1]"
