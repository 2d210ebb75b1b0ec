"""An ablation of one row: done once, not twice; and with a learning rate of 0 the weights stay as they are."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ergo_rl.examples.panels.scenes import PanelsConfig, Split, question
from ergo_rl.questions.dataset import write_questions
from tests.conftest import ROOT
from tests.system.background import Background

pytestmark = pytest.mark.system
TIMEOUT_S = 300


def ablate(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ergo_rl.jobs", "ablate", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S)


@pytest.mark.timeout(1500)
def test_ablate_trains_a_row_once_and_learning_rate_0_changes_nothing(background: Background) -> None:
    background.result(__name__)


def story(tmp_path: Path) -> None:
    data, out = tmp_path / "questions.parquet", tmp_path / "out"
    write_questions(data, (question(PanelsConfig(), 0, Split.TRAIN, index) for index in range(8)))
    plan = tmp_path / "plan.yaml"
    plan.write_text(
        f"recipe: configs/panels.yaml\n"
        f"overrides: [embedded.panels=null, 'questions.paths=[{data}]', 'evaluation.paths=[{data}]', "
        "evaluation.questions=4, groups_per_step=2, rollout.group_size=4]\n"
        "seeds: [3]\nrows: {nothing learned: [learner.optimizer.lr=0]}\n"
    )
    first = ablate(str(plan), "--out", str(out), "total_steps=2")
    assert first.returncode == 0, first.stdout[-2000:] + first.stderr[-2000:]
    folder = out / "nothing-learned" / "seed-3"
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [0, 1] and any(step["learner/grad_norm"] > 0 for step in steps)
    before = load_file(ROOT / "models" / "panels-policy" / "model.safetensors")
    after = load_file(folder / "policy" / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert "| nothing learned |" in (out / "ablation.md").read_text()

    done_at = folder.stat().st_mtime_ns
    again = ablate(str(plan), "--out", str(out), "total_steps=2")
    assert again.returncode == 0 and folder.stat().st_mtime_ns == done_at, "what is done is not done again"
