"""Alarms, from steps one can count by hand."""

from __future__ import annotations

import pytest

from ergo_rl.jobs.alerts import Alerts
from ergo_rl.jobs.config import AlertsConfig
from ergo_rl.jobs.metrics import Metrics

FINE = {
    "rollout/full_image_rate": 0.1,
    "rollout/tiny_box_rate": 0.0,
    "rollout/coverage": 0.5,
    "reward/region": 0.55,
    "reward/equal_groups": 0.2,
    "learner/entropy": 0.5,
}


def after(*steps: Metrics, window: int = 2) -> tuple[Metrics, dict[str, str]]:
    guards = Alerts(AlertsConfig(window=window))
    for step in steps:
        found = guards.watch(step)
    return found


def test_alerts_are_off_when_metrics_are_fine() -> None:
    alarms, sentences = after(FINE, FINE)
    assert set(alarms.values()) == {0.0} and len(alarms) == 5 and not sentences


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


def test_entropy_alert_is_relative_to_the_first_steps() -> None:
    low = FINE | {"learner/entropy": 0.04}
    assert after(FINE, FINE, low)[0]["alarm/entropy"] == 0.0  # (0.5 + 0.04) / 2 is more than a tenth of 0.5
    assert after(FINE, FINE, low, low)[1] == {"entropy": "entropy has fallen by 92%"}


def test_alert_is_absent_when_its_metrics_are() -> None:
    nowhere = {name: value for name, value in FINE.items() if name != "rollout/coverage"}
    alarms, _ = after(nowhere, nowhere)
    assert "alarm/paid_without_coverage" not in alarms and "alarm/full_image" in alarms
