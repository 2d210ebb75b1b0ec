"""Group-relative advantages (GRPO; DeepSeekMath, arXiv 2402.03300, equation 3). Pure arithmetic."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from ergo_rl.learners.config import AdvantageConfig, Normalisation

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
