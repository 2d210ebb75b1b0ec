"""The engine holds the learner's weights after a publish; and every cache that could hide the old ones is cleared."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from episodes.types import Question
from jobs.config import ProofConfig
from jobs.proof import Proof, WeightsDiffer
from tests.system.conftest import Everything, Stack, differences

pytestmark = pytest.mark.system


async def play_all(stack: Stack, questions: list[Question]) -> list[tuple[Any, ...]]:
    rollouts = await asyncio.gather(*(stack.rollouts.play(one, seed=5) for one in questions))
    return list(await asyncio.gather(*(one.trajectories for one in rollouts)))  # type: ignore[union-attr]


@pytest.mark.parametrize("which", ["untied", "tied", "qwen3"])
def test_a_perturbed_learner_and_the_engine_agree_on_prompts_and_images_seen_before(
    which: str, everything: Everything, runner: asyncio.Runner, questions: list[Question]
) -> None:
    """Every weight changes, the vision tower's too; the same prompts and images before and after (so every cache is
    warm); log-probs equal within 1e-5 nats on average. vLLM #12284, #28827 (prefix cache), #44910 (encoder cache);
    a tied head keeps its old packed copy unless it is processed again."""
    stack: Stack = getattr(everything, which)

    async def story() -> None:
        await play_all(stack, questions[:4])
        for seed in (1, 2):
            assert await stack.perturb(seed) >= 60
            version = await stack.publish()
            groups = await play_all(stack, questions[:4])
            assert {turn.policy_version for group in groups for one in group for turn in one.turns} == {version}
            found = np.concatenate([await differences(stack, group) for group in groups])
            assert found.size >= 200
            assert found.mean() <= 1e-5 and found.max() <= 1e-3, (found.mean(), found.max())

    runner.run(story())


@pytest.mark.parametrize("forgotten", ["reset_prefix_cache", "reset_encoder_cache"])
def test_the_proof_notices_a_forgotten_cache(
    forgotten: str, untied: Stack, runner: asyncio.Runner, questions: list[Question]
) -> None:
    """The control of the test above: with one cache left as it was, the proof stops the run."""

    def forget(worker: Any) -> None:
        async def nothing(*_: object, **__: object) -> bool:
            return True

        setattr(worker._engine._llm, forgotten, nothing)

    def remember(worker: Any) -> None:
        delattr(worker._engine._llm, forgotten)

    async def story() -> None:
        proof = Proof(untied.rollouts, untied.learners, questions[0], ProofConfig(tolerance=1e-3))
        await untied.publish()
        fresh = await proof.measure(untied.version)
        assert fresh["proof/mismatch_mean"] <= 1e-5
        await untied.on_worker(forget)
        try:
            await untied.perturb(seed=3)
            await untied.publish()
            with pytest.raises(WeightsDiffer, match="stale weights or caches"):
                await proof.measure(untied.version)
        finally:
            await untied.on_worker(remember)
        await untied.publish()
        assert (await proof.measure(untied.version))["proof/mismatch_mean"] <= 1e-5
        with pytest.raises(WeightsDiffer, match="played for versions"):
            await proof.measure(untied.version + 1)

    runner.run(story())
