"""r_acc: is the policy's own final answer right?"""

from __future__ import annotations

from ergo_rl.episodes.prompts import parse_answer
from ergo_rl.episodes.types import Outcome, Question, Trajectory
from ergo_rl.rewards.base import Reading, RewardTerm
from ergo_rl.rewards.matching import matches


class Accuracy(RewardTerm):
    """1 if the text of the last ``<answer>`` in turn 2 matches the ground truth. A reply that was cut off has not
    answered, and neither has one without the tag: unlike the reward model, the policy is told to use it."""

    def __call__(self, question: Question, trajectory: Trajectory, reading: Reading) -> float:
        if trajectory.outcome is not Outcome.ANSWERED:
            return 0.0
        said = parse_answer(trajectory.turns[-1].text)
        return float(said is not None and matches(said, question, self.config.number_tolerance))

    def by_turn(self, value: float, trajectory: Trajectory) -> tuple[float, float]:
        return 0.0, value
