"""The loss of a micro-batch by hand: clipping, masking, the KL penalty, sums over micro-batches; and each objective."""

import math
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ergo_rl.learners.config import LossConfig, MismatchLevel, ObjectiveName
from ergo_rl.learners.losses import OBJECTIVES, TokenBatch, policy_loss
from ergo_rl.learners.metrics import TokenMeans, TokenSums

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
    result = sums.means(turn, **options)
    assert result is not None
    return result


def gradient(batch: TokenBatch, config: LossConfig) -> torch.Tensor:
    loss, _ = policy_loss(batch, config)
    (result,) = torch.autograd.grad(loss, batch.logprobs)
    return result


def test_policy_loss_by_hand() -> None:
    loss, sums = policy_loss(two_rows(), LossConfig(clip_low=0.2, clip_high=0.2))
    # row 0: -(1 * 2) - min(2 * 2, 1.2 * 2) = -4.4; row 1: 0.8 (clipped) + 1 + 2 (an unclipped ratio is worse) = 3.8
    assert loss.item() == pytest.approx(-4.4 + 3.8, abs=1e-6)
    assert sums.total("loss") == pytest.approx(-0.6, abs=1e-6)
    result = means(sums)
    assert result.tokens == 5
    assert result.clip_share == 2 / 5 and result.masked_share == 0
    assert result.ratio == pytest.approx((1 + 2 + 0.5 + 1 + 2) / 5, abs=1e-6)
    assert result.ess == pytest.approx(6.5**2 / (5 * (1 + 4 + 0.25 + 1 + 4)), abs=1e-6)
    assert result.mismatch_mean == pytest.approx(3 * math.log(2) / 5, abs=1e-6)
    assert result.mismatch_max == pytest.approx(math.log(2), abs=1e-6)
    assert result.entropy == (1 + 2 + 3 + 4 + 5) / 5
    assert result.kl is None


def test_metrics_by_turn_by_hand() -> None:
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


def test_mismatched_tokens_leave_the_loss_and_are_counted() -> None:
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


def test_mismatched_trajectory_leaves_as_a_whole_at_level_sequence() -> None:
    """Geometric means: row 0 sqrt 2, row 1 exactly 1."""
    config = LossConfig(mismatch_low=0.6, mismatch_high=1.3, mismatch_level=MismatchLevel.SEQUENCE)
    loss, sums = policy_loss(two_rows(), config)
    assert loss.item() == pytest.approx(3.8, abs=1e-6)
    assert means(sums).masked_share == pytest.approx(2 / 5)


def test_default_mismatch_bounds_are_an_eighth_and_eight() -> None:
    """A ratio of 7.9 stays, of 8.1 leaves; so do 1/7.9 and 1/8.1. Without bounds all stay."""
    batch = two_rows()
    gaps = torch.tensor([[7.9, 8.1, 1.0], [1 / 7.9, 1 / 8.1, 1.0]]).log()
    batch = replace(batch, rollout_logprobs=batch.logprobs.detach() - gaps)
    assert means(policy_loss(batch, LossConfig())[1]).masked_share == pytest.approx(2 / 5)
    unbounded = LossConfig(mismatch_low=0.0, mismatch_high=math.inf)
    assert means(policy_loss(batch, unbounded)[1]).masked_share == 0


def test_nan_logprob_shows_in_the_loss() -> None:
    batch = two_rows()
    broken = batch.logprobs.detach().clone()
    broken[1, 1] = math.nan
    loss, _ = policy_loss(replace(batch, logprobs=broken), LossConfig())
    assert math.isnan(loss.item())


def test_kl_penalty_by_hand() -> None:
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


def test_kl_gradient_is_unbiased() -> None:
    """Over every token of a vocabulary of five, weighted by the engine's probabilities, the gradient of the loss is
    that of KL(policy || reference) itself, though the engine is not the policy."""
    torch.manual_seed(0)
    logits, engine, reference = torch.randn(3, 5, dtype=torch.float64).log_softmax(-1).unbind()
    logits.requires_grad_()
    policy = logits.log_softmax(-1)
    (wanted,) = torch.autograd.grad((policy.exp() * (policy - reference)).sum(), logits, retain_graph=True)
    result = torch.zeros(5, dtype=torch.float64)
    value = 0.0
    for token in range(5):
        batch = TokenBatch(
            logprobs=policy[token].view(1, 1), entropy=torch.zeros(1, 1), rollout_logprobs=engine[token].view(1, 1),
            advantages=torch.zeros(1, 1), mask=torch.ones(1, 1, dtype=torch.bool), turns=torch.ones(1, 1),
            reference_logprobs=reference[token].view(1, 1),
        )  # fmt: skip
        loss, sums = policy_loss(batch, LossConfig(kl=1.0, mismatch_low=0.0, mismatch_high=math.inf))
        result += engine[token].exp() * torch.autograd.grad(loss, logits, retain_graph=True)[0]
        value += float(engine[token].exp()) * sums.total("kl")
    torch.testing.assert_close(result, wanted, atol=1e-7, rtol=0)
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


def test_empty_mask_gives_zero_loss_and_no_means() -> None:
    batch = replace(two_rows(), mask=torch.zeros(2, 3, dtype=torch.bool))
    loss, sums = policy_loss(batch, LossConfig())
    loss.backward()
    assert loss.item() == 0 and not sums.sums.any() and not sums.histogram.any() and sums.means() is None
    assert not batch.logprobs.grad.any()


def test_row_outside_the_mask_may_have_a_nan_advantage() -> None:
    batch = replace(
        two_rows(),
        advantages=torch.tensor([[math.nan] * 3, [-1.0] * 3]),
        mask=torch.tensor([[False] * 3, [True] * 3]),
    )
    loss, _ = policy_loss(batch, LossConfig())
    loss.backward()
    assert loss.item() == pytest.approx(3.8, abs=1e-6)
    assert torch.isfinite(batch.logprobs.grad).all()


# --- objectives ---------------------------------------------------------------------------------------------------

# Each objective on two trajectories of two and three tokens, worked out by hand.
#
# Trajectory 0, advantage 2: ratios 1, 2. Trajectory 1, advantage -1: ratios 1/2, 1, 2. Clip 0.2 on both sides, so PPO's
# token losses are -2, -2.4 and 0.8, 1, 2.

LN2 = 0.6931471805599453
CASES = {
    # mean over the 5 tokens
    ObjectiveName.DAPO: ((-4.4 + 3.8) / 5, [[-2, 0, 0], [0, 1, 2]], 5),
    # mean of the trajectories' means: (-4.4 / 2 + 3.8 / 3) / 2
    ObjectiveName.GRPO: ((-2.2 + 3.8 / 3) / 2, [[-1, 0, 0], [0, 1 / 3, 2 / 3]], 2),
    # 2 trajectories x 4 tokens
    ObjectiveName.DR_GRPO: ((-4.4 + 3.8) / 8, [[-2 / 4, 0, 0], [0, 1 / 4, 2 / 4]], 2),
    # ratios of the trajectories: (1 * 2) ** (1 / 2) = 1.41, clipped at 1.2, and (1/2 * 1 * 2) ** (1 / 3) = 1
    ObjectiveName.GSPO: ((-2.4 + 1) / 2, [[0, 0, 0], [1 / 3, 1 / 3, 1 / 3]], 2),
    # -weight * advantage * log-prob; weights 1, 1.2 (capped) and 1/2, 1, 1.2 (capped); log-probs -1, -1 and -3, -1, -1,
    # times ln 2
    ObjectiveName.CISPO: ((4.4 - 1.5 - 1 - 1.2) * LN2 / 5, [[-2, -2.4, 0], [0.5, 1, 1.2]], 5),
}


@pytest.mark.parametrize("name", CASES)
def test_objective_by_hand(name: ObjectiveName) -> None:
    wanted, slopes, denominator = CASES[name]
    config = LossConfig(objective=name, longest_reply=4)
    assert OBJECTIVES[name].denominator([2, 3]) == denominator
    loss, sums = policy_loss(two_rows(), config)
    assert loss.item() / denominator == pytest.approx(wanted, abs=1e-6)
    assert sums.total("loss") == pytest.approx(loss.item(), abs=1e-6)
    torch.testing.assert_close(
        gradient(two_rows(), config), torch.tensor(slopes, dtype=torch.float32), atol=1e-6, rtol=0
    )


def test_every_objective_name_has_its_class() -> None:
    assert set(OBJECTIVES) == set(ObjectiveName) == set(CASES)


def test_clip_share_counts_tokens_on_which_the_clip_acted() -> None:
    shares = {}
    for name in OBJECTIVES:
        result = policy_loss(two_rows(), LossConfig(objective=name))[1].means()
        assert result is not None
        shares[name.value] = round(result.clip_share * 5)
    assert shares == {"dapo": 2, "grpo": 2, "dr_grpo": 2, "gspo": 2, "cispo": 2}


def test_gspo_keeps_the_advantage_of_each_turn() -> None:
    """Trajectory 1 (ratio 1) with advantages -1, -1 in turn 1 and 3 in turn 2: each token's gradient is its own
    advantage, not the mean of all; weight 1/3."""
    advantages = torch.tensor([[2.0, 2.0, 2.0], [-1.0, -1.0, 3.0]])
    result = gradient(replace(two_rows(), advantages=advantages), LossConfig(objective=ObjectiveName.GSPO))
    torch.testing.assert_close(result[1], torch.tensor([1 / 3, 1 / 3, -1.0]), atol=1e-6, rtol=0)


def test_denominator_leaves_out_rows_without_tokens() -> None:
    assert [OBJECTIVES[name].denominator([0, 4, 0]) for name in ("dapo", "grpo", "gspo")] == [4, 1, 1]


def batch_of(rows: list[list[tuple[float, float]]], advantages: list[float]) -> TokenBatch:
    """Rows of (learner, engine) log-probs, padded on the right."""
    width = max(map(len, rows))
    table = torch.tensor([row + [(0.0, 0.0)] * (width - len(row)) for row in rows])
    mask = torch.tensor([[place < len(row) for place in range(width)] for row in rows])
    return TokenBatch(
        logprobs=table[..., 0].clone().requires_grad_(), entropy=torch.zeros_like(table[..., 0]),
        rollout_logprobs=table[..., 1], advantages=torch.tensor(advantages)[:, None].expand(-1, width),
        mask=mask, turns=mask.to(torch.int8),
    )  # fmt: skip


NATS = st.floats(-3.0, -0.125, width=32)
ROWS = st.lists(st.lists(st.tuples(NATS, NATS), min_size=1, max_size=4), min_size=1, max_size=4)


@settings(max_examples=50)
@given(st.data(), ROWS, st.sampled_from(list(ObjectiveName)))
def test_packing_changes_no_gradient(data: st.DataObject, rows: list[list[tuple[float, float]]], name: str) -> None:
    """One micro-batch of all rows, or one for each: the same sums, the same gradient, for every objective."""
    advantages = data.draw(st.lists(st.floats(-2, 2, width=32), min_size=len(rows), max_size=len(rows)))
    batch, config = batch_of(rows, advantages), LossConfig(objective=ObjectiveName(name))
    loss, _ = policy_loss(batch, config)
    alone = torch.stack([policy_loss(rows_of(batch, row), config)[0] for row in range(len(rows))]).sum()
    assert loss.item() == pytest.approx(alone.item(), abs=1e-4)
    whole, parts = (torch.autograd.grad(total, batch.logprobs, retain_graph=True)[0] for total in (loss, alone))
    torch.testing.assert_close(whole, parts, atol=1e-5, rtol=1e-5)


@settings(max_examples=30)
@given(ROWS)
def test_on_policy_all_objectives_have_the_direction_of_reinforce(rows: list[list[tuple[float, float]]]) -> None:
    """Where learner and engine agree every ratio is 1: the gradient on a token is -advantage x its weight."""
    agreeing = [[(learner, learner) for learner, _ in row] for row in rows]
    advantages = [1.0 if place % 2 else -0.5 for place in range(len(rows))]
    for name, objective in OBJECTIVES.items():
        config = LossConfig(objective=name)
        batch = batch_of(agreeing, advantages)
        weight = objective.weight(batch.mask.sum(1), config)[:, None]
        wanted = torch.where(batch.mask, -batch.advantages * weight, 0.0)
        torch.testing.assert_close(gradient(batch, config), wanted, atol=1e-5, rtol=1e-5)
