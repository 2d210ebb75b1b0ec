"""The reward of ERGO: task-driven contextual exploration plus accuracy and format, every part kept."""

from __future__ import annotations

from ergo_rl.episodes.plugins import import_class
from ergo_rl.episodes.types import Question, Score, Trajectory, Unscored, Verdict
from ergo_rl.rewards.accuracy import Accuracy
from ergo_rl.rewards.base import Reading, RewardTerm
from ergo_rl.rewards.box import SmallBox, SoftBox
from ergo_rl.rewards.config import RewardConfig
from ergo_rl.rewards.format import Format
from ergo_rl.rewards.region import Region

TERMS: dict[str, type[RewardTerm]] = {
    "region": Region,
    "box": SmallBox,
    "soft_box": SoftBox,
    "accuracy": Accuracy,
    "format": Format,
}


class TotalReward:
    """R = alpha * region + beta * box + accuracy + format with the default weights: 0 .. 3.5.

    Raises ValueError for a weight whose term does not exist, and for a term without a weight."""

    def __init__(self, config: RewardConfig) -> None:
        terms, self.weights = terms_of(config), weights_of(config)
        self._terms = {name: terms[name](config) for name in self.weights}

    def __call__(self, question: Question, trajectory: Trajectory, reading: Reading) -> Verdict:
        """``Score`` with every part before its weight, or ``Unscored`` with the reason of the first part that could
        not be judged: a total without it would be a lie."""
        parts: dict[str, float] = {}
        for name, term in self._terms.items():
            value = term(question, trajectory, reading)
            if isinstance(value, Unscored):
                return Unscored(f"{name}: {value.reason}")
            parts[name] = value
        earned = [(self.weights[name], self._terms[name].by_turn(value, trajectory)) for name, value in parts.items()]
        first, second = (sum(weight * turns[turn] for weight, turns in earned) for turn in (0, 1))
        return Score(sum(self.weights[name] * value for name, value in parts.items()), parts, (first, second))


def terms_of(config: RewardConfig) -> dict[str, type[RewardTerm]]:
    """TERMS and the user's own. Raises ValueError for a name that is taken, a class that is not there."""
    if taken := sorted(TERMS.keys() & config.terms.keys()):
        raise ValueError(f"reward.terms: {', '.join(taken)} is a term of ours; give yours another name")
    return TERMS | {name: import_class(path, RewardTerm) for name, path in config.terms.items()}


def weights_of(config: RewardConfig) -> dict[str, float]:
    """The weight of every term. Raises ValueError for an unknown term, one that alpha or beta weighs already, and one
    of the user's without a weight."""
    others = sorted((TERMS.keys() | config.terms.keys()) - {"region", "box"})
    if weightless := sorted(config.terms.keys() - config.weights.keys()):
        raise ValueError(f"reward.weights has none for {', '.join(weightless)} of reward.terms; 0 only measures a term")
    unknown = sorted(config.weights.keys() - set(others))
    if unknown:
        takes = f"{', '.join(others)} (alpha weighs region, beta box)"
        raise ValueError(f"reward.weights takes {takes}, not {', '.join(unknown)}")
    return {"region": config.alpha, "box": config.beta, **config.weights}
