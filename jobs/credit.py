"""From a step's scores to what the learner takes: advantages in place of scores. Pure."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from ergo_rl.actors.trajectory_store import Group
from ergo_rl.episodes.types import Outcome, Unscored
from ergo_rl.learners.advantages import over_step, term_advantages, turn_advantages
from ergo_rl.learners.config import Credit, LearnerConfig, Terms
from ergo_rl.learners.learner_group import TrainingGroup

Advantages = Sequence[tuple[float, ...]]
"""For each trajectory of a group those of its turns, or one for all of it; NaN leaves the loss."""


@dataclass(frozen=True, slots=True)
class Crediting:
    """How a step's trajectories are credited. weights: of the reward terms, by their names; stale_weight: of a group
    for each version that it is too old."""

    config: LearnerConfig
    weights: Mapping[str, float]
    stale_weight: float = 0.0

    def batch(self, groups: Sequence[Group], oldest: int = 0) -> list[TrainingGroup]:
        """The scored groups of a step as the learner takes them; ``oldest``: the first version that is not too old."""
        advantages: list[Advantages] = [self.advantages(group) for group in groups]
        if self.config.advantages.terms is Terms.NORMALISE_THEN_SUM:
            advantages = list(over_step(advantages, self.config.advantages))
        return [
            TrainingGroup(
                question_id=group.question.id,
                trajectories=group.trajectories,
                advantages=tuple(self._without_truncated(group, self._aged(group, mine, oldest))),
                tokens=tuple(facts.prompt_tokens + sum(facts.reply_tokens) for facts in group.played.facts),
            )
            for group, mine in zip(groups, advantages, strict=True)
        ]

    def teaches(self, group: Group) -> bool:
        """Whether any advantage of the group is other than 0: from the others nothing is learned."""
        return any(advantage and not math.isnan(advantage) for one in self.advantages(group) for advantage in one)

    def advantages(self, group: Group) -> Advantages:
        config = self.config.advantages
        if config.terms is Terms.NORMALISE_THEN_SUM:
            parts = [None if isinstance(score, Unscored) else score.parts for score in group.scores]
            return term_advantages(parts, self.weights, config)
        by_turn = config.credit is Credit.TURN
        turns = [len(facts.reply_tokens) for facts in group.played.facts]
        earned = [
            None if isinstance(score, Unscored) else score.turns[:played] if by_turn else (score.total,)
            for score, played in zip(group.scores, turns, strict=True)
        ]
        return turn_advantages(earned, config)

    def _aged(self, group: Group, advantages: Advantages, oldest: int) -> Advantages:
        if (late := oldest - group.oldest_version) <= 0:
            return advantages
        return [tuple(one * self.stale_weight**late for one in mine) for mine in advantages]

    def _without_truncated(self, group: Group, advantages: Advantages) -> Advantages:
        if not self.config.loss.mask_truncated:
            return advantages
        pairs = zip(group.played.facts, advantages, strict=True)
        return [(math.nan,) if facts.outcome is Outcome.TRUNCATED else mine for facts, mine in pairs]


def shuffled(groups: Sequence[Group], rng: random.Random) -> list[Group]:
    """The same groups with their scores dealt out anew, across all of them."""
    scores = [score for group in groups for score in group.scores]
    rng.shuffle(scores)
    dealt = iter(scores)
    return [replace(group, scores=tuple(islice(dealt, len(group.scores)))) for group in groups]
