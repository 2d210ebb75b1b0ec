"""Metrics of a step, from its groups; and alerts, known ways in which a run goes wrong while its reward still looks
fine. Pure."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Sequence

from ergo_rl.actors.rollout_worker import TrajectorySummary
from ergo_rl.actors.trajectory_store import Group
from ergo_rl.episodes.types import BoxOutcome, Outcome, Question, Score, Unscored
from ergo_rl.jobs.config import AlertsConfig, MetricsConfig

Metrics = dict[str, float]


def rollout_metrics(groups: Sequence[Group], config: MetricsConfig) -> Metrics:
    """Return metrics of the trajectories.

    Rates are shares of all trajectories, area ratios means over those with a crop, and coverage (the crop contains the
    target) is a share of the trajectories whose question says where the target is."""
    pairs = [(group, facts) for group in groups for facts in group.result.summaries]
    everyone = [facts for _, facts in pairs]
    ratios = [facts.area_ratio for facts in everyone if facts.area_ratio is not None]
    located = [(group, facts) for group, facts in pairs if group.question.boxes]
    metrics = {
        "rollout/trajectories": float(len(everyone)),
        "rollout/answered_rate": _share(facts.outcome is Outcome.ANSWERED for facts in everyone),
        "rollout/truncated_rate": _share(facts.outcome is Outcome.TRUNCATED for facts in everyone),
        "rollout/bad_box_rate": _share(not BoxOutcome(facts.box_outcome).usable for facts in everyone),
        "rollout/full_image_rate": _share(_within(facts, config.full_image_ratio, 1.0) for facts in everyone),
        "rollout/tiny_box_rate": _share(_within(facts, 0.0, config.tiny_box_ratio) for facts in everyone),
        "rollout/prompt_tokens": _mean([float(facts.prompt_tokens) for facts in everyone]),
        "rollout/reply_tokens": _mean([float(sum(facts.reply_tokens)) for facts in everyone]),
    }
    if prompted := sum(facts.engine_prompt_tokens for facts in everyone):
        metrics["rollout/cached_prompt_share"] = sum(facts.cached_tokens for facts in everyone) / prompted
    if ratios:
        metrics["rollout/area_ratio"] = _mean(ratios)
    if located:
        metrics["rollout/coverage"] = _share(covers(group.question, facts) for group, facts in located)
    return metrics


def staleness_metrics(groups: Sequence[Group], version: int) -> Metrics:
    """Return the age of trajectories when the learner is at ``version``, in versions by their oldest token; and the
    share of them during which an update arrived in the middle of a turn."""
    everyone = [facts for group in groups for facts in group.result.summaries]
    ages = [float(version - min(facts.policy_versions)) for facts in everyone]
    return {
        "rollout/staleness_mean": _mean(ages),
        "rollout/staleness_max": max(ages),
        "rollout/across_updates": _share(facts.updates > 0 for facts in everyone),
    }


def reward_metrics(groups: Sequence[Group]) -> Metrics:
    """Return means over the scored trajectories; the others are counted, never averaged in.

    ``equal_groups`` is the share of groups whose rewards are all equal, from which GRPO learns nothing."""
    scores = [score for group in groups for score in group.scores if isinstance(score, Score)]
    everyone = sum(len(group.scores) for group in groups)
    metrics = {
        "reward/unscored": float(everyone - len(scores)),
        "reward/unscored_share": (everyone - len(scores)) / max(1, everyone),
        "reward/equal_groups": _share(len({round(total, 6) for total in _totals(group)}) <= 1 for group in groups),
    }
    kinds = Counter(score.kind for group in groups for score in group.scores if isinstance(score, Unscored))
    metrics |= {f"reward/unscored_{kind}": count / everyone for kind, count in sorted(kinds.items())}
    if scores:
        metrics["reward/total"] = _mean([score.total for score in scores])
        for part in sorted({name for score in scores for name in score.parts}):
            metrics[f"reward/{part}"] = _mean([score.parts[part] for score in scores if part in score.parts])
    return metrics | region_agreement(groups)


def region_agreement(groups: Sequence[Group]) -> Metrics:
    """Return how r_region agrees with coverage, where questions say where the target is.

    Precision: share of the rewarded crops that hold the target; recall: share of the crops that hold the target that
    are rewarded."""
    pairs = covered_and_paid(groups)
    paid = [covered for covered, paid in pairs if paid]
    covered = [paid for covered, paid in pairs if covered]
    return ({"reward/region_precision": _share(paid)} if paid else {}) | (
        {"reward/region_recall": _share(covered)} if covered else {}
    )


def covered_and_paid(groups: Sequence[Group]) -> list[tuple[bool, bool]]:
    """Return (the crop holds the target, r_region is 1) for every scored trajectory whose question has boxes."""
    return [
        (covers(group.question, facts), score.parts["region"] > 0.5)
        for group in groups
        for facts, score in zip(group.result.summaries, group.scores, strict=True)
        if group.question.boxes and isinstance(score, Score) and "region" in score.parts
    ]


def _totals(group: Group) -> list[float]:
    return [score.total for score in group.scores if isinstance(score, Score)]


def covers(question: Question, facts: TrajectorySummary) -> bool:
    """Whether the crop holds every target box."""
    return facts.crop is not None and all(facts.crop.contains(box) for box in question.boxes)


def _within(facts: TrajectorySummary, low: float, high: float) -> bool:
    return facts.area_ratio is not None and low <= facts.area_ratio <= high


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _share(flags: Iterable[bool]) -> float:
    counted = list(flags)
    return sum(counted) / len(counted)


Check = tuple[str, float | None, float, str]
"""Name, value (None: not known), the limit above which it is on, and its sentence."""


class Alerts:
    """Watches the metrics of a run step by step."""

    def __init__(self, config: AlertsConfig) -> None:
        self._config = config
        self._recent: deque[Metrics] = deque(maxlen=config.window)
        self._first_entropy: float | None = None

    def watch(self, metrics: Metrics) -> tuple[Metrics, dict[str, str]]:
        """Return ``alarm/NAME`` (1 on, 0 off; absent where its metrics are) and a sentence for each that is on.

        What no single update may do is on at once; the rest after a whole window."""
        self._recent.append(metrics)
        at_once = [
            ("skipped_update", metrics.get("learner/skipped"), 0, "the update was skipped: its gradient is not finite"),
            ("not_finite", metrics.get("learner/not_finite"), 0, "{:.0f} trajectories left the loss: not finite"),
            ("no_learning_rate", _is_zero(metrics.get("learner/lr")), 0, "the learning rate is 0: nothing is learned"),
        ]
        checks = at_once + (self._checks_of_window() if len(self._recent) == self._config.window else [])
        alarms, sentences = dict[str, float](), dict[str, str]()
        for name, value, limit, sentence in checks:
            if value is not None:
                alarms[f"alarm/{name}"] = float(value > limit)
                if value > limit:
                    sentences[name] = sentence.format(value)
        return alarms, sentences

    def _checks_of_window(self) -> list[Check]:
        limits = self._config
        if self._first_entropy is None:
            self._first_entropy = self._mean("learner/entropy")
        region, coverage, entropy = map(self._mean, ("reward/region", "rollout/coverage", "learner/entropy"))
        first = self._first_entropy
        fallen = None if first is None or entropy is None else 1 - entropy / max(first, 1e-9)
        beyond = None if region is None or coverage is None else region - coverage
        whole, tiny, equal = map(
            self._mean, ("rollout/full_image_rate", "rollout/tiny_box_rate", "reward/equal_groups")
        )
        unscored = self._mean("reward/unscored_share")
        return [
            ("unscored", unscored, limits.unscored, "{:.0%} of the trajectories could not be scored"),
            ("full_image", whole, limits.full_image_rate, "{:.0%} of the crops are whole images"),
            ("tiny_box", tiny, limits.tiny_box_rate, "{:.0%} of the crops are tiny"),
            ("equal_groups", equal, limits.equal_groups, "{:.0%} of the groups have equal rewards and teach nothing"),
            ("entropy", fallen, 1 - limits.entropy, "entropy has fallen by {:.0%}"),
            ("paid_without_coverage", beyond, limits.paid_without_coverage, "r_region is {:.0%} above the coverage"),
        ]

    def _mean(self, name: str) -> float | None:
        values = [metrics[name] for metrics in self._recent if name in metrics]
        return sum(values) / len(values) if values else None


def _is_zero(value: float | None) -> float | None:
    return None if value is None else float(value == 0)
