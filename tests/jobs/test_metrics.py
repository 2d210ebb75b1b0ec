"""A step's numbers, from groups one can count by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import ray

from ergo_rl.actors.rollout_worker import GroupResult, TrajectorySummary
from ergo_rl.actors.trajectory_store import Group
from ergo_rl.episodes.types import Box, Outcome, Question, Score, Unscored, Verdict
from ergo_rl.jobs.config import MetricsConfig
from ergo_rl.jobs.metrics import reward_metrics, rollout_metrics, staleness_metrics

WHOLE, RIGHT, WRONG, TINY = Box(0, 0, 100, 100), Box(10, 10, 60, 60), Box(60, 60, 90, 90), Box(20, 20, 25, 25)
TARGET = Box(20, 20, 30, 30)


def facts(crop: Box | None, outcome: Outcome = Outcome.ANSWERED, box_outcome: str = "ok") -> TrajectorySummary:
    ratio = None if crop is None else crop.area / 10_000
    return TrajectorySummary(outcome, box_outcome, crop, ratio, 90, (20, 10) if crop else (20,), (0,))


def test_staleness_by_hand() -> None:
    """Version 5 learns: turns of versions (5, 5) and (3, 4), the second of which lived through an update; and of 4."""
    members = [replace(facts(RIGHT), policy_versions=(5, 5)), replace(facts(RIGHT), policy_versions=(3, 4), updates=1)]
    groups = [group(members, [Score(0.0)] * 2), group([replace(facts(None), policy_versions=(4,))], [Score(0.0)])]
    assert staleness_metrics(groups, 5) == {
        "rollout/staleness_mean": 1.0,
        "rollout/staleness_max": 2.0,
        "rollout/across_updates": pytest.approx(1 / 3),
    }


def group(members: list[TrajectorySummary], scores: list[Verdict], boxes: tuple[Box, ...] = (TARGET,)) -> Group:
    question = Question("q", b"", "?", "ring", boxes=boxes)
    return Group(0, question, GroupResult("q", tuple(members)), tuple(scores), ray.ObjectRef.nil())


def test_rollout_metrics_by_hand() -> None:
    """Five trajectories: whole image, right, wrong, tiny, no box. The whole image and the right box hold the target."""
    members = [facts(WHOLE), facts(RIGHT), facts(WRONG), facts(TINY), facts(None, Outcome.BAD_BOX, "no_tag")]
    found = rollout_metrics([group(members, [Score(0.0)] * 5)], MetricsConfig())
    assert found["rollout/trajectories"] == 5
    assert found["rollout/answered_rate"] == pytest.approx(4 / 5)
    assert found["rollout/bad_box_rate"] == found["rollout/full_image_rate"] == found["rollout/tiny_box_rate"] == 1 / 5
    assert found["rollout/area_ratio"] == pytest.approx((1.0 + 0.25 + 0.09 + 0.0025) / 4)
    assert found["rollout/coverage"] == pytest.approx(2 / 5)
    assert found["rollout/reply_tokens"] == pytest.approx((4 * 30 + 20) / 5)


def test_coverage_is_of_questions_that_say_where() -> None:
    groups = [group([facts(RIGHT)], [Score(0.0)]), group([facts(WRONG)], [Score(0.0)], boxes=())]
    assert rollout_metrics(groups, MetricsConfig())["rollout/coverage"] == 1.0
    assert "rollout/coverage" not in rollout_metrics(groups[1:], MetricsConfig())


def test_rewards_average_over_what_was_scored() -> None:
    scores: list[Verdict] = [Score(3.5, {"region": 1.0}), Score(0.5, {"region": 0.0}), Unscored("timeout")]
    found = reward_metrics(
        [group([facts(RIGHT)] * 3, scores), group([facts(RIGHT)] * 2, [Score(2.0, {"region": 0.5})] * 2)]
    )
    # five crops hold the target, of the four that were scored one is paid; 0.5 is not above a half
    agreement = {"reward/region_precision": 1.0, "reward/region_recall": 0.25}
    means = {"reward/total": 2.0, "reward/region": 0.5, "reward/unscored": 1.0, "reward/equal_groups": 0.5}
    assert found == means | agreement
    nothing = reward_metrics([group([facts(RIGHT)], [Unscored("timeout")])])
    assert nothing == {"reward/unscored": 1.0, "reward/equal_groups": 1.0}
