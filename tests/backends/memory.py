"""A backend in memory: the training loop with engines that answer at once.

The learner's weights are a digest of everything that it has ever learned from, in order. So two runs that end with the
same digest have used the same questions, seeds, versions and scores in the same steps.

Example::

    backend = MemoryBackend(dies_at={4})
    folder = Trainer(config, backend=backend).fit()
    assert backend.learner_starts == 2  # started again after the fourth update
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ergo_rl.actors.config import RolloutConfig
from ergo_rl.actors.rollout_pool import Rollout
from ergo_rl.actors.rollout_worker import GroupResult, SkippedQuestion, summarize
from ergo_rl.cluster.placement import Cluster
from ergo_rl.episodes.probe import Replacement, Replay
from ergo_rl.episodes.types import Question, Score, Trajectory, Unscored, Verdict
from ergo_rl.jobs.checkpoint_store import FileSystem
from ergo_rl.jobs.config import TrainConfig
from ergo_rl.learners.learner_group import LearnerFailed, TrainingGroup
from ergo_rl.rewards.config import RewardConfig
from ergo_rl.rewards.terms import TermSource, TotalReward
from tests.factories import trajectory


class Reference:
    """Stands for a ray.ObjectRef, to something in this process."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __await__(self) -> Any:
        yield from asyncio.sleep(0).__await__()
        return self.value


@dataclass
class MemoryBackend:
    """One backend for all processes that a run would have: a second ``Trainer`` with it is the run, resumed."""

    dies_at: set[int] = field(default_factory=set)
    """Numbers of the updates, counted over all learners, in which a rank dies."""
    skips_at: set[int] = field(default_factory=set)
    """Numbers of the updates that are skipped, because their gradient is not finite."""
    unplayable: set[str] = field(default_factory=set)
    """Ids of questions that cannot be played."""
    outage: int = 0
    """How many of the next groups the verifier does not answer for."""
    starts: dict[str, Callable[[], Awaitable[None]]] = field(default_factory=dict)
    """What happens while a role starts; nothing where it is not named."""
    starting: list[str] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)
    """Roles in the order in which they were started, and ended before training."""
    file_system: FileSystem = field(default_factory=FileSystem)
    updates: int = 0
    learner_starts: int = 0
    engine_starts: int = 0
    rollouts: Rollouts = field(init=False)

    def connect(self, config: Any) -> Any:
        return contextlib.nullcontext(Cluster(config))

    def start_workers(self, cluster: Any, config: TrainConfig, reward_terms: Mapping[str, TermSource]) -> Any:
        self.engine_starts += 1
        self.rollouts = Rollouts(self, config=config.rollout)
        return self.rollouts, Rewards(self, config.reward, reward_terms)

    async def start_learners(self, cluster: Any, config: Any) -> Any:
        self.learner_starts += 1
        try:
            await self.start("learner")
        except asyncio.CancelledError:
            self.closed.append("learner")
            raise
        return Learners(self)

    async def start(self, role: str) -> None:
        self.starting.append(role)
        if role in self.starts:
            await self.starts[role]()

    def release_learners(self, cluster: Any) -> None: ...

    async def prepare_weight_check(self, rollouts: Any, learners: Any, probes: Iterable[Question], config: Any) -> Any:
        return DigestCheck(rollouts, learners)

    def serve_run_control(self, *_: Any) -> Any:
        return contextlib.nullcontext()

    def put(self, value: Any) -> Reference:
        return Reference(value)

    def get(self, reference: Reference) -> Any:
        return reference.value


@dataclass
class DigestCheck:
    """The weight check: the engines hold exactly what the learner has."""

    rollouts: Rollouts
    learners: Learners

    async def measure(self, version: int) -> dict[str, float]:
        assert self.rollouts.holds == self.learners.digest
        assert self.rollouts.version == self.learners.step == version
        return {}


@dataclass
class Learners:
    backend: MemoryBackend
    step: int = 0
    digest: str = "the first weights"
    dead: bool = False

    async def update(self, groups: Sequence[TrainingGroup]) -> dict[str, float]:
        self.backend.updates += 1
        rollouts = self.backend.rollouts
        assert rollouts.asleep == rollouts.config.engine.sleep, "engines give their memory away for each update"
        if self.backend.updates in self.backend.dies_at:
            self.dead = True
            raise LearnerFailed("learner rank 0 died in update") from RuntimeError("killed")
        if self.backend.updates in self.backend.skips_at:
            return {"learner/skipped": 1.0}
        for group in groups:
            seen = [(member.sample, member.token_ids.tolist()) for member in group.trajectories.value]  # type: ignore[attr-defined]
            self.digest = _digest(self.digest, group.question_id, group.advantages, seen)
        self.step += 1
        return {"learner/loss": int(self.digest[:6], 16) / 2**24}

    async def weights(self) -> list[Reference]:
        return [Reference(self.digest)]

    async def state(self, keep: Callable[[Any], Awaitable[None]]) -> None:
        assert not self.dead
        await keep(Reference(f"{self.step} {self.digest[:5]}".encode()))
        await keep(Reference(f"{self.step} {self.digest[5:]}".encode()))

    async def restore(self, files: Sequence[Reference]) -> int:
        parts = [file.value.decode().partition(" ") for file in files]
        self.step, self.digest = int(parts[0][0]), "".join(rest for _, _, rest in parts)
        return self.step

    async def export(self, path: Path) -> None:
        path.mkdir()
        (path / "digest").write_text(self.digest)

    async def close(self) -> None:
        self.dead = True


@dataclass
class Rollouts:
    backend: MemoryBackend
    version: int = -1
    holds: str = ""
    restarts: int = 0
    asleep: bool = False
    config: RolloutConfig = field(default_factory=RolloutConfig)

    def __len__(self) -> int:
        return 1

    async def ready(self, deadline_s: float) -> None:
        await self.backend.start("rollout")

    async def close(self) -> None:
        self.backend.closed.append("rollout")

    async def sleep(self) -> None:
        assert not self.asleep
        self.asleep = self.config.engine.sleep

    async def load_weights(self, version: int, buckets: Sequence[Reference]) -> list[float]:
        self.version, self.holds, self.asleep = version, buckets[0].value, False
        return [0.0]

    async def rollout(self, question: Question, seed: int, **_: Any) -> Rollout | SkippedQuestion:
        await asyncio.sleep(0.001 * (seed % 5))
        assert self.version >= 0, "no rollout before the first weights"
        assert not self.asleep, "no rollout on engines that sleep"
        if question.id in self.backend.unplayable:
            return SkippedQuestion(question.id, "no image")
        salt = int(_digest(self.holds, question.id, seed)[:6], 16)
        played = tuple(trajectory(question.id, n, seed=salt, version=self.version) for n in range(2))
        facts = tuple(map(summarize, played))
        return Rollout(GroupResult(question.id, facts), Reference(played))  # type: ignore[arg-type]

    async def replay(self, question: Question, played: Any, other: Any, target: Any) -> dict[Replacement, Replay]:
        assert self.version >= 0 and not self.asleep
        there = {Replacement.OTHER: other is not None, Replacement.ORACLE: target is not None}
        return {how: Replay(question.answer) for how in Replacement if there.get(how, True)}


@dataclass
class Rewards:
    backend: MemoryBackend
    config: RewardConfig
    terms: Mapping[str, TermSource]
    restarts: int = 0

    def __len__(self) -> int:
        return 1

    async def ready(self, deadline_s: float) -> None:
        await self.backend.start("reward")

    async def close(self) -> None:
        self.backend.closed.append("reward")

    async def score(self, question: Question, trajectories: Any) -> tuple[Verdict, ...]:
        if self.backend.outage > 0:
            self.backend.outage -= 1
            return tuple(Unscored("http://rewards:8000/v1/chat/completions: status 503") for _ in trajectories.value)
        if self.terms:  # with terms of the user the reward is the real one, of a verifier that says nothing
            total = TotalReward(self.config, self.terms)
            return tuple(total(question, trajectory, "") for trajectory in trajectories.value)
        return tuple(_score(trajectory) for trajectory in trajectories.value)


def _score(trajectory: Trajectory) -> Score:
    value = int(_digest(trajectory.token_ids.tolist())[:2], 16) / 256
    return Score(value, {"region": value}, (value, 0.0))


def _digest(*parts: object) -> str:
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()
