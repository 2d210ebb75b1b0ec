"""Senders and receivers, each a real process, over gloo and over shared memory: what arrives, and what happens when one
does not live to see it."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch

from ergo_rl.cluster import lending
from ergo_rl.cluster.buckets import Layout, parts_of, tensors_of
from ergo_rl.cluster.collective import Door, Group, GroupLost
from ergo_rl.cluster.meeting import Meeting

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
        what = pipe.recv()
        if isinstance(what, float):
            door = Door("127.0.0.1", what)
            pipe.send((door.address, door.port))
            continue
        meeting, rank, buckets, end, place = what
        if place:
            lending.place_of = lambda _, place=place: place
        found, started = [], time.monotonic()
        try:
            group = Group(meeting, rank, CPU, None if rank else door)
            for seed in range(1, buckets + 1):
                layout = layout_of(tensors(seed))
                started = time.monotonic()
                if rank < meeting.senders:
                    group.send(tensors(seed).items(), layout)
                    found.append(described(tensors(seed)))
                else:
                    found.append(described(dict(tensors_of(group.receive(layout.bytes), layout))))
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
    """One that opens the door and three others."""
    started = [Member() for _ in range(4)]
    for one in started:
        assert one.answer() == "ready"
    yield started
    for one in started:
        one.process.kill()
        one.process.join()


def meet(
    members: list[Member],
    limit_s: float,
    buckets: int,
    ipc: bool = False,
    world: int = 0,
    end: int = 0,
    places: str = "",
    senders: int = 1,
) -> None:
    """A new generation, the first ones its senders; ``end``: of the last one, behind the first bucket; places: a letter
    for each member, as whose neighbour it passes; its own where there is none."""
    members[0].pipe.send(limit_s)
    meeting = Meeting(0, *members[0].answer(), world or len(members), limit_s, senders, ipc)
    for rank, one in enumerate(members):
        last = one is members[-1]
        one.pipe.send((meeting, rank, buckets, end if last else 0, places[rank] if places else ""))


both = pytest.mark.parametrize("ipc", [False, True], ids=["gloo", "ipc"])


@both
def test_all_receivers_get_what_was_sent_bit_by_bit(members: list[Member], ipc: bool) -> None:
    meet(members[:3], PATIENT_S, 2, ipc)
    assert [one.answer() for one in members[:3]] == [[described(tensors(seed)) for seed in (1, 2)]] * 3


@both
def test_a_killed_receiver_is_noticed_and_the_next_group_works(members: list[Member], ipc: bool) -> None:
    """By its connection, or because its process is gone: long before the time limit. Small buckets: some are under way
    before it is seen."""
    sender, survivor, other, victim = members
    meet([sender, survivor, victim], PATIENT_S, 1000, ipc, end=signal.SIGKILL)
    for one in (sender, survivor):
        why, seconds = one.answer()
        assert why.startswith("the group broke while weights were sent: ") and seconds < PATIENT_S / 2
    members[3] = Member()
    assert members[3].answer() == "ready"
    meet([sender, survivor, other], PATIENT_S, 1, ipc)
    assert [one.answer() for one in (sender, survivor, other)] == [[described(tensors(1))]] * 3


@both
def test_a_receiver_that_hangs_is_given_up_in_time_and_the_next_group_works(members: list[Member], ipc: bool) -> None:
    sender, survivor, victim, _ = members
    meet([sender, survivor, victim], SHORT_S, 1000, ipc, end=signal.SIGSTOP)
    for one in (sender, survivor):
        why, seconds = one.answer()
        assert why.startswith("the group broke while weights were sent: ") and seconds < 4 * SHORT_S
    os.kill(victim.process.pid or 0, signal.SIGCONT)
    for _ in range(1000):  # it stops behind every bucket that had reached it
        if victim.pipe.poll(0.05):
            break
        os.kill(victim.process.pid or 0, signal.SIGCONT)
    assert "the group broke" in victim.answer()[0]
    meet([sender, survivor, victim], PATIENT_S, 1, ipc)
    assert [one.answer() for one in (sender, survivor, victim)] == [[described(tensors(1))]] * 3


@both
def test_who_does_not_come_is_not_waited_for(members: list[Member], ipc: bool) -> None:
    meet(members[:2], 1.0, 1, ipc, world=3)
    for one in members[:2]:
        why, seconds = one.answer()
        assert why.startswith("the group broke while it met: ") and seconds < 20


def test_each_takes_from_the_sender_beside_it(members: list[Member]) -> None:
    """As learner ranks and engines on two GPUs; and on one, where the lower of two ranks lends."""
    for places in ("abab", "aaaa", "abbb"):
        meet(members, PATIENT_S, 2, ipc=True, places=places, senders=2)
        assert [one.answer() for one in members] == [[described(tensors(seed)) for seed in (1, 2)]] * 4


def test_who_has_no_sender_beside_it_is_named_and_nobody_waits_for_the_others(members: list[Member]) -> None:
    meet(members[:3], PATIENT_S, 1, ipc=True, places="aab")
    for one in members[:3]:
        why, seconds = one.answer()
        assert "no learner rank shares the memory of b, where an engine is; ranks are on a" in why and seconds < 20


def test_what_is_said_of_a_gpus_memory_survives_the_way() -> None:
    """torch's own fifteen arguments for the process that opens it; no GPU opens anything here."""
    flat, bytes_of = torch.zeros(64, dtype=torch.uint8), iter((b"\x00\xffmemory", b"counter", b"event"))

    def reduced(_: torch.Tensor) -> Any:
        first, second, third = bytes_of
        return None, (*[None] * 7, first, 2048, 512, False, second, 3, third, True)

    def rebuilt(*arguments: Any) -> torch.Tensor:
        assert arguments[6:] == (1, b"\x00\xffmemory", 2048, 512, False, b"counter", 3, b"event", True)
        return flat

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.multiprocessing.reductions.reduce_tensor", reduced)
        patch.setattr("torch.multiprocessing.reductions.rebuild_cuda_tensor", rebuilt)
        patch.setattr("torch.cuda.synchronize", lambda _: None)
        handle = json.loads(json.dumps(lending.handle_of(flat)))
        assert torch.equal(lending.copied(handle, 64, torch.device("cuda", 1)), flat)


def test_a_layout_by_hand() -> None:
    """The widest first, so that each begins at a multiple of its width: 8 + 3 x 2 + 1 bytes."""
    some = {"a": torch.zeros(1, dtype=torch.uint8), "b": torch.zeros(3, dtype=torch.bfloat16), "c": torch.tensor(5)}
    layout = layout_of(some)
    assert layout == Layout(("c", "b", "a"), ("int64", "bfloat16", "uint8"), ((), (3,), (1,)), (8, 6, 1))
    assert torch.cat(parts_of(some, layout)).tolist() == [5] + [0] * 14 and layout.bytes == 15
    with pytest.raises(ValueError, match="without weights"):
        Layout.of([])
