"""Each objective on two trajectories of two and three tokens, worked out by hand.

Trajectory 0, advantage 2: ratios 1, 2. Trajectory 1, advantage -1: ratios 1/2, 1, 2. Clip 0.2 on both sides, so PPO's
token losses are -2, -2.4 and 0.8, 1, 2."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ergo_rl.learners.config import LossConfig, ObjectiveName
from ergo_rl.learners.losses import TokenBatch, policy_loss
from ergo_rl.learners.objectives import OBJECTIVES
from tests.learners.test_losses import gradient, rows_of, two_rows

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
def test_by_hand(name: ObjectiveName) -> None:
    wanted, slopes, denominator = CASES[name]
    config = LossConfig(objective=name, longest_reply=4)
    assert OBJECTIVES[name].denominator([2, 3]) == denominator
    loss, sums = policy_loss(two_rows(), config)
    assert loss.item() / denominator == pytest.approx(wanted, abs=1e-6)
    assert sums.total("loss") == pytest.approx(loss.item(), abs=1e-6)
    torch.testing.assert_close(
        gradient(two_rows(), config), torch.tensor(slopes, dtype=torch.float32), atol=1e-6, rtol=0
    )


def test_every_name_has_its_class() -> None:
    assert set(OBJECTIVES) == set(ObjectiveName) == set(CASES)


def test_clipped_counts_what_the_clip_acted_on() -> None:
    shares = {}
    for name in OBJECTIVES:
        found = policy_loss(two_rows(), LossConfig(objective=name))[1].means()
        assert found is not None
        shares[name.value] = round(found.clip_share * 5)
    assert shares == {"dapo": 2, "grpo": 2, "dr_grpo": 2, "gspo": 2, "cispo": 2}


def test_gspo_keeps_the_credit_of_each_turn() -> None:
    """Trajectory 1 (ratio 1) with advantages -1, -1 in turn 1 and 3 in turn 2: each token's gradient is its own
    advantage, not the mean of all; weight 1/3."""
    advantages = torch.tensor([[2.0, 2.0, 2.0], [-1.0, -1.0, 3.0]])
    found = gradient(replace(two_rows(), advantages=advantages), LossConfig(objective=ObjectiveName.GSPO))
    torch.testing.assert_close(found[1], torch.tensor([1 / 3, 1 / 3, -1.0]), atol=1e-6, rtol=0)


def test_what_is_not_in_the_loss_is_not_in_the_denominator() -> None:
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


@settings(max_examples=50, deadline=None)
@given(st.data(), ROWS, st.sampled_from(list(ObjectiveName)))
def test_packing_changes_nothing(data: st.DataObject, rows: list[list[tuple[float, float]]], name: str) -> None:
    """One micro-batch of all rows, or one for each: the same sums, the same gradient, for every objective."""
    advantages = data.draw(st.lists(st.floats(-2, 2, width=32), min_size=len(rows), max_size=len(rows)))
    batch, config = batch_of(rows, advantages), LossConfig(objective=ObjectiveName(name))
    loss, _ = policy_loss(batch, config)
    alone = torch.stack([policy_loss(rows_of(batch, row), config)[0] for row in range(len(rows))]).sum()
    assert loss.item() == pytest.approx(alone.item(), abs=1e-4)
    whole, parts = (torch.autograd.grad(one, batch.logprobs, retain_graph=True)[0] for one in (loss, alone))
    torch.testing.assert_close(whole, parts, atol=1e-5, rtol=1e-5)


@settings(max_examples=30, deadline=None)
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
