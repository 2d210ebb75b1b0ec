"""Check that every engine holds the learner's weights, by log-probs instead of parameters.

After a publish every engine answers one question that it has seen before (the same prompt, the same images), and the
learner computes the log-probs of the sampled tokens. A stale prefix cache, a stale vision-encoder cache or a stale
packed head changes the engine's log-probs by 0.05 to 0.1 nats, while its parameters look right.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice

import numpy as np
import ray

from ergo_rl.actors.rollout_pool import RolloutPool
from ergo_rl.actors.rollout_worker import SkippedQuestion
from ergo_rl.episodes.types import Question, Trajectory
from ergo_rl.errors import ErgoError
from ergo_rl.jobs.config import WeightCheckConfig
from ergo_rl.jobs.metrics import Metrics
from ergo_rl.learners.learner_group import LearnerGroup
from ergo_rl.questions.dataset import DatasetError

MAX_PROBES = 64


class WeightsDiffer(ErgoError, RuntimeError):
    """An engine does not hold the learner's weights."""


class WeightCheck:
    """One probe question, answered a few times by every engine after each publish.

    Example::

        check = await WeightCheck.prepare(rollouts, learners, questions, config.weight_check)
        await weights.publish(version=1)
        metrics = await check.measure(version=1)  # raises WeightsDiffer
    """

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
    ) -> WeightCheck:
        """Choose the first of ``questions`` that can be played. Raises DatasetError where none of the first 64 can."""
        reason = "there are none"
        for question in islice(questions, MAX_PROBES):
            answer = await rollouts.rollout(question, seed=0, samples=1)
            if not isinstance(answer, SkippedQuestion):
                return cls(rollouts, learners, question, config)
            reason = f"the last one, {answer.question_id!r}: {answer.reason}"
        raise DatasetError(f"none of the first {MAX_PROBES} questions could be played; {reason}")

    async def measure(self, version: int) -> Metrics:
        """Return the mean and largest absolute difference (nats) per sampled token, over all engines.

        Raises WeightsDiffer above the tolerance, or when an engine samples with another version."""
        plays = await self._rollouts.rollout_everywhere(self._question, seed=version, samples=self._config.replies)
        differences = []
        for worker, trajectories in enumerate(plays):
            if stale := {turn.policy_version for trajectory in trajectories for turn in trajectory.turns} - {version}:
                raise WeightsDiffer(
                    f"rollout worker {worker} sampled with versions {sorted(stale)} after version {version}"
                )
            ours = await self._learners.logprobs(ray.put(trajectories))
            differences.append(mismatch(trajectories, ours))
        all_tokens = np.concatenate(differences)
        mean, largest = float(all_tokens.mean()), float(all_tokens.max())
        if not mean <= self._config.tolerance:  # NaN must not pass
            raise WeightsDiffer(
                f"after publishing version {version} the engines' log-probs differ from the learner's by {mean:.2e} "
                f"nats on average ({largest:.2e} at most), more than weight_check.tolerance = "
                f"{self._config.tolerance:.0e}: stale weights or caches"
            )
        return {"proof/mismatch_mean": mean, "proof/mismatch_max": largest, "proof/tokens": float(all_tokens.size)}


def mismatch(trajectories: Sequence[Trajectory], ours: Sequence[np.ndarray]) -> np.ndarray:
    """Return float32[all sampled tokens]: absolute differences between the engine's and the learner's log-probs."""
    theirs = [trajectory.logprobs[trajectory.loss_mask] for trajectory in trajectories]
    return np.concatenate([np.abs(a - b) for a, b in zip(theirs, ours, strict=True)])
