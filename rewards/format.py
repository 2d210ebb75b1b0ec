"""r_format: are the tags there and well-formed in both turns?"""

from __future__ import annotations

import re

from ergo_rl.episodes.prompts import parse_answer
from ergo_rl.episodes.types import BoxOutcome, Outcome, Question, Trajectory
from ergo_rl.rewards.base import Reading, RewardTerm

_TAG = re.compile(r"</?(?:think|zoom|answer)>")


class Format(RewardTerm):
    """1 if turn 1 is a thought and a usable box, and turn 2 is a thought and an answer that is not empty; nothing
    but white space around them, and no tag inside another."""

    def __call__(self, question: Question, trajectory: Trajectory, reading: Reading) -> float:
        return float(all(self.by_turn(1.0, trajectory)))

    def by_turn(self, value: float, trajectory: Trajectory) -> tuple[float, float]:
        """Each turn answers for its own tags."""
        texts = [turn.text for turn in trajectory.turns]
        look = thought_then(texts[0], "zoom") and BoxOutcome(trajectory.box_outcome).usable
        read = (
            trajectory.outcome is Outcome.ANSWERED
            and thought_then(texts[1], "answer")
            and parse_answer(texts[1]) is not None
        )
        return float(look), float(read)


def thought_then(reply: str, tag: str) -> bool:
    """Whether a reply is exactly ``<think>...</think><tag>...</tag>`` with optional white space between."""
    if _TAG.findall(reply) != ["<think>", "</think>", f"<{tag}>", f"</{tag}>"]:
        return False
    before, _thought, between, _content, after = _TAG.split(reply)
    return not (before + between + after).strip()
