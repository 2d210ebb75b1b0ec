"""Control of a running run from outside: ``ergo-rl scale`` changes the number of its workers.

Every run has a named Ray actor: any process on the cluster finds it by name, on any machine, and gets the run's answer.
(A file in the run's folder would need a disk that all of them see, and could not answer.) The actor ends with the run,
because the run's driver owns it.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ergo_rl.actors.rollout_pool import RolloutPool
from ergo_rl.errors import ErgoError, explain, first_line
from ergo_rl.jobs.config import ConfigError
from ergo_rl.jobs.console_display import ConsoleDisplay
from ergo_rl.rewards.pool import RewardPool

logger = logging.getLogger(__name__)

ADDRESS = "cluster.json"
"""In the run's folder: where its Ray is, for a run that started one of its own."""
PROBE_S = 5.0
"""Within this time a Ray takes a connection."""
_PREFIX = "ergo-rl run "


class NotRunning(ErgoError):
    """The run that is asked is not going on."""


@dataclass(frozen=True, slots=True)
class WorkerCounts:
    """Wanted workers of each role; None leaves their number as it is."""

    rollout: int | None = None
    reward: int | None = None


class RunControl:
    """A Ray actor that carries requests to the driver of a run, and its answers back."""

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._asked: asyncio.Queue[tuple[int, WorkerCounts]] = asyncio.Queue()
        self._answers: dict[int, asyncio.Future[str]] = {}

    async def ask(self, sizes: WorkerCounts) -> str:
        """Return the driver's answer, when it has resized its pools or could not."""
        number = next(self._numbers)
        self._answers[number] = asyncio.get_running_loop().create_future()
        await self._asked.put((number, sizes))
        return await self._answers[number]

    async def next(self) -> tuple[int, WorkerCounts]:
        return await self._asked.get()

    async def answer(self, number: int, text: str) -> None:
        self._answers.pop(number).set_result(text)


@asynccontextmanager
async def serve_run_control(
    folder: Path, console: ConsoleDisplay, rollouts: RolloutPool, rewards: RewardPool
) -> AsyncIterator[None]:
    """Obey requests within the block. folder: of the run."""
    name = _PREFIX + str(folder.resolve())
    context = ray.get_runtime_context()
    here = NodeAffinitySchedulingStrategy(context.get_node_id(), soft=False)  # it must not die with another node
    actor: Any = ray.remote(RunControl).options(name=name, num_cpus=0, scheduling_strategy=here).remote()
    token = os.environ.get("RAY_AUTH_MODE") == "token"
    cluster = {"address": context.gcs_address, "namespace": context.namespace, "token": token}
    (folder / ADDRESS).write_text(json.dumps(cluster) + "\n")
    task = asyncio.create_task(_serve(actor, console, rollouts, rewards))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        ray.kill(actor)
        (folder / ADDRESS).unlink(missing_ok=True)


async def _serve(actor: Any, console: ConsoleDisplay, rollouts: RolloutPool, rewards: RewardPool) -> None:
    try:
        while True:
            number, sizes = await actor.next.remote()
            text = await resize_pools(sizes, rollouts, rewards)
            logger.warning("asked for %s: %s", sizes, text)
            console.say(f"scale: {text}")
            await actor.answer.remote(number, text)
    except RayActorError as error:
        logger.warning("the run's control actor has died, `ergo-rl scale` will not find it any more: %s", error)


async def resize_pools(sizes: WorkerCounts, rollouts: RolloutPool, rewards: RewardPool) -> str:
    """Return what was changed, in one line. An error is part of the answer and does not end the run."""
    said = []
    for role, pool, wanted in (("rollout", rollouts, sizes.rollout), ("reward", rewards, sizes.reward)):
        if wanted is None:
            continue
        try:
            await pool.resize(wanted)
            said.append(f"{wanted} {role} workers")
        except Exception as error:  # the answer to the request
            said.append(f"{role} workers not changed: {explain(error)}")
    return "; ".join(said)


def where_it_runs(folder: Path) -> dict[str, Any]:
    """Read where the Ray of a run is. Raises NotRunning where the run is not going on."""
    try:
        known = json.loads((folder / ADDRESS).read_text(encoding="utf-8"))
        if isinstance(known["address"], str) and isinstance(known["namespace"], str):
            return dict(known)
    except FileNotFoundError:
        raise NotRunning(
            f"{folder} has no {ADDRESS}: this run is not going on here. --address names a cluster where it does"
        ) from None
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise NotRunning(f"{folder / ADDRESS} cannot be read; --address HOST:PORT names the cluster of the run")


def find_cluster(address: str) -> str:
    """Return the address of a Ray that answers; ``auto``: of this machine's. Joining a dead one takes a minute.

    Raises NotRunning."""
    from ray._private.services import canonicalize_bootstrap_address_or_die

    if address == "auto":
        try:
            address = canonicalize_bootstrap_address_or_die("auto")
        except (ConnectionError, ValueError) as error:
            raise NotRunning("no Ray is running on this machine; --address HOST:PORT names one") from error
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=PROBE_S).close()
    except (OSError, ValueError, OverflowError) as error:
        raise NotRunning(
            f"no Ray answers at {address} ({first_line(error)}): the run is not going on, or --address HOST:PORT is "
            "not that of its cluster"
        ) from error
    return address


async def ask(run: str, sizes: WorkerCounts) -> str:
    """Raises ConfigError where no run of this name is running in this cluster."""
    found = [name for name in ray.util.list_named_actors() if name.startswith(_PREFIX)]
    mine = [name for name in found if Path(name.removeprefix(_PREFIX)).match(run)]
    if len(mine) != 1:
        there = ", ".join(name.removeprefix(_PREFIX) for name in mine or found) or "none"
        which = "more than one run" if mine else "no run"
        raise ConfigError(f"there is {which} {run!r} running in this cluster; give one of: {there}")
    try:
        answer: str = await ray.get_actor(mine[0]).ask.remote(sizes)
    except (RayActorError, ValueError) as error:
        raise NotRunning(f"{run}: the run has ended before it answered") from error
    return answer
