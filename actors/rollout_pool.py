"""What jobs see of the rollout workers: play, load weights, resize."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray

from actors.rollout_worker import Manner, Played, RolloutConfig, RolloutWorker, SamplingConfig, Unplayable
from cluster.placement import Cluster
from cluster.pool import Faults, Pool
from episodes.coarse_to_fine import EpisodeConfig
from episodes.types import Box, Question, Trajectory

ROLE = "rollout"


@dataclass(frozen=True, slots=True)
class Rollout:
    """The facts of a played group, and a reference to its ``tuple[Trajectory, ...]``."""

    played: Played
    trajectories: ray.ObjectRef


class RolloutPool:
    """Rollout workers as one thing. New and replaced workers are given the current weights before they play, and what
    is asked while weights are on their way is played with the new ones; what is being played goes on."""

    def __init__(self, pool: Pool, config: RolloutConfig, cluster: Cluster) -> None:
        self._pool, self.config, self._cluster = pool, config, cluster
        self._settled = asyncio.Event()
        self._settled.set()
        self._weights: tuple[int, Sequence[ray.ObjectRef]] | None = None

    @classmethod
    def launch(cls, cluster: Cluster, config: RolloutConfig, episode: EpisodeConfig) -> RolloutPool:
        """Create the workers; they start in the background (``await ready()``)."""
        cluster.request(ROLE, config.resources)
        actor_class = ray.remote(RolloutWorker)

        def spawn(index: int) -> Any:
            return actor_class.options(**cluster.actor_options(ROLE)).remote(config, episode)

        async def catch_up(worker: Any) -> None:
            if self._weights is not None:
                version, buckets = self._weights
                await worker.load_weights.remote(version, *buckets)

        faults = Faults(config.restarts, config.stall_s, config.backoff_s)
        self = cls(Pool(spawn, config.size.least, faults, "rollout workers", catch_up), config, cluster)
        return self

    async def ready(self, deadline_s: float) -> None:
        await self._pool.ready(deadline_s)

    async def play(
        self,
        question: Question,
        seed: int,
        samples: int | None = None,
        sampling: SamplingConfig | None = None,
        box: Box | None = None,
        manner: Manner | None = None,
    ) -> Rollout | Unplayable:
        """Play ``question`` (``group_size`` times unless told otherwise) on the least loaded worker; ``box`` is used
        in place of the policy's own, ``manner`` in place of the usual episode."""
        count = range(self.config.group_size if samples is None else samples)
        await self._settled.wait()
        played, reference = await self._pool.call(
            "play", question, tuple(count), seed, sampling, box, manner, num_returns=2
        )
        return played if isinstance(played, Unplayable) else Rollout(played, reference)

    async def play_everywhere(self, question: Question, seed: int, samples: int) -> list[tuple[Trajectory, ...]]:
        """The same play on every worker (to prove what weights they hold)."""
        await self._settled.wait()
        answers = await self._pool.call_all("play", question, tuple(range(samples)), seed, None)
        for played, _ in answers:
            if isinstance(played, Unplayable):
                raise ValueError(f"question {played.question_id!r} cannot be played: {played.reason}")
        return [trajectories for _, trajectories in answers]

    async def load_weights(self, version: int, buckets: Sequence[ray.ObjectRef]) -> list[float]:
        """Every worker takes over ``version``; seconds per worker. Kept for workers that come later."""
        self._weights = (version, list(buckets))
        self._settled.clear()
        try:
            seconds: list[float] = await self._pool.call_all("load_weights", version, *buckets)
        finally:
            self._settled.set()
        return seconds

    @property
    def restarts(self) -> int:
        return self._pool.restarts

    def __len__(self) -> int:
        """Workers that play."""
        return len(self._pool)

    def free(self) -> str:
        """What new workers would find, in words."""
        return f"free in the cluster: {self._cluster.free()}, needed for each: {self.config.resources}"

    async def resize(self, workers: int) -> None:
        """Raises TimeoutError where new ones do not come up within the deadline of ``ready``; they are gone then."""
        self._cluster.expect(ROLE, workers)
        try:
            await self._pool.resize(workers)
        finally:
            self._cluster.expect(ROLE, len(self))

    async def close(self) -> None:
        await self._pool.close()
