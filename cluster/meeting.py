"""Where the processes of a weight transfer meet. Light: the driver hands it out, engines and learners go there."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Meeting:
    """generation: no other group of this driver has it; address, port: of the store of rank 0; world: processes, the
    first ``senders`` of them have the weights; timeout_s: how long one waits for another, to come and in each bucket;
    ipc: senders lend their memory (``cluster.lending``), else rank 0 sends to all in one collective."""

    generation: int
    address: str
    port: int
    world: int
    timeout_s: float
    senders: int = 1
    ipc: bool = False
