import math

import pytest
import torch

from learners.config import LossConfig
from learners.losses import TokenSums, policy_loss

HALF, QUARTER, EIGHTH = math.log(0.5), math.log(0.25), math.log(0.125)


def two_rows() -> dict[str, torch.Tensor]:
    """Row 0 (advantage 2): ratios 1, 2, and one token outside the mask. Row 1 (advantage -1): ratios 1/2, 1, 2."""
    return {
        "logprobs": torch.tensor([[HALF, HALF, 9.0], [EIGHTH, HALF, HALF]], requires_grad=True),
        "entropy": torch.tensor([[1.0, 2.0, 9.0], [3.0, 4.0, 5.0]]),
        "rollout_logprobs": torch.tensor([[HALF, QUARTER, 1.0], [QUARTER, HALF, QUARTER]]),
        "advantages": torch.tensor([[2.0] * 3, [-1.0] * 3]),
        "mask": torch.tensor([[True, True, False], [True, True, True]]),
    }


def test_by_hand() -> None:
    rows = two_rows()
    loss, sums = policy_loss(**rows, config=LossConfig(0.2, 0.2))
    # row 0: -(1 * 2) - min(2 * 2, 1.2 * 2) = -4.4; row 1: 0.8 (clipped) + 1 + 2 (an unclipped ratio is worse) = 3.8
    assert loss.item() == pytest.approx(-4.4 + 3.8, abs=1e-6)
    assert sums.loss.item() == pytest.approx(-0.6, abs=1e-6)
    assert sums.tokens.item() == 5
    assert sums.clipped.item() == 2
    assert sums.ratio.item() == pytest.approx(1 + 2 + 0.5 + 1 + 2, abs=1e-6)
    assert sums.mismatch.item() == pytest.approx(3 * math.log(2), abs=1e-6)
    assert sums.mismatch_max.item() == pytest.approx(math.log(2), abs=1e-6)
    assert sums.entropy.item() == 1 + 2 + 3 + 4 + 5


def test_gradient_by_hand() -> None:
    """d loss / d logprob = -advantage * ratio where clipping did not act, else 0."""
    rows = two_rows()
    loss, _ = policy_loss(**rows, config=LossConfig(0.2, 0.2))
    loss.backward()
    expected = torch.tensor([[-2.0, 0.0, 0.0], [0.0, 1.0, 2.0]])
    torch.testing.assert_close(rows["logprobs"].grad, expected, atol=1e-6, rtol=0)


def test_upper_and_lower_clip_are_separate() -> None:
    rows = two_rows()
    loss, sums = policy_loss(**rows, config=LossConfig(clip_low=0.6, clip_high=0.5))
    # row 0: -2 - 1.5 * 2 = -5; row 1: 0.5 + 1 + 2 = 3.5 (the ratio 1/2 is above 0.4)
    assert loss.item() == pytest.approx(-1.5, abs=1e-6)
    assert sums.clipped.item() == 1


def test_micro_batches_add_up_to_the_whole() -> None:
    rows = two_rows()
    _, whole = policy_loss(**rows, config=LossConfig())
    added = TokenSums.zero(torch.device("cpu"))
    for row in (0, 1):
        _, part = policy_loss(**{name: values[row : row + 1] for name, values in rows.items()}, config=LossConfig())
        added = added.plus(part)
    torch.testing.assert_close(added.stack(), whole.stack())


def test_nothing_in_the_mask() -> None:
    rows = two_rows() | {"mask": torch.zeros(2, 3, dtype=torch.bool)}
    loss, sums = policy_loss(**rows, config=LossConfig())
    loss.backward()
    assert loss.item() == 0 and not sums.stack().any()
    assert not rows["logprobs"].grad.any()


def test_a_row_outside_the_mask_may_have_no_advantage() -> None:
    rows = two_rows()
    rows["advantages"] = torch.tensor([[math.nan] * 3, [-1.0] * 3])
    rows["mask"] = torch.tensor([[False] * 3, [True] * 3])
    loss, _ = policy_loss(**rows, config=LossConfig())
    loss.backward()
    assert loss.item() == pytest.approx(3.8, abs=1e-6)
    assert torch.isfinite(rows["logprobs"].grad).all()
