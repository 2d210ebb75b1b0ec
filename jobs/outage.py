"""A reward model that stops answering: the run waits for it instead of learning from what little was scored."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from ergo_rl.actors.trajectory_store import Group
from ergo_rl.episodes.types import Unscored
from ergo_rl.errors import ErgoError
from ergo_rl.jobs.view import View
from ergo_rl.rewards.config import RewardConfig
from ergo_rl.rewards.pool import RewardPool

logger = logging.getLogger(__name__)

FIRST_WAIT_S = 5.0
LONGEST_WAIT_S = 60.0


class RewardsUnavailable(ErgoError, RuntimeError):
    """More of a step stayed unscored than is tolerated, for longer than is allowed; the message says why."""


def unscored_share(groups: Sequence[Group]) -> float:
    """Of all trajectories of a step."""
    scores = [score for group in groups for score in group.scores]
    return sum(isinstance(score, Unscored) for score in scores) / max(1, len(scores))


def why_unscored(groups: Sequence[Group]) -> str:
    """The most frequent reason: for an endpoint its address and error."""
    reasons = Counter(score.reason for group in groups for score in group.scores if isinstance(score, Unscored))
    return reasons.most_common(1)[0][0]


async def rescored(groups: Sequence[Group], rewards: RewardPool, config: RewardConfig, view: View) -> list[Group]:
    """The groups of a step, scored again while more of their trajectories than ``unscored_tolerance`` have no score.

    Waits visibly between two attempts. Raises RewardsUnavailable after ``outage_deadline_s``."""
    since, wait_s, said = time.monotonic(), FIRST_WAIT_S, ""
    groups = list(groups)
    while (share := unscored_share(groups)) > config.unscored_tolerance:
        why = why_unscored(groups)
        if (waited := time.monotonic() - since) >= config.outage_deadline_s:
            raise RewardsUnavailable(
                f"{share:.0%} of the step is unscored after {waited:.0f} s (reward.outage_deadline_s), more than "
                f"reward.unscored_tolerance = {config.unscored_tolerance:.0%}: {why}"
            )
        said = f"paused: {share:.0%} of the step could not be scored: {why}"
        logger.warning(said)
        view.warn({"rewards": said})
        await asyncio.sleep(min(wait_s, max(0.0, config.outage_deadline_s - waited)))
        wait_s = min(wait_s * 2, LONGEST_WAIT_S)
        groups = list(await asyncio.gather(*(_again(group, rewards) for group in groups)))
    if said:
        waited = time.monotonic() - since
        logger.warning("the reward model answers again after %.0f s", waited)
        view.warn({})
        view.say(f"going on: the reward model answers again after {waited:.0f} s")
    return groups


async def _again(group: Group, rewards: RewardPool) -> Group:
    if not any(isinstance(score, Unscored) for score in group.scores):
        return group
    return replace(group, scores=await rewards.score(group.question, group.trajectories))
