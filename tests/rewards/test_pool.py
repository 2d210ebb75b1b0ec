"""Reward workers as Ray actors: references in, verdicts out, failures named, dead workers replaced."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any, TypeVar

import pytest
import ray

from ergo_rl.cluster.config import Resources
from ergo_rl.cluster.placement import Cluster
from ergo_rl.cluster.worker_pool import WorkerPool
from ergo_rl.episodes.types import Outcome, Question, Score, Trajectory, Unscored, View
from ergo_rl.rewards.config import RewardConfig
from ergo_rl.rewards.endpoint import VerifierUnavailable
from ergo_rl.rewards.pool import RewardPool, RewardWorker
from ergo_rl.rewards.terms import VerifierReply
from ergo_rl.rewards.verifier import VerifierDied
from tests.rewards.builders import QUESTION, SCENE, Turns, ended_early, played
from tests.rewards.conftest import Endpoint, fails
from tests.rewards.test_verifier import configured

T = TypeVar("T")
pytestmark = pytest.mark.system


def with_pool(cluster: Cluster, config: RewardConfig, use: Callable[[RewardPool], Awaitable[T]]) -> T:
    async def run() -> T:
        pool = RewardPool.launch(cluster, config)
        try:
            await pool.ready(60)
            return await use(pool)
        finally:
            await pool.close()

    return asyncio.run(run())


def config_for(endpoint: Endpoint, workers: int = 1) -> RewardConfig:
    return replace(configured(endpoint.url), workers=workers, resources=Resources(cpus=0.1))


@ray.remote
def group(*trajectories: Trajectory) -> tuple[Trajectory, ...]:
    return trajectories


def test_score_takes_a_group_by_reference(ray_cluster: Cluster, endpoint: Endpoint) -> None:
    reference = group.remote(played(), played(box=SCENE, sample=1), ended_early("left", Outcome.BAD_BOX))

    async def use(pool: RewardPool) -> Any:
        verdicts = await pool.score(QUESTION, reference)
        endpoint.answer = lambda body: fails(500)
        return verdicts, await pool.score(QUESTION, reference)

    scored, failed = with_pool(ray_cluster, config_for(endpoint, workers=2), use)
    assert [verdict.total for verdict in scored] == [3.5, 3.0, 0.0]
    assert scored[0] == Score(3.5, {"region": 1.0, "box": 1.0, "accuracy": 1.0, "format": 1.0}, (2.5, 2.0))
    assert isinstance(failed[0], Unscored) and isinstance(failed[1], Unscored) and "status 500" in failed[0].reason
    assert failed[2] == scored[2]


def test_worker_imports_a_term_by_its_path(ray_cluster: Cluster, endpoint: Endpoint) -> None:
    weights = {"accuracy": 1.0, "format": 1.0, "turns": 0.25}
    config = replace(config_for(endpoint), terms={"turns": "tests.rewards.builders:Turns"}, weights=weights)

    async def use(pool: RewardPool) -> Any:
        return await pool.score(QUESTION, (played(),))

    (score,) = with_pool(ray_cluster, config, use)
    assert score.total == 3.5 + 0.25 * 2 and score.parts["turns"] == 2


def test_worker_gets_terms_that_were_handed_over(ray_cluster: Cluster, endpoint: Endpoint) -> None:
    """A class and a function that no import path leads to; the crop is 4 % of the scene."""
    factor = 10.0

    def scaled(question: Question, trajectory: Trajectory, reply: VerifierReply) -> float:
        return factor * (trajectory.area_ratio or 0.0)

    config = config_for(endpoint)

    async def run() -> Any:
        pool = RewardPool.launch(ray_cluster, config, {"scaled": scaled, "turns": Turns})
        try:
            await pool.ready(60)
            return await pool.score(QUESTION, (played(),))
        finally:
            await pool.close()

    (score,) = asyncio.run(run())
    assert score.parts["scaled"] == pytest.approx(0.4) and score.total == pytest.approx(3.5 + 0.4 + 2)


def test_launch_fails_when_the_verifier_cannot_answer(ray_cluster: Cluster, endpoint: Endpoint) -> None:
    endpoint.answer = lambda body: fails(404)

    async def use(pool: RewardPool) -> None:
        raise AssertionError("must not come to this")

    with pytest.raises(VerifierUnavailable, match="status 404"):
        with_pool(ray_cluster, config_for(endpoint), use)


def test_launch_refuses_an_unknown_weight_before_any_actor_starts(ray_cluster: Cluster, endpoint: Endpoint) -> None:
    with pytest.raises(ValueError, match="acuracy"):
        RewardPool.launch(ray_cluster, replace(config_for(endpoint), weights={"acuracy": 1.0}))


class Mortal(RewardWorker):
    """Its first incarnation has a verifier whose engine dies at the second question (the first is the probe)."""

    def __init__(self, config: RewardConfig, life: int) -> None:
        super().__init__(config)
        self._life = life

    async def start(self) -> None:
        await super().start()
        if self._life == 0:
            self._verifier = Dying()


class Dying:
    async def answer(self, question: Question, crop: View) -> str:
        raise VerifierDied("the engine is gone")

    async def close(self) -> None: ...


def test_worker_with_a_dead_engine_is_replaced_and_its_call_repeated(ray_cluster: Cluster, endpoint: Endpoint) -> None:
    config, lives = config_for(endpoint), iter(range(10))

    async def run() -> tuple[Any, int]:
        pool = WorkerPool(lambda index: ray.remote(Mortal).options(num_cpus=0.1).remote(config, next(lives)), 1)
        rewards = RewardPool(pool, config)
        await rewards.ready(60)
        try:
            return await rewards.score(QUESTION, (played(),)), rewards.restarts
        finally:
            await rewards.close()

    verdicts, restarts = asyncio.run(run())
    assert [verdict.total for verdict in verdicts] == [3.5] and restarts == 1
