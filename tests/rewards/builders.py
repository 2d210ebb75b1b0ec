"""Questions and trajectories for the reward tests: what was said, and which box it gave."""

from __future__ import annotations

import numpy as np

from ergo_rl.episodes.types import Box, BoxOutcome, Finish, Outcome, Question, Trajectory, Turn, View
from ergo_rl.rewards.terms import RewardTerm, VerifierReply

SCENE = Box(0, 0, 1000, 1000)
GOOD_BOX = Box(100, 100, 300, 300)  # 4 % of the scene
QUESTION = Question("q1", b"the original", "Which mark is on the red panel?", "B", ("cross", "ring", "bar", "dot"))
LOOK = "<think>The red panel is up left.</think>\n<zoom>[10, 10, 30, 30]</zoom>"
READ = "<think>A ring.</think>\n<answer>B</answer>"


class Turns(RewardTerm):
    """A term of a user's own, as a class: the number of turns."""

    def __call__(self, question: Question, trajectory: Trajectory, reply: VerifierReply) -> float:
        return float(len(trajectory.turns))


def crop_share(question: Question, trajectory: Trajectory, reply: VerifierReply) -> float:
    """A term of a user's own, as a plain function: the share of the image that the crop shows."""
    return trajectory.area_ratio or 0.0


def turn(text: str, finish: Finish = Finish.STOP) -> Turn:
    ids = np.zeros(3, np.int32)
    return Turn(ids, ids, np.zeros(3, np.float32), text, finish, engine_prompt_length=3, policy_version=0)


def view(box: Box, size: int = 56) -> View:
    """Different pixels for different boxes."""
    return View(box, np.full((size, size, 3), (box.x1 * 7 + box.x2) % 256, np.uint8))


def played(
    look: str = LOOK,
    read: str = READ,
    box: Box = GOOD_BOX,
    outcome: Outcome = Outcome.ANSWERED,
    box_outcome: BoxOutcome = BoxOutcome.OK,
    sample: int = 0,
) -> Trajectory:
    """An episode of two turns."""
    finish = Finish.LENGTH if outcome is Outcome.TRUNCATED else Finish.STOP
    return Trajectory("q1", sample, (view(SCENE), view(box)), (turn(look), turn(read, finish)), outcome, box_outcome)


def ended_early(look: str, outcome: Outcome, box_outcome: BoxOutcome = BoxOutcome.NO_TAG) -> Trajectory:
    """An episode of one turn: no usable box, or cut off."""
    finish = Finish.LENGTH if outcome is Outcome.TRUNCATED else Finish.STOP
    return Trajectory("q1", 0, (view(SCENE),), (turn(look, finish),), outcome, box_outcome)
