"""``ergo-rl scale``: more or fewer workers for a run that is going on.

Every run has a mailbox, a named Ray actor: whoever is on the cluster finds it by name, on any machine, and gets the
run's answer. A file in the run's folder would need a disk that all of them see, and could not answer. It ends with the
run, because it belongs to its driver.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ergo_rl.actors.rollout_pool import RolloutPool
from ergo_rl.jobs.cli_common import explain
from ergo_rl.jobs.config import ConfigError
from ergo_rl.jobs.run import Run
from ergo_rl.rewards.pool import RewardPool

logger = logging.getLogger(__name__)

ADDRESS = "cluster.json"
"""In the run's folder: where its Ray is, for a run that started one of its own."""
_PREFIX = "ergo-rl run "


@dataclass(frozen=True, slots=True)
class Sizes:
    """Workers of each role; None leaves them as they are."""

    rollout: int | None = None
    reward: int | None = None


class Mailbox:
    """A Ray actor between those who ask and the run's driver."""

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._asked: asyncio.Queue[tuple[int, Sizes]] = asyncio.Queue()
        self._answers: dict[int, asyncio.Future[str]] = {}

    async def ask(self, sizes: Sizes) -> str:
        """What the driver says to it, when it has done it or could not."""
        number = next(self._numbers)
        self._answers[number] = asyncio.get_running_loop().create_future()
        await self._asked.put((number, sizes))
        return await self._answers[number]

    async def next(self) -> tuple[int, Sizes]:
        return await self._asked.get()

    async def answer(self, number: int, text: str) -> None:
        self._answers.pop(number).set_result(text)


@asynccontextmanager
async def scalable(run: Run, rollouts: RolloutPool, rewards: RewardPool) -> AsyncIterator[None]:
    """Inside the block the run does what its mailbox is asked."""
    name = _PREFIX + str(run.folder.resolve())
    context = ray.get_runtime_context()
    here = NodeAffinitySchedulingStrategy(context.get_node_id(), soft=False)  # no other node's end may take it along
    mailbox: Any = ray.remote(Mailbox).options(name=name, num_cpus=0, scheduling_strategy=here).remote()
    token = os.environ.get("RAY_AUTH_MODE") == "token"
    place = {"address": context.gcs_address, "namespace": context.namespace, "token": token}
    (run.folder / ADDRESS).write_text(json.dumps(place) + "\n")
    task = asyncio.create_task(_serve(mailbox, run, rollouts, rewards))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        ray.kill(mailbox)
        (run.folder / ADDRESS).unlink(missing_ok=True)


async def _serve(mailbox: Any, run: Run, rollouts: RolloutPool, rewards: RewardPool) -> None:
    try:
        while True:
            number, sizes = await mailbox.next.remote()
            text = await resized(sizes, rollouts, rewards)
            logger.warning("asked for %s: %s", sizes, text)
            run.view.say(f"scale: {text}")
            await mailbox.answer.remote(number, text)
    except RayActorError as error:
        logger.warning("the run's mailbox is gone, `ergo-rl scale` will not find it any more: %s", error)


async def resized(sizes: Sizes, rollouts: RolloutPool, rewards: RewardPool) -> str:
    """Do it; what became of it, in one line. The run goes on whatever it is."""
    said = []
    for role, pool, wanted in (("rollout", rollouts, sizes.rollout), ("reward", rewards, sizes.reward)):
        if wanted is None:
            continue
        try:
            await pool.resize(wanted)
            said.append(f"{wanted} {role} workers")
        except Exception as error:  # it is the answer to whoever asked
            said.append(f"{role} workers not changed: {explain(error)}")
    return "; ".join(said)


async def ask(run: str, sizes: Sizes) -> str:
    """Raises ConfigError where no run of this name is going on in this cluster."""
    found = [one for one in ray.util.list_named_actors() if one.startswith(_PREFIX)]
    mine = [one for one in found if Path(one.removeprefix(_PREFIX)).match(run)]
    if len(mine) != 1:
        there = ", ".join(one.removeprefix(_PREFIX) for one in mine or found) or "none"
        which = "more than one run" if mine else "no run"
        raise ConfigError(f"there is {which} {run!r} going on in this cluster; give one of: {there}")
    answer: str = await ray.get_actor(mine[0]).ask.remote(sizes)
    return answer
