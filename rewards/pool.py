"""Reward workers: Ray actors with one verifier and every reward term each, and the pool that jobs see of them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import ray

from ergo_rl.cluster.devices import require_gpu
from ergo_rl.cluster.placement import Cluster
from ergo_rl.cluster.worker_pool import Faults, WorkerPool
from ergo_rl.episodes.types import Box, Question, Trajectory, Unscored, Verdict, View
from ergo_rl.rewards.config import RewardConfig
from ergo_rl.rewards.endpoint import NoVerdict, VerifierUnavailable
from ergo_rl.rewards.terms import TermSource, TotalReward, policy_crop, require_handed_over, term_weights
from ergo_rl.rewards.verifier import Verifier, open_verifier, recut, strip_for_verifier

logger = logging.getLogger(__name__)
ROLE = "reward"
_GREY = View(Box(0, 0, 56, 56), np.full((56, 56, 3), 128, np.uint8))


class RewardWorker:
    """Scores all trajectories of a group at once. ``RewardPool`` makes a Ray actor of it."""

    def __init__(self, config: RewardConfig, own_terms: Mapping[str, TermSource] | None = None) -> None:
        self._config = config
        self._reward = TotalReward(config, own_terms)
        self._verifier: Verifier | None = None

    async def start(self) -> None:
        """Start the verifier and ask it one question.

        A verifier that cannot answer (a wrong URL, model or key) so ends the launch and not every later score. Raises
        VerifierUnavailable or ValueError, saying what is wrong."""
        require_gpu(self._config.resources.gpus, "reward.resources.gpus")
        verifier = await open_verifier(self._config.verifier)
        try:
            await verifier.answer(Question("probe", b"", "What colour is this?", ""), _GREY)
        except NoVerdict as error:
            if error.kind == "refused":  # as it would refuse every question
                raise
            logger.warning("the verifier's first reply has no verdict: %s", error)
        self._verifier = verifier

    async def score(self, question: Question, trajectories: tuple[Trajectory, ...]) -> tuple[Verdict, ...]:
        """Return one verdict per trajectory, in their order. The verifier is asked once about equal crops.

        Where the verifier has no reply, the trajectories that need it are ``Unscored``. Other errors are raised; after
        VerifierDied this worker must be replaced."""
        crops = {crop.box: crop for trajectory in trajectories if (crop := policy_crop(trajectory)) is not None}
        asked = strip_for_verifier(question)
        if self._config.verifier.fine_tokens:
            try:
                crops = await asyncio.to_thread(recut, question, list(crops), self._config.verifier)
            except (OSError, ValueError) as error:
                unscored = Unscored(f"the crop cannot be cut from the original: {error}", "refused")
                return tuple(self._verdict(question, one, dict.fromkeys(crops, unscored)) for one in trajectories)
        answers = await asyncio.gather(*(self._ask_verifier(asked, crop) for crop in crops.values()))
        replies: dict[Box, str | Unscored] = dict(zip(crops, answers, strict=True))
        return tuple(self._verdict(question, trajectory, replies) for trajectory in trajectories)

    def _verdict(self, question: Question, trajectory: Trajectory, replies: Mapping[Box, str | Unscored]) -> Verdict:
        crop = policy_crop(trajectory)
        return self._reward(question, trajectory, None if crop is None else replies[crop.box])

    async def _ask_verifier(self, question: Question, crop: View) -> str | Unscored:
        if self._verifier is None:
            raise RuntimeError("score before start")
        try:
            return await self._verifier.answer(question, crop)
        except VerifierUnavailable as error:
            return Unscored(str(error), error.kind)


class RewardPool:
    """All reward workers. They hold no state, so a dead one is replaced and its calls are made again."""

    def __init__(self, pool: WorkerPool, config: RewardConfig) -> None:
        self._pool, self.config = pool, config

    @classmethod
    def launch(
        cls, cluster: Cluster, config: RewardConfig, own_terms: Mapping[str, TermSource] | None = None
    ) -> RewardPool:
        """Create the workers; they start in the background (``await ready()``).

        own_terms: terms handed over as objects, by name; Ray sends them to the workers, functions of a script or
        notebook included. Raises ValueError for a weight without a term."""
        require_handed_over(config, own_terms)
        term_weights(config, own_terms)
        cluster.declare(ROLE, config.resources)
        actor_class = ray.remote(RewardWorker)

        def spawn(index: int) -> Any:
            return actor_class.options(**cluster.actor_options(ROLE)).remote(config, own_terms)

        faults = Faults(config.restarts, config.hang_timeout_s, config.backoff_s)
        return cls(WorkerPool(spawn, config.workers, faults, "reward workers"), config)

    async def ready(self, deadline_s: float) -> None:
        await self._pool.ready(deadline_s)

    async def score(
        self, question: Question, trajectories: ray.ObjectRef[tuple[Trajectory, ...]] | tuple[Trajectory, ...]
    ) -> tuple[Verdict, ...]:
        """Return one verdict per trajectory, in their order.

        The original image is sent only where the verifier's crops are cut anew: no term uses it."""
        sent = question if self.config.verifier.fine_tokens else replace(question, image=b"")
        verdicts: tuple[Verdict, ...] = await self._pool.call("score", sent, trajectories)
        return verdicts

    @property
    def restarts(self) -> int:
        """Workers replaced so far."""
        return self._pool.restarts

    def __len__(self) -> int:
        """Number of workers."""
        return len(self._pool)

    async def resize(self, workers: int) -> None:
        await self._pool.resize(workers)

    async def close(self) -> None:
        await self._pool.close()
