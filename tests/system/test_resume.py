"""A run that is stopped by SIGTERM, then killed in the middle of a step, then killed inside a save, comes to the same
losses and the same weights as one that nobody disturbed, bit for bit."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.lives import Life, lines_of, living, small_run
from tests.system.background import Background

pytestmark = pytest.mark.system
STEPS = 8


def outlived(life: Life) -> list[str]:
    """What of ours was still there half a minute after its driver was killed; Ray's own agents may take longer."""
    return [title for _, title in life.left if title not in ("ray::DashboardAgent", "ray::RuntimeEnvAgent")]


@pytest.mark.timeout(1500)
def test_run_stopped_and_killed_resumes_to_the_same_end(background: Background) -> None:
    background.result(__name__)


def story(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    with living(small_run(tmp_path / "whole", STEPS), tmp_path / "whole.log") as whole:
        if whole.end() != 0:
            whole.fail("the undisturbed run failed")

    same = small_run(tmp_path / "cut", STEPS)
    with living(same, tmp_path / "first.log") as life:
        life.wait_for_steps(1)
        os.killpg(life.process.pid, signal.SIGTERM)  # to its group, as schedulers do
        if life.end(120) != 128 + signal.SIGTERM:
            life.fail(f"SIGTERM ended it with {life.process.returncode}")
        assert "SIGTERM received" not in life.log.read_text(), "Ray's servers are in a session of their own"
        assert "the same command resumes the run" in life.log.read_text()
        checkpoints = life.run / "checkpoints"
        saved = (checkpoints / "LATEST").read_text().strip()
        assert saved == f"step-{len(life.steps()):06d}", "saved where it stood"

    with living(same, tmp_path / "second.log") as life:
        life.wait_for_steps(4)
        life.kill()
        assert not outlived(life), f"they outlived the driver: {life.left}"

    with living(same, tmp_path / "third.log") as life:
        waiting = (checkpoints / "LATEST").read_text()
        life.wait_for("save", lambda: any(checkpoints.glob(".writing-step-*")), 240, pause_s=0.001)
        life.process.kill()
        life.kill()
        assert not outlived(life), f"they outlived the driver: {life.left}"
        print("killed inside a save:", (checkpoints / "LATEST").read_text() == waiting)

    with living(same, tmp_path / "last.log") as life:
        if life.end() != 0:
            life.fail("the last life failed")
        assert life.run == tmp_path / "cut" / "run" and "resuming from" in life.log.read_text()
        compare(whole, life)


def compare(whole: Life, cut: Life) -> None:
    """Says where they part before it fails."""
    questions = [lines_of(life.run / "questions.jsonl") for life in (whole, cut)]
    for one, other in zip(whole.steps(), cut.steps(), strict=True):
        names = ("step", "learner/loss", "learner/grad_norm", "reward/total", "rollout/reply_tokens")
        print(*(f"{name} {one[name]!r} {other[name]!r}" for name in names))
    assert questions[0] == questions[1], "the same questions in the same steps"
    for name in ("learner/loss", "learner/grad_norm", "reward/total"):
        assert [step[name] for step in whole.steps()] == [step[name] for step in cut.steps()], name
    before, after = [load_file(life.run / "policy" / "model.safetensors") for life in (whole, cut)]
    off = {name: float((before[name] - after[name]).abs().max()) for name in before}
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before), off
