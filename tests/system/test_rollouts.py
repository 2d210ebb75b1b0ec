"""Rollout workers on a real engine: lengths, log-probs, seeds, bans, refusals, deaths."""

from __future__ import annotations

import asyncio
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ergo_rl.actors.rollout_pool import Rollout
from ergo_rl.actors.rollout_worker import SkippedQuestion
from ergo_rl.episodes.families import family_of, load_tokenizer
from ergo_rl.episodes.probe import Replacement
from ergo_rl.episodes.types import Question, Trajectory
from ergo_rl.jobs.config import TrainConfig
from tests.system.conftest import Everything, Stack, differences

pytestmark = pytest.mark.system


async def play(stack: Stack, question: Question, seed: int, samples: int = 8) -> tuple[Trajectory, ...]:
    rollout = await stack.rollouts.rollout(question, seed, samples)
    assert isinstance(rollout, Rollout), rollout
    trajectories: tuple[Trajectory, ...] = await rollout.trajectories
    return trajectories


def test_engine_and_learner_agree_on_lengths_and_log_probs(
    untied: Stack, runner: asyncio.Runner, questions: list[Question]
) -> None:
    """Prompt lengths of both turns as vLLM reports them, with one and with two images; log-probs within 1e-5 nats."""
    from ergo_rl.learners.batch import Sample, expand, length_mismatch

    async def story() -> None:
        groups = await asyncio.gather(*(play(untied, one, seed=7) for one in questions[:8]))
        family, tokenizer = family_of("models/panels-policy"), load_tokenizer("models/panels-policy")
        pad = tokenizer.convert_tokens_to_ids(family.image_pad)
        everyone = [one for group in groups for one in group]
        assert not any(length_mismatch(expand(Sample(one, (0.0,)), family, pad), one) for one in everyone)
        found = np.concatenate([await differences(untied, group) for group in groups])
        assert found.mean() <= 1e-5 and found.max() <= 1e-3, (found.mean(), found.max())

    runner.run(story())


def test_log_probs_are_of_the_distribution_that_was_sampled(
    untied: Stack, runner: asyncio.Runner, recipe: TrainConfig, questions: list[Question]
) -> None:
    """At temperature 0.7 vLLM's log-probs are the learner's at 0.7 (TRL #4159), and far from those at 1."""

    def at(temperature: float) -> Any:
        return lambda rank: setattr(rank._learner.config, "temperature", temperature)

    async def story() -> None:
        cool = replace(recipe.rollout.sampling, temperature=0.7)
        rollout = await untied.rollouts.rollout(questions[0], 7, 8, cool)
        assert isinstance(rollout, Rollout)
        group = await rollout.trajectories
        learner = untied.learners._actors[0]
        await learner.__ray_call__.remote(at(0.7))
        same = await differences(untied, group)
        await learner.__ray_call__.remote(at(1.0))
        other = await differences(untied, group)
        assert same.mean() <= 1e-5 and same.max() <= 1e-3
        assert other.mean() > 1e-2

    runner.run(story())


def test_rollout_same_seed_is_reproducible_and_another_differs(
    untied: Stack, runner: asyncio.Runner, questions: list[Question]
) -> None:
    async def story() -> None:
        first, again, other = [await play(untied, questions[0], seed) for seed in (3, 3, 4)]
        ids = [[one.token_ids.tolist() for one in group] for group in (first, again, other)]
        assert ids[0] == ids[1]
        assert ids[0] != ids[2]
        assert len({tuple(one) for one in ids[0]}) > 1, "samples of one group are seeded apart"

    runner.run(story())


def test_replay_with_its_own_crop_gives_the_same_answer(
    untied: Stack, runner: asyncio.Runner, recipe: TrainConfig, questions: list[Question]
) -> None:
    """The crop in place of itself, as if it were another question's: turn 2 is what it was."""

    async def story() -> None:
        greedy = replace(recipe.rollout.sampling, temperature=0.0)
        for one in questions[:4]:
            played = await untied.rollouts.rollout(one, 0, 1, greedy)
            assert isinstance(played, Rollout) and played.result.summaries[0].crop is not None
            found = await untied.rollouts.replay(one, played.trajectories, played.trajectories, one.boxes[0])
            assert isinstance(found, dict) and set(found) == set(Replacement), found
            assert not any(replay.failure for replay in found.values())
            assert found[Replacement.OTHER].answer == played.result.summaries[0].answer is not None

    runner.run(story())


def test_rollout_chunked_prefill_keeps_seeds(tied: Stack, runner: asyncio.Runner, questions: list[Question]) -> None:
    """Ninety-six tokens a step for 48 prompts of about 60 each: what is sampled after a part is thrown away and must
    not use up the request's random numbers (vLLM on CPU died of it: ``cluster.compat.patch_cpu_seeded_sampling``)."""

    async def story() -> None:
        busy = await asyncio.gather(*(play(tied, one, seed=8) for one in questions[:6]))
        alone = [await play(tied, one, seed=8, samples=1) for one in questions[:6]]
        assert tied.rollouts.restarts == 0
        same = [
            group[0].turns[0].completion_ids.tolist() == single[0].turns[0].completion_ids.tolist()
            for group, single in zip(busy, alone, strict=True)
        ]
        assert sum(same) >= 5, "one may differ: sums in another order can tip a draw"

    runner.run(story())


def test_vision_tokens_are_never_sampled(tied: Stack, runner: asyncio.Runner, questions: list[Question]) -> None:
    """A random model samples nearly evenly: without the ban 5 of about 400 ids would come up in 1,500 tokens
    about 19 times (R1-V #91, verl #3469)."""
    tokenizer = load_tokenizer("models/panels-policy")
    banned = set(family_of("models/panels-policy").banned_ids(tokenizer))

    async def story() -> None:
        groups = await asyncio.gather(*(play(tied, one, seed=1) for one in questions[:6]))
        sampled = [token for group in groups for one in group for token in one.token_ids[one.loss_mask].tolist()]
        assert len(sampled) >= 1500
        assert banned.isdisjoint(sampled) and len(set(sampled)) > 200

    runner.run(story())


def test_rollout_resends_an_image_the_core_has_lost(
    untied: Stack, runner: asyncio.Runner, questions: list[Question]
) -> None:
    """vLLM's front end keeps account of the processed images that its core has; requests that are cancelled on their
    way make it wrong, and the core then refuses those that come without pixels. Here its own cache is emptied alone."""

    def forget(worker: Any) -> None:
        llm = worker._engine._llm  # this runs beside the engine's loop
        loop = llm.output_handler.get_loop()
        asyncio.run_coroutine_threadsafe(llm.engine_core.reset_mm_cache_async(), loop).result(60)

    async def story() -> None:
        before = await play(untied, questions[11], seed=31)
        await untied.on_worker(forget)
        after = await play(untied, questions[11], seed=31)
        assert [one.token_ids.tolist() for one in after] == [one.token_ids.tolist() for one in before]

    runner.run(story())


def test_turn_two_reuses_the_prefix_cache_of_turn_one(
    untied: Stack, runner: asyncio.Runner, questions: list[Question]
) -> None:
    """Turn 2 finds the whole 32-token blocks of turn 1, prompt and reply, in the prefix cache (all but the last)."""

    async def story() -> None:
        groups = await asyncio.gather(*(play(untied, one, seed=6) for one in questions[8:12]))
        second = [one.turns for group in groups for one in group if len(one.turns) == 2]
        assert len(second) >= 16, "the committed policy names a usable box most of the time"
        for look, read in second:
            known = look.engine_prompt_length + len(look.completion_ids)
            assert read.engine_cached_tokens % 32 == 0 and read.engine_cached_tokens >= known - 2 * 32

    runner.run(story())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"image": b"\xff\xd8\xff not a picture"}, "UnreadableImage: not a readable image"),
        ({"text": "What is <|image_pad|>?"}, r"ReservedText: question .* contains the special token <\|image_pad\|>"),
        ({"text": "why " * 400}, "TurnRefused: .*512"),
    ],
)
def test_rollout_unusable_question_says_why(
    change: dict[str, Any], reason: str, untied: Stack, runner: asyncio.Runner, questions: list[Question]
) -> None:
    async def story() -> None:
        bad = replace(questions[0], **change)
        answer, good = await asyncio.gather(untied.rollouts.rollout(bad, seed=0), play(untied, questions[1], seed=0))
        assert isinstance(answer, SkippedQuestion) and answer.question_id == questions[0].id
        assert len(good) == 8, "others are not disturbed"
        assert re.search(reason, answer.reason), answer.reason

    runner.run(story())


def test_a_dead_worker_is_replaced_with_the_current_weights(
    untied: Stack, runner: asyncio.Runner, questions: list[Question]
) -> None:
    """Killed while it plays: its questions are played again, by a worker that was given the published weights."""

    async def story() -> None:
        await untied.perturb(seed=9)
        version = await untied.publish()
        playing = asyncio.gather(*(play(untied, one, seed=2) for one in questions[:4]))
        await asyncio.sleep(0.05)
        with pytest.raises(Exception, match=r"died|dead|exit"):
            await untied.on_worker(lambda worker: __import__("os")._exit(1))
        groups = await playing
        assert untied.rollouts.restarts == 1
        assert {turn.policy_version for group in groups for one in group for turn in one.turns} == {version}
        found = np.concatenate([await differences(untied, group) for group in groups])
        assert found.mean() <= 1e-5, "the replacement holds the learner's weights"

    runner.run(story())


def test_roles_without_gpus_see_none_of_them(everything: Everything, runner: asyncio.Runner) -> None:
    """The Ray of the tests believes in eight, and Ray itself hides none from an actor that asks for none."""
    pools = (everything.untied.rollouts._pool, everything.rewards._pool)
    actors = [*(pool._workers[0].actor for pool in pools), everything.untied.learners._actors[0]]

    async def seen(actor: Any) -> Any:
        return await actor.__ray_call__.remote(lambda _: __import__("os").environ.get("CUDA_VISIBLE_DEVICES"))

    async def story() -> list[Any]:
        return await asyncio.gather(*map(seen, actors))

    assert runner.run(story()) == ["", "", ""]


def test_stack_listens_on_loopback_only(everything: Everything) -> None:
    """Ray, engines and ranks: none of their ports is on another interface."""
    import os

    from benchmarks.lives import descendants
    from tests.cluster.test_placement import LOOPBACK, listening, sockets_of

    owners = sockets_of([(os.getpid(), "pytest"), *descendants(os.getpid())])
    ports = listening(os.getuid())
    elsewhere = {f"{owners[one]} {one}": ports[one] for one in owners.keys() & ports.keys()}
    assert len(elsewhere) >= 4, "the tables are read"
    assert {who: port for who, port in elsewhere.items() if port.split(":")[0] not in LOOPBACK} == {}
