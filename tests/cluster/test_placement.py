"""What listens, and for whom; who gets which GPU."""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections import defaultdict
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.util.placement_group import placement_group, remove_placement_group

from benchmarks.lives import descendants
from ergo_rl.cluster.config import ClusterConfig, Resources
from ergo_rl.cluster.devices import NoGPU
from ergo_rl.cluster.placement import Cluster, shared_memory_shortage
from ergo_rl.jobs.config import TrainConfig, load_config
from ergo_rl.jobs.placement_plan import make_plan
from tests.conftest import ROOT

LOOPBACK = ("0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000")
"""127.0.0.1, the same as IPv6, ::1; as /proc/net writes them."""


def listening(user: int) -> dict[str, str]:
    """Socket inode -> local address:port of every TCP listener of a user."""
    found = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            cells = line.split()
            if cells[3] == "0A" and int(cells[7]) == user:
                found[cells[9]] = cells[1]
    return found


def sockets_of(family: list[tuple[int, str]]) -> dict[str, str]:
    """Inode -> command of every socket of these processes."""
    found = {}
    for pid, command in family:
        with suppress(OSError):  # it has ended
            for handle in Path(f"/proc/{pid}/fd").iterdir():
                if (target := os.readlink(handle)).startswith("socket:["):
                    found[target[8:-1]] = command
    return found


def test_connect_local_ray_listens_on_loopback_only(ray_cluster: Cluster) -> None:
    """Whoever reaches the ports of Ray can run code: none of them is on another interface."""
    assert ray.util.get_node_ip_address() == "127.0.0.1"
    owners = sockets_of([(os.getpid(), "pytest"), *descendants(os.getpid())])
    open_to = listening(os.getuid())
    ours = {inode: open_to[inode] for inode in owners.keys() & open_to.keys()}
    assert len(ours) >= 4, "the tables are read"
    elsewhere = {owners[inode]: address for inode, address in ours.items() if address.split(":")[0] not in LOOPBACK}
    assert not elsewhere


def test_reserve_gang_concurrent_calls_get_separate_places(ray_cluster: Cluster) -> None:
    @ray.remote
    class Placed:
        def where(self) -> Any:
            found = ray.util.get_current_placement_group()
            return found.id.hex() if found else None

    async def story() -> list[list[Any]]:
        gangs = await asyncio.gather(*(ray_cluster.reserve_gang("pairs", 2, Resources(cpus=0.01)) for _ in range(3)))
        actors = [[Placed.options(**place).remote() for place in places] for places in gangs]  # type: ignore[attr-defined]
        try:
            async with asyncio.timeout(60):
                return [list(await asyncio.gather(*(one.where.remote() for one in pair))) for pair in actors]
        finally:
            for one in (one for pair in actors for one in pair):
                ray.kill(one)

    first, second, third = asyncio.run(story())
    assert [len(set(pair)) for pair in (first, second, third)] == [1, 1, 1], "a pair is together"
    assert len({first[0], second[0], third[0]}) == 3, "and apart from the others"


@pytest.mark.parametrize(
    ("store", "free", "said"),
    [
        (2.0, 64 / 1024, "has 0.06 GiB free, and a run here needs 2.5"),  # Docker's default
        (2.0, 2.4999, "--shm-size=3g, or --ipc=host"),
        (40.0, 8.0, "--shm-size=41g, or --ipc=host"),
        (2.0, 2.5, ""),
        (2.0, 64.0, ""),
    ],
)
def test_shared_memory_shortage_names_dockers_options(store: float, free: float, said: str) -> None:
    message = shared_memory_shortage(store, free)
    assert said in message and bool(said) == bool(message)


def test_connect_without_gpus_refuses_a_role_that_asks_for_one(ray_cluster: Cluster) -> None:
    """A Ray of this machine alone will never have one, so nobody waits for it."""
    alone = Cluster(ClusterConfig(wait_s=60), alone=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
        with pytest.raises(NoGPU, match=r"rollout.resources.gpus is 0.35, and Ray finds no GPU on this machine"):
            alone.declare("rollout", Resources(gpus=0.35))
        with pytest.raises(NoGPU, match=r"learner.resources.gpus is 1, and Ray finds no GPU on this machine"):
            asyncio.run(alone.reserve_gang("learner", 2, Resources(gpus=1)))
        alone.declare("reward", Resources())


# --- GPUs -------------------------------------------------------------------------------------------------------------

DECLARED = 8
"""GPUs that the tests' Ray believes in (``tests.conftest``)."""
GPU_RECIPES = {"panels-gpu": 1, "ergo-3b": 1, "ergo-7b": 4, "qwen3-vl-8b": 4, "ergo-7b-judge": 8}
"""Recipe -> the least number of GPUs on which it runs."""


async def placed(config: TrainConfig, gpus: int, folder: Path) -> list[tuple[str, list[int]]]:
    """The GPUs of each process of a recipe on a machine that has so many: the places are those of the real roles, a
    function stands in them that says what it sees."""
    cluster = Cluster(ClusterConfig(wait_s=30))

    @ray.remote
    def hold_place(folder: str, role: str) -> tuple[str, str]:
        """Keep a place until everybody has one. In here, so that its process does not import this module."""
        seen = os.environ.get("CUDA_VISIBLE_DEVICES", "all")
        Path(folder, f"{role}-{os.getpid()}-{time.monotonic_ns()}").touch()
        while not Path(folder, "go").exists():
            time.sleep(0.02)
        return role, seen

    others = placement_group([{"GPU": DECLARED - gpus}]) if gpus < DECLARED else None

    def little(resources: Resources) -> Resources:
        return replace(resources, cpus=0.01)

    if others is not None:
        await asyncio.to_thread(others.wait, 30)
    cluster.declare("rollout", little(config.rollout.resources))
    cluster.declare("reward", little(config.reward.resources))
    wanted = ["rollout"] * config.rollout.size.max + ["reward"] * config.reward.workers
    asked = [hold_place.options(**cluster.actor_options(role)).remote(str(folder), role) for role in wanted]
    ranks = await cluster.reserve_gang("learner", config.learner.ranks, little(config.learner.resources))
    asked += [hold_place.options(**place).remote(str(folder), "learner") for place in ranks]
    try:
        async with asyncio.timeout(60):
            while len(list(folder.iterdir())) < len(asked):
                await asyncio.sleep(0.02)
            (folder / "go").touch()
            answers = await asyncio.gather(*asked)
    finally:
        cluster.release("learner")
        if others is not None:
            remove_placement_group(others)
    return [(role, [int(device) for device in seen.split(",") if device]) for role, seen in answers]


@pytest.mark.parametrize("gpus", [1, 4, 8])
def test_roles_of_the_gpu_recipes_get_the_devices_of_their_plan(
    gpus: int, ray_cluster: Cluster, tmp_path: Path
) -> None:
    """Who asks for none sees none; nobody sees another's; on no device do engines ask for more memory than it has;
    roles that share are together, as ``ergo-rl plan`` says."""
    for name, least in GPU_RECIPES.items():
        if gpus < least:
            continue
        config = load_config(ROOT / "configs" / f"{name}.yaml")
        folder = tmp_path / name
        folder.mkdir()
        found = asyncio.run(placed(config, gpus, folder))
        engines = {"rollout": config.rollout.engine, "reward": config.reward.verifier.engine}
        asks = {"rollout": config.rollout, "reward": config.reward, "learner": config.learner}
        shares: dict[int, float] = defaultdict(float)
        roles: dict[int, list[str]] = defaultdict(list)
        for role, devices in found:
            assert len(devices) == math.ceil(asks[role].resources.gpus), f"{name}: {role} sees {devices}"
            for device in devices:
                roles[device].append(role)
                shares[device] += engines[role].gpu_memory_utilization if role in engines else 0.0
        assert len(roles) <= gpus and all(share <= 1 for share in shares.values()), f"{name}: {dict(shares)}"
        hardware = replace(config.hardware, nodes=1, gpus_per_node=gpus)
        plan = make_plan(replace(config, hardware=hardware))
        planned = [[process.role for process in there] for there in plan.gpus if there]
        assert sorted(map(sorted, roles.values())) == sorted(map(sorted, planned)), name
