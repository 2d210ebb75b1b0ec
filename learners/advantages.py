"""Group-relative advantages (GRPO; DeepSeekMath, arXiv 2402.03300, equation 3). Pure arithmetic."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np


class Credit(StrEnum):
    """TRAJECTORY: one advantage for all tokens, from the total reward. TURN: one for each turn, from what that turn
    earned (region and box terms: turn 1; accuracy: turn 2; format: each its own), relative to the same turn of the
    group."""

    TRAJECTORY = "trajectory"
    TURN = "turn"


class Normalisation(StrEnum):
    """STD: divided by the group's standard deviation (GRPO). NONE: reward minus mean (Dr. GRPO, arXiv 2503.20783: the
    division makes questions that are nearly always or nearly never solved weigh more)."""

    STD = "std"
    NONE = "none"


class Terms(StrEnum):
    """SUM_THEN_NORMALISE: the weighted reward terms are summed, the sum is normalised (GRPO). NORMALISE_THEN_SUM: each
    term is normalised within the group, then they are weighted and summed, and the sums divided by their standard
    deviation over the whole step (GDPO, arXiv 2601.05242), so that unlike terms with equal sums stay apart."""

    SUM_THEN_NORMALISE = "sum_then_normalise"
    NORMALISE_THEN_SUM = "normalise_then_sum"


@dataclass
class AdvantageConfig:
    credit: Credit = Credit.TRAJECTORY
    """trajectory | turn."""
    normalisation: Normalisation = Normalisation.STD
    """std | none."""
    terms: Terms = Terms.SUM_THEN_NORMALISE
    """sum_then_normalise | normalise_then_sum (with credit trajectory and normalisation std)."""
    epsilon: float = 1e-4
    """Added to the standard deviation; reward units (TRL and verl use 1e-4 and 1e-6)."""
    tolerance: float = 1e-6
    """Rewards of a group that differ by no more than this are equal: all advantages are exactly 0."""

    def __post_init__(self) -> None:
        plain = self.credit is Credit.TRAJECTORY and self.normalisation is Normalisation.STD
        if self.terms is Terms.NORMALISE_THEN_SUM and not plain:
            raise ValueError("advantages.terms=normalise_then_sum needs credit=trajectory and normalisation=std")


TurnAdvantages = tuple[float, ...]
"""The advantages of a trajectory: one for each of its turns, or a single one for all of it.

NaN (a trajectory that could not be scored) leaves the loss."""


def is_scored(advantages: TurnAdvantages) -> bool:
    """Tell whether a trajectory with these advantages is in the loss."""
    return not any(map(math.isnan, advantages))


def group_advantages(rewards: Sequence[float | None], config: AdvantageConfig) -> tuple[float, ...]:
    """Return (reward - mean) / (std + epsilon) over the *scored* members of one group; NaN for the others.

    ``None`` or NaN is a member that could not be scored: it leaves both the baseline and the loss. A group with one
    scored member, or of equal rewards, does not tell what is better: exactly 0, because floating-point noise divided by
    a tiny standard deviation would give 0.2 to 0.9.

    ``std`` is the sample standard deviation (division by n - 1), as in the reference implementations of GRPO
    (``torch.std``), so that their learning rates carry over; it matters most for small groups."""
    values = np.array([math.nan if reward is None else reward for reward in rewards], dtype=np.float64)
    if np.isinf(values).any():
        raise ValueError(f"infinite reward in {list(rewards)}")
    scored = values[~np.isnan(values)]
    if len(scored) < 2 or np.ptp(scored) <= config.tolerance:
        return tuple((values * 0.0 + 0.0).tolist())  # NaN stays NaN; + 0.0 turns -0.0 into 0.0
    scale = scored.std(ddof=1) + config.epsilon if config.normalisation is Normalisation.STD else 1.0
    return tuple(((values - scored.mean()) / scale).tolist())


def turn_advantages(rewards: Sequence[Sequence[float] | None], config: AdvantageConfig) -> tuple[TurnAdvantages, ...]:
    """Return ``group_advantages`` turn by turn: turn t of a member against turn t of all members that have it.

    rewards: for each member those of its turns, None where it could not be scored (a single NaN then)."""
    longest = max((len(member) for member in rewards if member is not None), default=0)
    by_turn = [
        group_advantages(
            [None if member is None or turn >= len(member) else member[turn] for member in rewards], config
        )
        for turn in range(longest)
    ]
    return tuple(
        (math.nan,) if member is None else tuple(by_turn[turn][place] for turn in range(len(member)))
        for place, member in enumerate(rewards)
    )


def term_advantages(
    parts: Sequence[Mapping[str, float] | None], weights: Mapping[str, float], config: AdvantageConfig
) -> tuple[tuple[float], ...]:
    """Normalise every term of a group by itself, and return the weighted sums (GDPO, first half).

    parts: for each member its terms before their weights, None where it could not be scored (NaN then)."""
    total = np.zeros(len(parts))
    for name, weight in weights.items():
        rewards = [None if member is None else member[name] for member in parts]
        total += weight * np.array(group_advantages(rewards, config))
    return tuple((float(advantage),) for advantage in total)


def normalise_over_step(
    groups: Sequence[Sequence[TurnAdvantages]], config: AdvantageConfig
) -> list[tuple[TurnAdvantages, ...]]:
    """Divide every advantage of the step by their standard deviation (GDPO, second half).

    So their size does not grow with the number of terms. Their mean is 0 already, group by group; an advantage of
    exactly 0 or NaN stays as it is."""
    values = np.array([advantage for group in groups for member in group for advantage in member])
    scored = values[~np.isnan(values)]
    equal = len(scored) < 2 or np.ptp(scored) <= config.tolerance
    scale = 1.0 if equal else float(scored.std(ddof=1)) + config.epsilon
    return [tuple(tuple(advantage / scale for advantage in member) for member in group) for group in groups]
