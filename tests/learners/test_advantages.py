import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ergo_rl.learners.advantages import group_advantages, normalise_over_step, term_advantages, turn_advantages
from ergo_rl.learners.config import AdvantageConfig, Credit, Normalisation, Terms

EXACT = AdvantageConfig(epsilon=0.0)


def test_group_advantages_by_hand() -> None:
    # mean 2, sample variance (1 + 0 + 1) / 2 = 1
    assert group_advantages([1.0, 2.0, 3.0], EXACT) == (-1.0, 0.0, 1.0)
    # mean 1, sample variance (1 + 1 + 1 + 9) / 3 = 4, std 2
    assert group_advantages([0.0, 0.0, 0.0, 4.0], EXACT) == (-0.5, -0.5, -0.5, 1.5)


def test_epsilon_is_added_to_the_standard_deviation() -> None:
    assert group_advantages([1.0, 2.0, 3.0], AdvantageConfig(epsilon=1.0)) == (-0.5, 0.0, 0.5)


def test_unscored_members_leave_baseline_and_loss() -> None:
    advantages = group_advantages([1.0, None, 3.0, math.nan, 2.0], EXACT)
    assert [advantages[place] for place in (0, 2, 4)] == [-1.0, 1.0, 0.0]
    assert math.isnan(advantages[1]) and math.isnan(advantages[3])


@pytest.mark.parametrize("size", range(2, 17))
@pytest.mark.parametrize("reward", [0.0, 0.1, 1 / 3, 1.5, 3.5, -2.7, 1e6])
def test_equal_rewards_give_exactly_zero(size: int, reward: float) -> None:
    # 0.1 * 3 / 3 != 0.1: the mean of equal numbers need not be that number
    noisy = [reward * (1 + 1e-16 * place) for place in range(size)]
    assert group_advantages(noisy, AdvantageConfig()) == (0.0,) * size


@given(st.integers(2, 16), st.floats(-1e6, 1e6), st.sampled_from(Normalisation))
def test_any_equal_rewards_give_exactly_zero(size: int, reward: float, normalisation: Normalisation) -> None:
    advantages = group_advantages([reward] * size, AdvantageConfig(normalisation=normalisation))
    assert advantages == (0.0,) * size and not any(math.copysign(1, advantage) < 0 for advantage in advantages)


def test_normalisation_none_is_reward_minus_mean() -> None:
    """Dr. GRPO: reward - mean, in reward units."""
    result = group_advantages([0.0, 0.0, 0.0, 4.0, None], AdvantageConfig(normalisation=Normalisation.NONE))
    assert result[:4] == (-1.0, -1.0, -1.0, 3.0) and math.isnan(result[4])


def test_single_scored_member_has_advantage_zero() -> None:
    advantages = group_advantages([None, 2.0, None], AdvantageConfig())
    assert advantages[1] == 0.0 and math.isnan(advantages[0]) and math.isnan(advantages[2])
    assert all(math.isnan(advantage) for advantage in group_advantages([None, None], AdvantageConfig()))


def test_infinite_reward_is_refused() -> None:
    with pytest.raises(ValueError, match="infinite reward"):
        group_advantages([1.0, math.inf], AdvantageConfig())


@given(st.lists(st.none() | st.floats(-4, 4), min_size=1, max_size=16))
def test_any_group_has_finite_centred_advantages(rewards: list[float | None]) -> None:
    advantages = np.array(group_advantages(rewards, AdvantageConfig()))
    scored = np.array([reward is not None for reward in rewards])
    assert np.isnan(advantages[~scored]).all() and np.isfinite(advantages[scored]).all()
    assert abs(advantages[scored].sum()) < 1e-6
    if scored.sum() > 1 and advantages[scored].any():
        assert np.std(advantages[scored], ddof=1) <= 1 + 1e-9


def test_turn_advantages_by_hand() -> None:
    """Three members: (1, 0) and (3, 2) played two turns, (2,) only the first; a fourth could not be scored. Turn 1:
    rewards 1, 3, 2, so -1, 1, 0. Turn 2: rewards 0, 2 with a sample deviation of sqrt 2, so -1/sqrt 2 and 1/sqrt 2."""
    result = turn_advantages([(1.0, 0.0), (3.0, 2.0), (2.0,), None], EXACT)
    assert result[0] == pytest.approx((-1.0, -math.sqrt(0.5)))
    assert result[1] == pytest.approx((1.0, math.sqrt(0.5)))
    assert result[2] == (0.0,) and math.isnan(result[3][0]) and len(result[3]) == 1


def test_turn_advantages_are_nan_when_nothing_is_scored() -> None:
    assert all(math.isnan(member[0]) for member in turn_advantages([None, None], EXACT))


WEIGHTS = {"region": 1.0, "box": 0.5}
DECOUPLED = AdvantageConfig(terms=Terms.NORMALISE_THEN_SUM, epsilon=0.0)


def test_term_advantages_by_hand() -> None:
    """region 1, 0: mean 1/2, sample deviation sqrt(1/2), so +- sqrt(1/2); box 1, 1: equal, so 0. The third member could
    not be scored."""
    result = term_advantages([{"region": 1.0, "box": 1.0}, {"region": 0.0, "box": 1.0}, None], WEIGHTS, DECOUPLED)
    assert result[:2] == (pytest.approx((math.sqrt(0.5),)), pytest.approx((-math.sqrt(0.5),)))
    assert math.isnan(result[2][0])


def test_term_advantages_tell_unlike_terms_with_equal_sums_apart() -> None:
    """Members earn (region, box) = (1, 0), (0, 2), (0, 0): with weights 1 and 0.5 the first two have the same total and
    the same GRPO advantage. For themselves: region (2, -1, -1) / sqrt 3, box (-1, 2, -1) / sqrt 3."""
    parts = [{"region": 1.0, "box": 0.0}, {"region": 0.0, "box": 2.0}, {"region": 0.0, "box": 0.0}]
    summed = group_advantages([1.0, 1.0, 0.0], EXACT)
    assert summed[0] == summed[1]
    apart = [advantage for (advantage,) in term_advantages(parts, WEIGHTS, DECOUPLED)]
    third = math.sqrt(3)
    assert apart == pytest.approx([(2 - 0.5) / third, (-1 + 1) / third, (-1 - 0.5) / third])


def test_normalise_over_step_gives_deviation_one() -> None:
    """Advantages 3, -3, 0, 0 of two groups: mean 0, sample variance 18 / 3 = 6. Zero and NaN stay."""
    first, second = normalise_over_step([((3.0,), (-3.0,)), ((0.0,), (0.0,), (math.nan,))], DECOUPLED)
    assert [advantage for (advantage,) in first] == pytest.approx([3 / math.sqrt(6), -3 / math.sqrt(6)])
    assert second[:2] == ((0.0,), (0.0,)) and math.isnan(second[2][0])
    assert normalise_over_step([((0.0,), (0.0,))], DECOUPLED) == [((0.0,), (0.0,))], "nothing to scale by"


@pytest.mark.parametrize("other", [{"credit": Credit.TURN}, {"normalisation": Normalisation.NONE}])
def test_normalise_then_sum_needs_whole_trajectories(other: dict[str, Credit | Normalisation]) -> None:
    with pytest.raises(ValueError, match="normalise_then_sum needs credit=trajectory and normalisation=std"):
        AdvantageConfig(terms=Terms.NORMALISE_THEN_SUM, **other)
