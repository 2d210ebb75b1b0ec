"""Sums over tokens: by turn, over micro-batches and ranks, and the percentile with the resolution it promises."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ergo_rl.learners.metrics import HISTOGRAM_MAX, HISTOGRAM_MIN, QUANTITIES, TokenSums, UpdateReport


def sums_of(mismatches: list[float], turns: list[int] | None = None, **others: list[float]) -> TokenSums:
    size = len(mismatches)
    columns = dict.fromkeys(QUANTITIES, [1.0] * size) | others
    table = {name: torch.tensor(values) for name, values in columns.items() if name not in ("tokens", "mismatch")}
    return TokenSums.of(torch.tensor(turns or [1] * size), torch.tensor(mismatches, dtype=torch.float64), **table)


def test_means_by_hand() -> None:
    """Weights 1, 3 in turn 1 and 2 in turn 2: effective sizes 16 / 10 of 2, 1 of 1, and 36 / 14 of 3."""
    weights = {"ratio": [1.0, 3.0, 2.0], "ratio_squared": [1.0, 9.0, 4.0]}
    sums = sums_of([0.1, 0.3, 0.2], [1, 1, 2], entropy=[1.0, 2.0, 6.0], clipped=[0.0, 1.0, 0.0], **weights)
    first, second, both = sums.means(1), sums.means(2), sums.means()
    assert first and second and both
    assert (first.tokens, second.tokens, both.tokens) == (2, 1, 3)
    assert (first.ess, second.ess, both.ess) == pytest.approx((16 / 20, 1.0, 36 / 42))
    assert (first.ratio, second.ratio, both.ratio) == pytest.approx((2.0, 2.0, 2.0))
    assert (first.clip_share, second.clip_share) == (0.5, 0.0)
    assert (first.mismatch_max, second.mismatch_max) == pytest.approx((0.3, 0.2))
    assert both.entropy == pytest.approx(3.0) and both.mismatch_mean == pytest.approx(0.2)


def test_means_are_none_for_a_turn_without_tokens() -> None:
    assert sums_of([0.1]).means(2) is None and TokenSums.zero(torch.device("cpu")).means() is None


@settings(max_examples=60)
@given(st.lists(st.floats(1e-7, 50.0), min_size=1, max_size=400), st.integers(1, 5))
def test_percentile_is_at_most_an_eighth_too_high(mismatches: list[float], parts: int) -> None:
    """Whatever micro-batches and ranks the tokens were in."""
    added = TokenSums.zero(torch.device("cpu"))
    for part in np.array_split(np.array(mismatches), parts):
        added = added.plus(sums_of(part.tolist()))
    result = added.means()
    exact = float(np.quantile(mismatches, 0.99, method="inverted_cdf"))
    assert result is not None and result.tokens == len(mismatches)
    assert exact * (1 - 1e-9) <= result.mismatch_p99 <= min(exact * 1.123, result.mismatch_max * (1 + 1e-9))


def test_histogram_takes_values_beyond_its_ends() -> None:
    exact = sums_of([0.0, 0.0]).means()
    assert exact is not None and exact.mismatch_p99 == 0.0, "never above the greatest"
    wild = sums_of([HISTOGRAM_MIN, HISTOGRAM_MAX, 10 * HISTOGRAM_MAX, float("inf"), float("nan")])
    assert wild.histogram[0, 0] == 1 and wild.histogram[0, -1] == 4 and wild.histogram.sum() == 5


def test_metrics_have_their_names() -> None:
    sums = sums_of([0.1, 0.2], [1, 1])
    every = sums.means(with_kl=True)
    assert every is not None
    report = UpdateReport(0.5, 1.0, 1e-6, 8, 0, 1, False, 2, 0.25, 3.0, every, (sums.means(1), sums.means(2)))
    metrics = report.metrics()
    assert (metrics["learner/not_finite"], metrics["learner/skipped"]) == (1, 0)
    nan = replace(report, loss=math.nan, grad_norm=math.inf, skipped=True).metrics()
    assert nan["learner/skipped"] == 1 and metrics.keys() - nan.keys() == {"learner/loss", "learner/grad_norm"}
    assert metrics["learner/loss"] == 0.5 and metrics["learner/tokens"] == metrics["learner/turn1_tokens"] == 2
    assert "learner/kl" in metrics and "learner/turn1_kl" not in metrics, "only where there is a reference"
    assert not any("turn2" in name for name in metrics)
    names = ("entropy", "ratio", "ess", "clip_share", "masked_share", "mismatch_mean", "mismatch_p99", "mismatch_max")
    assert {f"learner/{turn}{name}" for name in names for turn in ("", "turn1_")} <= metrics.keys()
