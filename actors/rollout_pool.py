"""What jobs see of the rollout workers: play, load weights, resize."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import ray

from ergo_rl.actors.config import RolloutConfig, SamplingConfig
from ergo_rl.actors.rollout_worker import Manner, Played, RolloutWorker, Unplayable
from ergo_rl.cluster.broadcast import NotDelivered, Published
from ergo_rl.cluster.buckets import Layout
from ergo_rl.cluster.meeting import Meeting
from ergo_rl.cluster.placement import Cluster
from ergo_rl.cluster.pool import Faults, Pool
from ergo_rl.episodes.config import EpisodeConfig
from ergo_rl.episodes.types import Box, Question, Trajectory

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
        self._published: Published | None = None
        self._joining = 0

    @classmethod
    def launch(cls, cluster: Cluster, config: RolloutConfig, episode: EpisodeConfig) -> RolloutPool:
        """Create the workers; they start in the background (``await ready()``)."""
        cluster.request(ROLE, config.resources)
        actor_class = ray.remote(RolloutWorker)

        def spawn(index: int) -> Any:
            return actor_class.options(**cluster.actor_options(ROLE)).remote(config, episode)

        async def catch_up(worker: Any) -> None:
            await self._catch_up(worker)

        faults = Faults(config.restarts, config.hang_timeout_s, config.backoff_s)
        self = cls(Pool(spawn, config.size.min, faults, "rollout workers", catch_up), config, cluster)
        return self

    async def _catch_up(self, worker: Any) -> None:
        """Give a new worker what was published last; if something else was meanwhile, that, too. Why it comes to an
        end: ``cluster.broadcast``."""
        held: Published | None = None
        self._joining += 1
        try:
            while self._published is not None and self._published is not held:
                published = self._published
                buckets = await published.buckets()
                if buckets is None:
                    await published.outdated.wait()
                else:
                    await worker.load_weights.remote(published.version, *buckets)
                    held = published
        finally:
            self._joining -= 1

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

        async def kept() -> Sequence[ray.ObjectRef]:
            return list(buckets)

        self.announce(Published(version, kept))
        async with self._held_back():
            seconds: list[float] = await self._pool.call_all("load_weights", version, *buckets)
        return seconds

    async def sleep(self) -> None:
        """Where ``engine.sleep`` is set: every engine gives its device's memory back until weights are loaded."""
        if self.config.engine.sleep:
            await self._pool.call_all("sleep")

    # What a broadcast needs (``cluster.broadcast.Receivers``).

    @property
    def processes(self) -> int:
        return self.config.engine.processes

    @property
    def joining(self) -> bool:
        return self._joining > 0

    def members(self) -> tuple[Any, ...]:
        return self._pool.up()

    def announce(self, published: Published) -> None:
        if self._published is not None:
            self._published.outdated.set()
        self._published = published

    async def enter(self, meeting: Meeting, members: Sequence[Any]) -> None:
        calls = [(member, (meeting, meeting.senders + place * self.processes)) for place, member in enumerate(members)]
        _of_all(await self._pool.call_each("enter_group", calls))

    async def receive(
        self, version: int, meeting: Meeting, layouts: Sequence[Layout], members: Sequence[Any]
    ) -> list[float]:
        calls = [(member, (version, meeting.generation, list(layouts))) for member in members]
        async with self._held_back():
            return _of_all(await self._pool.call_each("receive_weights", calls))

    @asynccontextmanager
    async def _held_back(self) -> AsyncIterator[None]:
        """Inside the block what is asked to be played waits."""
        self._settled.clear()
        try:
            yield
        finally:
            self._settled.set()

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


def _of_all(answers: Sequence[Any]) -> list[float]:
    """Seconds per worker. Raises NotDelivered where one has none."""
    failures = [
        f"rollout worker {place}: {type(one).__name__} {str(one).splitlines()[0] if str(one) else ''}"
        for place, one in enumerate(answers)
        if isinstance(one, Exception)
    ]
    if failures:
        raise NotDelivered("; ".join(failures))
    return list(answers)
