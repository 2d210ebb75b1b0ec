"""Buckets from a learner to the worker processes of engines: a group of its own, beside whatever groups its members are
in, and one of two lines between them.

``Collective``: torch's NCCL group on GPUs and its gloo group on CPUs, made as vLLM makes its stateless groups
(``vllm.distributed.utils``), without the global one that a process can have only once, and with one code for both: so
what runs on GPUs is tested on CPUs. The sender needs no vLLM for it (7 s of imports in every learner). NCCL has not
been run by this project. ``Lending``: from memory to memory on one machine.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from ergo_rl.cluster.buckets import Layout, parts_of
from ergo_rl.cluster.lending import Lending
from ergo_rl.cluster.meeting import Meeting


class GroupLost(RuntimeError):
    """A member is gone or too slow. What was being sent has reached some or none, and the group is of no more use."""


class Door:
    """Where a group will meet: a store that the sender opens at ``address``, at a free port, and nowhere else."""

    def __init__(self, address: str, timeout_s: float) -> None:
        listener = socket.create_server((address, 0))
        self.address, self.port = address, int(listener.getsockname()[1])
        self.store = TCPStore(
            address,
            self.port,
            is_master=True,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )


class Line(Protocol):
    """How bytes get from the senders to everybody else. Whatever goes wrong is a RuntimeError or an OSError."""

    def send(self, parts: Sequence[Tensor]) -> None: ...

    def receive(self, size: int) -> Tensor: ...

    def close(self) -> None: ...


class Group:
    """One generation of the group, and this process as ``rank`` of it. The constructor returns when a first byte has
    come from the senders to everybody.

    Raises GroupLost where somebody has not come in time."""

    def __init__(self, meeting: Meeting, rank: int, device: torch.device, door: Door | None = None) -> None:
        """device: where weights are; door: of rank 0."""
        timeout = timedelta(seconds=meeting.timeout_s)
        self._line: Line | None = None
        keep_local(meeting.address)
        with self._lost("while it met"):
            store = (
                door.store if door else TCPStore(meeting.address, meeting.port, timeout=timeout, wait_for_workers=False)
            )
            # All must be here before NCCL begins, which would wait for ever for who does not come.
            store.set(f"here/{rank}", "1")
            store.wait([f"here/{one}" for one in range(meeting.world)], timeout)
            ours = PrefixStore("group", store)
            self._line = (Lending if meeting.ipc else Collective)(ours, meeting, rank, device)
        if rank < meeting.senders:
            self._send([torch.zeros(1, dtype=torch.uint8, device=device)])
        else:
            self.receive(1)

    def send(self, weights: Iterable[tuple[str, Tensor]], layout: Layout) -> None:
        """A bucket, to everybody who is no sender; all senders have the same. It may change when this returns.

        Raises GroupLost, after the time limit at the latest; the group is closed, so that the others learn of it."""
        self._send(parts_of(dict(weights), layout))

    def receive(self, size: int) -> Tensor:
        """uint8[size]: the next bucket, on the group's device. Raises GroupLost, as ``send`` does."""
        with self._lost("while weights were sent"):
            return self._open.receive(size)

    def close(self) -> None:
        """The others' part in what goes on ends with GroupLost."""
        if self._line is not None:
            self._line.close()
        self._line = None

    def _send(self, parts: Sequence[Tensor]) -> None:
        with self._lost("while weights were sent"):
            self._open.send(parts)

    @property
    def _open(self) -> Line:
        if self._line is None:
            raise RuntimeError("it is closed")
        return self._line

    @contextmanager
    def _lost(self, where: str) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, OSError) as error:  # torch's own: a peer's end, a time limit; a file that is gone
            self.close()
            raise GroupLost(f"the group broke {where}: {str(error)[:300]}") from error
        except Exception:
            self.close()  # nobody is to wait for a member that is wrong
            raise


class Collective:
    """Rank 0 broadcasts: gloo on CPUs, NCCL on GPUs."""

    def __init__(self, store: Store, meeting: Meeting, rank: int, device: torch.device) -> None:
        self._device, self._timeout = device, timedelta(seconds=meeting.timeout_s)
        self._group = _backend(store, rank, meeting.world, device, self._timeout)

    def send(self, parts: Sequence[Tensor]) -> None:
        self._broadcast(parts[0] if len(parts) == 1 else torch.cat(list(parts)))

    def receive(self, size: int) -> Tensor:
        flat = torch.empty(size, dtype=torch.uint8, device=self._device)
        self._broadcast(flat)
        return flat

    def close(self) -> None:
        self._group.abort()

    def _broadcast(self, flat: Tensor) -> None:
        options = torch.distributed.BroadcastOptions()
        options.rootRank, options.rootTensor, options.timeout = 0, 0, self._timeout
        self._group.broadcast([flat], options).wait(self._timeout)
        if self._device.type == "cuda":
            torch.cuda.synchronize()


def keep_local(address: str) -> None:
    """Where all members are on this machine, gloo needs to be reached by nobody else."""
    if address == "127.0.0.1" and Path("/sys/class/net/lo").exists():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def _backend(store: Store, rank: int, world: int, device: torch.device, timeout: timedelta) -> Any:
    from torch.distributed import distributed_c10d as c10d

    if device.type == "cpu":
        return c10d.ProcessGroupGloo(store, rank, world, timeout)
    options: Any = c10d.ProcessGroupNCCL.Options()
    options._timeout = timeout
    # Read when a group is made. With it a wait raises at the time limit; without it torch ends the process.
    before = os.environ.get(_BLOCKING)
    os.environ[_BLOCKING] = "1"
    try:
        return c10d.ProcessGroupNCCL(store, rank, world, options)
    finally:
        if before is None:
            del os.environ[_BLOCKING]
        else:
            os.environ[_BLOCKING] = before


_BLOCKING = "TORCH_NCCL_BLOCKING_WAIT"
