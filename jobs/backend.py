"""What a run needs machines for: behind one protocol, so that the training loop also runs without them.

``RayBackend`` is the one of every real run. ``tests/backends/memory.py`` has one that lives in the test's process.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import ray

from ergo_rl.actors.rollout_pool import RolloutPool
from ergo_rl.cluster.config import ClusterConfig
from ergo_rl.cluster.placement import Cluster
from ergo_rl.episodes.types import Question
from ergo_rl.jobs.checkpoint_store import FileSystem
from ergo_rl.jobs.config import TrainConfig, WeightCheckConfig
from ergo_rl.jobs.console_display import ConsoleDisplay
from ergo_rl.jobs.evaluation import launch_workers
from ergo_rl.jobs.run_control import serve_run_control
from ergo_rl.jobs.weight_check import WeightCheck
from ergo_rl.learners.config import LearnerConfig
from ergo_rl.learners.learner_group import ROLE, LearnerGroup
from ergo_rl.rewards.pool import RewardPool
from ergo_rl.rewards.terms import TermSource


class Backend(Protocol):
    @property
    def file_system(self) -> FileSystem:
        """Where checkpoints are written."""
        ...

    def connect(self, config: ClusterConfig) -> AbstractContextManager[Cluster]:
        """Connect to the cluster, or start one."""
        ...

    def start_workers(
        self, cluster: Cluster, config: TrainConfig, reward_terms: Mapping[str, TermSource]
    ) -> tuple[RolloutPool, RewardPool]:
        """Start both pools in the background; their ``ready`` waits for them."""
        ...

    async def start_learners(self, cluster: Cluster, config: LearnerConfig) -> LearnerGroup:
        """Start the learner's ranks and wait for them; cancelled, end them. Raises LearnerFailed, TimeoutError."""
        ...

    def release_learners(self, cluster: Cluster) -> None:
        """Give back the places of ranks that failed, before others are started."""
        ...

    async def prepare_weight_check(
        self, rollouts: RolloutPool, learners: LearnerGroup, probes: Iterable[Question], config: WeightCheckConfig
    ) -> WeightCheck: ...

    def serve_run_control(
        self, folder: Path, console: ConsoleDisplay, rollouts: RolloutPool, rewards: RewardPool
    ) -> AbstractAsyncContextManager[None]:
        """Obey ``ergo-rl scale`` within the block."""
        ...

    def put(self, value: Any) -> Any:
        """Put a value into the object store; returns an awaitable reference to it."""
        ...

    def get(self, reference: Any) -> Any:
        """Fetch the value of a reference; blocks."""
        ...


class RayBackend:
    """Ray actors that host vLLM engines and DeepSpeed ranks."""

    file_system = FileSystem()

    def connect(self, config: ClusterConfig) -> AbstractContextManager[Cluster]:
        return Cluster.connect(config)

    def start_workers(
        self, cluster: Cluster, config: TrainConfig, reward_terms: Mapping[str, TermSource]
    ) -> tuple[RolloutPool, RewardPool]:
        return launch_workers(cluster, config, reward_terms)

    async def start_learners(self, cluster: Cluster, config: LearnerConfig) -> LearnerGroup:
        try:
            return await LearnerGroup.launch(cluster, config)
        except asyncio.CancelledError:  # another role has failed: ranks that load a model would go on to its end
            self.release_learners(cluster)
            raise

    def release_learners(self, cluster: Cluster) -> None:
        cluster.release(ROLE)

    async def prepare_weight_check(
        self, rollouts: RolloutPool, learners: LearnerGroup, probes: Iterable[Question], config: WeightCheckConfig
    ) -> WeightCheck:
        return await WeightCheck.prepare(rollouts, learners, probes, config)

    def serve_run_control(
        self, folder: Path, console: ConsoleDisplay, rollouts: RolloutPool, rewards: RewardPool
    ) -> AbstractAsyncContextManager[None]:
        return serve_run_control(folder, console, rollouts, rewards)

    def put(self, value: Any) -> Any:
        return ray.put(value)

    def get(self, reference: Any) -> Any:
        return ray.get(reference)
