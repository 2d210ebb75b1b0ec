"""Shared-memory transfers between real processes: Ray actors as learner ranks and as engines. What arrives, and what
happens when an engine or a rank does not survive it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import pytest
import ray
import torch

from ergo_rl.cluster import weight_sender
from ergo_rl.cluster.config import Transport
from ergo_rl.cluster.placement import Cluster
from ergo_rl.cluster.weight_buckets import Bucket, BucketSpec, map_file, pack, unpack
from ergo_rl.cluster.weight_sender import SendResult, WeightSender
from ergo_rl.cluster.weight_sync import WeightSyncFailed

PATIENT_S, SHORT_S = 60.0, 5.0

Received = dict[str, tuple[str, tuple[int, ...], bytes]]
"""Of one bucket, by name: type, shape and bytes."""


def tensors(seed: int) -> dict[str, torch.Tensor]:
    """Odd sizes, a scalar, an empty one, one that is not contiguous."""
    torch.manual_seed(seed)
    return {
        "mask": torch.rand(3) > 0.5,
        "half": torch.rand(5, 3).to(torch.float16),
        "rotary": torch.rand(7).to(torch.bfloat16),
        "double": torch.rand(1, dtype=torch.float64),
        "nothing": torch.zeros(0, 4),
        "weight": torch.rand(13, 11).T,
        "step": torch.tensor(seed),
        "bytes": torch.arange(1, 4, dtype=torch.uint8),
    }


def described(some: dict[str, torch.Tensor]) -> Received:
    return {
        name: (
            str(tensor.dtype), tuple(tensor.shape), bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())
        )
        for name, tensor in some.items()
    }  # fmt: skip


EXPECTED = [described(tensors(seed)) for seed in (1, 2)]


@ray.remote(num_cpus=0.01)
class Engine:
    """Has the methods of a rollout worker that a transfer calls. ``signal_itself``: after this many buckets."""

    async def begin(self, domain: str) -> None:
        """As if it had just started, in this memory."""
        self.domain, self.version = domain, -1
        self.received: list[Received] = []
        self.after, self.signal = -1, 0

    async def pid(self) -> int:
        return os.getpid()

    async def signal_itself(self, after: int, number: int) -> None:
        self.after, self.signal = after, number

    async def init_weight_transfer(self, transport: str, info: dict[str, Any], timeout_s: float) -> None:
        assert (transport, info) == ("shared_memory", {})

    async def start_weight_update(self, transfer: str) -> None:
        self.transfer, self.received = transfer, []

    async def update_weights(self, transfer: str, update: dict[str, Any]) -> None:
        assert transfer == self.transfer and update["transport"] == "shared_memory"
        spec, paths = BucketSpec(**update["payload"]["spec"]), update["payload"]["paths"]
        if self.domain not in paths:
            raise LookupError(f"no learner rank shares the memory of {self.domain}; ranks are on {', '.join(paths)}")
        self.received.append(described(dict(unpack(map_file(paths[self.domain], spec.bytes), spec))))
        if len(self.received) == self.after:
            os.kill(os.getpid(), self.signal)

    async def finish_weight_update(self, transfer: str, version: int) -> float:
        assert transfer == self.transfer
        self.version = version
        return 0.25

    async def state(self) -> tuple[int, list[Received]]:
        return self.version, self.received


@ray.remote(num_cpus=0.01)
class Rank:
    """A learner rank whose weights are ``tensors`` of 1, 2, ..."""

    def begin(self, rank: int, ranks: int, store: str, domain: str = "a") -> None:
        """As if it had just started."""
        self.rank, self.domain, self.buckets, self.gathered = rank, domain, 2, 0
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        if ranks > 1:
            torch.distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=ranks)

    def weights(self) -> Iterator[Bucket]:
        for seed in range(1, self.buckets + 1):
            self.gathered += 1
            yield pack(tensors(seed).items())

    def connect(self, engines: list[Any], timeout_s: float, buckets: int = 2) -> str:
        self.buckets = buckets
        with patch.object(weight_sender, "memory_domain", lambda: self.domain):
            try:
                self.sender = WeightSender.connect(
                    Transport.IPC,
                    engines,
                    1,
                    timeout_s,
                    self,
                    self.rank,
                    torch.device("cpu"),  # type: ignore[arg-type]
                )
            except WeightSyncFailed as error:
                return str(error)
        return ""

    def send(self, version: int) -> tuple[SendResult, float, int]:
        """Result, seconds and the number of buckets that were gathered."""
        started, self.gathered = time.monotonic(), 0
        result = self.sender.send(version)
        return result, time.monotonic() - started, self.gathered


@pytest.fixture(scope="module")
def actors(ray_cluster: Cluster) -> Iterator[dict[str, list[Any]]]:
    """Two engines and two ranks for all tests: a process takes seconds to start."""
    started = {"engines": [Engine.remote() for _ in range(2)], "ranks": [Rank.remote() for _ in range(2)]}  # type: ignore[attr-defined]
    yield started
    for actor in (*started["engines"], *started["ranks"]):
        ray.kill(actor)


def begin_engines(actors: dict[str, list[Any]], domains: str) -> list[Any]:
    """One that the last test killed is started anew."""
    for place, domain in enumerate(domains):
        try:
            ray.get(actors["engines"][place].begin.remote(domain), timeout=PATIENT_S)
        except ray.exceptions.RayActorError:
            actors["engines"][place] = Engine.remote()  # type: ignore[attr-defined]
            ray.get(actors["engines"][place].begin.remote(domain), timeout=PATIENT_S)
    return list(actors["engines"])


def begin_ranks(actors: dict[str, list[Any]], store: Any, domains: str) -> list[Any]:
    ranks = actors["ranks"][: len(domains)]
    begun = [
        rank.begin.remote(number, len(domains), str(store), domain)
        for number, (rank, domain) in enumerate(zip(ranks, domains, strict=True))
    ]
    ray.get(begun, timeout=PATIENT_S)
    return ranks


@pytest.fixture
def engines(actors: dict[str, list[Any]]) -> list[Any]:
    return begin_engines(actors, "aa")


@pytest.fixture
def learner(actors: dict[str, list[Any]]) -> Any:
    (rank,) = begin_ranks(actors, "", "a")
    return rank


def states(engines: list[Any]) -> Any:
    return ray.get([engine.state.remote() for engine in engines], timeout=PATIENT_S)


def test_send_delivers_every_bucket_bit_by_bit(engines: list[Any], learner: Any) -> None:
    assert ray.get(learner.connect.remote(engines, PATIENT_S)) == ""
    for version in (3, 4):
        result, _, _ = ray.get(learner.send.remote(version))
        assert result == SendResult("", 0.25)
        assert states(engines) == [(version, EXPECTED)] * 2


def test_send_with_killed_engine_fails_at_once_and_next_connection_works(engines: list[Any], learner: Any) -> None:
    survivor, victim = engines
    ray.get([victim.pid.remote(), learner.connect.remote(engines, PATIENT_S, 1000)])
    ray.get(victim.signal_itself.remote(3, signal.SIGKILL))
    result, seconds, gathered = ray.get(learner.send.remote(3))
    assert result.failure.startswith("update_weights of rollout worker 1: ") and "Died" in result.failure
    assert seconds < PATIENT_S / 2
    assert gathered == 1000, "the other ranks gather every bucket in any case"
    assert len(states([survivor])[0][1]) == 3
    ray.get(learner.connect.remote([survivor], PATIENT_S))
    assert ray.get(learner.send.remote(4))[0].failure == "" and states([survivor]) == [(4, EXPECTED)]


def test_send_with_hung_engine_fails_in_time_and_next_connection_works(engines: list[Any], learner: Any) -> None:
    _, victim = engines
    pid = ray.get(victim.pid.remote())
    ray.get(learner.connect.remote(engines, SHORT_S))
    ray.get(victim.signal_itself.remote(1, signal.SIGSTOP))
    result, seconds, gathered = ray.get(learner.send.remote(3))
    assert result.failure.startswith("update_weights of rollout worker 1: GetTimeoutError") and gathered == 2
    assert SHORT_S <= seconds < 4 * SHORT_S
    os.kill(pid, signal.SIGCONT)
    ray.get(victim.signal_itself.remote(-1, 0))
    ray.get(learner.connect.remote(engines, PATIENT_S))
    assert ray.get(learner.send.remote(4))[0].failure == "" and states(engines) == [(4, EXPECTED)] * 2


def test_connect_with_absent_engine_fails_in_time(engines: list[Any], learner: Any) -> None:
    absent = Engine.options(num_cpus=10_000).remote()  # type: ignore[attr-defined]
    started = time.monotonic()
    failure = ray.get(learner.connect.remote([*engines, absent], 3.0))
    assert failure.startswith("init_weight_transfer of rollout worker 2: GetTimeoutError")
    assert time.monotonic() - started < 20
    ray.kill(absent)


@pytest.mark.parametrize("domains", ["abab", "aaaa", "abbb"])
def test_send_with_two_ranks_reaches_engines_in_each_memory(
    domains: str, actors: dict[str, list[Any]], tmp_path: Any
) -> None:
    """Two ranks and two engines, as on two machines, and on one, where only the lower rank writes."""
    ranks, engines = begin_ranks(actors, tmp_path / "store", domains[:2]), begin_engines(actors, domains[2:])
    assert ray.get([rank.connect.remote(engines, PATIENT_S) for rank in ranks], timeout=PATIENT_S) == ["", ""]
    results = ray.get([rank.send.remote(5) for rank in ranks], timeout=PATIENT_S)
    assert [result.failure for result, _, _ in results] == ["", ""]
    assert states(engines) == [(5, EXPECTED)] * 2


def test_send_to_engine_in_foreign_memory_names_it_and_both_ranks_end(
    actors: dict[str, list[Any]], tmp_path: Any
) -> None:
    ranks, engines = begin_ranks(actors, tmp_path / "store", "aa"), begin_engines(actors, "ab")
    ray.get([rank.connect.remote(engines, PATIENT_S) for rank in ranks], timeout=PATIENT_S)
    (first, seconds, _), (other, _, gathered) = ray.get([rank.send.remote(5) for rank in ranks], timeout=PATIENT_S)
    assert "no learner rank shares the memory of b; ranks are on a" in first.failure and seconds < 20
    assert other.failure == "" and gathered == 2
