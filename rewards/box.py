"""r_box: is the chosen region smaller than the whole image by a margin? And a soft variant, which is ours."""

from __future__ import annotations

from ergo_rl.episodes.types import Question, Trajectory, Unscored
from ergo_rl.rewards.base import Reading, RewardTerm, chosen_region
from ergo_rl.rewards.config import RewardConfig
from ergo_rl.rewards.region import Region


class SmallBox(RewardTerm):
    """1 if area(crop) / area(original) <= gamma; 0 where the policy chose no region."""

    def __call__(self, question: Question, trajectory: Trajectory, reading: Reading) -> float:
        region = chosen_region(trajectory)
        return float(region is not None and region.box.area <= self.config.gamma * trajectory.original.area)


class SoftBox(RewardTerm):
    """1 - area(crop) / (gamma * area(original)), not below 0, where the region is enough to answer; else 0.

    Ours, not the paper's: it falls smoothly with the area, where r_box is a step. It is paid only for a region that is
    right, because a bonus for small boxes alone is earned at once and for sure by boxes that show nothing."""

    def __init__(self, config: RewardConfig) -> None:
        super().__init__(config)
        self._enough = Region(config)

    def __call__(self, question: Question, trajectory: Trajectory, reading: Reading) -> float | Unscored:
        enough, region = self._enough(question, trajectory, reading), chosen_region(trajectory)
        if isinstance(enough, Unscored) or region is None:
            return enough
        return enough * max(0.0, 1 - region.box.area / (self.config.gamma * trajectory.original.area))
