"""The real stack, started once per test run: Ray, vLLM engines and a learner on the panels recipe, and the same
for a random model with tied embeddings and for one of the second family."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch

from ergo_rl.actors.rollout_pool import RolloutPool
from ergo_rl.cluster.config import Resources
from ergo_rl.cluster.placement import Cluster
from ergo_rl.cluster.weight_sync import WeightChannel
from ergo_rl.episodes.config import EpisodeConfig, OnBadBox
from ergo_rl.episodes.families import Qwen3VL
from ergo_rl.episodes.types import Question
from ergo_rl.examples.panels.scenes import PanelsConfig, Split, question
from ergo_rl.examples.panels.tiny_model import TinyConfig, make_model, make_processor, save_folder
from ergo_rl.jobs.config import TrainConfig, load_config
from ergo_rl.learners.learner_group import LearnerGroup
from ergo_rl.rewards.pool import RewardPool
from tests.conftest import ROOT, layer_of

START_S = 300
LITTLE = Resources(cpus=0.1)
"""Three stacks share the machine's cores, and what earlier tests reserved is given back at the end only."""


_SHARED: list[Callable[[], None]] = []
"""How the engines that are shared are ended, while they are up."""


def end_shared_engines() -> None:
    while _SHARED:
        _SHARED.pop()()


@pytest.fixture(autouse=True)
def _room_for_processes(request: pytest.FixtureRequest) -> None:
    """Tests of whole commands come last (``tests.conftest``), and have the machine to themselves: beside four shared
    engines their own would not fit into 24 GB, and Ray kills what does not fit."""
    if layer_of(request.node) == "processes":
        end_shared_engines()
        request.getfixturevalue("background").begin_late()


@dataclass
class Stack:
    """Engines and learner of one model, and the channel between them."""

    rollouts: RolloutPool
    learners: LearnerGroup
    version: int = 0

    async def publish(self) -> int:
        self.version += 1
        await WeightChannel(self.learners, self.rollouts).publish(self.version)
        return self.version

    async def perturb(self, seed: int) -> int:
        """Change every weight of the learner, the vision tower's too, by noise of a tenth of its own spread (of 0.02
        where it has none); returns how many tensors changed."""

        def on_learner(rank: Any) -> int:
            generator = torch.Generator().manual_seed(seed)
            weights = dict(rank._learner.policy.vlm.named_parameters())
            with torch.no_grad():
                for weight in weights.values():
                    spread = float(weight.std()) if weight.numel() > 1 else 0.0
                    weight.add_(torch.randn(weight.shape, generator=generator) * max(0.1 * spread, 0.02))
            return len(weights)

        changed: int = await self.learners._actors[0].__ray_call__.remote(on_learner)
        return changed

    async def remember(self) -> None:
        """Have the learner keep a copy of its weights."""

        def on_learner(rank: Any) -> None:
            rank.kept = {name: weight.detach().clone() for name, weight in rank._learner.policy.vlm.named_parameters()}

        await self.learners._actors[0].__ray_call__.remote(on_learner)

    async def exchange(self) -> None:
        """The learner's weights against the copy that it keeps."""

        def on_learner(rank: Any) -> None:
            with torch.no_grad():
                for name, weight in rank._learner.policy.vlm.named_parameters():
                    now = weight.detach().clone()
                    weight.copy_(rank.kept[name])
                    rank.kept[name] = now

        await self.learners._actors[0].__ray_call__.remote(on_learner)

    async def on_worker(self, change: Callable[[Any], Any]) -> Any:
        """Run something inside the (only) rollout worker."""
        return await self.rollouts._pool._workers[0].actor.__ray_call__.remote(change)


@pytest.fixture(scope="session")
def recipe() -> TrainConfig:
    """The panels recipe; its paths are relative to the repository."""
    return load_config(ROOT / "configs" / "panels.yaml")


@pytest.fixture(scope="session")
def runner() -> Iterator[asyncio.Runner]:
    """One asyncio loop for the whole run: pools belong to a loop."""
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="session")
def tied_model(tmp_path_factory: pytest.TempPathFactory, recipe: TrainConfig) -> Path:
    """A random model with tied embeddings, and the tokenizer of the panels policy."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(recipe.learner.model)
    folder = tmp_path_factory.mktemp("models") / "tied"
    save_folder(make_model(tokenizer, TinyConfig(tie_embeddings=True), seed=0), make_processor(tokenizer), folder)
    return folder


@pytest.fixture(scope="session")
def qwen3_model(tmp_path_factory: pytest.TempPathFactory, recipe: TrainConfig) -> Path:
    """A random Qwen3-VL, and the tokenizer of the panels policy."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(recipe.learner.model)
    folder, family = tmp_path_factory.mktemp("models") / "qwen3", Qwen3VL()
    save_folder(make_model(tokenizer, TinyConfig(), 0, family), make_processor(tokenizer, family), folder)
    return folder


@dataclass
class Everything:
    untied: Stack
    tied: Stack
    qwen3: Stack
    rewards: RewardPool


@pytest.fixture(scope="session")
def everything(
    ray_cluster: Cluster, runner: asyncio.Runner, recipe: TrainConfig, tied_model: Path, qwen3_model: Path
) -> Iterator[Everything]:
    """All engines start at once, which takes about as long as one after the other on two cores, but no longer."""

    async def launch(model: str, episode: EpisodeConfig = recipe.episode, **extra: Any) -> Stack:
        engine = replace(recipe.rollout.engine, model=model, extra=recipe.rollout.engine.extra | extra)
        rollout = replace(recipe.rollout, engine=engine, resources=LITTLE)
        rollouts = RolloutPool.launch(ray_cluster, rollout, episode)
        learners = await LearnerGroup.launch(
            ray_cluster, replace(recipe.learner, model=model, freeze_vision=False, threads=1, resources=LITTLE)
        )
        await rollouts.ready(START_S)
        return Stack(rollouts, learners)

    async def launch_all() -> Everything:
        rewards = RewardPool.launch(ray_cluster, recipe.reward)
        least = Qwen3VL.min_visual_tokens
        larger = replace(recipe.episode, coarse_tokens=least, fine_tokens=least, on_bad_box=OnBadBox.WHOLE_IMAGE)
        untied, tied, qwen3, _ = await asyncio.gather(
            launch(recipe.learner.model),
            # so few tokens a step that most prompts are prefilled in parts
            launch(str(tied_model), max_num_batched_tokens=96),
            launch(str(qwen3_model), larger),
            rewards.ready(START_S),
        )
        return Everything(untied, tied, qwen3, rewards)

    started = runner.run(launch_all())

    async def close_all() -> None:
        for stack in (started.untied, started.tied, started.qwen3):
            await stack.rollouts.close()
            await stack.learners.close()
        await started.rewards.close()

    _SHARED.append(lambda: runner.run(close_all()))
    yield started
    end_shared_engines()


@pytest.fixture(scope="session")
def untied(everything: Everything) -> Stack:
    return everything.untied


@pytest.fixture(scope="session")
def tied(everything: Everything) -> Stack:
    return everything.tied


@pytest.fixture(scope="session")
def rewards(everything: Everything) -> RewardPool:
    return everything.rewards


@pytest.fixture(scope="session")
def questions() -> list[Question]:
    """Twenty-four held-out panels questions."""
    return [question(PanelsConfig(), 0, Split.HELDOUT, index) for index in range(24)]


async def differences(stack: Stack, trajectories: tuple[Any, ...]) -> np.ndarray:
    """|engine - learner| log-prob of every sampled token, nats."""
    from ergo_rl.jobs.weight_check import mismatch

    return mismatch(trajectories, await stack.learners.logprobs(ray.put(trajectories)))
