"""Alerts: known ways in which a run goes wrong while its reward still looks fine. Pure."""

from __future__ import annotations

from collections import deque

from ergo_rl.jobs.config import AlertsConfig
from ergo_rl.jobs.metrics import Metrics


class Alerts:
    """Watches the metrics of a run step by step."""

    def __init__(self, config: AlertsConfig) -> None:
        self._config = config
        self._recent: deque[Metrics] = deque(maxlen=config.window)
        self._first_entropy: float | None = None

    def watch(self, metrics: Metrics) -> tuple[Metrics, dict[str, str]]:
        """Return ``alarm/NAME`` (1 on, 0 off; absent where its metrics are) and a sentence for each that is on.

        Nothing is on before a whole window was seen."""
        self._recent.append(metrics)
        if len(self._recent) < self._config.window:
            return {}, {}
        limits, alarms, sentences = self._config, dict[str, float](), dict[str, str]()
        if self._first_entropy is None:
            self._first_entropy = self._mean("learner/entropy")
        region, coverage, entropy = map(self._mean, ("reward/region", "rollout/coverage", "learner/entropy"))
        first = self._first_entropy
        fallen = None if first is None or entropy is None else 1 - entropy / max(first, 1e-9)
        beyond = None if region is None or coverage is None else region - coverage
        whole, tiny, equal = map(
            self._mean, ("rollout/full_image_rate", "rollout/tiny_box_rate", "reward/equal_groups")
        )
        checks = [
            ("full_image", whole, limits.full_image_rate, "{:.0%} of the crops are whole images"),
            ("tiny_box", tiny, limits.tiny_box_rate, "{:.0%} of the crops are tiny"),
            ("equal_groups", equal, limits.equal_groups, "{:.0%} of the groups have equal rewards and teach nothing"),
            ("entropy", fallen, 1 - limits.entropy, "entropy has fallen by {:.0%}"),
            ("paid_without_coverage", beyond, limits.paid_without_coverage, "r_region is {:.0%} above the coverage"),
        ]
        for name, value, limit, sentence in checks:
            if value is not None:
                alarms[f"alarm/{name}"] = float(value > limit)
                if value > limit:
                    sentences[name] = sentence.format(value)
        return alarms, sentences

    def _mean(self, name: str) -> float | None:
        values = [metrics[name] for metrics in self._recent if name in metrics]
        return sum(values) / len(values) if values else None
