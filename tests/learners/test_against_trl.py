"""Our arithmetic against TRL's own loss code, which is given the same log-probs: losses and gradients."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ergo_rl.learners.config import LossConfig, ObjectiveName
from ergo_rl.learners.losses import OBJECTIVES, TokenBatch, policy_loss

TrlLoss = Callable[[SimpleNamespace, None, dict[str, torch.Tensor]], torch.Tensor]
NAMES = {
    ObjectiveName.DAPO: ("dapo", "token"),
    ObjectiveName.GRPO: ("grpo", "token"),
    ObjectiveName.DR_GRPO: ("dr_grpo", "token"),
    ObjectiveName.GSPO: ("grpo", "sequence"),
    ObjectiveName.CISPO: ("cispo", "token"),
}
LENGTHS = (7, 3, 12, 1, 9)


@pytest.fixture(scope="module")
def trl_loss() -> TrlLoss:
    from ergo_rl.cluster.compat import repair_torchvision

    pytest.importorskip("accelerate", reason="comes with the dev extra")
    repair_torchvision()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "vllm", None)  # TRL imports it where it can, which takes longer than all tests here
        trainer = pytest.importorskip("trl.trainer.grpo_trainer", reason="comes with the dev extra")
    loss: TrlLoss = trainer.GRPOTrainer._compute_loss
    return loss


def batch_of(seed: int, width: float) -> TokenBatch:
    """Five trajectories whose log-probs differ from the engine's by a normal of ``width`` nats."""
    draw = torch.Generator().manual_seed(seed)
    size = (len(LENGTHS), max(LENGTHS))
    mask = torch.arange(size[1]) < torch.tensor(LENGTHS)[:, None]
    engine = -3 * torch.rand(size, generator=draw) - 0.05
    return TokenBatch(
        logprobs=(engine + width * torch.randn(size, generator=draw)).requires_grad_(),
        entropy=torch.rand(size, generator=draw),
        rollout_logprobs=engine,
        advantages=torch.randn(size[0], 1, generator=draw).expand(size),
        mask=mask,
        turns=mask.to(torch.int8),
        reference_logprobs=engine + width * torch.randn(size, generator=draw),
    )


def by_trl(trl_loss: TrlLoss, batch: TokenBatch, config: LossConfig) -> tuple[torch.Tensor, dict[str, list[float]]]:
    """The loss as TRL's trainer computes it, from a stub of the trainer that holds the settings."""
    loss_type, level = NAMES[config.objective]
    # TRL's epsilon_high is the cap itself for CISPO
    high = config.clip_high + (1 if config.objective == ObjectiveName.CISPO else 0)
    accelerator = SimpleNamespace(num_processes=1, gather=lambda value: value, reduce=lambda value, reduction: value)
    trainer: Any = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *args, **options: (batch.logprobs, batch.entropy, None),
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None, use_vllm=False,
        vllm_importance_sampling_correction=False, importance_sampling_level=level, loss_type=loss_type,
        beta=config.kl, epsilon_low=config.clip_low, epsilon_high=high, max_completion_length=config.longest_reply,
        args=SimpleNamespace(delta=config.dual_clip, use_bias_correction_kl=True, steps_per_generation=1),
        model=SimpleNamespace(training=True), current_gradient_accumulation_steps=1, accelerator=accelerator,
        _entropy_bonus_enabled=False, _metrics={"train": defaultdict(list)},
    )  # fmt: skip
    mask = batch.mask.long()
    inputs = {
        "prompt_ids": mask[:, :1], "prompt_mask": mask[:, :1], "completion_ids": mask, "completion_mask": mask,
        "advantages": batch.advantages[:, 0], "old_per_token_logps": batch.rollout_logprobs,
        "ref_per_token_logps": batch.reference_logprobs, "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    return trl_loss(trainer, None, inputs), trainer._metrics["train"]


@pytest.mark.parametrize("width", [0.01, 0.5], ids=["near", "far"])
@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradient_equal_trls(trl_loss: TrlLoss, name: ObjectiveName, width: float) -> None:
    for seed in range(5):
        batch = batch_of(seed, width)
        config = LossConfig(objective=name, clip_low=0.2, clip_high=0.28, longest_reply=16)
        denominator = OBJECTIVES[name].denominator(LENGTHS)
        ours, theirs = policy_loss(batch, config)[0] / denominator, by_trl(trl_loss, batch, config)[0]
        assert ours.item() == pytest.approx(theirs.item(), abs=1e-6)
        slopes, wanted = (torch.autograd.grad(loss, batch.logprobs)[0] for loss in (ours, theirs))
        torch.testing.assert_close(slopes, wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", [name for name in NAMES if name is not ObjectiveName.CISPO])
def test_dual_clip_equals_trls(trl_loss: TrlLoss, name: ObjectiveName) -> None:
    batch, denominator = batch_of(1, 0.5), OBJECTIVES[name].denominator(LENGTHS)
    config = LossConfig(objective=name, dual_clip=1.22)
    ours, unbounded = (
        policy_loss(batch, settings)[0].item() / denominator for settings in (config, LossConfig(objective=name))
    )
    assert ours == pytest.approx(by_trl(trl_loss, batch, config)[0].item(), abs=1e-6)
    assert abs(unbounded - ours) > 1e-3, "the fixture must reach the bound"


@pytest.mark.parametrize("name", [ObjectiveName.DAPO, ObjectiveName.GRPO])
def test_kl_has_the_gradient_of_trls_corrected_estimator(trl_loss: TrlLoss, name: ObjectiveName) -> None:
    """TRL's differentiable ratio x k3 (DeepSeek-V3.2) has another value than our detached ratio x k2, and exactly the
    same gradient; its value is the one that we report."""
    batch, config = batch_of(2, 0.4), LossConfig(objective=name, kl=0.3, mismatch_low=0.0, mismatch_high=1e9)
    ours, sums = policy_loss(batch, config)
    theirs, metrics = by_trl(trl_loss, batch, config)
    ours = ours / OBJECTIVES[name].denominator(LENGTHS)
    slopes, wanted = (torch.autograd.grad(loss, batch.logprobs)[0] for loss in (ours, theirs))
    torch.testing.assert_close(slopes, wanted, atol=1e-6, rtol=0)
    result = sums.means(with_kl=True)
    assert result is not None and result.kl == pytest.approx(metrics["kl"][0], abs=1e-6)
    assert result.entropy == pytest.approx(metrics["entropy"][0], abs=1e-6)


def test_clip_share_equals_trls(trl_loss: TrlLoss) -> None:
    batch = batch_of(3, 0.4)
    result = policy_loss(batch, LossConfig())[1].means()
    assert result is not None and 0.1 < result.clip_share < 0.9
    assert result.clip_share == pytest.approx(by_trl(trl_loss, batch, LossConfig())[1]["clip_ratio/region_mean"][0])
