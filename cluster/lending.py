"""Weights from memory to memory on one machine: a learner rank lends what it has gathered, and the engines' worker
processes beside it take it from there.

On a GPU that both share it is CUDA IPC: one array per bucket on the device, whose handle the others open and copy from,
without a byte through main memory. **This half has not been run by this project.** On CPUs it is a file in memory
(``cluster.shared_memory``) that the others map: the only copy is the one into it. Who has whose memory at hand is found
out when they meet: a GPU by its UUID, a CPU by the kernel that runs there. With several learner ranks each one lends to
its own neighbours, the lowest where two are at the same place.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._distributed_c10d import Store

from ergo_rl.cluster.meeting import Meeting
from ergo_rl.cluster.shared_memory import SharedFiles, mapped

LOOK_S = 0.5
"""Who waits for others looks so often whether they live."""


class Neighbour(NamedTuple):
    rank: int
    place: str
    pid: int


class Lending:
    """Raises RuntimeError, in every process of the group, where one that needs weights has nobody to take them from."""

    def __init__(self, store: Store, meeting: Meeting, rank: int, device: torch.device) -> None:
        self._store, self._rank, self._timeout_s, self._device = store, rank, meeting.timeout_s, device
        self._count, self._files = 0, SharedFiles()
        here = place_of(device)
        store.set(f"place/{rank}", json.dumps([here, os.getpid()]))
        everybody = [Neighbour(one, *json.loads(store.get(f"place/{one}").decode())) for one in range(meeting.world)]
        senders, takers = everybody[: meeting.senders], everybody[meeting.senders :]
        lenders: dict[str, Neighbour] = {}
        for sender in senders:
            lenders.setdefault(sender.place, sender)
        if alone := [taker for taker in takers if taker.place not in lenders]:
            raise RuntimeError(
                f"no learner rank shares the memory of {alone[0].place}, where an engine is; ranks are on "
                f"{', '.join(lenders)}"
            )
        self._lender = lenders.get(here)
        self._takers = [taker for taker in takers if taker.place == here]

    def send(self, parts: Sequence[Tensor]) -> None:
        """Returns when all neighbours have what they need; then ``parts`` may change. Raises RuntimeError."""
        self._count += 1
        if self._lender is None or self._lender.rank != self._rank or not self._takers:
            return
        with self._lent(parts) as handle:
            self._store.set(self._key("lent"), json.dumps(handle))
            self._wait([self._key("taken", taker.rank) for taker in self._takers], self._takers)

    def receive(self, size: int) -> Tensor:
        """uint8[size] on this process's device. On a CPU it is the lender's memory, which stays as it is for as long as
        anything of it is in use. Raises RuntimeError, OSError."""
        self._count += 1
        assert self._lender is not None, "looked at when they met"
        key = self._key("lent", self._lender.rank)
        self._wait([key], [self._lender])
        handle = json.loads(self._store.get(key).decode())
        flat = mapped(handle, size) if isinstance(handle, str) else copied(handle, size, self._device)
        self._store.set(self._key("taken"), "")
        return flat

    def close(self) -> None:
        """The others' part ends, too."""
        with suppress(RuntimeError):  # the store went with its process, which they notice
            self._store.set("closed", "")
        self._files.close()

    def _key(self, what: str, rank: int | None = None) -> str:
        return f"{what}/{self._count}/{self._rank if rank is None else rank}"

    @contextmanager
    def _lent(self, parts: Sequence[Tensor]) -> Iterator[Any]:
        if self._device.type == "cpu":
            file = self._files.lend([part.numpy() for part in parts])
            try:
                yield str(file.path)
            finally:
                self._files.give_back(file)
        else:
            flat = torch.cat(list(parts))
            torch.cuda.synchronize(self._device)
            try:
                yield handle_of(flat)
            finally:
                del flat
                torch.cuda.ipc_collect()  # what the others have closed is kept until somebody looks

    def _wait(self, keys: list[str], others: Sequence[Neighbour]) -> None:
        ends = time.monotonic() + self._timeout_s
        while not wait(self._store, keys, min(LOOK_S, self._timeout_s)):
            if self._store.check(["closed"]):
                raise RuntimeError("somebody has left it")
            if dead := [other for other in others if not alive(other.pid)]:
                raise RuntimeError(f"rank {dead[0].rank} is dead (process {dead[0].pid})")
            if time.monotonic() >= ends:
                raise RuntimeError(f"{self._timeout_s:g} s without {', '.join(f'rank {one.rank}' for one in others)}")


def wait(store: Store, keys: list[str], seconds: float) -> bool:
    """Whether they all came to be within that time. Raises RuntimeError when the store is gone."""
    try:
        store.wait(keys, timedelta(seconds=seconds))
    except torch.distributed.DistStoreError:
        return False
    return True


def place_of(device: torch.device) -> str:
    """Those at the same place can open each other's memory. A CPU: kernel and process namespace, by which a file of
    another process has its name."""
    if device.type != "cpu":
        return f"GPU {torch.cuda.get_device_properties(device).uuid}"
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except FileNotFoundError:
        return os.uname().nodename


def alive(pid: int) -> bool:
    """Of this machine. One that ended and was not waited for is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return not Path("/proc/self").exists()


Handle = dict[str, int | bool | str]
_BYTES = ("memory", "counter", "event")
_FIELDS = ("memory", "bytes", "start", "counter", "counter_start", "event", "waits")
"""What torch says of a storage of a GPU to a process that is to open it; bytes as hexadecimal digits. Nothing here is
pickled: who reaches the store can spoil weights, and do no more."""


def handle_of(flat: Tensor) -> Handle:
    """Of uint8[bytes] on a GPU."""
    from torch.multiprocessing.reductions import reduce_tensor

    reduced: Callable[[Tensor], Any] = reduce_tensor
    _, arguments = reduced(flat)
    values = (*arguments[7:10], *arguments[11:15])
    return {name: value.hex() if name in _BYTES else value for name, value in zip(_FIELDS, values, strict=True)}


def copied(handle: Handle, size: int, device: torch.device) -> Tensor:
    """uint8[size]: a copy of what the handle stands for, which is closed again."""
    from torch.multiprocessing.reductions import rebuild_cuda_tensor

    rebuilt: Callable[..., Tensor] = rebuild_cuda_tensor
    opened = {name: bytes.fromhex(str(handle[name])) if name in _BYTES else handle[name] for name in _FIELDS}
    memory, length, start, *rest = opened.values()
    theirs = rebuilt(
        Tensor, torch.Size([size]), (1,), 0, torch.storage.TypedStorage, torch.uint8, device.index, memory, length,
        start, False, *rest,
    )  # fmt: skip
    ours = theirs.clone()
    torch.cuda.synchronize(device)
    return ours
