"""The frozen verifier on a real engine: it reads what the crop shows, and nothing else."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest
import ray

from ergo_rl.episodes import images
from ergo_rl.episodes.families import family_of
from ergo_rl.episodes.types import Box, Finish, Outcome, Question, Score, Trajectory, Turn, Unscored
from ergo_rl.examples.panels.scenes import VIEW_TOKENS, PanelsConfig, Split, question
from ergo_rl.rewards.pool import RewardPool
from tests.system.conftest import Stack

pytestmark = pytest.mark.system
SCENES = 32


def trajectory(question: Question, crop: Box, answer: str) -> Trajectory:
    """What a policy would have left behind that looked at ``crop`` and answered ``answer``."""
    family = family_of("models/panels-policy")
    assert isinstance(question.image, bytes)
    pixels = images.decode(question.image)
    views = tuple(images.view(pixels, box, family, VIEW_TOKENS) for box in (images.full_box(pixels), crop))
    texts = ("<think>There.</think><zoom>[1, 2, 3, 4]</zoom>", f"<think>I see.</think><answer>{answer}</answer>")
    one = np.zeros(1, np.int32)
    turns = tuple(Turn(one, one, np.zeros(1, np.float32), text, Finish.STOP, 1, 0) for text in texts)
    return Trajectory(question.id, 0, views, turns, Outcome.ANSWERED, "ok")


def around(box: Box, margin: int, side: int) -> Box:
    return Box(max(0, box.x1 - margin), max(0, box.y1 - margin), min(side, box.x2 + margin), min(side, box.y2 + margin))


def test_region_term_needs_the_target_in_the_crop(rewards: RewardPool, runner: asyncio.Runner) -> None:
    """A crop round the mark is read right nearly always; the opposite corner of the scene at about chance (1 in 4);
    the whole scene is too large to read at this budget, and does not pay for its size either."""
    config = PanelsConfig()

    async def story() -> None:
        async def scored(index: int, crop: Box, answer: str) -> Score:
            row = question(config, 0, Split.HELDOUT, index)
            reference = ray.put((trajectory(row, crop, answer),))
            (verdict,) = await rewards.score(row, reference)
            assert isinstance(verdict, Score)
            return verdict

        def mirrored(box: Box) -> Box:
            return Box(config.side - box.x2, config.side - box.y2, config.side - box.x1, config.side - box.y1)

        answers = [question(config, 0, Split.HELDOUT, index) for index in range(SCENES)]
        targets = [row.boxes[0] for row in answers]
        right = await asyncio.gather(
            *(scored(i, around(target, 40, config.side), answers[i].answer) for i, target in enumerate(targets))
        )
        apart = [i for i, target in enumerate(targets) if not _overlap(around(target, 60, 672), mirrored(target))]
        wrong = await asyncio.gather(*(scored(i, mirrored(around(targets[i], 40, config.side)), "?") for i in apart))
        whole = await asyncio.gather(*(scored(i, Box(0, 0, config.side, config.side), "?") for i in range(SCENES)))

        assert sum(score.parts["region"] for score in right) >= 0.85 * SCENES
        assert sum(score.parts["region"] for score in wrong) <= 0.6 * len(wrong)
        assert sum(score.parts["region"] for score in whole) <= 0.6 * SCENES
        assert {score.parts["box"] for score in right} == {1.0} and {score.parts["box"] for score in whole} == {0.0}
        assert {score.parts["accuracy"] for score in right} == {1.0} and {
            score.parts["accuracy"] for score in whole
        } == {0.0}
        assert {score.parts["format"] for score in right} == {1.0}
        for score in right:
            parts = score.parts
            assert score.total == parts["region"] + 0.5 * parts["box"] + parts["accuracy"] + parts["format"]

    runner.run(story())


def _overlap(a: Box, b: Box) -> bool:
    return a.x1 < b.x2 and b.x1 < a.x2 and a.y1 < b.y2 and b.y1 < a.y2


def test_question_too_long_for_the_verifier_is_unscored(
    rewards: RewardPool, runner: asyncio.Runner, questions: list[Question]
) -> None:
    async def story() -> None:
        row = questions[0]
        reference = ray.put((trajectory(row, around(row.boxes[0], 40, 672), row.answer),))
        too_long = replace(row, text="why " * 400)
        (verdict,) = await rewards.score(too_long, reference)
        assert isinstance(verdict, Unscored) and "512" in verdict.reason

    runner.run(story())


def test_score_takes_the_reference_of_a_rollout(
    untied: Stack, rewards: RewardPool, runner: asyncio.Runner, questions: list[Question]
) -> None:
    async def story() -> None:
        rollout = await untied.rollouts.rollout(questions[0], seed=1)
        verdicts = await rewards.score(questions[0], rollout.trajectories)  # type: ignore[union-attr]
        facts = rollout.result.summaries  # type: ignore[union-attr]
        assert len(verdicts) == len(facts) == 8
        for verdict, fact in zip(verdicts, facts, strict=True):
            assert isinstance(verdict, Score)
            if fact.crop is None:
                assert verdict.parts["region"] == verdict.parts["box"] == verdict.parts["accuracy"] == 0
            else:
                assert verdict.parts["box"] == float(fact.area_ratio <= 0.6)  # type: ignore[operator]

    runner.run(story())
