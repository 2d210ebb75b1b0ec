"""What a reward term is."""

from __future__ import annotations

from abc import ABC, abstractmethod

from ergo_rl.episodes.types import BoxOutcome, Question, Trajectory, Unscored, View
from ergo_rl.rewards.config import RewardConfig

Reading = str | Unscored | None
"""What the frozen reward model replied to (crop, question): its reply, why there is none, or None where the policy
chose no region, so that nothing was asked."""


class RewardTerm(ABC):
    """One part of the reward. A new one is a subclass: a line in ``rewards.tce.TERMS``, or named in ``reward.terms``
    (docs/extending.md); and its weight in ``reward.weights``."""

    def __init__(self, config: RewardConfig) -> None:
        self.config = config

    @abstractmethod
    def __call__(self, question: Question, trajectory: Trajectory, reading: Reading) -> float | Unscored:
        """The term's value before its weight; Unscored where it could not be judged. What was played and lost is
        a value of 0, never Unscored."""

    def by_turn(self, value: float, trajectory: Trajectory) -> tuple[float, float]:
        """What each of the two turns earned of it, where credit is given by turn. Most terms are about the region,
        which turn 1 chose."""
        return value, 0.0


def chosen_region(trajectory: Trajectory) -> View | None:
    """The crop that the policy asked for. None where there is no crop, or where the crop is the whole image because
    the box could not be used (``on_bad_box: whole_image``): that lets the policy answer, but pays for no region."""
    return trajectory.crop if BoxOutcome(trajectory.box_outcome).usable else None
