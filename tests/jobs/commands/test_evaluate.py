"""The arguments of ``ergo-rl evaluate``, and a benchmark from the command line on a real HTTP server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ergo_rl.episodes.questions import write_questions
from ergo_rl.jobs.commands import evaluate
from tests.conftest import ROOT
from tests.jobs.conftest import Server, question


def test_budgets_without_modes_are_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        evaluate.main(["--budgets", "36"])
    assert "--budgets and --url are for --modes" in capsys.readouterr().err


def test_overrides_behind_modes_and_budgets_are_applied(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One question in one mode at two budgets; the files of questions come behind ``--budgets 16 36``."""
    write_questions(tmp_path / "held.parquet", [question("a")])
    held = f"evaluation.paths=[{tmp_path / 'held.parquet'}]"
    arguments = [str(ROOT / "configs" / "panels.yaml"), "--url", server.url, "--out", str(tmp_path / "out")]
    arguments += ["--modes", "two-stage", "embedded.panels=null", "--budgets", "16", "36", held]
    assert evaluate.main(arguments) == 0
    records = [json.loads(line) for line in (tmp_path / "out" / "records.jsonl").read_text().splitlines()]
    assert sorted((record["mode"], record["budget"]) for record in records) == [("two-stage", 16), ("two-stage", 36)]
    assert "| two-stage | 36 | all |" in capsys.readouterr().out


def test_an_expected_error_is_one_line_and_status_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(ROOT / "configs" / "panels.yaml"), "--boxes", "policy", "embedded.panels=null"]
    assert evaluate.main([*arguments, f"evaluation.paths=[{tmp_path / 'none.parquet'}]"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("ergo-rl evaluate: ") and "none.parquet" in said and "Traceback" not in said
