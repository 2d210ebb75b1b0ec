"""Checkpoints on a disk that fails: at every operation, in every file, the one before is still there and whole."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest

from ergo_rl.jobs.checkpoint_store import (
    LATEST,
    MANIFEST,
    RUN_ID,
    CheckpointStore,
    CheckpointWriter,
    DamagedCheckpoint,
    FileSystem,
    step_of,
    verify_checkpoint,
)
from ergo_rl.jobs.config import CheckpointConfig
from ergo_rl.jobs.run_paths import step_folder


class Crash(BaseException):
    """The machine stops; nothing is tidied up."""


class FailingFileSystem(FileSystem):
    """Crashes at operation number ``at``: before it, or in the middle of it (a file half written)."""

    def __init__(self, at: int) -> None:
        self.left = at

    def _tick(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise Crash

    def make(self, folder: Path) -> None:
        self._tick()
        super().make(folder)

    @contextmanager
    def create(self, path: Path) -> Iterator[IO[bytes]]:
        self._tick()
        with path.open("xb") as file:
            yield file
            if self.left == 0:
                file.flush()
                file.truncate(file.tell() // 2)
                raise Crash

    def rename(self, path: Path, target: Path) -> None:
        self._tick()
        super().rename(path, target)

    def remove(self, path: Path) -> None:
        if path.exists():
            self._tick()
            if path.is_dir() and self.left == 0:  # half of it is gone
                next(iter(sorted(path.iterdir()))).unlink()
                raise Crash
        super().remove(path)


def fill(writer: CheckpointWriter, step: int) -> None:
    writer.write("state.json", json.dumps({"step": step}).encode())
    with writer.create("learner-00000.safetensors") as file:
        file.write(b"a" * 1000)
        file.write(memoryview(bytes([step]) * 1000))


def save(store: CheckpointStore, step: int, score: float | None = None) -> None:
    with store.write(step, score) as writer:
        fill(writer, step)
    store.prune(keep=1)


def step_in(folder: Path) -> int:
    """By its content; every file was compared."""
    found: int = json.loads((folder / "state.json").read_bytes())["step"]
    assert verify_checkpoint(folder).step == found and (folder / "learner-00000.safetensors").read_bytes()[-1] == found
    return found


@pytest.mark.parametrize("again", [50, 25], ids=["the next step", "the same step once more"])
def test_crash_at_any_operation_leaves_an_intact_checkpoint(tmp_path: Path, again: int) -> None:
    survived = 0
    for at in range(100):
        folder = tmp_path / str(at)
        save(CheckpointStore(folder), 10)
        save(CheckpointStore(folder), 25)
        crashed = False
        try:
            save(CheckpointStore(folder, FailingFileSystem(at)), again)
        except Crash:
            survived, crashed = survived + 1, True
        newest = CheckpointStore(folder).newest()
        assert newest is not None and step_in(newest) in (10, 25, again)
        if again != 25:
            assert step_in(newest) in (25, 50)
        save(CheckpointStore(folder), 75)  # and the next life can save
        newest = CheckpointStore(folder).newest()
        assert newest is not None and step_in(newest) == 75
        assert [path.name for path in sorted(folder.iterdir())] == [RUN_ID, LATEST, "step-000075"], "nothing is left"
        if not crashed:
            break
    assert survived >= 8


def test_error_while_writing_leaves_nothing(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    with pytest.raises(RuntimeError), store.write(3) as writer:
        writer.write("state.json", b"{}")
        raise RuntimeError("the learner died")
    assert store.newest() is None and store.names() == []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / MANIFEST).unlink(), "manifest.json cannot be read"),
        (lambda folder: (folder / MANIFEST).write_text("{"), "manifest.json cannot be read"),
        (lambda folder: (folder / MANIFEST).write_text("[1]"), "manifest.json cannot be read"),
        (lambda folder: (folder / "state.json").unlink(), "state.json is missing"),
        (lambda folder: (folder / "state.json").write_bytes(b""), "state.json has 0 bytes"),
        (lambda folder: flip(folder / "learner-00000.safetensors"), "checksum of learner-00000.safetensors differs"),
        (lambda folder: rewrite(folder, format=2), "format 2, this version reads 1"),
        (lambda folder: rewrite(folder, step=26), "is of step 26"),
        (lambda folder: rewrite(folder, files={"../../etc/passwd": [1, "00"]}), "are no files of its own"),
    ],
)
def test_newest_refuses_a_damaged_checkpoint_by_name_and_uses_the_one_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: object, message: str
) -> None:
    store = CheckpointStore(tmp_path)
    for step in (10, 25):
        with store.write(step) as writer:
            fill(writer, step)
    damage(tmp_path / "step-000025")  # type: ignore[operator]
    newest = store.newest()
    assert newest is not None and step_in(newest) == 10
    assert "step-000025" in caplog.text and message in caplog.text
    damage_too = tmp_path / "step-000010" / "state.json"
    damage_too.write_bytes(b"{]")
    with pytest.raises(DamagedCheckpoint, match=r"(?s)no checkpoint is intact: .*step-000025.*step-000010"):
        store.newest()


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[500] ^= 1
    path.write_bytes(content)


def rewrite(folder: Path, **cells: object) -> None:
    found = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**found, **cells}))


def test_prune_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for step, score in ((10, 0.7), (20, 0.5), (30, None), (40, 0.6), (50, 0.7)):
        with store.write(step, score) as writer:
            fill(writer, step)
        store.prune(keep=2)
        if step == 40:
            assert sorted(store.names()) == ["step-000010", "step-000030", "step-000040"]
    assert sorted(store.names()) == ["step-000040", "step-000050"], "of equal scores the later one is the best"


def test_prune_does_not_count_a_damaged_checkpoint(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 10)
    (tmp_path / "step-000099").mkdir()
    save(store, 20)
    assert store.names() == ["step-000020"]


def test_name_of_a_checkpoint_is_its_step() -> None:
    assert (
        step_folder(50) == "step-000050"
        and step_of("step-000050") == 50
        and step_of(step_folder(12_345_678)) == 12_345_678
    )
    with pytest.raises(ValueError, match="'step-5' is not the name of a checkpoint"):
        step_of("step-5")


def test_checkpoint_is_due_every_few_steps_and_at_the_end() -> None:
    assert [step for step in range(8) if CheckpointConfig(every=3).due(step + 1, 8)] == [2, 5, 7]
    assert not CheckpointConfig(every=0).due(8, 8)
    with pytest.raises(ValueError, match="keep is 0; it must be at least 1"):
        CheckpointConfig(keep=0)
