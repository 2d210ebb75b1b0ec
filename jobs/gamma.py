"""gamma from the data: how large are the regions that are known?"""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import numpy as np

from ergo_rl.episodes import images
from ergo_rl.jobs.config import TrainConfig
from ergo_rl.questions.dataset import DatasetError, QuestionStream

MOST_QUESTIONS = 1000


def with_known_gamma(config: TrainConfig) -> TrainConfig:
    """The same configuration with ``reward.gamma`` from the first thousand training questions, where
    ``reward.gamma_quantile`` asks for it. A single number for the whole data set: no reward of a trajectory depends on
    the box of its own question.

    Raises DatasetError where no question has a box."""
    reward = config.reward
    if reward.gamma_quantile is None:
        return config
    stream = QuestionStream(replace(config.questions, shuffle=False))
    shares = []
    for question in islice(stream, min(len(stream), MOST_QUESTIONS)):
        if question.boxes:
            width, height = images.size(question.image)
            shares.append(
                images.expand_boxes(question.boxes, reward.gamma_margin, width, height).area / (width * height)
            )
    if not shares:
        raise DatasetError(
            "reward.gamma_quantile needs questions with boxes, and none has any; set reward.gamma instead"
        )
    return replace(config, reward=replace(reward, gamma=float(np.quantile(shares, reward.gamma_quantile))))
