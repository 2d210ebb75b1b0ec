"""r_format: are the tags there and well-formed in both turns?"""

from __future__ import annotations

import re

from episodes.parsing import BoxOutcome, parse_answer
from episodes.types import Outcome, Question, Trajectory
from rewards.base import Reading, RewardTerm

_TAG = re.compile(r"</?(?:think|zoom|answer)>")


class Format(RewardTerm):
    """1 if turn 1 is a thought and a usable box, and turn 2 is a thought and an answer that is not empty; nothing
    but white space around them, and no tag inside another."""

    def __call__(self, question: Question, trajectory: Trajectory, reading: Reading) -> float:
        if trajectory.outcome is not Outcome.ANSWERED or not BoxOutcome(trajectory.box_outcome).usable:
            return 0.0
        look, read = (turn.text for turn in trajectory.turns)
        return float(thought_then(look, "zoom") and thought_then(read, "answer") and parse_answer(read) is not None)


def thought_then(reply: str, tag: str) -> bool:
    """Whether a reply is exactly ``<think>...</think><tag>...</tag>`` with optional white space between."""
    if _TAG.findall(reply) != ["<think>", "</think>", f"<{tag}>", f"</{tag}>"]:
        return False
    before, _thought, between, _content, after = _TAG.split(reply)
    return not (before + between + after).strip()
