"""Group-relative advantages (GRPO; DeepSeekMath, arXiv 2402.03300, equation 3). Pure arithmetic."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from ergo_rl.learners.config import AdvantageConfig, Normalisation


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
    scale = scored.std(ddof=1) + config.epsilon if config.normalisation is Normalisation.STD else 1.0
    return tuple(((values - scored.mean()) / scale).tolist())


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


def term_advantages(
    parts: Sequence[Mapping[str, float] | None], weights: Mapping[str, float], config: AdvantageConfig
) -> tuple[tuple[float], ...]:
    """Each term of a group normalised for itself, then the weighted sum (GDPO, first half; ``over_step`` is the other).

    parts: for each member its terms before their weights, None where it could not be scored (NaN then)."""
    total = np.zeros(len(parts))
    for name, weight in weights.items():
        total += weight * np.array(group_advantages([None if one is None else one[name] for one in parts], config))
    return tuple((float(advantage),) for advantage in total)


def over_step(
    groups: Sequence[Sequence[Sequence[float]]], config: AdvantageConfig
) -> list[tuple[tuple[float, ...], ...]]:
    """GDPO's second half: every advantage of the step divided by their standard deviation, so that their size does not
    grow with the number of terms. Their mean is 0 already, group by group; what is exactly 0 or NaN stays so."""
    every = np.array([advantage for group in groups for member in group for advantage in member])
    scored = every[~np.isnan(every)]
    equal = len(scored) < 2 or np.ptp(scored) <= config.tolerance
    scale = 1.0 if equal else float(scored.std(ddof=1)) + config.epsilon
    return [tuple(tuple(advantage / scale for advantage in member) for member in group) for group in groups]
