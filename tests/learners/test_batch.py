import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ergo_rl.episodes.types import Trajectory
from ergo_rl.learners.batch import Batcher, Sample, expand, pack_bins, pad_bins
from ergo_rl.learners.config import Packing
from tests.factories import FAMILY, IDS, IMAGE_PAD, shared_view, trajectory, view


@pytest.fixture(scope="module")
def batcher(tiny: Path) -> Batcher:
    from ergo_rl.cluster.compat import repair_torchvision

    repair_torchvision()
    from transformers import AutoImageProcessor

    return Batcher(FAMILY, AutoImageProcessor.from_pretrained(tiny), IMAGE_PAD, IDS["<|im_end|>"], 120, Packing.NONE)


def test_expand_repeats_placeholders_once() -> None:
    episode = trajectory(replies=(5, 7), coarse=view(3, 2), crop=view(2, 4))
    row = expand(Sample(episode, (1.0,)), FAMILY, IMAGE_PAD)
    # turn 1: 3 + 1 + (3 x 2) + 1 + 4 = 15 prompt tokens, then 5; turn 2: 4 + 1 + (2 x 4) + 1 + 4 = 18, then 7
    assert len(row) == 15 + 5 + 18 + 7
    assert row.prompt_lengths == (15, 15 + 5 + 18)
    assert np.flatnonzero(row.loss_mask).tolist() == [*range(15, 20), *range(38, 45)]
    assert np.flatnonzero(row.image_mask).tolist() == [*range(4, 10), *range(25, 33)]
    assert (row.token_ids[row.image_mask] == IMAGE_PAD).all()
    assert row.token_ids[row.loss_mask].tolist() == episode.token_ids[episode.loss_mask].tolist()
    assert row.rollout_logprobs[row.loss_mask].tolist() == episode.logprobs[episode.loss_mask].tolist()
    assert not row.rollout_logprobs[~row.loss_mask].any()
    assert row.turns[row.loss_mask].tolist() == [1] * 5 + [2] * 7 and not row.turns[~row.loss_mask].any()


def test_expand_refuses_a_sampled_placeholder() -> None:
    episode = trajectory(name="odd")
    turn = episode.turns[0]
    sampled = replace(turn, completion_ids=np.array([IMAGE_PAD, *turn.completion_ids[1:]], np.int32))
    broken = replace(episode, turns=(sampled, episode.turns[1]))
    with pytest.raises(ValueError, match=r"'odd'.*3 image placeholders \(1 of them sampled\) for 2 views"):
        expand(Sample(broken, (1.0,)), FAMILY, IMAGE_PAD)


def with_engine_length(episode: Trajectory, length: int) -> Trajectory:
    return replace(episode, turns=(*episode.turns[:-1], replace(episode.turns[-1], engine_prompt_length=length)))


def test_plan_drops_a_trajectory_with_another_length_in_the_engine(
    batcher: Batcher, caplog: pytest.LogCaptureFixture
) -> None:
    good, bad = trajectory("good"), with_engine_length(trajectory("bad", 3), 39)
    with caplog.at_level(logging.WARNING):
        plan = batcher.plan([Sample(good, (1.0,)), Sample(bad, (1.0,))])
    assert plan.length_mismatches == 1 and len(plan.rows) == 1
    assert plan.lengths == [12]
    assert "'bad', sample 3" in caplog.text and "(15, 39)" in caplog.text and "(15, 38)" in caplog.text


def test_plan_drops_unscored_trajectories(batcher: Batcher) -> None:
    plan = batcher.plan([Sample(trajectory(), (math.nan,)), Sample(trajectory(sample=1), (0.5,))])
    (row,) = plan.rows
    assert set(row.advantages[row.loss_mask].tolist()) == {0.5}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_plan_with_a_log_prob_that_is_no_number_when_made_then_that_trajectory_alone_is_left_out(
    batcher: Batcher, caplog: pytest.LogCaptureFixture, value: float
) -> None:
    episode = trajectory("bad", 3)
    logprobs = episode.turns[0].logprobs.copy()
    logprobs[1] = value
    bad = replace(episode, turns=(replace(episode.turns[0], logprobs=logprobs), *episode.turns[1:]))
    with caplog.at_level(logging.WARNING):
        plan = batcher.plan([Sample(bad, (1.0,)), Sample(trajectory(sample=1), (0.5,)), Sample(bad, (math.nan,))])
    assert (plan.not_finite, plan.length_mismatches, plan.lengths) == (1, 0, [12]), "what is not scored is not counted"
    assert "'bad', sample 3: a log-prob of the engine or an advantage is NaN" in caplog.text
    (batch,) = batcher.batches(batcher.plan([Sample(bad, (1.0,))]))
    assert not batch.loss_mask.any(), "a rank that has nothing else makes its passes without loss"


def test_plan_with_an_infinite_advantage_when_made_then_that_trajectory_is_left_out(batcher: Batcher) -> None:
    plan = batcher.plan([Sample(trajectory(), (1.0, math.inf)), Sample(trajectory(sample=1), (0.5,))])
    assert plan.not_finite == 1 and len(plan.rows) == 1


def test_expand_gives_each_turn_its_own_advantage() -> None:
    episode = trajectory()
    row = expand(Sample(episode, (0.5, -2.0)), FAMILY, IMAGE_PAD)
    replies = [len(turn.completion_ids) for turn in episode.turns]
    assert row.advantages[row.loss_mask].tolist() == [0.5] * replies[0] + [-2.0] * replies[1]
    assert not row.advantages[~row.loss_mask].any()
    with pytest.raises(ValueError, match="3 advantages for 2 turns"):
        Sample(episode, (1.0, 2.0, 3.0))


def test_plan_keeps_one_row_without_loss_when_nothing_is_scored(batcher: Batcher) -> None:
    plan = batcher.plan([Sample(trajectory(sample=place), (math.nan,)) for place in range(3)])
    (batch,) = batcher.batches(plan)
    assert plan.lengths == [0] and not batch.loss_mask.any() and batch.input_ids.shape[0] == 1


def test_batches_hold_every_token_and_image(batcher: Batcher) -> None:
    shared = shared_view(3, 2, 9)
    episodes = [
        trajectory(f"q{n}", n, replies=(4 + n, 3) if n % 2 else (6 + n,), coarse=shared, crop=view(2 + n, 2, n))
        for n in range(6)
    ]
    plan = batcher.plan([Sample(episode, (float(n),)) for n, episode in enumerate(episodes)])
    batches = list(batcher.batches(plan))
    assert len(batches) > 1
    for members, batch in zip(plan.bins, batches, strict=True):
        rows = [plan.rows[member] for member in members]
        assert batch.input_ids.numel() <= 120
        assert batch.attention_mask.sum(-1).tolist() == [len(row) for row in rows]
        assert [batch.advantages[n, : len(row)].tolist() for n, row in enumerate(rows)] == [
            row.advantages.tolist() for row in rows
        ]
        assert [batch.turns[n, : len(row)].tolist() for n, row in enumerate(rows)] == [
            row.turns.tolist() for row in rows
        ]
        assert batch.mm_token_type_ids.sum().item() == batch.image_grid_thw.prod(-1).sum().item() // 4
        assert [tuple(grid) for grid in batch.image_grid_thw.tolist()] == [
            (1, shown.height // 14, shown.width // 14) for row in rows for shown in row.views
        ]
        for place, row in enumerate(rows):
            assert batch.input_ids[place, : len(row)].tolist() == row.token_ids.tolist()
            assert not batch.loss_mask[place, len(row) :].any()
    assert sum(int(batch.loss_mask.sum()) for batch in batches) == sum(plan.lengths)
    assert sum(batch.input_ids.numel() for batch in batches) == plan.passed_tokens


def test_batches_process_a_shared_view_once(batcher: Batcher) -> None:
    processed: list[int] = []

    class Counting:
        def __call__(self, **arguments: Any) -> Any:
            processed.extend(id(image) for image in arguments["images"])
            return batcher.image_processor(**arguments)

    shared = view(3, 2)
    episodes = [trajectory("q", n, coarse=shared, crop=view(2, 4, n)) for n in range(5)]
    counting = replace(batcher, image_processor=Counting())
    batches = list(counting.batches(counting.plan([Sample(episode, (1.0,)) for episode in episodes])))
    assert len(processed) == 1 + 5
    assert sum(len(batch.image_grid_thw) for batch in batches) == 10
    for members, batch in zip(
        counting.plan([Sample(episode, (1.0,)) for episode in episodes]).bins, batches, strict=True
    ):
        assert len(batch.view_grids) == 1 + len(members) and batch.view_index.tolist()[::2] == [0] * len(members)


def test_batches_without_loss_fill_up_to_the_count(batcher: Batcher) -> None:
    plan = batcher.plan([Sample(trajectory(), (1.0,))])
    first, *others = batcher.batches(plan, 3)
    assert [bool(batch.loss_mask.any()) for batch in (first, *others)] == [True, False, False]
    assert all(torch.equal(batch.input_ids, first.input_ids) for batch in others)


def test_micro_batch_refuses_unequal_lengths(batcher: Batcher) -> None:
    (batch,) = batcher.batches(batcher.plan([Sample(trajectory(), (1.0,))]))
    with pytest.raises(ValueError, match="loss_mask is"):
        replace(batch, loss_mask=batch.loss_mask[:, 1:])
    with pytest.raises(ValueError, match="patches, but the grids say"):
        replace(batch, pixel_values=batch.pixel_values[1:])
    with pytest.raises(ValueError, match=r"advantages is \[1\], input_ids"):
        replace(batch, advantages=torch.zeros(1))


def test_pad_bins_by_hand() -> None:
    # longest first: 9 | 6 5 (2 x 6 = 12) | 4 3 3 (3 x 4 = 12) | 2
    assert pad_bins([3, 9, 4, 6, 2, 5, 3], 12) == ((1,), (3, 5), (2, 0, 6), (4,))
    assert pad_bins([50], 12) == ((0,),)


def test_pack_bins_by_hand() -> None:
    # in their order: 3 + 9 = 12 | 4 + 6 + 2 = 12 | 5 + 3
    assert pack_bins([3, 9, 4, 6, 2, 5, 3], 12) == ((0, 1), (2, 3, 4), (5, 6))
    assert pack_bins([50, 5], 12) == ((0,), (1,))


@given(st.lists(st.integers(1, 40), min_size=1, max_size=40), st.integers(1, 200))
def test_bins_hold_every_row_within_the_budget(lengths: list[int], budget: int) -> None:
    for bins, tokens in (
        (pad_bins(lengths, budget), lambda members: len(members) * max(lengths[index] for index in members)),
        (pack_bins(lengths, budget), lambda members: sum(lengths[index] for index in members)),
    ):
        assert sorted(index for members in bins for index in members) == list(range(len(lengths)))
        assert all(len(members) == 1 or tokens(members) <= budget for members in bins)


def test_packed_rows_pass_no_padding(batcher: Batcher) -> None:
    """Rows of 45, 39 and 45 tokens: 3 x 45 are passed where they are padded, 129 where they are not."""
    samples = [
        Sample(trajectory(sample=n, replies=replies), (1.0,)) for n, replies in enumerate([(5, 7), (3, 3), (5, 7)])
    ]
    for packing, passed in ((Packing.NONE, 3 * 45), (Packing.SEQUENCES, 45 + 39 + 45)):
        plan = replace(batcher, packing=packing, token_budget=4096).plan(samples)
        assert plan.passed_tokens == passed and plan.real_tokens == 129 and len(plan.bins) == 1
