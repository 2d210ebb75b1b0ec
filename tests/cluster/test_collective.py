"""A sender and its receivers, each a real process, over gloo: what arrives, and what happens when one does not live to
see it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch

from cluster.buckets import Layout
from cluster.collective import Door, Group, GroupLost, flat_of, tensors_of

CPU = torch.device("cpu")
PATIENT_S, SHORT_S = 60.0, 5.0
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "torch.distributed"])  # imported once for all of them

Found = list[dict[str, tuple[str, tuple[int, ...], bytes]]]
"""Of each bucket, by name: type, shape and bytes."""


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


def layout_of(some: dict[str, torch.Tensor]) -> Layout:
    return Layout.of((name, one.dtype, one.shape) for name, one in some.items())


def described(some: dict[str, torch.Tensor]) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {
        name: (str(one.dtype), tuple(one.shape), bytes(one.contiguous().reshape(-1).view(torch.uint8).tolist()))
        for name, one in some.items()
    }


def work(pipe: Connection) -> None:
    """A process that does what it is told: open a place to meet, or meet there and send or receive buckets. It says
    what it holds then, or why it lost the group and after how many seconds of waiting."""
    door: Any = None
    pipe.send("ready")
    while True:
        limit_s, *rest = pipe.recv()
        if not rest:
            door = Door("127.0.0.1", limit_s)
            pipe.send((door.address, door.port))
            continue
        place, rank, world, buckets, end = rest
        found, started = [], time.monotonic()
        try:
            group = Group(*place, rank, world, CPU, limit_s, None if rank else door)
            for seed in range(1, buckets + 1):
                layout = layout_of(tensors(seed))
                flat = torch.empty(layout.bytes, dtype=torch.uint8) if rank else flat_of(tensors(seed).items(), layout)
                started = time.monotonic()
                group.broadcast(flat)
                found.append(described(dict(tensors_of(flat, layout))))
                if end:
                    os.kill(os.getpid(), end)
            group.close()
            pipe.send(found)
        except GroupLost as error:
            pipe.send((str(error), time.monotonic() - started))


class Member:
    def __init__(self) -> None:
        self.pipe, its = multiprocessing.Pipe()
        self.process = CONTEXT.Process(target=work, args=(its,), daemon=True)
        self.process.start()

    def answer(self) -> Any:
        assert self.pipe.poll(PATIENT_S), "it hangs"
        return self.pipe.recv()


@pytest.fixture(scope="module")
def members() -> Iterator[list[Member]]:
    """A sender and three receivers."""
    started = [Member() for _ in range(4)]
    for one in started:
        assert one.answer() == "ready"
    yield started
    for one in started:
        one.process.kill()
        one.process.join()


def meet(members: list[Member], limit_s: float, buckets: int, world: int = 0, end: int = 0) -> None:
    """A new generation, the first member its sender; ``end``: of the last one, behind the first bucket."""
    members[0].pipe.send((limit_s,))
    place = members[0].answer()
    for rank, one in enumerate(members):
        last = one is members[-1]
        one.pipe.send((limit_s, place, rank, world or len(members), buckets, end if last else 0))


def test_all_receivers_get_what_was_sent_bit_by_bit(members: list[Member]) -> None:
    meet(members[:3], PATIENT_S, buckets=2)
    assert [one.answer() for one in members[:3]] == [[described(tensors(seed)) for seed in (1, 2)]] * 3


def test_a_killed_receiver_is_noticed_and_the_next_group_works(members: list[Member]) -> None:
    """By its connection: long before the time limit. Small buckets: some are under way before it is seen."""
    sender, survivor, other, victim = members
    meet([sender, survivor, victim], PATIENT_S, buckets=1000, end=signal.SIGKILL)
    for one in (sender, survivor):
        why, seconds = one.answer()
        assert why.startswith("the group broke in a broadcast: ") and seconds < PATIENT_S / 2
    meet([sender, survivor, other], PATIENT_S, buckets=1)
    assert [one.answer() for one in (sender, survivor, other)] == [[described(tensors(1))]] * 3


def test_a_receiver_that_hangs_is_given_up_in_time_and_the_next_group_works(members: list[Member]) -> None:
    sender, survivor, victim, _ = members
    meet([sender, survivor, victim], SHORT_S, buckets=1000, end=signal.SIGSTOP)
    for one in (sender, survivor):
        why, seconds = one.answer()
        assert why.startswith("the group broke in a broadcast: ") and seconds < 4 * SHORT_S
    os.kill(victim.process.pid or 0, signal.SIGCONT)
    for _ in range(1000):  # it stops behind every bucket that had reached it
        if victim.pipe.poll(0.05):
            break
        os.kill(victim.process.pid or 0, signal.SIGCONT)
    assert "the group broke" in victim.answer()[0]
    meet([sender, survivor, victim], PATIENT_S, buckets=1)
    assert [one.answer() for one in (sender, survivor, victim)] == [[described(tensors(1))]] * 3


def test_who_does_not_come_is_not_waited_for(members: list[Member]) -> None:
    meet(members[:2], 1.0, buckets=1, world=3)
    for one in members[:2]:
        why, seconds = one.answer()
        assert why.startswith("the group broke while it met: ") and seconds < 20


def test_a_layout_by_hand() -> None:
    """The widest first, so that each begins at a multiple of its width: 8 + 3 x 2 + 1 bytes."""
    some = {"a": torch.zeros(1, dtype=torch.uint8), "b": torch.zeros(3, dtype=torch.bfloat16), "c": torch.tensor(5)}
    layout = layout_of(some)
    assert layout == Layout(("c", "b", "a"), ("int64", "bfloat16", "uint8"), ((), (3,), (1,)), (8, 6, 1))
    assert flat_of(some.items(), layout).tolist() == [5] + [0] * 14 and layout.bytes == 15
    with pytest.raises(ValueError, match="without weights"):
        Layout.of([])
