"""r_box: is the chosen region smaller than the whole image by a margin?"""

from __future__ import annotations

from episodes.types import Question, Trajectory
from rewards.base import Reading, RewardTerm, chosen_region


class SmallBox(RewardTerm):
    """1 if area(crop) / area(original) <= gamma; 0 where the policy chose no region."""

    def __call__(self, question: Question, trajectory: Trajectory, reading: Reading) -> float:
        region = chosen_region(trajectory)
        return float(region is not None and region.box.area <= self.config.gamma * trajectory.original.area)
