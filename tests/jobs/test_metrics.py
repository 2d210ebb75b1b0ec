"""A step's numbers, from groups one can count by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import ray

from ergo_rl.actors.rollout_worker import GroupResult, TrajectorySummary
from ergo_rl.actors.trajectory_store import Group
from ergo_rl.episodes.types import Box, Outcome, Question, Score, Unscored, Verdict
from ergo_rl.jobs.config import AlertsConfig, MetricsConfig
from ergo_rl.jobs.metrics import Alerts, Metrics, reward_metrics, rollout_metrics, staleness_metrics

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
    assert found == means | agreement | {"reward/unscored_share": 0.2, "reward/unscored_unavailable": 0.2}
    nothing = reward_metrics([group([facts(RIGHT)], [Unscored("cut at 32 tokens", "cut")])])
    unscored = {"reward/unscored": 1.0, "reward/unscored_share": 1.0, "reward/unscored_cut": 1.0}
    assert nothing == unscored | {"reward/equal_groups": 1.0}


FINE = {
    "rollout/full_image_rate": 0.1,
    "rollout/tiny_box_rate": 0.0,
    "rollout/coverage": 0.5,
    "reward/region": 0.55,
    "reward/equal_groups": 0.2,
    "reward/unscored_share": 0.0,
    "learner/entropy": 0.5,
}


def after(*steps: Metrics, window: int = 2) -> tuple[Metrics, dict[str, str]]:
    guards = Alerts(AlertsConfig(window=window))
    for step in steps:
        found = guards.watch(step)
    return found


def test_alerts_are_off_when_metrics_are_fine() -> None:
    alarms, sentences = after(FINE, FINE)
    assert set(alarms.values()) == {0.0} and len(alarms) == 6 and not sentences


def test_alerts_say_nothing_before_a_whole_window() -> None:
    assert after(FINE | {"rollout/full_image_rate": 1.0}) == ({}, {})


@pytest.mark.parametrize(
    ("metric", "value", "alarm", "sentence"),
    [
        ("rollout/full_image_rate", 1.0, "full_image", "55% of the crops are whole images"),
        ("rollout/tiny_box_rate", 1.0, "tiny_box", "50% of the crops are tiny"),  # 0.5 is the limit, not above it
        ("reward/equal_groups", 1.0, "equal_groups", "60%"),
        ("reward/region", 1.0, "paid_without_coverage", "r_region is 45% above the coverage"),
    ],
)
def test_alert_follows_the_mean_of_the_window(metric: str, value: float, alarm: str, sentence: str) -> None:
    assert alarm not in after(FINE, FINE | {metric: 0.3})[1]
    one, both = after(FINE, FINE | {metric: value}), after(FINE | {metric: value}, FINE | {metric: value})
    assert both[0][f"alarm/{alarm}"] == 1.0 and alarm in both[1]
    if alarm == "full_image":
        assert one[1] == {"full_image": sentence}
    else:
        assert alarm not in one[1]


@pytest.mark.parametrize(
    ("metric", "value", "alarm", "sentence"),
    [
        ("learner/skipped", 1.0, "skipped_update", "the update was skipped: its gradient is not finite"),
        ("learner/not_finite", 2.0, "not_finite", "2 trajectories left the loss: not finite"),
        ("learner/lr", 0.0, "no_learning_rate", "the learning rate is 0: nothing is learned"),
    ],
)
def test_alert_of_a_single_update_when_it_happens_then_it_is_on_at_once(
    metric: str, value: float, alarm: str, sentence: str
) -> None:
    assert after({metric: value}) == ({f"alarm/{alarm}": 1.0}, {alarm: sentence})
    assert after({metric: 1.0 - float(value > 0)}) == ({f"alarm/{alarm}": 0.0}, {})


def test_alert_says_that_verdicts_are_missing() -> None:
    some, more = FINE | {"reward/unscored_share": 0.1}, FINE | {"reward/unscored_share": 0.3}
    assert after(some, some)[1] == {}  # 0.1 is the limit, not above it
    assert after(some, more)[1] == {"unscored": "20% of the trajectories could not be scored"}


def test_entropy_alert_is_relative_to_the_first_steps() -> None:
    low = FINE | {"learner/entropy": 0.04}
    assert after(FINE, FINE, low)[0]["alarm/entropy"] == 0.0  # (0.5 + 0.04) / 2 is more than a tenth of 0.5
    assert after(FINE, FINE, low, low)[1] == {"entropy": "entropy has fallen by 92%"}


def test_alert_is_absent_when_its_metrics_are() -> None:
    nowhere = {name: value for name, value in FINE.items() if name != "rollout/coverage"}
    alarms, _ = after(nowhere, nowhere)
    assert "alarm/paid_without_coverage" not in alarms and "alarm/full_image" in alarms
