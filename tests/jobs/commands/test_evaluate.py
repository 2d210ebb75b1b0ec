"""The arguments of ``ergo-rl evaluate``, and a benchmark from the command line on a real HTTP server."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ergo_rl.episodes.types import Box
from ergo_rl.jobs.commands import evaluate
from ergo_rl.questions.dataset import write_questions
from tests.conftest import ROOT
from tests.jobs.conftest import LOOK, READ, Server, question, scene


def test_budgets_without_modes_are_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in (
        (["--budgets", "36"], "--budgets is for --modes"),
        (["--url", "http://host/v1"], "--url is for --modes and --probe"),
        (["--probe", "--modes", "direct"], "name one of them"),
        (["--probe", "--boxes", "policy"], "name one of them"),
    ):
        with pytest.raises(SystemExit):
            evaluate.main(arguments)
        assert said in capsys.readouterr().err


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


def test_probe_over_a_url_replaces_the_crop_in_turn_2(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The endpoint reads "ring" in the crop alone; two images, and a row that is none. The endpoint is away for the
    oracle's crop of the first, 180 x 210 pixels or 5 x 6 visual tokens."""

    def say(messages: list[dict[str, Any]]) -> str | int:
        if len(messages) == 1:
            return LOOK
        images = [part["image_url"]["url"] for part in messages[-1]["content"] if part["type"] == "image_url"]
        pixels = images and np.asarray(Image.open(io.BytesIO(base64.b64decode(images[0].partition(",")[2]))))
        crops = [scene()[112:336, 112:336], 255 - scene()[112:336, 112:336]]
        if len(pixels) and pixels.shape == (168, 140, 3):
            return 503
        own = crops["inverted" in messages[-1]["content"][-1]["text"]]
        shown = Image.fromarray(own).resize((168, 168), Image.Resampling.BICUBIC)
        return READ if len(pixels) and np.array_equal(pixels, np.asarray(shown)) else "<answer>dot</answer>"

    server.say = say
    Image.fromarray(255 - scene()).save(inverted := io.BytesIO(), "PNG", compress_level=0)
    other = replace(question("b", image=inverted.getvalue()), text="Which mark of the inverted one?")
    tall = replace(question("a"), boxes=(Box(120, 120, 300, 330),))
    write_questions(tmp_path / "held.parquet", [tall, other, replace(question("bad"), image=b"none")])
    out = tmp_path / "probe.json"
    arguments = [str(ROOT / "configs" / "panels.yaml"), "--probe", "--url", server.url, "--out", str(out)]
    arguments += ["embedded.panels=null", f"evaluation.paths=[{tmp_path / 'held.parquet'}]"]
    quick = [f"reward.verifier.endpoint.{key}" for key in ("retries=0", "timeout_s=20")]
    assert evaluate.main([*arguments, *quick, "evaluation.oracle_margin=0"]) == 0
    found = json.loads(out.read_text())
    figures = found["probe"]
    assert figures["eval/accuracy"] == figures["eval/probe_none_gain"] == figures["eval/probe_noise_gain"] == 2 / 3
    assert figures["eval/probe_other_gain"] == 2 / 3 and figures["eval/probe_none_reliance"] == 1
    assert figures["eval/visual_tokens"] == 72 and figures["eval/looks"] == 1 and "eval/unscored" not in figures
    assert [row["own"]["answer"] for row in found["rows"]] == ["ring", "ring", None]
    assert "status 503" in found["rows"][0]["replaced"]["oracle"]["failure"]
    last = [body["messages"][-1]["content"] for body in server.bodies if len(body["messages"]) == 3]
    assert sum(len(content) == 1 for content in last) == 2, "without a crop the words alone"
    said = capsys.readouterr().out
    assert "is the crop used? 3 held-out questions" in said and "failed: a, crop replaced (oracle): " in said
    assert "Gain: wrong so, right with its own crop" in said and "66.7% [20.8% - 93.9%]" in said


def test_an_expected_error_is_one_line_and_status_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(ROOT / "configs" / "panels.yaml"), "--boxes", "policy", "embedded.panels=null"]
    assert evaluate.main([*arguments, f"evaluation.paths=[{tmp_path / 'none.parquet'}]"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("ergo-rl evaluate: ") and "none.parquet" in said and "Traceback" not in said
