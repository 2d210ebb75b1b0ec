"""From the scores of a step to the batch that the learner takes; and gamma of the reward, from the training data."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from ergo_rl.actors.trajectory_store import Group
from ergo_rl.episodes import images
from ergo_rl.episodes.config import QuestionsConfig
from ergo_rl.episodes.types import Outcome, Unscored
from ergo_rl.learners.advantages import TurnAdvantages, normalise_over_step, term_advantages, turn_advantages
from ergo_rl.learners.config import Credit, LearnerConfig, Terms
from ergo_rl.learners.learner_group import TrainingGroup
from ergo_rl.questions.dataset import DatasetError, QuestionStream
from ergo_rl.rewards.config import RewardConfig

GroupAdvantages = Sequence[TurnAdvantages]
"""By trajectory."""


@dataclass(frozen=True, slots=True)
class AdvantageEstimator:
    """Computes advantages relative to the group, as ``learner.advantages`` says.

    Example::

        estimator = AdvantageEstimator(LearnerConfig(), {"region": 1.0, "box": 0.5})
        batch = estimator.batch(groups, oldest=step - max_staleness)
        await learners.update(batch)
    """

    config: LearnerConfig
    weights: Mapping[str, float]
    """Of the reward terms, by name."""
    stale_weight: float = 0.0
    """Factor on the advantages of a group, once for each version by which it is too old."""

    def batch(self, groups: Sequence[Group], oldest: int = 0) -> list[TrainingGroup]:
        """Return the scored groups of a step as the learner takes them.

        oldest: the first policy version that is not too old."""
        advantages: list[GroupAdvantages] = [self.advantages(group) for group in groups]
        if self.config.advantages.terms is Terms.NORMALISE_THEN_SUM:
            advantages = list(normalise_over_step(advantages, self.config.advantages))
        return [
            TrainingGroup(
                question_id=group.question.id,
                trajectories=group.trajectories,
                advantages=tuple(self._mask_truncated(group, self._discount_stale(group, mine, oldest))),
                tokens=tuple(facts.prompt_tokens + sum(facts.reply_tokens) for facts in group.result.summaries),
            )
            for group, mine in zip(groups, advantages, strict=True)
        ]

    def has_signal(self, group: Group) -> bool:
        """Whether any advantage of the group differs from 0; nothing is learned from a group without one."""
        return any(value and not math.isnan(value) for turns in self.advantages(group) for value in turns)

    def advantages(self, group: Group) -> GroupAdvantages:
        """Return the advantages of one group, before staleness, truncation and scaling over the step."""
        config = self.config.advantages
        if config.terms is Terms.NORMALISE_THEN_SUM:
            parts = [None if isinstance(score, Unscored) else score.parts for score in group.scores]
            return term_advantages(parts, self.weights, config)
        by_turn = config.credit is Credit.TURN
        turns = [len(facts.reply_tokens) for facts in group.result.summaries]
        earned = [
            None if isinstance(score, Unscored) else score.turns[:played] if by_turn else (score.total,)
            for score, played in zip(group.scores, turns, strict=True)
        ]
        return turn_advantages(earned, config)

    def _discount_stale(self, group: Group, advantages: GroupAdvantages, oldest: int) -> GroupAdvantages:
        if (late := oldest - group.oldest_version) <= 0:
            return advantages
        return [tuple(value * self.stale_weight**late for value in turns) for turns in advantages]

    def _mask_truncated(self, group: Group, advantages: GroupAdvantages) -> GroupAdvantages:
        if not self.config.loss.mask_truncated:
            return advantages
        pairs = zip(group.result.summaries, advantages, strict=True)
        return [(math.nan,) if facts.outcome is Outcome.TRUNCATED else mine for facts, mine in pairs]


def shuffle_scores(groups: Sequence[Group], rng: random.Random) -> list[Group]:
    """Return the same groups with the scores of all of them dealt out at random: a control experiment."""
    scores = [score for group in groups for score in group.scores]
    rng.shuffle(scores)
    dealt = iter(scores)
    return [replace(group, scores=tuple(islice(dealt, len(group.scores)))) for group in groups]


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
