"""``from ergo_rl import ...``: lazy, from scripts and notebooks, without signal handlers."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import ergo_rl
from ergo_rl import ErgoError, Policy, Question, RewardTerm, TrainConfig, Trainer, Trajectory, load_config
from ergo_rl.episodes.types import Box, Finish, Outcome, Turn, View
from ergo_rl.jobs.config import ConfigError
from ergo_rl.jobs.policy_clients import EpisodeResult
from tests.backends.memory import MemoryBackend
from tests.conftest import ROOT
from tests.jobs.test_trainer import config, data, digest, fit, records

__all__ = ["config", "data"]  # fixtures


def test_import_loads_neither_ray_nor_torch_nor_vllm() -> None:
    script = "import sys, ergo_rl; print(sorted({'ray', 'torch', 'vllm'} & sys.modules.keys()), dir(ergo_rl))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("[] ") and "'Trainer'" in done.stdout


def test_every_public_name_is_there_and_others_are_not() -> None:
    assert all(getattr(ergo_rl, name).__name__ == name for name in ergo_rl.__all__)
    with pytest.raises(AttributeError, match="module 'ergo_rl' has no attribute 'Trianer'"):
        _ = ergo_rl.Trianer


def test_fit_from_a_script_and_from_a_running_loop_train_the_same_as_the_command(
    config: TrainConfig, tmp_path: Path
) -> None:
    as_command = fit(replace(config, runs_dir=str(tmp_path / "command")), MemoryBackend())
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    script = Trainer(replace(config, runs_dir=str(tmp_path / "script")), backend=MemoryBackend()).fit()

    async def cell() -> Path:  # a notebook's event loop runs while the cell does
        return Trainer(replace(config, runs_dir=str(tmp_path / "notebook")), backend=MemoryBackend()).fit()

    notebook = asyncio.run(cell())
    assert digest(script) == digest(notebook) == digest(as_command)
    assert {number: signal.getsignal(number) for number in handlers} == handlers


def test_callbacks_get_every_step_and_resuming_repeats_none(config: TrainConfig) -> None:
    seen: list[tuple[int, float]] = []
    backend = MemoryBackend(dies_at={4})
    note = [lambda step, metrics: seen.append((step, metrics["learner/loss"]))]
    with pytest.raises(ErgoError):
        Trainer(
            replace(config, recovery=replace(config.recovery, learner_restarts=0)), callbacks=note, backend=backend
        ).fit()
    assert [step for step, _ in seen] == [0, 1, 2]
    folder = Trainer(config, callbacks=note, backend=backend).fit()
    # steps 0 and 1 are in the checkpoint; step 2 had learned, was lost with the learner, and is learned again
    assert [step for step, _ in seen] == [0, 1, 2, 2, 3, 4, 5, 6]
    assert [loss for _, loss in seen[:2] + seen[3:]] == [
        line["learner/loss"] for line in records(folder, "metrics.jsonl")
    ]


def test_cancelled_fit_saves_and_resumes(config: TrainConfig, tmp_path: Path) -> None:
    """Ctrl-C in a notebook cancels the run."""
    whole = Trainer(replace(config, runs_dir=str(tmp_path / "whole")), backend=MemoryBackend()).fit()
    config = replace(config, checkpoint=replace(config.checkpoint, every=0))

    def cancel(step: int, metrics: Any) -> None:
        if step == 2:
            task = asyncio.current_task()
            assert task is not None
            task.cancel()

    with pytest.raises(asyncio.CancelledError):
        Trainer(config, callbacks=[cancel], backend=MemoryBackend()).fit()
    assert (Path(config.runs_dir) / "story" / "checkpoints" / "LATEST").read_text() == "step-000003\n"
    assert digest(Trainer(config, backend=MemoryBackend()).fit()) == digest(whole)


def test_a_plain_function_and_a_class_are_reward_terms(config: TrainConfig) -> None:
    def two(question: Question, trajectory: Trajectory, reply: Any) -> float:
        return 2.0

    class AlwaysThree(RewardTerm):
        def __call__(self, question: Question, trajectory: Trajectory, reply: Any) -> float:
            return 3.0

    config = replace(config, total_steps=1, max_staleness=0)
    folder = Trainer(config, reward_terms=[two, AlwaysThree], backend=MemoryBackend()).fit()
    (step,) = records(folder, "metrics.jsonl")
    assert step["reward/two"] == 2.0 and step["reward/always_three"] == 3.0
    assert step["reward/total"] >= 5.0, "each weighs 1 unless reward.weights says otherwise"


def test_run_with_handed_over_terms_resumes_with_the_same_ones_only(config: TrainConfig) -> None:
    def two(question: Question, trajectory: Trajectory, reply: Any) -> float:
        return 2.0

    weights = {**config.reward.weights, "two": 0.25}
    weighted = replace(config, reward=replace(config.reward, handed_over=["two"], weights=weights))
    fails = replace(weighted, recovery=replace(config.recovery, learner_restarts=0))
    with pytest.raises(ErgoError):
        Trainer(fails, reward_terms=[two], backend=MemoryBackend(dies_at={4})).fit()
    stored = load_config(Path(config.runs_dir) / "story" / "config.yaml")
    assert stored.reward.handed_over == ["two"] and stored.reward.weights["two"] == 0.25
    with pytest.raises(ConfigError, match=r"reward\.handed_over \(\['two'\], now \[\]\)"):
        Trainer(config, backend=MemoryBackend()).fit()
    folder = Trainer(weighted, reward_terms=[two], backend=MemoryBackend()).fit()
    assert len(records(folder, "metrics.jsonl")) == config.total_steps


def test_what_cannot_be_a_term_or_reach_the_workers_is_refused(config: TrainConfig) -> None:
    def region(question: Question, trajectory: Trajectory, reply: Any) -> float:
        return 0.0

    class Local:
        pass

    with pytest.raises(ConfigError, match="region is a term of ours"):
        Trainer(config, reward_terms=[region])
    with pytest.raises(ConfigError, match="has no name"):
        Trainer(config, reward_terms=[lambda *_: 0.0])
    with pytest.raises(ConfigError, match=r"objective .*Local is defined in a script, notebook or function"):
        Trainer(config, objective=Local)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no_such_module:Family cannot be imported"):
        Trainer(config, family="no_such_module:Family")


def test_objective_and_family_reach_the_configuration(config: TrainConfig) -> None:
    from ergo_rl.episodes.families import Qwen3VL
    from ergo_rl.learners.losses import OBJECTIVES

    objective = type(OBJECTIVES["gspo"])
    trainer = Trainer(config, objective=objective, family=Qwen3VL)
    assert trainer.config.learner.loss.objective == f"ergo_rl.learners.losses:{objective.__name__}"
    family = "ergo_rl.episodes.families:Qwen3VL"
    assert trainer.config.learner.family == trainer.config.episode.family == family


class OneCrop:
    """A policy client that looks at (10, 20) to (30, 40) and answers 'ring'."""

    family: Any = None
    asked: Question | None = None
    closed = 0

    async def run_episode(self, question: Question, manner: Any, box: Any = None) -> EpisodeResult:
        self.asked = question
        views = tuple(View(corners, np.zeros((28, 28, 3), np.uint8)) for corners in (Box(0, 0, 64, 48), BOX))
        one = np.zeros(1, np.int32)
        turns = tuple(
            Turn(one, one, np.zeros(1, np.float32), text, Finish.STOP, 5, 0)
            for text in ("<zoom>[10, 20, 30, 40]</zoom>", "<think>here</think><answer>ring</answer>")
        )
        return EpisodeResult(Trajectory("asked", 0, views, turns, Outcome.ANSWERED, "ok"), 0.1, 2)

    async def close(self) -> None:
        self.closed += 1


BOX = Box(10, 20, 30, 40)


@pytest.mark.parametrize("kind", ["array", "PIL", "bytes", "path"])
def test_a_policy_answers_about_any_kind_of_image(tmp_path: Path, kind: str) -> None:
    pixels = np.full((48, 64, 3), 128, np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    image: Any = {
        "array": pixels,
        "PIL": Image.fromarray(pixels),
        "bytes": (tmp_path / "image.png").read_bytes(),
        "path": str(tmp_path / "image.png"),
    }[kind]
    client = OneCrop()
    with Policy(client, load_config(ROOT / "configs" / "panels.yaml")) as policy:

        async def cell() -> Any:
            return policy.answer(image, "Which?", ["ring", "disc"])

        found = asyncio.run(cell())
    assert (found.answer, found.box) == ("ring", BOX) and found.image.size == (64, 48)
    assert client.asked is not None and client.asked.options == ("ring", "disc") and client.closed == 1
    policy.close()
    assert client.closed == 1
    assert json.dumps(found.image.getpixel((10, 30))) != json.dumps(found.image.getpixel((50, 5))), "the box is drawn"
