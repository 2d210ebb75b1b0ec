"""The panels as Parquet files: what is written, and when it is written again."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pyarrow.parquet as pq

from ergo_rl.episodes.config import QuestionsConfig
from ergo_rl.examples.panels.dataset import prepare_panels
from ergo_rl.examples.panels.scenes import PanelsConfig, Split, question
from ergo_rl.questions.dataset import QuestionStream


def test_prepare_panels_writes_both_splits_in_small_row_groups(tmp_path: Path) -> None:
    train, heldout = prepare_panels(tmp_path / "panels", train=70, heldout=3, seed=5)
    assert pq.ParquetFile(train).metadata.num_rows == 70
    assert [pq.ParquetFile(train).metadata.row_group(index).num_rows for index in range(2)] == [64, 6]
    stream = QuestionStream(QuestionsConfig([str(heldout)], shuffle=False))
    assert list(islice(stream, 3)) == [question(PanelsConfig(), 5, Split.HELDOUT, index) for index in range(3)]


def test_prepare_panels_leaves_the_same_settings_alone(tmp_path: Path) -> None:
    train, _ = prepare_panels(tmp_path, train=2, heldout=1)
    before = train.stat().st_mtime_ns, train.read_bytes()
    prepare_panels(tmp_path, train=2, heldout=1)
    assert train.stat().st_mtime_ns == before[0]
    prepare_panels(tmp_path, train=2, heldout=1, seed=1)
    assert train.read_bytes() != before[1]
    prepare_panels(tmp_path, train=2, heldout=1)
    assert train.read_bytes() == before[1]


def test_prepare_panels_when_interrupted_is_made_again(tmp_path: Path) -> None:
    train, _ = prepare_panels(tmp_path, train=2, heldout=1)
    whole = train.read_bytes()
    train.write_bytes(b"half")
    (tmp_path / "manifest.json").unlink()
    prepare_panels(tmp_path, train=2, heldout=1)
    assert train.read_bytes() == whole
