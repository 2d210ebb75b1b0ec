"""The second family: patches of 16, DeepStack, interleaved mRoPE. What is tested with numbers of its own for the first
one must hold here too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ergo_rl.episodes.families import Qwen3VL, family_of
from ergo_rl.episodes.types import Trajectory
from ergo_rl.learners.batch import Batcher, MicroBatch, Sample
from ergo_rl.learners.config import LearnerConfig, Packing
from ergo_rl.learners.model import PolicyModel
from tests.factories import IDS, IMAGE_PAD, trajectory, view

FAMILY = Qwen3VL()


@pytest.fixture
def folder(tiny_qwen3: Path) -> Path:
    return tiny_qwen3


@pytest.fixture(scope="module")
def batcher(tiny_qwen3: Path) -> Batcher:
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(tiny_qwen3)
    return Batcher(FAMILY, processor, IMAGE_PAD, IDS["<|im_end|>"], 4096, Packing.NONE)


@pytest.fixture(scope="module")
def episodes() -> list[Trajectory]:
    """Groups share their coarse view; crops and lengths differ."""
    coarse = [view(8, 8, 0, family=FAMILY), view(16, 5, 1, family=FAMILY)]
    return [
        trajectory(
            f"q{n % 2}",
            n,
            replies=(3 + n, 9 - n),
            coarse=coarse[n % 2],
            crop=view(8 + n, 8, n, family=FAMILY),
            family=FAMILY,
        )
        for n in range(4)
    ]


def batch_of(batcher: Batcher, episodes: list[Trajectory]) -> MicroBatch:
    plan = batcher.plan([Sample(episode, (1.0,)) for episode in episodes])
    assert plan.length_mismatches == 0
    (batch,) = batcher.batches(plan)
    return batch


def test_folder_is_of_its_family_and_the_tower_feeds_two_layers(folder: Path) -> None:
    assert isinstance(family_of(str(folder)), Qwen3VL)
    policy = PolicyModel(LearnerConfig(model=str(folder)))
    assert len(policy.vlm.model.visual.deepstack_merger_list) == 2
    assert policy.vlm.config.text_config.rope_parameters["mrope_interleaved"]


@torch.no_grad()
def test_logprobs_equal_those_of_transformers_own_forward(
    folder: Path, batcher: Batcher, episodes: list[Trajectory]
) -> None:
    """From full logits of each unpadded row, its own pixels given to transformers' own forward pass."""
    policy = PolicyModel(LearnerConfig(model=str(folder), packing=Packing.NONE))
    for episode in episodes:
        batch = batch_of(batcher, [episode])
        states = policy.vlm.model(
            input_ids=batch.input_ids,
            mm_token_type_ids=batch.mm_token_type_ids,
            pixel_values=batch.pixel_values,
            image_grid_thw=batch.image_grid_thw,
        ).last_hidden_state[0]
        wanted = torch.log_softmax(states @ policy.vlm.lm_head.weight.T, -1)
        sampled = torch.nonzero(batch.loss_mask[0]).squeeze(-1)
        logprobs, _ = policy(batch, 1.0, ())
        torch.testing.assert_close(
            logprobs[batch.loss_mask], wanted[sampled - 1, batch.input_ids[0, sampled]], atol=1e-5, rtol=0
        )


def test_gradient_is_the_same_packed_and_padded_with_shared_views(
    folder: Path, batcher: Batcher, episodes: list[Trajectory]
) -> None:
    batch = batch_of(batcher, episodes)
    assert (batch.attention_mask == 0).any() and len(batch.view_grids) == 6 < len(batch.view_index) == 8
    outcomes = []
    for packing in Packing:
        policy = PolicyModel(LearnerConfig(model=str(folder), packing=packing))
        logprobs, _ = policy(batch, 1.0, ())
        (logprobs * torch.linspace(-1, 1, logprobs.numel()).view_as(logprobs)).sum().backward()
        gradients = {name: weight.grad for name, weight in policy.vlm.named_parameters()}
        missing = [name for name, gradient in gradients.items() if gradient is None]
        assert not missing
        outcomes.append((logprobs.detach(), torch.cat([part.double().flatten() for part in gradients.values()])))
    (logprobs, gradient), (other, other_gradient) = outcomes
    torch.testing.assert_close(other, logprobs, atol=1e-5, rtol=0)
    assert (other_gradient - gradient).norm() <= 1e-5 * gradient.norm()


def test_batch_without_loss_reaches_every_parameter(folder: Path, batcher: Batcher, episodes: list[Trajectory]) -> None:
    policy = PolicyModel(LearnerConfig(model=str(folder)))
    policy(batch_of(batcher, episodes).without_loss(), 1.0, ())[0].sum().backward()
    for name, weight in policy.vlm.named_parameters():
        assert weight.grad is not None and not weight.grad.any(), name
