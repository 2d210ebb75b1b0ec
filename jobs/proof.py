"""The proof that every engine holds the learner's weights: log-probs, not parameters.

After each publish every engine plays one question it has seen before (the same prompt, the same images), and the
learner computes the log-probs of what was sampled. A stale prefix cache, a stale vision-encoder cache or a stale
packed head changes the engine's log-probs by 0.05 to 0.1 nats, while its parameters look right.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice

import numpy as np
import ray

from ergo_rl.actors.rollout_pool import RolloutPool
from ergo_rl.actors.rollout_worker import Unplayable
from ergo_rl.episodes.questions import DatasetError
from ergo_rl.episodes.types import Question, Trajectory
from ergo_rl.jobs.config import WeightCheckConfig
from ergo_rl.jobs.metrics import Metrics
from ergo_rl.learners.learner_group import LearnerGroup

MOST_TRIED = 64


class WeightsDiffer(RuntimeError):
    """An engine does not hold the learner's weights."""


class Proof:
    """One probe question, played a few times by every engine after each publish."""

    def __init__(
        self, rollouts: RolloutPool, learners: LearnerGroup, question: Question, config: WeightCheckConfig
    ) -> None:
        self._rollouts, self._learners, self._question, self._config = rollouts, learners, question, config

    @classmethod
    async def prepare(
        cls,
        rollouts: RolloutPool,
        learners: LearnerGroup,
        questions: Iterable[Question],
        config: WeightCheckConfig,
    ) -> Proof:
        """With the first of ``questions`` that can be played. Raises DatasetError where none of the first 64 can."""
        why = "there are none"
        for question in islice(questions, MOST_TRIED):
            answer = await rollouts.play(question, seed=0, samples=1)
            if not isinstance(answer, Unplayable):
                return cls(rollouts, learners, question, config)
            why = f"the last one, {answer.question_id!r}: {answer.reason}"
        raise DatasetError(f"none of the first {MOST_TRIED} questions could be played; {why}")

    async def measure(self, version: int) -> Metrics:
        """Mean and largest absolute difference (nats) per sampled token, over all engines.

        Raises WeightsDiffer above the tolerance, or when an engine plays for another version."""
        plays = await self._rollouts.play_everywhere(self._question, seed=version, samples=self._config.replies)
        differences = []
        for worker, trajectories in enumerate(plays):
            if stale := {turn.policy_version for one in trajectories for turn in one.turns} - {version}:
                raise WeightsDiffer(
                    f"rollout worker {worker} played for versions {sorted(stale)} after version {version}"
                )
            ours = await self._learners.logprobs(ray.put(trajectories))
            differences.append(mismatch(trajectories, ours))
        every = np.concatenate(differences)
        mean, most = float(every.mean()), float(every.max())
        if not mean <= self._config.tolerance:  # NaN must not pass
            raise WeightsDiffer(
                f"after publishing version {version} the engines' log-probs differ from the learner's by {mean:.2e} "
                f"nats on average ({most:.2e} at most), more than weight_check.tolerance = "
                f"{self._config.tolerance:.0e}: stale weights or caches"
            )
        return {"proof/mismatch_mean": mean, "proof/mismatch_max": most, "proof/tokens": float(every.size)}


def mismatch(trajectories: Sequence[Trajectory], ours: Sequence[np.ndarray]) -> np.ndarray:
    """float32[all sampled tokens]: absolute differences between the engine's and our log-probs."""
    theirs = [one.logprobs[one.loss_mask] for one in trajectories]
    return np.concatenate([np.abs(a - b) for a, b in zip(theirs, ours, strict=True)])
