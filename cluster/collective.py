"""One broadcast to many processes: a process group of its own, beside whatever groups its members are in.

torch's NCCL group on GPUs and its gloo group on CPUs, made as vLLM makes its stateless groups
(``vllm.distributed.utils``), without the global one that a process can have only once, and with one code for both: so
what runs on GPUs is tested on CPUs. The sender needs no vLLM for it (7 s of imports in every learner). NCCL has not
been run by this project.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, TCPStore

from cluster.buckets import Layout

SENDER = 0
"""The rank whose bytes the others get."""


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


class Group:
    """One generation of the group; ``rank`` of ``world`` processes. The constructor returns when a first byte has come
    from the sender to everybody.

    Raises GroupLost where somebody has not come within ``timeout_s``."""

    def __init__(
        self, address: str, port: int, rank: int, world: int, device: torch.device, timeout_s: float, door: Door | None
    ) -> None:
        self._timeout, self._device = timedelta(seconds=timeout_s), device
        self._group: Any = None
        keep_local(address)
        with self._lost("while it met"):
            store = door.store if door else TCPStore(address, port, timeout=self._timeout, wait_for_workers=False)
            # All must be here before NCCL begins, which would wait for ever for who does not come.
            store.set(f"here/{rank}", "1")
            store.wait([f"here/{one}" for one in range(world)], self._timeout)
            self._store, self._group = store, _backend(PrefixStore("group", store), rank, world, device, self._timeout)
        self.broadcast(torch.zeros(1, dtype=torch.uint8, device=device))

    def broadcast(self, flat: Tensor) -> None:
        """The sender's uint8[bytes] arrive in everybody's, which has the same length and lies on the group's device.

        Raises GroupLost, after ``timeout_s`` at the latest; the group is closed, so that the others learn of it."""
        options = torch.distributed.BroadcastOptions()
        options.rootRank, options.rootTensor, options.timeout = SENDER, 0, self._timeout
        with self._lost("in a broadcast"):
            if self._group is None:
                raise RuntimeError("it is closed")
            self._group.broadcast([flat], options).wait(self._timeout)
            if self._device.type == "cuda":
                torch.cuda.synchronize()

    def close(self) -> None:
        """The others' part in a broadcast that goes on ends with GroupLost."""
        if self._group is not None:
            self._group.abort()
        self._group = None

    @contextmanager
    def _lost(self, where: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # all of torch's own: a peer's end, a time limit, a store that is gone
            self.close()
            raise GroupLost(f"the group broke {where}: {str(error)[:300]}") from error


def flat_of(tensors: Iterable[tuple[str, Tensor]], layout: Layout) -> Tensor:
    """uint8[bytes]: the tensors one after the other as ``layout`` says, on their own device."""
    by_name = dict(tensors)
    parts = [by_name[name].detach().contiguous().reshape(-1).view(torch.uint8) for name in layout.names]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def tensors_of(flat: Tensor, layout: Layout) -> Iterator[tuple[str, Tensor]]:
    """The reverse. The tensors share the memory of ``flat``."""
    start = 0
    for name, dtype, shape, size in zip(layout.names, layout.dtypes, layout.shapes, layout.sizes, strict=True):
        yield name, flat[start : start + size].view(getattr(torch, dtype)).view(tuple(shape))
        start += size


def keep_local(address: str) -> None:
    """Where all members are on this machine, gloo needs to be reached by nobody else."""
    if address == "127.0.0.1" and Path("/sys/class/net/lo").exists():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def _backend(store: PrefixStore, rank: int, world: int, device: torch.device, timeout: timedelta) -> Any:
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
