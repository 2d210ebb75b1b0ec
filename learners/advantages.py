"""Group-relative advantages (GRPO; DeepSeekMath, arXiv 2402.03300, equation 3). Pure arithmetic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np


class Credit(StrEnum):
    """TRAJECTORY: one advantage for all tokens, from the total reward. TURN: one for each turn, from what that turn
    earned (region and box terms: turn 1; accuracy: turn 2; format: each its own), relative to the same turn of the
    group."""

    TRAJECTORY = "trajectory"
    TURN = "turn"


@dataclass
class AdvantageConfig:
    credit: Credit = Credit.TRAJECTORY
    """trajectory | turn."""
    epsilon: float = 1e-4
    """Added to the standard deviation; reward units (TRL and verl use 1e-4 and 1e-6)."""
    tolerance: float = 1e-6
    """Rewards of a group that differ by no more than this are equal: all advantages are exactly 0."""


def group_advantages(rewards: Sequence[float | None], config: AdvantageConfig) -> tuple[float, ...]:
    """(reward - mean) / (std + epsilon) over the *scored* members of one group; NaN for the others.

    ``None`` or NaN is a member that could not be scored: it leaves both the baseline and the loss. A group
    with one scored member, or of equal rewards, says nothing about what is better: exactly 0, because
    floating-point noise divided by a tiny standard deviation would give 0.2 to 0.9.

    ``std`` is the sample one (division by n - 1), as in the reference implementations of GRPO
    (``torch.std``), so their learning rates carry over; it matters most for small groups."""
    values = np.array([math.nan if reward is None else reward for reward in rewards], dtype=np.float64)
    if np.isinf(values).any():
        raise ValueError(f"infinite reward in {list(rewards)}")
    scored = values[~np.isnan(values)]
    if len(scored) < 2 or np.ptp(scored) <= config.tolerance:
        return tuple((values * 0.0 + 0.0).tolist())  # NaN stays NaN; + 0.0 turns -0.0 into 0.0
    return tuple(((values - scored.mean()) / (scored.std(ddof=1) + config.epsilon)).tolist())


def turn_advantages(
    rewards: Sequence[Sequence[float] | None], config: AdvantageConfig
) -> tuple[tuple[float, ...], ...]:
    """The same turn by turn: entry t of a member is turn t's reward against turn t of those members that played it.
    ``None`` is a member that could not be scored; its advantage is a single NaN."""
    longest = max((len(member) for member in rewards if member is not None), default=0)
    by_turn = [
        group_advantages([None if one is None or turn >= len(one) else one[turn] for one in rewards], config)
        for turn in range(longest)
    ]
    return tuple(
        (math.nan,) if one is None else tuple(by_turn[turn][place] for turn in range(len(one)))
        for place, one in enumerate(rewards)
    )
