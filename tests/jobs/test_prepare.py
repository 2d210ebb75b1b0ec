"""``ergo-rl prepare panels``."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from ergo_rl.episodes.config import QuestionsConfig
from ergo_rl.episodes.panels import PanelsConfig, Split, question
from ergo_rl.episodes.questions import QuestionStream
from ergo_rl.jobs.prepare import main, prepare_panels


def test_writes_both_splits_in_small_row_groups(tmp_path: Path) -> None:
    train, heldout = prepare_panels(tmp_path / "panels", train=70, heldout=3, seed=5)
    assert pq.ParquetFile(train).metadata.num_rows == 70
    assert [pq.ParquetFile(train).metadata.row_group(index).num_rows for index in range(2)] == [64, 6]
    stream = QuestionStream(QuestionsConfig([str(heldout)], shuffle=False))
    assert stream.take(3) == [question(PanelsConfig(), 5, Split.HELDOUT, index) for index in range(3)]


def test_the_same_settings_are_left_alone_and_others_are_made_again(tmp_path: Path) -> None:
    train, _ = prepare_panels(tmp_path, train=2, heldout=1)
    before = train.stat().st_mtime_ns, train.read_bytes()
    prepare_panels(tmp_path, train=2, heldout=1)
    assert train.stat().st_mtime_ns == before[0]
    prepare_panels(tmp_path, train=2, heldout=1, seed=1)
    assert train.read_bytes() != before[1]
    prepare_panels(tmp_path, train=2, heldout=1)
    assert train.read_bytes() == before[1]


def test_an_interrupted_preparation_is_made_again(tmp_path: Path) -> None:
    train, _ = prepare_panels(tmp_path, train=2, heldout=1)
    whole = train.read_bytes()
    train.write_bytes(b"half")
    (tmp_path / "manifest.json").unlink()
    prepare_panels(tmp_path, train=2, heldout=1)
    assert train.read_bytes() == whole


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["panels", "--out", str(tmp_path), "--train", "2", "--heldout", "1"]) == 0
    assert "train.parquet" in capsys.readouterr().out
    assert main(["panels", "--out", str(tmp_path), "--train", "0"]) == 1
    assert "at least one row" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main(["panels", "--out", str(tmp_path / "file"), "--train", "1"]) == 1
    assert str(tmp_path / "file") in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0 and "panels" in capsys.readouterr().out
