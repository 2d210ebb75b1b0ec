"""What jobs see of the reward workers: score, resize."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ray

from ergo_rl.cluster.placement import Cluster
from ergo_rl.cluster.pool import Faults, Pool
from ergo_rl.episodes.types import Question, Trajectory, Verdict
from ergo_rl.rewards.config import RewardConfig
from ergo_rl.rewards.reward_worker import RewardWorker
from ergo_rl.rewards.tce import weights_of

ROLE = "reward"


class RewardPool:
    """Reward workers as one thing. They hold no state, so a dead one is replaced and its work done again."""

    def __init__(self, pool: Pool, config: RewardConfig) -> None:
        self._pool, self.config = pool, config

    @classmethod
    def launch(cls, cluster: Cluster, config: RewardConfig) -> RewardPool:
        """Create the workers; they start in the background (``await ready()``).

        Raises ValueError for a weight without a term."""
        weights_of(config)
        cluster.request(ROLE, config.resources)
        actor_class = ray.remote(RewardWorker)

        def spawn(index: int) -> Any:
            return actor_class.options(**cluster.actor_options(ROLE)).remote(config)

        faults = Faults(config.restarts, config.hang_timeout_s, config.backoff_s)
        return cls(Pool(spawn, config.workers, faults, "reward workers"), config)

    async def ready(self, deadline_s: float) -> None:
        await self._pool.ready(deadline_s)

    async def score(
        self, question: Question, trajectories: ray.ObjectRef[tuple[Trajectory, ...]] | tuple[Trajectory, ...]
    ) -> tuple[Verdict, ...]:
        """One verdict per trajectory, in their order. The original image stays behind: no reward worker has it."""
        verdicts: tuple[Verdict, ...] = await self._pool.call("score", replace(question, image=b""), trajectories)
        return verdicts

    @property
    def restarts(self) -> int:
        return self._pool.restarts

    def __len__(self) -> int:
        """Workers that score."""
        return len(self._pool)

    async def resize(self, workers: int) -> None:
        await self._pool.resize(workers)

    async def close(self) -> None:
        await self._pool.close()
