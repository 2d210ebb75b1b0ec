"""r_region: is the chosen region enough to answer the question?"""

from __future__ import annotations

from ergo_rl.episodes.prompts import parse_answer
from ergo_rl.episodes.types import Question, Trajectory, Unscored
from ergo_rl.rewards.base import Reading, RewardTerm, chosen_region
from ergo_rl.rewards.matching import matches


class Region(RewardTerm):
    """1 if the frozen reward model, given only the crop and the question, answers as the ground truth does."""

    def __call__(self, question: Question, trajectory: Trajectory, reading: Reading) -> float | Unscored:
        if chosen_region(trajectory) is None:
            return 0.0
        if reading is None:
            raise ValueError(f"{question.id!r} sample {trajectory.sample}: nobody asked about its region")
        if isinstance(reading, Unscored):
            return reading
        # A reward model of another make may not use the tag. Its bare reply counts where it is plain.
        said = parse_answer(reading) or reading
        return float(matches(said, question, self.config.number_tolerance))
