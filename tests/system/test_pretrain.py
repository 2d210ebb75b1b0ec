"""The pretraining command: the same seed gives the same weights, also when it was interrupted."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import ROOT
from tests.system.background import Background

pytestmark = pytest.mark.system
TIMEOUT_S = 240


def pretrain(out: Path, *arguments: str) -> None:
    command = [sys.executable, "-m", "ergo_rl.jobs", "pretrain", "panels", "--out", str(out), "--questions", "8"]
    done = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.mark.timeout(1500)
def test_the_same_seed_gives_the_same_weights_also_in_two_goes(background: Background) -> None:
    background.result(__name__)


def story(tmp_path: Path) -> None:
    """A two-hundredth of the lessons: in one go, and each model in a go of its own that finds the tower finished."""
    scale = ("--steps-scale", "0.005", "--seed", "7")
    pretrain(tmp_path / "one", *scale)
    pretrain(tmp_path / "two", *scale, "--only", "reward")
    pretrain(tmp_path / "two", *scale, "--only", "policy", "--resume")
    for role in ("policy", "reward"):
        one, two = (load_file(tmp_path / run / f"panels-{role}" / "model.safetensors") for run in ("one", "two"))
        assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one), role
        assert "--seed 7 --steps-scale 0.005" in (tmp_path / "one" / f"panels-{role}" / "README.md").read_text()
