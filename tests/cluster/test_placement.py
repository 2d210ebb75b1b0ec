"""What listens, and for whom."""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray

from benchmarks.lives import descendants
from ergo_rl.cluster.config import Resources
from ergo_rl.cluster.placement import Cluster

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
