"""From scores to advantages: what a group teaches, and what of it the learner is given."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import ray

from ergo_rl.actors.rollout_worker import GroupResult, TrajectorySummary
from ergo_rl.actors.trajectory_store import Group
from ergo_rl.episodes.types import Outcome, Question, Score, Unscored, Verdict
from ergo_rl.jobs.advantage_estimator import AdvantageEstimator
from ergo_rl.learners.config import AdvantageConfig, Credit, LearnerConfig, LossConfig, Terms

WEIGHTS = {"region": 1.0, "box": 0.5}


def score(region: float, box: float, accuracy: float = 0.0) -> Score:
    total = region + 0.5 * box + accuracy
    return Score(total, {"region": region, "box": box}, (region + 0.5 * box, accuracy))


def group(*scores: Verdict, truncated: tuple[int, ...] = (), replies: tuple[int, ...] = (5, 7)) -> Group:
    facts = tuple(
        TrajectorySummary(
            Outcome.TRUNCATED if place in truncated else Outcome.ANSWERED, "ok", None, 0.1, 100, replies, (0,)
        )
        for place in range(len(scores))
    )
    return Group(0, Question("q", b"", "?", "ring"), GroupResult("q", facts), scores, ray.ObjectRef.nil())


def crediting(loss: LossConfig | None = None, **advantages: object) -> AdvantageEstimator:
    config = AdvantageConfig(epsilon=0.0, **advantages)  # type: ignore[arg-type]
    return AdvantageEstimator(LearnerConfig(advantages=config, loss=loss or LossConfig()), WEIGHTS)


def test_batch_by_trajectory_has_an_advantage_per_trajectory() -> None:
    (batch,) = crediting().batch([group(score(0, 0), score(1, 0), score(1, 2), Unscored("timeout"))])
    assert batch.advantages[:3] == ((-1.0,), (0.0,), (1.0,)) and math.isnan(batch.advantages[3][0])
    assert batch.tokens == (112,) * 4


def test_batch_by_turn_has_an_advantage_per_turn() -> None:
    """Turn 1 earned 0, 1, 2; turn 2 earned 1, 1, 1."""
    (batch,) = crediting(credit=Credit.TURN).batch([group(score(0, 0, 1), score(1, 0, 1), score(1, 2, 1))])
    assert batch.advantages == ((-1.0, 0.0), (0.0, 0.0), (1.0, 0.0))


def test_truncated_trajectories_leave_the_loss_and_stay_in_the_baseline() -> None:
    some = [group(score(0, 0), score(1, 0), score(1, 2), truncated=(0,))]
    assert crediting().batch(some)[0].advantages == ((-1.0,), (0.0,), (1.0,))
    (batch,) = crediting(LossConfig(mask_truncated=True)).batch(some)
    assert math.isnan(batch.advantages[0][0]) and batch.advantages[1:] == ((0.0,), (1.0,))


def test_separate_terms_are_scaled_over_the_step() -> None:
    """Two groups of equal sums: in the first region and box differ, in the second nothing does. Advantages are -a, a,
    0, 0, their sample deviation a sqrt(2/3)."""
    terms = crediting(terms=Terms.NORMALISE_THEN_SUM)
    first, second = terms.batch([group(score(0, 2), score(1, 0)), group(score(1, 1), score(1, 1))])
    assert [advantage for (advantage,) in first.advantages] == pytest.approx([-math.sqrt(1.5), math.sqrt(1.5)])
    assert second.advantages == ((0.0,), (0.0,))


def test_has_signal_when_advantages_differ_from_zero() -> None:
    equal, unlike = group(score(1, 0), score(0, 2)), group(score(1, 0), score(0, 0))
    assert not crediting().has_signal(equal) and crediting().has_signal(unlike)
    assert crediting(terms=Terms.NORMALISE_THEN_SUM).has_signal(equal), "equal sums of unlike terms"
    assert not crediting().has_signal(group(Unscored("timeout"), Unscored("timeout")))
    assert not crediting().has_signal(group(score(1, 0), Unscored("timeout"))), "one scored member says nothing"
    # the same totals, earned in other turns
    swapped = group(score(1, 0, 0), score(0, 0, 1))
    assert not crediting().has_signal(swapped) and crediting(credit=Credit.TURN).has_signal(swapped)


def test_stale_group_weighs_less_for_each_version() -> None:
    """Sampled by version 0, rewards 1 and 0: advantages of +-sqrt(1/2) with the sample deviation."""
    old, half = group(score(1.0, 0.0), score(0.0, 0.0)), replace(crediting(), stale_weight=0.5)
    plain = 0.5**0.5
    for oldest, weight in ((0, 1.0), (1, 0.5), (3, 0.125)):
        (found,) = half.batch([old], oldest)
        assert found.advantages == ((pytest.approx(weight * plain),), (pytest.approx(-weight * plain),))
    assert half.batch([old], 0)[0].advantages == crediting().batch([old])[0].advantages, "bit by bit"
