"""Records in checkpoints: on the disk once, whole in each checkpoint."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from ergo_rl.jobs.checkpoint_store import CheckpointStore, verify_checkpoint
from ergo_rl.jobs.record_parts import read_record, write_record
from ergo_rl.jobs.run_paths import METRICS


def on_disk(folder: Path) -> int:
    """Bytes of records in all checkpoints, a file with several names once."""
    files = {path.stat().st_ino: path.stat().st_size for path in folder.rglob("metrics.*.jsonl")}
    return sum(files.values())


def test_records_of_many_saves_are_on_the_disk_about_once_and_whole_in_each(tmp_path: Path) -> None:
    """60 saves of 1 to 30 lines: at most 10 parts, and with two checkpoints at most twice the record on the disk."""
    store, record, draw = CheckpointStore(tmp_path / "checkpoints"), tmp_path / METRICS, random.Random(0)
    record.write_bytes(b"")
    earlier, written = None, 0
    for step in range(1, 61):
        with record.open("a") as file:
            for _ in range(draw.randrange(1, 30)):
                file.write(json.dumps({"step": step, "x": draw.random()}) + "\n")
        before = on_disk(store.folder)
        with store.write(step) as writer:
            write_record(writer, record, earlier)
        written += max(0, on_disk(store.folder) - before)
        store.prune(keep=2)
        earlier = store.newest() if step % 20 == 0 else store.folder / f"step-{step:06d}"
        assert earlier is not None and read_record(earlier, METRICS) == (record.read_bytes(), True)
    size = record.stat().st_size
    assert len(list(earlier.glob("metrics.*"))) <= 10 and verify_checkpoint(earlier).step == 60
    assert on_disk(store.folder) <= 2 * size and written <= 10 * size, "copied whole each time it would be 30 times"


def test_record_that_was_cut_back_or_did_not_grow_is_written_as_it_is(tmp_path: Path) -> None:
    store, record = CheckpointStore(tmp_path / "checkpoints"), tmp_path / METRICS
    for step, content in ((1, b'{"a": 1}\n'), (2, b'{"a": 1}\n'), (3, b"{}\n"), (4, b"")):
        record.write_bytes(content)
        earlier = store.newest()
        with store.write(step) as writer:
            writer.write("state.json", b"{}")
            write_record(writer, record, earlier)
        assert read_record(store.folder / f"step-{step:06d}", METRICS) == (content, True)
        verify_checkpoint(store.folder / f"step-{step:06d}")


def test_record_of_an_older_version_is_one_file(tmp_path: Path) -> None:
    (tmp_path / METRICS).write_bytes(b"{}\n")
    assert read_record(tmp_path, METRICS) == (b"{}\n", True) and read_record(tmp_path, "other.jsonl") == (b"", True)


@pytest.mark.parametrize("damage", ["missing", "bit", "cut", "folder", "not UTF-8"])
def test_damaged_record_costs_its_lines_alone(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    """Parts are shared: what damages one damages it in every checkpoint. None of them is refused for it."""
    store, record, earlier = CheckpointStore(tmp_path / "checkpoints"), tmp_path / METRICS, None
    for step in (1, 2, 3):
        with record.open("a") as file:
            for _ in range(2 ** (6 - step)):
                file.write(json.dumps({"step": step}) + "\n")
        with store.write(step) as writer:
            write_record(writer, record, earlier)
        earlier = store.folder / f"step-{step:06d}"
    first = min((store.folder / "step-000003").glob("metrics.*"))
    content = first.read_bytes()
    if damage in ("missing", "folder"):
        first.unlink()
        if damage == "folder":
            first.mkdir()
    else:
        first.write_bytes(
            {"bit": b"\x00" + content[1:], "cut": content[:-4], "not UTF-8": b"\xff" + content[1:]}[damage]
        )
    newest = store.newest()
    assert newest is not None and newest.name == "step-000003" and "all but this record is whole" in caplog.text
    lines, whole = read_record(newest, METRICS)
    steps = [json.loads(line)["step"] for line in lines.splitlines()]
    assert steps.count(3) == 8 and steps.count(2) >= 15 and not whole


@pytest.mark.parametrize("linked", [True, False])
def test_disk_without_links_gets_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, linked: bool) -> None:
    if not linked:

        def refuses(*_: object) -> None:
            raise OSError(1, "Operation not permitted")

        monkeypatch.setattr("os.link", refuses)
    store, record = CheckpointStore(tmp_path / "checkpoints"), tmp_path / METRICS
    for step, line in ((1, b'{"a": "long line"}\n'), (2, b"{}\n")):
        with record.open("ab") as file:
            file.write(line)
        earlier = store.newest()
        with store.write(step) as writer:
            write_record(writer, record, earlier)
    first = store.folder / "step-000001" / "metrics.000000000000000-000000000000019.jsonl"
    assert first.stat().st_nlink == (2 if linked else 1)
    assert read_record(store.folder / "step-000002", METRICS) == (record.read_bytes(), True)
