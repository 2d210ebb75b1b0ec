"""vLLM and the learner on 200 two-turn trajectories of every size: the same prompts, grids and log-probs."""

from __future__ import annotations

import asyncio
import io
from collections import Counter
from dataclasses import replace
from itertools import cycle, islice
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ergo_rl.actors.rollout_pool import Rollout
from ergo_rl.episodes import images
from ergo_rl.episodes.config import OnBadBox
from ergo_rl.episodes.families import family_of, load_tokenizer
from ergo_rl.episodes.types import Question, Trajectory
from ergo_rl.examples.panels.scenes import PanelsConfig, Split, question
from ergo_rl.jobs.config import TrainConfig
from tests.system.conftest import Stack, differences

pytestmark = pytest.mark.system

WANTED = 200
BUDGETS = ((36, 36), (81, 16), (20, 81), (64, 49))
"""Most visual tokens of the coarse view and of the crop; they take turns. With text and replies well below the engine's
limit of 512 tokens."""
QUESTIONS, SAMPLES, MOST_ROUNDS = 12, 8, 12
WORDS = ("red", "green", "blue", "yellow", "white", "cyan", "panel", "mark", "cross", "ring", "bar", "dot")


def varied(number: int) -> Question:
    """A held-out panels question with a part of its image, of any shape, and up to twelve words more."""
    rng, plain = np.random.default_rng(number), question(PanelsConfig(), 0, Split.HELDOUT, number)
    pixels = images.decode(plain.image)
    height, width = (int(side) for side in rng.integers(60, 673, 2))
    top, left = (int(rng.integers(0, 672 - side + 1)) for side in (height, width))
    buffer = io.BytesIO()
    Image.fromarray(pixels[top : top + height, left : left + width]).save(buffer, "PNG", compress_level=1)
    words = " ".join([plain.text, *rng.choice(WORDS, int(rng.integers(0, 13)))])
    return replace(plain, id=f"varied-{number}", image=buffer.getvalue(), text=words, boxes=())


def grids(trajectory: Trajectory, processor: Any) -> list[list[int]]:
    """(time, height, width) in patches of all images, as the model's own processor makes them, which vLLM calls."""
    views = [Image.fromarray(view.pixels) for view in trajectory.views]
    return processor(images=views, return_tensors="pt")["image_grid_thw"].tolist()


async def budgets(stack: Stack, coarse: int, fine: int, on_bad_box: OnBadBox) -> None:
    def change(worker: Any) -> None:
        from dataclasses import replace

        settings = replace(worker._episodes.config, coarse_tokens=coarse, fine_tokens=fine, on_bad_box=on_bad_box)
        worker._episodes.config = settings

    await stack.on_worker(change)


async def played(stack: Stack, recipe: TrainConfig) -> list[Trajectory]:
    """At least ``WANTED`` trajectories of two turns, in rounds with other budgets; replies end where they end, or at a
    limit that differs from question to question. Where the policy names no usable box, the whole image is the crop."""
    two_turns: list[Trajectory] = []
    try:
        for round, (coarse, fine) in enumerate(islice(cycle(BUDGETS), MOST_ROUNDS)):
            await budgets(stack, coarse, fine, OnBadBox.WHOLE_IMAGE)
            chosen = range(round * QUESTIONS, (round + 1) * QUESTIONS)
            limits = [replace(recipe.rollout.sampling, fine_max_tokens=3 + 7 * n % 46) for n in chosen]
            plays = await asyncio.gather(
                *(stack.rollouts.rollout(varied(n), 11, SAMPLES, at) for n, at in zip(chosen, limits, strict=True))
            )
            for play in plays:
                assert isinstance(play, Rollout), play
                two_turns += [episode for episode in await play.trajectories if len(episode.turns) == 2]
            if len(two_turns) >= WANTED:
                return two_turns
    finally:
        episode = recipe.episode
        await budgets(stack, episode.coarse_tokens, episode.fine_tokens, episode.on_bad_box)
    raise AssertionError(f"only {len(two_turns)} of {MOST_ROUNDS * QUESTIONS * SAMPLES} trajectories had two turns")


def test_two_hundred_trajectories_of_every_size_agree(
    untied: Stack, runner: asyncio.Runner, recipe: TrainConfig
) -> None:
    """Prompt lengths as vLLM reports them for both turns, grids of both images, and log-probs of every sampled token:
    within 1e-5 nats on average and 1e-3 at most."""
    from transformers import AutoImageProcessor

    from ergo_rl.learners.batch import Batcher, Sample

    model = recipe.learner.model
    family, tokenizer, processor = family_of(model), load_tokenizer(model), AutoImageProcessor.from_pretrained(model)
    pad, end = (tokenizer.convert_tokens_to_ids(token) for token in (family.image_pad, family.turn_end))

    async def story() -> None:
        episodes = await played(untied, recipe)
        batcher = Batcher(family, processor, pad, end, recipe.learner.micro_batch_tokens)
        plan = batcher.plan([Sample(episode, (1.0,)) for episode in episodes])
        assert plan.length_mismatches == 0 and len(plan.rows) == len(episodes)
        for members, batch in zip(plan.bins, batcher.batches(plan), strict=True):
            wanted = [grid for member in members for grid in grids(episodes[member], processor)]
            assert batch.image_grid_thw.tolist() == wanted

        shapes = Counter((view.width, view.height) for episode in episodes for view in episode.views)
        replies = {len(turn.completion_ids) for episode in episodes for turn in episode.turns}
        prompts = [episode.turns[-1].engine_prompt_length for episode in episodes]
        assert len(shapes) >= 25 and len(replies) >= 8 and max(prompts) >= 1.5 * min(prompts), "of every size"

        gaps = await differences(untied, tuple(episodes))
        assert gaps.size >= 10 * len(episodes)
        assert gaps.mean() <= 1e-5 and gaps.max() <= 1e-3, (gaps.mean(), gaps.max())

    runner.run(story())
