"""Gamma of the reward from the data: how large are the regions that are known?"""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import numpy as np

from ergo_rl.episodes import images
from ergo_rl.episodes.config import QuestionsConfig
from ergo_rl.questions.dataset import DatasetError, QuestionStream
from ergo_rl.rewards.config import RewardConfig

MAX_QUESTIONS = 1000


def resolve_gamma(reward: RewardConfig, questions: QuestionsConfig) -> RewardConfig:
    """Return ``reward`` with its gamma from the first thousand training questions, where ``gamma_quantile`` is set.

    It is a single number for the whole data set: no reward of a trajectory depends on the box of its own question.
    Raises DatasetError where no question has a box."""
    if reward.gamma_quantile is None:
        return reward
    stream = QuestionStream(replace(questions, shuffle=False))
    shares = []
    for question in islice(stream, min(len(stream), MAX_QUESTIONS)):
        if question.boxes:
            width, height = images.size(question.image)
            shares.append(
                images.expand_boxes(question.boxes, reward.gamma_margin, width, height).area / (width * height)
            )
    if not shares:
        raise DatasetError(
            "reward.gamma_quantile needs questions with boxes, and none has any; set reward.gamma instead"
        )
    return replace(reward, gamma=float(np.quantile(shares, reward.gamma_quantile)))
