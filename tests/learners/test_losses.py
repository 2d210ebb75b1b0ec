"""The loss of a micro-batch: what clips, what is masked, what the divergence costs, and that parts add up."""

import math
from dataclasses import fields, replace

import pytest
import torch

from ergo_rl.learners.config import LossConfig, MismatchLevel
from ergo_rl.learners.losses import TokenBatch, policy_loss
from ergo_rl.learners.report import TokenMeans, TokenSums

HALF, QUARTER, EIGHTH = math.log(0.5), math.log(0.25), math.log(0.125)


def two_rows() -> TokenBatch:
    """Row 0 (advantage 2): ratios 1, 2, and one token outside the mask. Row 1 (advantage -1): ratios 1/2, 1, 2; its
    last token belongs to turn 2."""
    return TokenBatch(
        logprobs=torch.tensor([[HALF, HALF, 9.0], [EIGHTH, HALF, HALF]], requires_grad=True),
        entropy=torch.tensor([[1.0, 2.0, 9.0], [3.0, 4.0, 5.0]]),
        rollout_logprobs=torch.tensor([[HALF, QUARTER, 1.0], [QUARTER, HALF, QUARTER]]),
        advantages=torch.tensor([[2.0] * 3, [-1.0] * 3]),
        mask=torch.tensor([[True, True, False], [True, True, True]]),
        turns=torch.tensor([[1, 1, 0], [1, 1, 2]], dtype=torch.int8),
    )


def means(sums: TokenSums, turn: int | None = None, **options: bool) -> TokenMeans:
    found = sums.means(turn, **options)
    assert found is not None
    return found


def gradient(batch: TokenBatch, config: LossConfig) -> torch.Tensor:
    loss, _ = policy_loss(batch, config)
    (found,) = torch.autograd.grad(loss, batch.logprobs)
    return found


def test_by_hand() -> None:
    loss, sums = policy_loss(two_rows(), LossConfig(clip_low=0.2, clip_high=0.2))
    # row 0: -(1 * 2) - min(2 * 2, 1.2 * 2) = -4.4; row 1: 0.8 (clipped) + 1 + 2 (an unclipped ratio is worse) = 3.8
    assert loss.item() == pytest.approx(-4.4 + 3.8, abs=1e-6)
    assert sums.total("loss") == pytest.approx(-0.6, abs=1e-6)
    found = means(sums)
    assert found.tokens == 5
    assert found.clip_share == 2 / 5 and found.masked_share == 0
    assert found.ratio == pytest.approx((1 + 2 + 0.5 + 1 + 2) / 5, abs=1e-6)
    assert found.ess == pytest.approx(6.5**2 / (5 * (1 + 4 + 0.25 + 1 + 4)), abs=1e-6)
    assert found.mismatch_mean == pytest.approx(3 * math.log(2) / 5, abs=1e-6)
    assert found.mismatch_max == pytest.approx(math.log(2), abs=1e-6)
    assert found.entropy == (1 + 2 + 3 + 4 + 5) / 5
    assert found.kl is None


def test_turns_by_hand() -> None:
    _, sums = policy_loss(two_rows(), LossConfig())
    first, second = means(sums, 1), means(sums, 2)
    assert (first.tokens, second.tokens) == (4, 1)
    assert (first.entropy, second.entropy) == (2.5, 5.0)
    assert first.clip_share == 2 / 4 and second.clip_share == 0, "a larger ratio is no clip where the advantage is < 0"
    assert first.ratio == pytest.approx(4.5 / 4) and second.ratio == pytest.approx(2.0)
    assert second.ess == pytest.approx(1.0), "one token weighs as itself"
    assert first.mismatch_mean == pytest.approx(2 * math.log(2) / 4)


def test_gradient_by_hand() -> None:
    """d loss / d logprob = -advantage * ratio where clipping did not act, else 0."""
    expected = torch.tensor([[-2.0, 0.0, 0.0], [0.0, 1.0, 2.0]])
    torch.testing.assert_close(gradient(two_rows(), LossConfig()), expected, atol=1e-6, rtol=0)


def test_upper_and_lower_clip_are_separate() -> None:
    loss, sums = policy_loss(two_rows(), LossConfig(clip_low=0.6, clip_high=0.5))
    # row 0: -2 - 1.5 * 2 = -5; row 1: 0.5 + 1 + 2 = 3.5 (the ratio 1/2 is above 0.4)
    assert loss.item() == pytest.approx(-1.5, abs=1e-6)
    assert means(sums).clip_share == 1 / 5


def test_dual_clip_bounds_large_ratios_of_bad_tokens_only() -> None:
    """With a bound of 1.5 the last token costs 1.5 in place of 2, without a gradient; the good token of ratio 2 is
    clipped as before."""
    config = LossConfig(dual_clip=1.5)
    loss, sums = policy_loss(two_rows(), config)
    assert loss.item() == pytest.approx(-4.4 + 0.8 + 1 + 1.5, abs=1e-6)
    assert means(sums).clip_share == 3 / 5
    expected = torch.tensor([[-2.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    torch.testing.assert_close(gradient(two_rows(), config), expected, atol=1e-6, rtol=0)


def test_tokens_that_disagree_leave_the_loss_and_are_counted() -> None:
    """Bounds 0.6 and 1.9: the ratios 2, 1/2 and 2 leave; -2 and 1 stay."""
    config = LossConfig(mismatch_low=0.6, mismatch_high=1.9)
    loss, sums = policy_loss(two_rows(), config)
    assert loss.item() == pytest.approx(-2 + 1, abs=1e-6)
    assert means(sums).masked_share == pytest.approx(3 / 5)
    assert means(sums).tokens == 5, "they stay in the denominator"
    assert means(sums).ratio == pytest.approx(1.0), "of those kept"
    assert means(sums).ess == pytest.approx(2**2 / (5 * 2))
    assert means(sums, 2).masked_share == 1 and means(sums, 2).mismatch_max == pytest.approx(math.log(2))
    expected = torch.tensor([[-2.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    torch.testing.assert_close(gradient(two_rows(), config), expected, atol=1e-6, rtol=0)


def test_a_trajectory_that_disagrees_leaves_as_a_whole() -> None:
    """Geometric means: row 0 sqrt 2, row 1 exactly 1."""
    config = LossConfig(mismatch_low=0.6, mismatch_high=1.3, mismatch_level=MismatchLevel.SEQUENCE)
    loss, sums = policy_loss(two_rows(), config)
    assert loss.item() == pytest.approx(3.8, abs=1e-6)
    assert means(sums).masked_share == pytest.approx(2 / 5)


def test_the_default_bounds_are_wide() -> None:
    """A ratio of 7.9 stays, of 8.1 leaves; so do 1/7.9 and 1/8.1. Without bounds all stay."""
    batch = two_rows()
    gaps = torch.tensor([[7.9, 8.1, 1.0], [1 / 7.9, 1 / 8.1, 1.0]]).log()
    batch = replace(batch, rollout_logprobs=batch.logprobs.detach() - gaps)
    assert means(policy_loss(batch, LossConfig())[1]).masked_share == pytest.approx(2 / 5)
    unbounded = LossConfig(mismatch_low=0.0, mismatch_high=math.inf)
    assert means(policy_loss(batch, unbounded)[1]).masked_share == 0


def test_a_broken_log_prob_is_seen_and_not_masked() -> None:
    batch = two_rows()
    broken = batch.logprobs.detach().clone()
    broken[1, 1] = math.nan
    loss, _ = policy_loss(replace(batch, logprobs=broken), LossConfig())
    assert math.isnan(loss.item())


def test_divergence_by_hand() -> None:
    """Reference log-probs log(1/4) everywhere. Row 0: gaps log 2 and log 2, ratios 1 and 2; row 1: gaps -log 2, log 2,
    log 2, ratios 1/2, 1, 2. k2 = (log 2)^2 / 2 each. k3 = ref / pi - 1 - log(ref / pi): 1/2 - 1 + log 2 for a gap of
    log 2, and 2 - 1 - log 2 for -log 2."""
    batch = replace(two_rows(), reference_logprobs=torch.full((2, 3), QUARTER))
    plain, _ = policy_loss(two_rows(), LossConfig())
    loss, sums = policy_loss(batch, LossConfig(kl=0.1))
    assert (loss - plain).item() == pytest.approx(0.1 * (1 + 2 + 0.5 + 1 + 2) * math.log(2) ** 2 / 2, abs=1e-6)
    near, far = math.log(2) - 0.5, 1 - math.log(2)
    assert means(sums, with_kl=True).kl == pytest.approx((1 * near + 2 * near + 0.5 * far + near + 2 * near) / 5)
    # ratio * gap, scaled by the coefficient, on top of the gradient without it
    added = torch.tensor([[1.0, 2.0, 0.0], [-0.5, 1.0, 2.0]]) * 0.1 * math.log(2)
    both = gradient(batch, LossConfig(kl=0.1)) - gradient(two_rows(), LossConfig())
    torch.testing.assert_close(both, added, atol=1e-6, rtol=0)


def test_the_gradient_of_the_divergence_is_unbiased() -> None:
    """Over every token of a vocabulary of five, weighted by the engine's probabilities, the gradient of the loss is
    that of KL(policy || reference) itself, though the engine is not the policy."""
    torch.manual_seed(0)
    logits, engine, reference = torch.randn(3, 5, dtype=torch.float64).log_softmax(-1).unbind()
    logits.requires_grad_()
    policy = logits.log_softmax(-1)
    (wanted,) = torch.autograd.grad((policy.exp() * (policy - reference)).sum(), logits, retain_graph=True)
    found = torch.zeros(5, dtype=torch.float64)
    value = 0.0
    for token in range(5):
        batch = TokenBatch(
            logprobs=policy[token].view(1, 1), entropy=torch.zeros(1, 1), rollout_logprobs=engine[token].view(1, 1),
            advantages=torch.zeros(1, 1), mask=torch.ones(1, 1, dtype=torch.bool), turns=torch.ones(1, 1),
            reference_logprobs=reference[token].view(1, 1),
        )  # fmt: skip
        loss, sums = policy_loss(batch, LossConfig(kl=1.0, mismatch_low=0.0, mismatch_high=math.inf))
        found += engine[token].exp() * torch.autograd.grad(loss, logits, retain_graph=True)[0]
        value += float(engine[token].exp()) * sums.total("kl")
    torch.testing.assert_close(found, wanted, atol=1e-7, rtol=0)
    exact = (policy.exp() * (policy - reference)).sum().item()
    assert value == pytest.approx(exact, abs=1e-7)


def rows_of(batch: TokenBatch, row: int) -> TokenBatch:
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return TokenBatch(**{name: None if value is None else value[row : row + 1] for name, value in values.items()})


def test_micro_batches_add_up_to_the_whole() -> None:
    _, whole = policy_loss(two_rows(), LossConfig())
    added = TokenSums.zero(torch.device("cpu"))
    for row in (0, 1):
        _, part = policy_loss(rows_of(two_rows(), row), LossConfig())
        added = added.plus(part)
    for name in ("sums", "histogram", "largest"):
        torch.testing.assert_close(getattr(added, name), getattr(whole, name))


def test_nothing_in_the_mask() -> None:
    batch = replace(two_rows(), mask=torch.zeros(2, 3, dtype=torch.bool))
    loss, sums = policy_loss(batch, LossConfig())
    loss.backward()
    assert loss.item() == 0 and not sums.sums.any() and not sums.histogram.any() and sums.means() is None
    assert not batch.logprobs.grad.any()


def test_a_row_outside_the_mask_may_have_no_advantage() -> None:
    batch = replace(
        two_rows(),
        advantages=torch.tensor([[math.nan] * 3, [-1.0] * 3]),
        mask=torch.tensor([[False] * 3, [True] * 3]),
    )
    loss, _ = policy_loss(batch, LossConfig())
    loss.backward()
    assert loss.item() == pytest.approx(3.8, abs=1e-6)
    assert torch.isfinite(batch.logprobs.grad).all()
