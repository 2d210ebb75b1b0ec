"""A whole crew without machines, for the story that the training loop tells: engines that answer at once, and a learner
whose weights are a digest of everything it has ever learned from, in order. Two runs that end with the same digest have
used the same questions, seeds, versions and scores in the same steps."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import ray

from ergo_rl.actors.config import RolloutConfig
from ergo_rl.actors.rollout_pool import Rollout
from ergo_rl.actors.rollout_worker import Played, Unplayable, facts_of
from ergo_rl.cluster.placement import Cluster
from ergo_rl.episodes.types import Question, Score, Trajectory, Unscored, Verdict
from ergo_rl.jobs import run, train
from ergo_rl.jobs.config import TrainConfig
from ergo_rl.jobs.saving import recovery, state
from ergo_rl.jobs.saving.checkpoints import Disk, Shelf
from ergo_rl.learners.learner_group import LearnerFailed, TrainingGroup
from tests.factories import trajectory


class Reference:
    """Like ray.ObjectRef, to something in this process."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __await__(self) -> Any:
        yield from asyncio.sleep(0).__await__()
        return self.value


@dataclass
class Learners:
    """``dies_at``: numbers of the updates, over the life of the world, in which a rank dies."""

    world: World
    step: int = 0
    digest: str = "the first weights"
    dead: bool = False

    async def update(self, groups: Sequence[TrainingGroup]) -> dict[str, float]:
        self.world.updates += 1
        crew = self.world.rollouts
        assert crew.asleep == crew.config.engine.sleep, "engines give their memory away for each update"
        if self.world.updates in self.world.dies_at:
            self.dead = True
            raise LearnerFailed("learner rank 0 died in update") from RuntimeError("killed")
        for group in groups:
            seen = [(one.sample, one.token_ids.tolist()) for one in group.trajectories.value]  # type: ignore[attr-defined]
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
    world: World
    version: int = -1
    holds: str = ""
    restarts: int = 0
    asleep: bool = False
    config: RolloutConfig = field(default_factory=RolloutConfig)

    def __len__(self) -> int:
        return 1

    async def sleep(self) -> None:
        assert not self.asleep
        self.asleep = self.config.engine.sleep

    async def load_weights(self, version: int, buckets: Sequence[Reference]) -> list[float]:
        self.version, self.holds, self.asleep = version, buckets[0].value, False
        return [0.0]

    async def play(self, question: Question, seed: int, **_: Any) -> Rollout | Unplayable:
        await asyncio.sleep(0.001 * (seed % 5))
        assert self.version >= 0, "nobody plays before the first weights"
        assert not self.asleep, "nobody plays without them"
        if question.id in self.world.unplayable:
            return Unplayable(question.id, "no picture")
        salt = int(_digest(self.holds, question.id, seed)[:6], 16)
        played = tuple(trajectory(question.id, n, seed=salt, version=self.version) for n in range(2))
        facts = tuple(map(facts_of, played))
        return Rollout(Played(question.id, facts), Reference(played))  # type: ignore[arg-type]


@dataclass
class Rewards:
    world: World
    restarts: int = 0

    def __len__(self) -> int:
        return 1

    async def score(self, question: Question, trajectories: Any) -> tuple[Verdict, ...]:
        if self.world.outage > 0:
            self.world.outage -= 1
            return tuple(Unscored("http://rewards:8000/v1/chat/completions: status 503") for _ in trajectories.value)
        return tuple(_score(one) for one in trajectories.value)


@dataclass
class World:
    """What the crews of one run share. updates: of all learners that there ever were; asked: (question, samples) the
    learner was given, by life."""

    dies_at: set[int] = field(default_factory=set)
    unplayable: set[str] = field(default_factory=set)
    outage: int = 0
    updates: int = 0
    launches: int = 0
    engines: int = 0
    disk: Disk = field(default_factory=Disk)
    rollouts: Rollouts = field(init=False)

    def enter(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Put everything in place of what needs machines."""

        async def launch(cluster: Any, config: TrainConfig, view: Any) -> Any:
            self.engines += 1
            self.rollouts = Rollouts(self, config=config.rollout)
            return train.Crew(self.rollouts, Rewards(self), self.learners())  # type: ignore[arg-type]

        class Proof:
            @classmethod
            async def prepare(cls, rollouts: Rollouts, learners: Learners, *_: Any) -> Proof:
                found = cls()
                found.crew = rollouts, learners
                return found

            crew: tuple[Rollouts, Learners]

            async def measure(self, version: int) -> dict[str, float]:
                rollouts, learners = self.crew
                assert rollouts.holds == learners.digest and rollouts.version == learners.step == version
                return {}

        async def relaunch(cluster: Any, config: Any) -> Learners:
            return self.learners()

        monkeypatch.setattr(train, "launch", launch)
        monkeypatch.setattr(train, "Proof", Proof)
        monkeypatch.setattr(train.Cluster, "connect", lambda config: contextlib.nullcontext(Cluster(config)))
        monkeypatch.setattr(train, "scalable", lambda *_: contextlib.nullcontext())
        monkeypatch.setattr(recovery.LearnerGroup, "launch", relaunch)
        monkeypatch.setattr(run, "Shelf", lambda folder: Shelf(folder, self.disk))
        monkeypatch.setattr(state.ray, "put", Reference)
        monkeypatch.setattr(ray, "get", lambda reference: reference.value)

    def learners(self) -> Learners:
        self.launches += 1
        return Learners(self)


def _score(one: Trajectory) -> Score:
    value = int(_digest(one.token_ids.tolist())[:2], 16) / 256
    return Score(value, {"region": value}, (value, 0.0))


def _digest(*parts: object) -> str:
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()
