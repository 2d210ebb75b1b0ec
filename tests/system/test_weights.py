"""The engine holds the learner's weights after a publish; and every cache that could hide the old ones is cleared."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import ray

from ergo_rl.actors.rollout_pool import Rollout
from ergo_rl.cluster.config import Transport, WeightsConfig
from ergo_rl.cluster.weight_sync import WeightChannel
from ergo_rl.episodes.types import Question, Trajectory
from ergo_rl.jobs.config import TrainConfig, WeightCheckConfig
from ergo_rl.jobs.weight_check import WeightCheck, WeightsDiffer
from tests.system.conftest import Everything, Stack, differences

pytestmark = pytest.mark.system


async def play_all(stack: Stack, questions: list[Question]) -> list[tuple[Any, ...]]:
    rollouts = await asyncio.gather(*(stack.rollouts.rollout(one, seed=5) for one in questions))
    return list(await asyncio.gather(*(one.trajectories for one in rollouts)))  # type: ignore[union-attr]


@pytest.mark.parametrize("which", ["untied", "tied", "qwen3"])
def test_publish_perturbed_weights_then_engine_agrees_on_cached_prompts_and_images(
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
        proof = WeightCheck(untied.rollouts, untied.learners, questions[0], WeightCheckConfig(tolerance=1e-3))
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
        with pytest.raises(WeightsDiffer, match="sampled with versions"):
            await proof.measure(untied.version + 1)

    runner.run(story())


def test_sleeping_engine_answers_only_after_new_weights(
    untied: Stack, runner: asyncio.Runner, questions: list[Question]
) -> None:
    """vLLM's own sleep, on a CPU without the memory that it would give back: what is asked meanwhile waits, and is
    played with the weights that wake it, on caches that were warm. Twice, and once more awake."""

    async def story() -> None:
        await play_all(untied, questions[:4])
        for seed in (11, 12):
            await untied.perturb(seed)
            await untied.rollouts._pool.call_all("sleep")
            asked = asyncio.create_task(play_all(untied, questions[:4]))
            assert not (await asyncio.wait([asked], timeout=3))[0], "an engine that sleeps has answered"
            version = await untied.publish()
            groups = await asked
            assert {turn.policy_version for group in groups for one in group for turn in one.turns} == {version}
            found = np.concatenate([await differences(untied, group) for group in groups])
            assert found.mean() <= 1e-5 and found.max() <= 1e-3, (found.mean(), found.max())
        await untied.perturb(13)
        await untied.publish()
        (group,) = await play_all(untied, questions[:1])
        assert (await differences(untied, group)).mean() <= 1e-5

    runner.run(story())


def test_direct_transfer_reaches_every_engine_and_recovers_after_a_failure(
    untied: Stack, runner: asyncio.Runner, questions: list[Question]
) -> None:
    """Shared memory, in pieces of half a megabyte: to one engine; a second one starts and holds what it missed; to
    both; the transfer breaks when each has two pieces of ten or so (layers with some of their weights, running replies
    on hold) and the object store delivers the same version; a new connection for the next. Each time the learner's
    log-probs are those of every engine, within 1e-5 nats on average."""
    transport = Transport.IPC

    async def in_pieces(size: int) -> int:
        def on_learner(rank: Any) -> int:
            before, rank._learner.config.bucket_bytes = rank._learner.config.bucket_bytes, size
            return before

        untied.learners._buckets = 0  # they are counted once
        before: int = await untied.learners._actors[0].__ray_call__.remote(on_learner)
        return before

    def break_at_the_third(rank: Any) -> None:
        client, sent = rank._sender._client, []
        update = client.update_weights

        def break_then_update(update_info: Any) -> None:
            sent.append(update_info)
            if len(sent) == 3:
                client.fail("broken by the test")
            update(update_info)

        client.update_weights = break_then_update

    async def story() -> None:
        learner = untied.learners._actors[0]
        whole = await in_pieces(500_000)
        channel = WeightChannel(untied.learners, untied.rollouts, WeightsConfig(transport, 60.0))
        proof = WeightCheck(untied.rollouts, untied.learners, questions[0], WeightCheckConfig(tolerance=1e-5))

        async def publish(seed: int) -> Transport:
            await untied.perturb(seed)
            untied.version += 1
            publication = await channel.publish(untied.version)
            await proof.measure(untied.version)
            return publication.transport

        try:
            assert await publish(31) is transport
            await untied.rollouts.resize(2)
            await proof.measure(untied.version)
            assert await publish(32) is transport
            await learner.__ray_call__.remote(break_at_the_third)
            assert await publish(33) is Transport.OBJECT_STORE
            assert await publish(34) is transport
            assert len(untied.rollouts) == len(untied.rollouts.members()) == 2 and untied.rollouts.restarts == restarts
        finally:
            await untied.rollouts.resize(1)
            await in_pieces(whole)

    restarts = untied.rollouts.restarts
    runner.run(story())


def sampled_by(trajectory: Trajectory) -> np.ndarray:
    """int[sampled tokens]: the version that the stamps say."""
    found = []
    for turn in trajectory.turns:
        versions = np.full(len(turn.completion_ids), turn.policy_version)
        for at, version in turn.updates:
            versions[at:] = version
        found.append(versions)
    return np.concatenate(found)


def test_publish_during_replies_stamps_every_token(
    tied: Stack, runner: asyncio.Runner, recipe: TrainConfig, questions: list[Question]
) -> None:
    """Version b is published while long replies of version a are being sampled, and the engine is not drained. Every
    token has the log-prob of the version that its stamp names (so the stamp is right to the token, and no cache of a
    served b); under the other version log-probs are elsewhere.

    The prompts are so long that blocks behind the image are in the prefix cache when they are asked again, and b must
    have it encoded anew (vLLM's core died of it: ``cluster.compat.patch_always_send_images``)."""
    long = replace(recipe.rollout.sampling, coarse_max_tokens=250)
    asked = [replace(one, text=f"{one.text} Look at every panel before you answer." * 3) for one in questions[12:14]]

    def furthest(worker: Any) -> int:
        requests = worker._engine._llm.output_processor.request_states.values()
        return max((one.detokenizer.num_output_tokens() for one in requests), default=0)

    async def story() -> None:
        a = await tied.publish()
        await tied.remember()
        await tied.perturb(seed=17)
        for one in asked:
            assert isinstance(await tied.rollouts.rollout(one, 22, 1), Rollout)
        playing = asyncio.gather(*(tied.rollouts.rollout(one, 23, 4, long) for one in asked))
        while await tied.on_worker(furthest) < 16:
            assert not playing.done()
            await asyncio.sleep(0.02)
        b = await tied.publish()
        rollouts = await playing
        assert all(isinstance(one, Rollout) for one in rollouts)
        groups = await asyncio.gather(*(one.trajectories for one in rollouts))  # type: ignore[union-attr]
        trajectories = tuple(one for group in groups for one in group)

        turns = [turn for one in trajectories for turn in one.turns]
        crossed = [turn for turn in turns if turn.updates]
        assert len(crossed) >= 4, "replies this long were still being sampled"
        assert {turn.versions for turn in crossed} == {(a, b)}
        assert {turn.versions for turn in turns} - {(a, b)} <= {(a,), (b,)}
        facts = [facts for one in rollouts for facts in one.result.summaries]  # type: ignore[union-attr]
        assert sum(one.updates for one in facts) == len(crossed)

        new = await tied.learners.logprobs(ray.put(trajectories))
        await tied.exchange()
        old = await tied.learners.logprobs(ray.put(trajectories))
        await tied.exchange()
        right, wrong = [], []
        for one, ours_a, ours_b in zip(trajectories, old, new, strict=True):
            theirs, of_b = one.logprobs[one.loss_mask], sampled_by(one) == b
            right.append(np.abs(theirs - np.where(of_b, ours_b, ours_a)))
            wrong.append(np.abs(theirs - np.where(of_b, ours_a, ours_b)))
        found, other = np.concatenate(right), np.concatenate(wrong)
        assert found.mean() <= 1e-5 and found.max() <= 1e-3, (found.mean(), found.max())
        assert other.mean() > 1e-2, "the two versions can be told apart"

    runner.run(story())
