"""Connect to Ray and decide where each role runs. Knows resources, not what is done with them."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.autoscaler.sdk import request_resources
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ergo_rl.cluster.compat import has_autoscaler, keep_ray_local
from ergo_rl.cluster.config import ClusterConfig, Resources

logger = logging.getLogger(__name__)

_LOOK_EVERY_S, _SAY_EVERY_S = 1.0, 10.0


@dataclass
class Cluster:
    """A connection to Ray, and the gangs (all or nothing) that were reserved on it."""

    config: ClusterConfig
    _gangs: dict[str, PlacementGroup] = field(default_factory=dict)
    _resources: dict[str, Resources] = field(default_factory=dict)
    _reserved: list[PlacementGroup] = field(default_factory=list)
    _expected: dict[str, int] = field(default_factory=dict)

    @classmethod
    @contextmanager
    def connect(cls, config: ClusterConfig) -> Iterator[Cluster]:
        """Join or start Ray; on leaving, give back what was reserved and stop a Ray that was started here.

        Raises ConnectionError where the address does not answer or Ray does not start."""
        joined_already = ray.is_initialized()
        if not joined_already:
            local = config.address is None and "RAY_ADDRESS" not in os.environ
            started_here: dict[str, Any] = {
                "num_cpus": max(os.cpu_count() or 1, 2),
                "object_store_memory": int(config.object_store_gib * 2**30),
                "include_dashboard": False,
                "_metrics_export_port": config.metrics_port or None,
            }
            if local and config.local_only:
                keep_ray_local()
            try:
                ray.init(
                    # Not None: it would join whatever cluster a file in Ray's temp folder names, also one that is gone.
                    address="local" if local else config.address,
                    namespace=config.namespace,
                    log_to_driver=config.log_to_driver,
                    logging_level=logging.ERROR,
                    **(started_here if local else {}),
                )
            except Exception as error:  # a bare Exception where Ray's own processes do not come up in its 30 s
                raise ConnectionError(f"Ray did not start, or could not be joined: {error}") from error
        cluster = cls(config)
        try:
            yield cluster
        finally:
            for gang in cluster._reserved:
                remove_placement_group(gang)
            if cluster._expected and has_autoscaler():
                request_resources(bundles=[])
            if not joined_already:
                ray.shutdown()

    def request(self, role: str, resources: Resources) -> None:
        """Actors of ``role`` each ask for these resources, one by one (workers that may come and go)."""
        self._resources[role] = resources

    async def reserve(self, role: str, count: int, resources: Resources) -> list[dict[str, Any]]:
        """Reserve ``count`` places for ``role`` together: all of them or none. The event loop goes on meanwhile, and
        may reserve others for the same role. Returns what ``ActorClass.options(**...)`` takes, for each place.

        Raises TimeoutError with the numbers when the cluster cannot hold them within ``wait_s``."""
        bundle = _bundle(resources)
        gang = placement_group([bundle] * count, strategy="PACK")
        self._reserved.append(gang)
        started = said = time.monotonic()
        while not await asyncio.to_thread(gang.wait, min(_LOOK_EVERY_S, self.config.wait_s)):
            message = f"{count} x {bundle} for role {role!r}; free now: {self.free()}"
            if (now := time.monotonic()) > started + self.config.wait_s:
                raise TimeoutError(
                    f"the cluster did not offer {message} within {self.config.wait_s:.0f} s (cluster.wait_s)"
                )
            if now > said + _SAY_EVERY_S:
                said = now
                logger.warning("waiting for %s", message)
        self._gangs[role] = gang
        strategies = [
            PlacementGroupSchedulingStrategy(gang, placement_group_bundle_index=place) for place in range(count)
        ]
        return [_asking(resources) | {"scheduling_strategy": strategy} for strategy in strategies]

    def expect(self, role: str, count: int) -> None:
        """Ray's autoscaler, where there is one, brings machines for ``count`` actors of ``role``, and keeps them,
        without its usual patience. Without one an actor simply waits for its place."""
        self._expected[role] = count
        if has_autoscaler():
            places = [_bundle(self._resources[one]) for one, number in self._expected.items() for _ in range(number)]
            request_resources(bundles=places + [dict(one) for gang in self._reserved for one in gang.bundle_specs])

    def give_back(self, role: str) -> None:
        """What ``role`` reserved last, so that it can be reserved anew; whoever still runs there is killed."""
        if (gang := self._gangs.pop(role, None)) is not None:
            self._reserved.remove(gang)
            remove_placement_group(gang)

    def actor_options(self, role: str) -> dict[str, Any]:
        """What ``ActorClass.options(**...)`` takes for an actor of a role that was asked for with ``request``."""
        return _asking(self._resources[role])

    @staticmethod
    def free() -> dict[str, float]:
        """What Ray has free now: CPU, GPU."""
        available = ray.available_resources()
        return {name: round(available.get(name, 0.0), 2) for name in ("CPU", "GPU")}


def _bundle(resources: Resources) -> dict[str, float]:
    return {"CPU": resources.cpus} | ({"GPU": resources.gpus} if resources.gpus else {})


def _asking(resources: Resources) -> dict[str, Any]:
    return {"num_cpus": resources.cpus, "num_gpus": resources.gpus}
