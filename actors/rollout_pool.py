"""All rollout workers of a run behind one interface: roll out, load weights, resize."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import ray

from ergo_rl.actors.config import RolloutConfig, SamplingConfig
from ergo_rl.actors.rollout_worker import EvalMode, GroupResult, RolloutWorker, SkippedQuestion
from ergo_rl.cluster.placement import Cluster
from ergo_rl.cluster.weight_sync import WeightSnapshot
from ergo_rl.cluster.worker_pool import Faults, WorkerPool
from ergo_rl.episodes.config import EpisodeConfig
from ergo_rl.episodes.probe import Replacement, Replay
from ergo_rl.episodes.types import Box, Question, Trajectory

ROLE = "rollout"


@dataclass(frozen=True, slots=True)
class Rollout:
    """One finished group."""

    result: GroupResult
    trajectories: ray.ObjectRef
    """To a ``tuple[Trajectory, ...]``."""


class RolloutPool:
    """New and replaced workers get the current weights before they take calls. Rollouts requested while weights are on
    their way use the new ones; running ones continue."""

    def __init__(self, pool: WorkerPool, config: RolloutConfig, cluster: Cluster) -> None:
        self._pool, self.config, self._cluster = pool, config, cluster
        self._settled = asyncio.Event()
        self._settled.set()
        self._target: WeightSnapshot | None = None
        self._pending = 0

    @classmethod
    def launch(cls, cluster: Cluster, config: RolloutConfig, episode: EpisodeConfig) -> RolloutPool:
        """Create the workers, which start in the background; ``ready()`` waits for them."""
        cluster.declare(ROLE, config.resources)
        actor_class = ray.remote(RolloutWorker)

        def spawn(index: int) -> Any:
            return actor_class.options(**cluster.actor_options(ROLE)).remote(config, episode)

        async def prepare(worker: Any) -> None:
            await self._sync_new_worker(worker)

        faults = Faults(config.restarts, config.hang_timeout_s, config.backoff_s)
        self = cls(WorkerPool(spawn, config.size.min, faults, "rollout workers", prepare), config, cluster)
        return self

    async def _sync_new_worker(self, worker: Any) -> None:
        """Load the weights that were published last into a new worker, and again if others were published meanwhile.
        ``cluster.weight_sync`` says why this ends."""
        held: WeightSnapshot | None = None
        self._pending += 1
        try:
            while self._target is not None and self._target is not held:
                target = self._target
                buckets = await target.buckets()
                if buckets is None:
                    await target.outdated.wait()
                else:
                    await worker.load_weights.remote(target.version, *buckets)
                    held = target
        finally:
            self._pending -= 1

    async def ready(self, deadline_s: float) -> None:
        await self._pool.ready(deadline_s)

    async def rollout(
        self,
        question: Question,
        seed: int,
        samples: int | None = None,
        sampling: SamplingConfig | None = None,
        box: Box | None = None,
        mode: EvalMode | None = None,
    ) -> Rollout | SkippedQuestion:
        """Sample a group of trajectories for ``question`` on the least loaded worker.

        samples: ``group_size`` by default; box: replaces the policy's own; mode: replaces the usual episode."""
        count = range(self.config.group_size if samples is None else samples)
        await self._settled.wait()
        result, reference = await self._pool.call(
            "rollout", question, tuple(count), seed, sampling, box, mode, num_returns=2
        )
        return result if isinstance(result, SkippedQuestion) else Rollout(result, reference)

    async def replay(
        self, question: Question, played: ray.ObjectRef, other: ray.ObjectRef | None, target: Box | None
    ) -> dict[Replacement, Replay] | SkippedQuestion:
        """Play turn 2 again, greedily, with its crop replaced (``episodes.probe.replay_each``).

        played: to a ``tuple[Trajectory, ...]`` whose first has a crop; other: the same, of another image; target: the
        oracle's box."""
        await self._settled.wait()
        greedy = replace(self.config.sampling, temperature=0.0)
        found: dict[Replacement, Replay] | SkippedQuestion = await self._pool.call(
            "replay", question, played, other, target, greedy
        )
        return found

    async def rollout_everywhere(self, question: Question, seed: int, samples: int) -> list[tuple[Trajectory, ...]]:
        """Do the same rollout on every worker, to check what weights they hold. Raises ValueError if the question
        cannot be used."""
        await self._settled.wait()
        answers = await self._pool.call_all("rollout", question, tuple(range(samples)), seed, None)
        for result, _ in answers:
            if isinstance(result, SkippedQuestion):
                raise ValueError(f"question {result.question_id!r} cannot be played: {result.reason}")
        return [trajectories for _, trajectories in answers]

    async def load_weights(self, version: int, buckets: Sequence[ray.ObjectRef]) -> list[float]:
        """Load ``version`` into every worker; seconds per worker. Kept for workers that come later."""

        async def kept() -> Sequence[ray.ObjectRef]:
            return list(buckets)

        self.set_target(WeightSnapshot(version, kept))
        async with self.hold_requests():
            seconds: list[float] = await self._pool.call_all("load_weights", version, *buckets)
        return seconds

    async def sleep(self) -> None:
        """If ``engine.sleep`` is set, every engine gives its device's memory back until weights are loaded."""
        if self.config.engine.sleep:
            await self._pool.call_all("sleep")

    # What a direct transfer needs (``cluster.weight_sync.WeightReceivers``).

    @property
    def processes(self) -> int:
        return self.config.engine.processes

    @property
    def has_pending_workers(self) -> bool:
        return self._pending > 0

    def members(self) -> tuple[Any, ...]:
        return self._pool.up()

    def set_target(self, snapshot: WeightSnapshot) -> None:
        if self._target is not None:
            self._target.outdated.set()
        self._target = snapshot

    @asynccontextmanager
    async def hold_requests(self) -> AsyncIterator[None]:
        self._settled.clear()
        try:
            yield
        finally:
            self._settled.set()

    @property
    def restarts(self) -> int:
        return self._pool.restarts

    def __len__(self) -> int:
        """Number of workers."""
        return len(self._pool)

    def free(self) -> str:
        """Say what resources new workers would find."""
        return f"free in the cluster: {self._cluster.free()}, needed for each: {self.config.resources}"

    async def resize(self, workers: int) -> None:
        """Grow or shrink. Raises TimeoutError if new workers do not start within the deadline of ``ready``; they are
        removed then."""
        self._cluster.hint_autoscaler(ROLE, workers)
        try:
            await self._pool.resize(workers)
        finally:
            self._cluster.hint_autoscaler(ROLE, len(self))

    async def close(self) -> None:
        await self._pool.close()
