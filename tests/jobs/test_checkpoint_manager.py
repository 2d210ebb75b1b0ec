"""Training on a disk that is full or fails, and beside a storage that is away: no learner is lost, and no step."""

from __future__ import annotations

import json
import logging
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import pytest

from ergo_rl.jobs import checkpoint_manager, lease, remote_store
from ergo_rl.jobs.checkpoint_store import CheckpointStore, FileSystem, verify_checkpoint
from ergo_rl.jobs.config import CheckpointConfig, ConfigError, TrainConfig
from ergo_rl.jobs.monitor import _RecordFile
from ergo_rl.jobs.report import read_run
from ergo_rl.jobs.storage import Storage
from ergo_rl.questions.dataset import write_questions
from tests.backends.memory import Learners, MemoryBackend
from tests.jobs.test_remote_store import Away
from tests.jobs.test_trainer import STEPS, backend, config, data, digest, fit, losses, numbers, whole  # noqa: F401

ENOSPC, EIO = OSError(28, "No space left on device"), OSError(5, "Input/output error")


class FailingDisk(FileSystem):
    """Raises ``error`` at some of its operations, by their number."""

    def __init__(self, fails: Any, error: OSError) -> None:
        self.count, self.failed, self._fails, self._error = 0, 0, fails, error

    def _tick(self) -> None:
        self.count += 1
        if self._fails(self.count):
            self.failed += 1
            raise self._error

    def make(self, folder: Path) -> None:
        self._tick()
        super().make(folder)

    @contextmanager
    def create(self, path: Path) -> Iterator[IO[bytes]]:
        self._tick()
        with super().create(path) as file:
            yield file
            file.write(b"")
            if self._fails(self.count):
                raise self._error

    def rename(self, path: Path, target: Path) -> None:
        self._tick()
        super().rename(path, target)


def test_save_that_fails_at_any_operation_costs_that_checkpoint_alone(
    config: TrainConfig,  # noqa: F811
    backend: MemoryBackend,  # noqa: F811
    whole: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A save makes about a dozen operations; the run has four of them."""
    for at in (1, 2, 5, 8, 9, 10, 11, 12):
        error = ENOSPC if at % 2 else EIO
        disk = FailingDisk(lambda number, at=at: number == at, error)
        backend.file_system, backend.learner_starts = disk, 0
        folder = fit(replace(config, runs_dir=str(tmp_path / f"fails-{at}")), backend)
        assert disk.failed == 1 and backend.learner_starts == 1, "no learner was started again"
        assert digest(folder) == digest(whole) and losses(folder) == losses(whole)
        said = " ".join(capsys.readouterr().out.split())
        assert said.count("NOT SAVED after step") == 1 and str(error) in said and "the next save is tried" in said
        left = [path.name for path in (folder / "checkpoints").iterdir() if path.name.startswith(".w")]
        newest = CheckpointStore(folder / "checkpoints").newest()
        assert not left and newest is not None and newest.name == "step-000007"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 3 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(folder)]).returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_disk_that_is_full_for_three_saves_costs_no_learner_and_no_step(
    config: TrainConfig,  # noqa: F811
    backend: MemoryBackend,  # noqa: F811
    whole: Path,  # noqa: F811
    small_disk: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Saves at 2, 4 and 6 find no space; before the one at 7 some is made. Records wait for it, too."""
    ballast, update, free = small_disk / "ballast", Learners.update, list[int]()

    async def beside(self: Learners, groups: Any) -> dict[str, float]:
        if self.step == 1:
            with ballast.open("wb", buffering=0) as file:
                try:
                    while True:
                        file.write(b"x" * 4096)
                except OSError:
                    pass
        if self.step in (3, 5):
            free.append(os.statvfs(small_disk).f_bavail)
        if self.step == 6:
            ballast.unlink()
        return await update(self, groups)

    monkeypatch.setattr(Learners, "update", beside)
    backend.learner_starts = 0
    mine = replace(config, runs_dir=str(small_disk), samples_every=2)
    with caplog.at_level(logging.WARNING):
        folder = fit(mine, backend)
    said = " ".join(capsys.readouterr().out.split())
    assert [f"NOT SAVED after step {step}: [Errno 28] No space left on device" in said for step in (2, 4, 6, 7)] == [
        True, True, True, False,
    ]  # fmt: skip
    assert backend.learner_starts == 1 and digest(folder) == digest(whole) and losses(folder) == losses(whole)
    assert numbers(folder) == numbers(whole), "every record is there"
    assert verify_checkpoint(folder / "checkpoints" / "step-000007").step == STEPS
    assert "bytes wait to be written" in caplog.text


def test_full_disk_before_the_first_step_is_a_sentence_and_the_run_can_be_begun_again(
    config: TrainConfig,  # noqa: F811
    backend: MemoryBackend,  # noqa: F811
    whole: Path,  # noqa: F811
    small_disk: Path,
) -> None:
    mine = replace(config, runs_dir=str(small_disk))
    half = small_disk / "story" / "checkpoints" / ".writing-step-000025"
    half.mkdir(parents=True)
    with (half / "learner").open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
        while True:
            file.write(b"x" * 4096)
    folder = fit(mine, backend)
    assert digest(folder) == digest(whole) and not half.exists(), "the remains of a killed save made the disk full"
    with (small_disk / "ballast").open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
        while True:
            file.write(b"x" * 4096)
    with pytest.raises(OSError, match="No space left on device"):
        fit(replace(mine, name="another"), backend)
    (small_disk / "ballast").unlink()
    assert digest(fit(replace(mine, name="another"), backend)) == digest(whole)


def test_records_that_a_full_disk_did_not_take_come_with_the_next_line(tmp_path: Path) -> None:
    record = _RecordFile(tmp_path / "metrics.jsonl")
    file, taken = record._file, []

    class Full:
        def write(self, content: bytes) -> int:
            if len(taken) in (1, 2):
                taken.append(b"")
                raise ENOSPC
            taken.append(content[:3])
            return file.write(content[:3])

    record._file = Full()  # type: ignore[assignment]
    for line in ("first\n", "second\n", "third\n"):
        record.append(line)
    assert (tmp_path / "metrics.jsonl").read_text() == "first\nsecond\nthird\n"


def test_report_of_a_run_with_cut_files_is_made(config: TrainConfig, backend: MemoryBackend) -> None:  # noqa: F811
    folder = fit(replace(config, samples_every=2, total_steps=3), backend)
    whole_run = read_run(folder, 9)
    for content in (b"", b"{", b"[1]", b"[" * 100_000, b"\xff"):
        (folder / "ended.json").write_bytes(content)
        (folder / "samples" / "step-000000" / "group.json").write_bytes(content)
        found = read_run(folder, 9)
        assert found.state == "ended; ended.json cannot be read" and len(found.groups) == len(whole_run.groups) - 1


# --- beside a storage that is away --------------------------------------------------------------------------------


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    for name, seconds in (("LEASE_S", 0.3), ("RENEW_S", 0.05), ("SETTLE_S", 0.0)):
        monkeypatch.setattr(lease, name, seconds)
    monkeypatch.setattr(remote_store, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(checkpoint_manager, "PATIENCE_S", 0.2)
    return f"file://{tmp_path / 'bucket'}"


def test_storage_that_is_away_does_not_hold_up_training(
    config: TrainConfig,  # noqa: F811
    backend: MemoryBackend,  # noqa: F811
    whole: Path,  # noqa: F811
    bucket: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It goes away after step 2 and comes back after step 6: all steps are made, and the last copy is there."""
    update, away = Learners.update, Away(monkeypatch, ConnectionError("no route to host"))
    away.on = False

    async def beside(self: Learners, groups: Any) -> dict[str, float]:
        away.on = 2 <= self.step < 6
        return await update(self, groups)

    monkeypatch.setattr(Learners, "update", beside)
    folder = fit(replace(config, checkpoint=CheckpointConfig(every=2, url=bucket)), backend)
    assert digest(folder) == digest(whole) and losses(folder) == losses(whole)
    place = Storage.open(bucket).below("story")
    assert json.loads(place.read("ended.json") or b"")["done"] is True and "step-000007" in place.names()
    said = " ".join(capsys.readouterr().out.split())
    assert "cannot be written to" in said and "no route to host" in said and "answers again after" in said
    assert "owner.json" not in place.names()


def test_storage_that_stays_away_ends_the_run_saved_in_its_folder(
    config: TrainConfig,  # noqa: F811
    backend: MemoryBackend,  # noqa: F811
    whole: Path,  # noqa: F811
    bucket: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    update, away = Learners.update, Away(monkeypatch, ConnectionError("no route to host"))
    away.on = False

    async def beside(self: Learners, groups: Any) -> dict[str, float]:
        away.on = self.step >= 2
        return await update(self, groups)

    monkeypatch.setattr(Learners, "update", beside)
    mine = replace(config, checkpoint=CheckpointConfig(every=2, url=bucket, outage_deadline_s=0.02))
    with pytest.raises(OSError, match=r"nothing could be written to .* \(checkpoint\.outage_deadline_s\)"):
        fit(mine, backend)
    away.on = False
    monkeypatch.setattr(Learners, "update", update)
    folder = fit(replace(mine, checkpoint=CheckpointConfig(every=2, url=bucket)), backend)
    assert digest(folder) == digest(whole) and folder.name == "story"


def test_accepted_questions_are_read_from_where_the_others_stopped(
    config: TrainConfig,  # noqa: F811
    backend: MemoryBackend,  # noqa: F811
    data: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    """A file that has fewer rows now: named, and gone on with where that is asked for."""
    from ergo_rl.examples.panels.scenes import PanelsConfig, Split, question
    from ergo_rl.learners.learner_group import LearnerFailed

    mine = tmp_path / "mine.parquet"
    mine.write_bytes(data.read_bytes())
    config = replace(config, questions=replace(config.questions, paths=[str(mine)]))
    backend.dies_at = {4}
    with pytest.raises(LearnerFailed):
        fit(replace(config, recovery=replace(config.recovery, learner_restarts=0)), backend)
    write_questions(mine, (question(PanelsConfig(), 1, Split.TRAIN, index) for index in range(4)))
    with pytest.raises(ConfigError, match=r"questions\.paths\.0 \(other content behind"):
        fit(config, backend)
    accepted = replace(config.checkpoint, accept_changes=["questions.paths"])
    folder = fit(replace(config, checkpoint=accepted), backend)
    assert numbers(folder) == list(range(3 * STEPS)) and len(losses(folder)) == STEPS
