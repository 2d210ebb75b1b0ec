"""Connect to Ray and place the actors of each role. Knows resources, not what is done with them."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.autoscaler.sdk import request_resources
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ergo_rl.cluster.compat import bind_ray_localhost, has_autoscaler, keep_sigterm_handler, start_ray_in_own_session
from ergo_rl.cluster.config import ClusterConfig, Resources
from ergo_rl.cluster.devices import NO_GPU, NoGPU

logger = logging.getLogger(__name__)

_POLL_S, _LOG_EVERY_S = 1.0, 10.0
_SHARED_MEMORY = Path("/dev/shm")
_ENGINES_GIB = 0.5
"""Shared memory that engines take beside Ray's store: vLLM's queue to the workers of one engine (10 x 16 MiB), and two
weight buckets of a small model."""


@dataclass
class Cluster:
    """A connection to Ray, and the gangs (all or nothing) reserved on it."""

    config: ClusterConfig
    alone: bool = False
    """Ray was started here for this machine alone: it will never have more than it has now."""
    shortage: str = ""
    """What is wrong with the machine's shared memory."""
    _gangs: dict[str, PlacementGroup] = field(default_factory=dict)
    _resources: dict[str, Resources] = field(default_factory=dict)
    _reserved: list[PlacementGroup] = field(default_factory=list)
    _hinted: dict[str, int] = field(default_factory=dict)

    @classmethod
    @contextmanager
    def connect(cls, config: ClusterConfig) -> Iterator[Cluster]:
        """Join or start Ray; on exit, release what was reserved and stop a Ray that was started here.

        Raises ConnectionError if the address does not answer or Ray does not start."""
        joined_already, local, shortage = ray.is_initialized(), False, ""
        if not joined_already:
            local = config.address is None and "RAY_ADDRESS" not in os.environ
            started_here: dict[str, Any] = {
                "num_cpus": max(os.cpu_count() or 1, 2),
                "object_store_memory": int(config.object_store_gib * 2**30),
                "include_dashboard": False,
                "_metrics_export_port": config.metrics_port or None,
            }
            if local and _SHARED_MEMORY.is_dir():
                free_gib = shutil.disk_usage(_SHARED_MEMORY).free / 2**30
                if shortage := shared_memory_shortage(config.object_store_gib, free_gib):
                    logger.warning(shortage)
            if local:
                start_ray_in_own_session()
            if local and config.local_only:
                bind_ray_localhost()
            try:
                with keep_sigterm_handler():
                    ray.init(
                        # Not None: it would join whatever cluster a file in Ray's temp folder names, also a dead one.
                        address="local" if local else config.address,
                        namespace=config.namespace,
                        log_to_driver=config.log_to_driver,
                        logging_level=logging.ERROR,
                        **(started_here if local else {}),
                    )
            except Exception as error:  # a bare Exception where Ray's own processes do not come up in its 30 s
                raise ConnectionError(f"Ray did not start, or could not be joined: {error}") from error
        cluster = cls(config, local and config.local_only, shortage)
        try:
            yield cluster
        finally:
            for gang in cluster._reserved:
                remove_placement_group(gang)
            if cluster._hinted and has_autoscaler():
                request_resources(bundles=[])
            if not joined_already:
                ray.shutdown()

    def declare(self, role: str, resources: Resources) -> None:
        """Set what each actor of ``role`` asks for; they are placed one by one, because workers may come and go. Raises
        NoGPU."""
        self._check_gpus(role, resources)
        self._resources[role] = resources

    async def reserve_gang(self, role: str, count: int, resources: Resources) -> list[dict[str, Any]]:
        """Reserve ``count`` places for ``role`` together: all of them or none. Does not block the event loop, which may
        reserve others for the same role meanwhile. Returns keyword arguments of ``ActorClass.options`` per place.

        Raises TimeoutError with the numbers if the cluster does not offer them within ``wait_s``, NoGPU if it never
        will."""
        self._check_gpus(role, resources)
        bundle = _bundle(resources)
        gang = placement_group([bundle] * count, strategy="PACK")
        self._reserved.append(gang)
        started = said = time.monotonic()
        while not await asyncio.to_thread(gang.wait, min(_POLL_S, self.config.wait_s)):
            message = f"{count} x {bundle} for role {role!r}; free now: {self.free()}"
            if (now := time.monotonic()) > started + self.config.wait_s:
                raise TimeoutError(
                    f"the cluster did not offer {message} within {self.config.wait_s:.0f} s (cluster.wait_s)"
                )
            if now > said + _LOG_EVERY_S:
                said = now
                logger.warning("waiting for %s", message)
        self._gangs[role] = gang
        strategies = [
            PlacementGroupSchedulingStrategy(gang, placement_group_bundle_index=place) for place in range(count)
        ]
        return [_asking(resources) | {"scheduling_strategy": strategy} for strategy in strategies]

    def _check_gpus(self, role: str, resources: Resources) -> None:
        if self.alone and resources.gpus and not ray.cluster_resources().get("GPU"):
            raise NoGPU(
                f"{role}.resources.gpus is {resources.gpus:g}, and Ray finds no GPU on this machine. See what "
                "nvidia-smi says; a recipe without GPUs: configs/panels.yaml"
            )

    def hint_autoscaler(self, role: str, count: int) -> None:
        """Ask Ray's autoscaler, if there is one, for room for ``count`` actors of ``role`` at once instead of waiting
        for demand, and to keep it. Without an autoscaler an actor simply waits for its place."""
        self._hinted[role] = count
        if has_autoscaler():
            bundles = [_bundle(self._resources[role]) for role, number in self._hinted.items() for _ in range(number)]
            bundles += [dict(bundle) for gang in self._reserved for bundle in gang.bundle_specs]
            request_resources(bundles=bundles)

    def release(self, role: str) -> None:
        """Release what ``role`` reserved last, so that it can be reserved anew; actors that still run there are
        killed."""
        if (gang := self._gangs.pop(role, None)) is not None:
            self._reserved.remove(gang)
            remove_placement_group(gang)

    def actor_options(self, role: str) -> dict[str, Any]:
        """Return keyword arguments of ``ActorClass.options`` for an actor of a declared role."""
        return _asking(self._resources[role])

    @staticmethod
    def free() -> dict[str, float]:
        """Return Ray's free CPUs and GPUs."""
        available = ray.available_resources()
        return {name: round(available.get(name, 0.0), 2) for name in ("CPU", "GPU")}


def shared_memory_shortage(object_store_gib: float, free_gib: float) -> str:
    """Say that shared memory is too small for an object store of this size and for engines; empty where it is not."""
    needed = object_store_gib + _ENGINES_GIB
    if free_gib >= needed:
        return ""
    return (
        f"{_SHARED_MEMORY} has {free_gib:.2f} GiB free, and a run here needs {needed:g}: {object_store_gib:g} for "
        f"Ray's object store (cluster.object_store_gib), {_ENGINES_GIB:g} for engines and weights. Without it "
        "Ray uses files on a disk, which is slow, and engines may fail. In Docker: "
        f"--shm-size={math.ceil(needed)}g, or --ipc=host"
    )


def _bundle(resources: Resources) -> dict[str, float]:
    return {"CPU": resources.cpus} | ({"GPU": resources.gpus} if resources.gpus else {})


def _asking(resources: Resources) -> dict[str, Any]:
    asking: dict[str, Any] = {"num_cpus": resources.cpus, "num_gpus": resources.gpus}
    if not resources.gpus:
        # Ray leaves all GPUs of the machine visible to an actor that asks for none (ray #54868), and vLLM and torch
        # take the first one, beside the role that it was given to. Ray's switch against it must be set on every node.
        asking["runtime_env"] = {"env_vars": NO_GPU}
    return asking
