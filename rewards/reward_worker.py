"""The Ray actor that scores: one reward model, every term, all trajectories of a group at once."""

from __future__ import annotations

import asyncio

import numpy as np

from ergo_rl.episodes.types import Box, Question, Trajectory, Unscored, Verdict, View
from ergo_rl.rewards.base import chosen_region
from ergo_rl.rewards.config import Backend, RewardConfig, VerifierConfig
from ergo_rl.rewards.endpoint_verifier import EndpointVerifier
from ergo_rl.rewards.engine_verifier import EngineVerifier
from ergo_rl.rewards.tce import TotalReward
from ergo_rl.rewards.verifier import Verifier, VerifierUnavailable, blind


class RewardWorker:
    """Made a Ray actor by ``RewardPool``."""

    def __init__(self, config: RewardConfig) -> None:
        self._config = config
        self._reward = TotalReward(config)
        self._verifier: Verifier | None = None

    async def start(self) -> None:
        """Start the reward model and ask it one question, so that one that cannot answer (a wrong URL, model or key)
        ends the launch and not every score after it.

        Raises VerifierUnavailable or ValueError, saying what is wrong."""
        verifier = await open_verifier(self._config.verifier)
        await verifier.answer(Question("probe", b"", "What colour is this?", ""), _GREY)
        self._verifier = verifier

    async def score(self, question: Question, trajectories: tuple[Trajectory, ...]) -> tuple[Verdict, ...]:
        """One verdict per trajectory, in their order. Equal crops are verified once.

        A reward model without an answer makes ``Unscored`` of the trajectories that need it; any other error rises
        (VerifierDied where there will be none: this worker is replaced)."""
        regions = {region.box: region for each in trajectories if (region := chosen_region(each)) is not None}
        replies = await asyncio.gather(*(self._read(blind(question), region) for region in regions.values()))
        readings: dict[Box, str | Unscored] = dict(zip(regions, replies, strict=True))
        return tuple(self._judge(question, each, readings) for each in trajectories)

    def _judge(self, question: Question, trajectory: Trajectory, readings: dict[Box, str | Unscored]) -> Verdict:
        region = chosen_region(trajectory)
        return self._reward(question, trajectory, None if region is None else readings[region.box])

    async def _read(self, question: Question, region: View) -> str | Unscored:
        if self._verifier is None:
            raise RuntimeError("score before start")
        try:
            return await self._verifier.answer(question, region)
        except VerifierUnavailable as error:
            return Unscored(str(error))


async def open_verifier(config: VerifierConfig) -> Verifier:
    if config.backend is Backend.ENGINE:
        return await EngineVerifier.start(config)
    return EndpointVerifier(config)


_GREY = View(Box(0, 0, 56, 56), np.full((56, 56, 3), 128, np.uint8))
