"""The ranks as one thing: what jobs see of the learner. The driver handles references, never pixels."""

from __future__ import annotations

import asyncio
import math
import socket
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayActorError

from ergo_rl.cluster.placement import Cluster
from ergo_rl.cluster.weight_buckets import Bucket, BucketSpec
from ergo_rl.cluster.weight_sync import Transport, WeightSyncFailed
from ergo_rl.cluster.worker_pool import on_one_line
from ergo_rl.episodes.types import FloatArray, Trajectory
from ergo_rl.learners.config import LearnerConfig

if TYPE_CHECKING:
    from ergo_rl.cluster.weight_sender import SendResult, WeightSender
    from ergo_rl.learners.learner import Learner  # imports torch, which the driver does not need

ROLE = "learner"
GRACE_S = 5.0
"""When a rank fails: how long to look whether another one's death is the cause."""

AHEAD = 2
"""Files of a state that are made before the first of them is taken."""


class LearnerFailed(RuntimeError):
    """A learner rank failed or died; the others were stopped, because they would wait for it for ever."""


@dataclass(frozen=True, slots=True)
class TrainingGroup:
    """The trajectories of one question, by reference, and what the driver knows of each.

    trajectories: reference to a ``tuple[Trajectory, ...]``; advantages: for each trajectory those of its turns, or one
    for all of it, NaN leaves the loss; tokens: length with images, the cost by which ranks are balanced."""

    question_id: str
    trajectories: ray.ObjectRef
    advantages: tuple[tuple[float, ...], ...]
    tokens: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.advantages) != len(self.tokens):
            raise ValueError(f"{self.question_id!r}: {len(self.advantages)} advantages, {len(self.tokens)} lengths")


@dataclass(frozen=True, slots=True)
class Share:
    """What one rank is given of one group: the members at these places."""

    trajectories: ray.ObjectRef
    members: tuple[int, ...]
    advantages: tuple[tuple[float, ...], ...]


class LearnerRank:
    """A thin Ray actor around ``Learner``; it turns references into trajectories."""

    def __init__(self, config: LearnerConfig) -> None:
        self._config = config
        self._learner: Learner
        self._sender: WeightSender | None = None

    def address(self) -> tuple[str, int]:
        """Where this process could listen as rank 0."""
        address = ray.util.get_node_ip_address()
        with socket.socket() as probe:
            probe.bind((address, 0))
            return address, int(probe.getsockname()[1])

    def start(self, rank: int, address: str, port: int) -> None:
        from ergo_rl.learners.learner import Learner, Rank

        self._learner = Learner(self._config, Rank(rank, self._config.ranks, address, port))

    def update(self, shares: Sequence[Share]) -> dict[str, float]:
        from ergo_rl.learners.batch import Sample

        groups = ray.get([share.trajectories for share in shares])
        samples = [
            Sample(trajectories[member], advantages)
            for share, trajectories in zip(shares, groups, strict=True)
            for member, advantages in zip(share.members, share.advantages, strict=True)
        ]
        return self._learner.update(samples).metrics()

    def logprobs(self, trajectories: Sequence[Trajectory]) -> list[FloatArray]:
        return self._learner.logprobs(trajectories)

    def weights(self) -> Iterator[Bucket | None]:
        """Behind the last one None: so whoever counts them sees that there are no more."""
        yield from self._learner.weights()
        yield None

    def attend_weights(self) -> None:
        """Take part in gathering weights that another rank sends."""
        for _ in self._learner.weights():
            pass

    def bucket_specs(self) -> list[BucketSpec]:
        return self._learner.bucket_specs()

    def connect(self, transport: Transport, engines: Sequence[Any], processes: int, timeout_s: float) -> str:
        """Prepare a direct transfer of weights to the engines. Returns what went wrong, or nothing: an exception would
        end all ranks."""
        from ergo_rl.cluster.weight_sender import WeightSender

        if self._sender is not None:
            self._sender.close()
        self._sender = None
        learner = self._learner
        try:
            self._sender = WeightSender.connect(
                transport, engines, processes, timeout_s, learner, learner.place.rank, learner.device
            )
        except WeightSyncFailed as error:
            return str(error)
        return ""

    def send_weights(self, version: int) -> SendResult:
        """Send the weights to the connected engines, or take part in gathering them for rank 0."""
        if self._sender is None:
            raise RuntimeError("send_weights without a connection to the engines")
        return self._sender.send(version)

    def export(self, path: Path) -> None:
        self._learner.export(path)

    def state(self) -> Iterator[bytes]:
        yield from self._learner.state()

    def attend_state(self) -> None:
        """Take part in gathering a state that another rank sends."""
        for _ in self._learner.state():
            pass

    def restore(self, files: Sequence[ray.ObjectRef]) -> int:
        return self._learner.restore(ray.get(file) for file in files)


class LearnerGroup:
    """Every method runs on all ranks at once. If one fails, all are stopped and LearnerFailed names it."""

    def __init__(self, actors: Sequence[Any]) -> None:
        self._actors = list(actors)
        self.weights_revision = 0
        """Number of calls issued so far that change the weights. Ranks run calls in the order of issue."""
        self._buckets = 0

    @classmethod
    async def launch(cls, cluster: Cluster, config: LearnerConfig) -> LearnerGroup:
        """Reserve places for all ranks together, start them, load the model.

        Raises TimeoutError when the cluster cannot hold them, LearnerFailed when one does not come up."""
        places = await cluster.reserve_gang(ROLE, config.ranks, config.resources)
        group = cls([ray.remote(LearnerRank).options(**place).remote(config) for place in places])
        (address, port), *_ = await group._all("start", [group._actors[0].address.remote()])
        await group._all("start", [actor.start.remote(rank, address, port) for rank, actor in enumerate(group._actors)])
        return group

    async def update(self, groups: Sequence[TrainingGroup]) -> dict[str, float]:
        """One optimiser step; its metrics (``learners.report.UpdateReport``, as ``learner/...``)."""
        shares = assign(groups, len(self._actors))
        self.weights_revision += 1
        pairs = zip(self._actors, shares, strict=True)
        reports = await self._all("update", [actor.update.remote(share) for actor, share in pairs])
        return dict(reports[0])

    async def logprobs(self, trajectories: ray.ObjectRef) -> list[FloatArray]:
        """Per trajectory of the referenced sequence: float32[sampled tokens], nats, under the current weights."""
        answers = await self._all("logprobs", [actor.logprobs.remote(trajectories) for actor in self._actors])
        return list(answers[0])

    async def weights(self) -> list[ray.ObjectRef]:
        """The current weights as buckets (``cluster.weight_buckets``), owned by the caller."""
        sender, *others = self._actors
        # Their number is known and stays: a streaming task would take several milliseconds longer.
        self._buckets = self._buckets or len(await self.bucket_specs())
        *buckets, sent = sender.weights.options(num_returns=self._buckets + 1).remote()
        end, *_ = await self._all("weights", [sent, *(actor.attend_weights.remote() for actor in others)])
        if end is not None:
            raise RuntimeError(f"the learner's weights come in more than the {self._buckets} buckets of before")
        return buckets

    async def bucket_specs(self) -> list[BucketSpec]:
        (specs,) = await self._all("bucket_specs", [self._actors[0].bucket_specs.remote()])
        return list(specs)

    async def connect(self, transport: Transport, engines: Sequence[Any], processes: int, timeout_s: float) -> None:
        """Prepare a direct transfer (``cluster.weight_sync.WeightProvider``). Raises WeightSyncFailed."""
        arguments = (transport, list(engines), processes, timeout_s)
        answers = await self._all("connect", [actor.connect.remote(*arguments) for actor in self._actors])
        if failure := next(filter(None, answers), ""):
            raise WeightSyncFailed(failure)

    async def send_weights(self, version: int) -> float:
        """Replace the weights of the connected engines; seconds of the slowest one. Raises WeightSyncFailed."""
        results = await self._all("send_weights", [actor.send_weights.remote(version) for actor in self._actors])
        if failure := next(filter(None, (result.failure for result in results)), ""):
            raise WeightSyncFailed(failure)
        return max(result.seconds for result in results)

    async def export(self, path: str | Path) -> None:
        """Write a Hugging Face folder."""
        await self._all("export", [actor.export.remote(Path(path)) for actor in self._actors])

    async def state(self, keep: Callable[[ray.ObjectRef], Awaitable[None]]) -> None:
        """The optimiser's state, weights and step, for ``restore``: safetensors files (``bytes``), handed to ``keep``
        one after the other; not many more than it has taken are made ahead."""
        sender, *others = self._actors
        streaming = sender.state.options(num_returns="streaming", _generator_backpressure_num_objects=AHEAD)
        sent = _drained(streaming.remote(), keep)
        await self._all("state", [sent, *(actor.attend_state.remote() for actor in others)])

    async def restore(self, files: Sequence[ray.ObjectRef]) -> int:
        """Take up a state, with any number of ranks; returns the step that comes next."""
        self.weights_revision += 1
        steps = await self._all("restore", [actor.restore.remote(list(files)) for actor in self._actors])
        return int(steps[0])

    async def close(self) -> None:
        self._kill()
        self._actors = []

    def _kill(self) -> None:
        """Whoever asks them for something afterwards is told that they are dead."""
        for actor in self._actors:
            ray.kill(actor)

    async def _all(self, what: str, answers: Sequence[Awaitable[Any]]) -> list[Any]:
        """The answers of all ranks, or LearnerFailed as soon as one fails: the others may hang in a collective."""
        tasks = [asyncio.ensure_future(_awaited(answer)) for answer in answers]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        if any(task.done() and task.exception() for task in tasks):
            await asyncio.wait(tasks, timeout=GRACE_S)
            raised = {rank: task.exception() for rank, task in enumerate(tasks) if task.done()}
            failures = {rank: error for rank, error in raised.items() if error is not None}
            for task in tasks:
                task.cancel()
            self._kill()
            # a death makes the connections of the others break: name the dead one
            rank = min(failures, key=lambda rank: (not isinstance(failures[rank], RayActorError), rank))
            verb = "died" if isinstance(failures[rank], RayActorError) else "failed"
            cause = failures[rank]
            raise LearnerFailed(f"learner rank {rank} {verb} in {what}: {on_one_line(cause)}") from cause
        return [task.result() for task in tasks]


def assign(groups: Sequence[TrainingGroup], ranks: int) -> list[list[Share]]:
    """Every trajectory to one rank: all of them in order, cut into ``ranks`` pieces of nearly equal cost. So most
    groups stay together, and their coarse view is fetched and prepared once.

    What is not scored costs nothing, for it is not run. A rank that would get nothing is given one trajectory
    outside the loss, because all ranks must run the same passes."""
    places = [(group, member) for group in groups for member in range(len(group.advantages))]
    if not places:
        raise ValueError("no trajectories to learn from")
    costs = [0 if any(map(math.isnan, group.advantages[member])) else group.tokens[member] for group, member in places]
    idle = [Share(groups[0].trajectories, (0,), ((math.nan,),))]
    return [_shares([places[index] for index in piece]) or idle for piece in cut(costs, ranks)]


def cut(costs: Sequence[float], parts: int) -> list[range]:
    """``range(len(costs))`` in consecutive pieces; an item goes to the piece in which its middle lies."""
    total = sum(costs) or 1
    pieces, start, done = [], 0, 0.0
    for part in range(1, parts + 1):
        stop = start
        while stop < len(costs) and (part == parts or done + costs[stop] / 2 < total * part / parts):
            done += costs[stop]
            stop += 1
        pieces.append(range(start, stop))
        start = stop
    return pieces


def _shares(places: Sequence[tuple[TrainingGroup, int]]) -> list[Share]:
    members: dict[ray.ObjectRef, list[tuple[int, tuple[float, ...]]]] = {}
    for group, member in places:
        members.setdefault(group.trajectories, []).append((member, group.advantages[member]))
    return [
        Share(trajectories, tuple(member for member, _ in chosen), tuple(advantages for _, advantages in chosen))
        for trajectories, chosen in members.items()
    ]


async def _awaited(answer: Awaitable[Any]) -> Any:
    return await answer


async def _drained(stream: Any, keep: Callable[[ray.ObjectRef], Awaitable[None]]) -> None:
    async for reference in stream:
        await keep(reference)
    await stream.completed()
