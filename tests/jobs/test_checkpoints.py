"""Checkpoints on a disk that fails: at every operation, in every file, the one before is still there and whole."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest

from ergo_rl.jobs.config import CheckpointConfig
from ergo_rl.jobs.saving.checkpoints import (
    LATEST,
    MANIFEST,
    DamagedCheckpoint,
    Disk,
    Draft,
    Shelf,
    check,
    name_of,
    step_of,
)
from ergo_rl.jobs.saving.copies import Copies


class Crash(BaseException):
    """The machine stops; nothing is tidied up."""


class FailingDisk(Disk):
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


def fill(draft: Draft, step: int) -> None:
    draft.write("state.json", json.dumps({"step": step}).encode())
    with draft.create("learner-00000.safetensors") as file:
        file.write(b"a" * 1000)
        file.write(memoryview(bytes([step]) * 1000))


def save(shelf: Shelf, step: int, score: float | None = None) -> None:
    with shelf.draft(step, score) as draft:
        fill(draft, step)
    shelf.prune(keep=1)


def step_in(folder: Path) -> int:
    """By its content; every file was compared."""
    found: int = json.loads((folder / "state.json").read_bytes())["step"]
    assert check(folder).step == found and (folder / "learner-00000.safetensors").read_bytes()[-1] == found
    return found


@pytest.mark.parametrize("again", [50, 25], ids=["the next step", "the same step once more"])
def test_a_crash_at_any_operation_leaves_a_whole_checkpoint(tmp_path: Path, again: int) -> None:
    survived = 0
    for at in range(100):
        folder = tmp_path / str(at)
        save(Shelf(folder), 10)
        save(Shelf(folder), 25)
        crashed = False
        try:
            save(Shelf(folder, FailingDisk(at)), again)
        except Crash:
            survived, crashed = survived + 1, True
        newest = Shelf(folder).newest()
        assert newest is not None and step_in(newest) in (10, 25, again)
        if again != 25:
            assert step_in(newest) in (25, 50)
        save(Shelf(folder), 75)  # and the next life can save
        newest = Shelf(folder).newest()
        assert newest is not None and step_in(newest) == 75
        assert [path.name for path in sorted(folder.iterdir())] == [LATEST, "step-000075"], "nothing is left about"
        if not crashed:
            break
    assert survived >= 8


def test_an_error_inside_a_draft_leaves_nothing(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    with pytest.raises(RuntimeError), shelf.draft(3) as draft:
        draft.write("state.json", b"{}")
        raise RuntimeError("the learner died")
    assert shelf.newest() is None and shelf.names() == []


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
def test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: object, message: str
) -> None:
    shelf = Shelf(tmp_path)
    for step in (10, 25):
        with shelf.draft(step) as draft:
            fill(draft, step)
    damage(tmp_path / "step-000025")  # type: ignore[operator]
    newest = shelf.newest()
    assert newest is not None and step_in(newest) == 10
    assert "step-000025" in caplog.text and message in caplog.text
    damage_too = tmp_path / "step-000010" / "state.json"
    damage_too.write_bytes(b"{]")
    with pytest.raises(DamagedCheckpoint, match=r"(?s)no checkpoint is whole: .*step-000025.*step-000010"):
        shelf.newest()


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[500] ^= 1
    path.write_bytes(content)


def rewrite(folder: Path, **cells: object) -> None:
    found = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**found, **cells}))


def test_the_newest_and_the_best_stay(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    for step, score in ((10, 0.7), (20, 0.5), (30, None), (40, 0.6), (50, 0.7)):
        with shelf.draft(step, score) as draft:
            fill(draft, step)
        shelf.prune(keep=2)
        if step == 40:
            assert sorted(shelf.names()) == ["step-000010", "step-000030", "step-000040"]
    assert sorted(shelf.names()) == ["step-000040", "step-000050"], "of equal scores the later one is the best"


def test_a_damaged_one_does_not_push_out_a_whole_one(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    save(shelf, 10)
    (tmp_path / "step-000099").mkdir()
    save(shelf, 20)
    assert shelf.names() == ["step-000020"]


def test_names_and_steps() -> None:
    assert name_of(50) == "step-000050" and step_of("step-000050") == 50 and step_of(name_of(12_345_678)) == 12_345_678
    with pytest.raises(ValueError, match="'step-5' is not the name of a checkpoint"):
        step_of("step-5")


def test_when_it_is_due() -> None:
    assert [step for step in range(8) if CheckpointConfig(every=3).due(step + 1, 8)] == [2, 5, 7]
    assert not CheckpointConfig(every=0).due(8, 8)
    with pytest.raises(ValueError, match="keep is 0; it must be at least 1"):
        CheckpointConfig(keep=0)


@pytest.mark.parametrize("scheme", ["file", "memory"])
def test_copies_behind_a_url(tmp_path: Path, scheme: str) -> None:
    """A machine that has nothing gets the newest whole one; a copy that was cut off is not one."""
    root = tmp_path / "far" / "run" if scheme == "file" else Path(f"/{tmp_path.name}")
    copies = Copies(f"{scheme}://{root}")
    copies.probe()
    here = Shelf(tmp_path / "here")
    for step in (10, 25):
        with here.draft(step) as draft:
            fill(draft, step)
        copies.put(here.folder / name_of(step))
    assert copies.names() == ["step-000025", "step-000010"]
    there = Shelf(tmp_path / "there")
    fetched = copies.fetch(there)
    assert fetched is not None and step_in(fetched) == 25 and there.latest == "step-000025"
    assert [path.name for path in sorted(there.folder.iterdir())] == [LATEST, "step-000025"]

    copies._remote.pipe_file(f"{copies._root}/step-000025/state.json", b"?")
    fetched = copies.fetch(Shelf(tmp_path / "third"))
    assert fetched is not None and step_in(fetched) == 10
    copies._remote.rm_file(f"{copies._root}/step-000025/{MANIFEST}")
    assert copies.names() == ["step-000010"]
    copies.prune([])
    assert copies.names() == [] and copies.fetch(there) is None


def test_a_url_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=r"checkpoint\.url: cannot write to file://.*file/run"):
        Copies(f"file://{tmp_path / 'file'}/run").probe()
