"""All ranks of the learner behind one class, for the driver, which handles references and never pixels."""

from __future__ import annotations

import asyncio
import math
import socket
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayActorError, RayError

from ergo_rl.cluster.config import Transport
from ergo_rl.cluster.placement import Cluster
from ergo_rl.cluster.weight_buckets import Bucket, BucketSpec
from ergo_rl.cluster.weight_sync import WeightSyncFailed
from ergo_rl.cluster.worker_pool import on_one_line
from ergo_rl.episodes.types import FloatArray, Trajectory
from ergo_rl.errors import ErgoError
from ergo_rl.learners.advantages import TurnAdvantages, is_scored
from ergo_rl.learners.config import LearnerConfig
from ergo_rl.learners.failures import SaveFailed, UpdatesSkipped

if TYPE_CHECKING:
    from ergo_rl.cluster.weight_sender import SendResult, WeightSender
    from ergo_rl.learners.learner import Learner  # imports torch, which the driver does not need

ROLE = "learner"
GRACE_S = 5.0
"""When a rank fails: how long to wait for the death of another rank, which then is the cause."""

PING_S = 5.0
"""While a call lasts, ranks are asked this often whether their processes run."""

_LIVENESS = "liveness"
"""Ray's name for the thread of a rank that answers pings while another computes."""

STATE_FILES_AHEAD = 2
"""Files of a state that are made before the first of them is consumed."""


class LearnerFailed(ErgoError, RuntimeError):
    """A learner rank failed, died or was stopped; the others were ended, because they would wait for it forever."""


@dataclass(frozen=True, slots=True)
class TrainingGroup:
    """The trajectories of one question, by reference, with their advantages."""

    question_id: str
    trajectories: ray.ObjectRef
    """To a ``tuple[Trajectory, ...]``."""
    advantages: tuple[TurnAdvantages, ...]
    """For each trajectory."""
    tokens: tuple[int, ...]
    """For each trajectory its length with visual tokens: the cost by which ranks are balanced."""

    def __post_init__(self) -> None:
        if len(self.advantages) != len(self.tokens):
            raise ValueError(f"{self.question_id!r}: {len(self.advantages)} advantages, {len(self.tokens)} lengths")


@dataclass(frozen=True, slots=True)
class RankBatch:
    """The part of one group that one rank learns from."""

    trajectories: ray.ObjectRef
    """Of the whole group."""
    members: tuple[int, ...]
    """Indices of the rank's trajectories."""
    advantages: tuple[TurnAdvantages, ...]
    """Of these trajectories."""


class LearnerRank:
    """A Ray actor around ``Learner`` that turns references into trajectories."""

    def __init__(self, config: LearnerConfig) -> None:
        self._config = config
        self._learner: Learner
        self._sender: WeightSender | None = None

    @ray.method(concurrency_group=_LIVENESS)
    def ping(self) -> None:
        """Return at once, whatever else the rank does; a process that is stopped does not."""

    def address(self) -> tuple[str, int]:
        """Return where this process can listen as rank 0."""
        address = ray.util.get_node_ip_address()
        with socket.socket() as probe:
            probe.bind((address, 0))
            return address, int(probe.getsockname()[1])

    def start(self, rank: int, address: str, port: int) -> None:
        from ergo_rl.learners.learner import Learner, Rank

        self._learner = Learner(self._config, Rank(rank, self._config.ranks, address, port))

    def update(self, batches: Sequence[RankBatch]) -> dict[str, float] | UpdatesSkipped:
        """Return the metrics, or what ended the learning: an exception would end all ranks, and their state is fine."""
        from ergo_rl.learners.batch import Sample

        groups = ray.get([batch.trajectories for batch in batches])
        samples = [
            Sample(trajectories[member], advantages)
            for batch, trajectories in zip(batches, groups, strict=True)
            for member, advantages in zip(batch.members, batch.advantages, strict=True)
        ]
        try:
            return self._learner.update(samples).metrics()
        except UpdatesSkipped as error:
            return error

    def logprobs(self, trajectories: Sequence[Trajectory]) -> list[FloatArray]:
        return self._learner.logprobs(trajectories)

    def weights(self) -> Iterator[Bucket | None]:
        """Yield the buckets, and None after the last so that the caller can detect a count mismatch."""
        yield from self._learner.weights()
        yield None

    def join_weight_gather(self) -> None:
        """Take part in gathering the weights that rank 0 sends."""
        for _ in self._learner.weights():
            pass

    def bucket_specs(self) -> list[BucketSpec]:
        return self._learner.bucket_specs()

    def connect(self, transport: Transport, engines: Sequence[Any], processes: int, timeout_s: float) -> str:
        """Prepare a direct transfer of weights to the engines.

        Returns what went wrong, or an empty text: an exception would end all ranks."""
        from ergo_rl.cluster.weight_sender import WeightSender

        if self._sender is not None:
            self._sender.close()
        self._sender = None
        learner = self._learner
        try:
            self._sender = WeightSender.connect(
                transport, engines, processes, timeout_s, learner, learner.rank, learner.device
            )
        except WeightSyncFailed as error:
            return str(error)
        return ""

    def send_weights(self, version: int) -> SendResult:
        """Send the weights to the connected engines, or take part in gathering them for rank 0."""
        if self._sender is None:
            raise RuntimeError("send_weights without a connection to the engines")
        return self._sender.send(version)

    def export(self, path: Path) -> SaveFailed | None:
        """Return what went wrong, if anything: an exception would end all ranks."""
        try:
            self._learner.export(path)
        except SaveFailed as error:
            return error
        return None

    def state(self) -> Iterator[bytes]:
        yield from self._learner.state()

    def join_state_gather(self) -> None:
        """Take part in gathering the state that rank 0 sends."""
        for _ in self._learner.state():
            pass

    def restore(self, files: Sequence[ray.ObjectRef]) -> int:
        return self._learner.restore(ray.get(file) for file in files)


def rank_actor() -> Any:
    """Return the actor class of a rank, with a thread of its own for pings."""
    remote: Any = ray.remote
    return remote(concurrency_groups={_LIVENESS: 1})(LearnerRank)


class LearnerGroup:
    """All ranks. If one fails in a call, dies in it or is stopped, all are ended and LearnerFailed names it.

    Example::

        learners = await LearnerGroup.launch(cluster, config.learner)
        metrics = await learners.update(groups)
        await learners.export("runs/mine/policy")
    """

    def __init__(self, actors: Sequence[Any], hang_timeout_s: float) -> None:
        self._actors, self._hang_timeout_s = list(actors), hang_timeout_s
        self.weights_revision = 0
        """Weight-changing calls issued so far (update, restore). Ranks execute calls in the order of issue."""
        self._buckets = 0

    @classmethod
    async def launch(cls, cluster: Cluster, config: LearnerConfig) -> LearnerGroup:
        """Reserve resources for all ranks together, start them, and load the model.

        Raises TimeoutError when the cluster has no room for them, LearnerFailed when one does not start."""
        places = await cluster.reserve_gang(ROLE, config.ranks, config.resources)
        group = cls([rank_actor().options(**place).remote(config) for place in places], config.hang_timeout_s)
        # A process that is not there yet answers no ping, and may take minutes: its node can be starting.
        (address, port), *_ = await group._all("start", [actor.address.remote() for actor in group._actors], ping=False)
        await group._all("start", [actor.start.remote(rank, address, port) for rank, actor in enumerate(group._actors)])
        return group

    async def update(self, groups: Sequence[TrainingGroup]) -> dict[str, float]:
        """Make one optimiser step; return its metrics (``learners.metrics.UpdateReport``, as ``learner/...``).

        Raises UpdatesSkipped; the ranks then still have the state after their last step."""
        batches = shard_groups(groups, len(self._actors))
        self.weights_revision += 1
        pairs = zip(self._actors, batches, strict=True)
        reports = await self._all("update", [actor.update.remote(batch) for actor, batch in pairs])
        if isinstance(reports[0], UpdatesSkipped):
            raise reports[0]
        return dict(reports[0])

    async def logprobs(self, trajectories: ray.ObjectRef) -> list[FloatArray]:
        """Return for each of the referenced trajectories float32[sampled tokens], nats, under the current weights."""
        answers = await self._all("logprobs", [actor.logprobs.remote(trajectories) for actor in self._actors])
        return list(answers[0])

    async def weights(self) -> list[ray.ObjectRef]:
        """Return the current weights as references to buckets (``cluster.weight_buckets``), owned by the caller."""
        sender, *others = self._actors
        # The number of buckets never changes, so it is asked once: a streaming task would take milliseconds longer.
        self._buckets = self._buckets or len(await self.bucket_specs())
        *buckets, sent = sender.weights.options(num_returns=self._buckets + 1).remote()
        end, *_ = await self._all("weights", [sent, *(actor.join_weight_gather.remote() for actor in others)])
        if end is not None:
            raise RuntimeError(f"the learner's weights no longer fit into {self._buckets} buckets")
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
        """Replace the weights of the connected engines; return the seconds of the slowest rank.

        Raises WeightSyncFailed."""
        results = await self._all("send_weights", [actor.send_weights.remote(version) for actor in self._actors])
        if failure := next(filter(None, (result.failure for result in results)), ""):
            raise WeightSyncFailed(failure)
        return max(result.seconds for result in results)

    async def export(self, path: str | Path) -> None:
        """Write a Hugging Face folder. Raises SaveFailed, which costs no rank."""
        answers = await self._all("export", [actor.export.remote(Path(path)) for actor in self._actors])
        if failure := next(filter(None, answers), None):
            raise failure

    async def state(self, keep: Callable[[ray.ObjectRef], Awaitable[None]]) -> None:
        """Hand the optimiser's state (with weights and step) to ``keep``, as references to safetensors files.

        One after the other (``bytes``); ``STATE_FILES_AHEAD`` are made ahead, so that memory holds few at a time. What
        ``keep`` raises (a full disk, say) is raised when all ranks are through, and costs none of them. Raises
        SaveFailed where a file does not arrive."""
        sender, *others = self._actors
        streaming = sender.state.options(num_returns="streaming", _generator_backpressure_num_objects=STATE_FILES_AHEAD)
        sent = _consume(streaming.remote(), keep)
        failure, *_ = await self._all("state", [sent, *(actor.join_state_gather.remote() for actor in others)])
        if isinstance(failure, RayError):
            raise SaveFailed(f"a part of the learner's state did not arrive: {on_one_line(failure)}") from failure
        if failure is not None:
            raise failure

    async def restore(self, files: Sequence[ray.ObjectRef]) -> int:
        """Load a state, saved by any number of ranks; return the next step."""
        self.weights_revision += 1
        steps = await self._all("restore", [actor.restore.remote(list(files)) for actor in self._actors])
        return int(steps[0])

    async def close(self) -> None:
        self._kill()
        self._actors = []

    def _kill(self) -> None:
        """End all ranks. The references stay, so that later calls fail with LearnerFailed instead of doing nothing."""
        for actor in self._actors:
            ray.kill(actor)

    async def _all(self, what: str, answers: Sequence[Awaitable[Any]], ping: bool = True) -> list[Any]:
        """Return the answers of all ranks, or raise LearnerFailed as soon as one fails or does not answer pings.

        The others may hang in a collective, waiting for it; so they are killed."""
        tasks = [asyncio.ensure_future(answer) for answer in answers]
        try:
            silent = await self._wait(tasks, ping)
        except asyncio.CancelledError:
            for task in tasks:  # else the errors of ranks that are ended now would be reported as forgotten
                task.cancel()
            raise
        if silent:
            for task in tasks:
                task.cancel()
            self._kill()
            raise LearnerFailed(
                f"learner rank {' and '.join(map(str, silent))} was silent for {self._hang_timeout_s:.0f} s "
                f"(learner.hang_timeout_s) in {what}: its process is stopped, or its machine is gone"
            )
        if any(task.done() and task.exception() for task in tasks):
            await asyncio.wait(tasks, timeout=GRACE_S)
            raised = {rank: task.exception() for rank, task in enumerate(tasks) if task.done()}
            failures = {rank: error for rank, error in raised.items() if error is not None}
            for task in tasks:
                task.cancel()
            self._kill()
            # A death breaks the connections of the other ranks, which then fail too: name the dead rank.
            rank = min(failures, key=lambda rank: (not isinstance(failures[rank], RayActorError), rank))
            verb = "died" if isinstance(failures[rank], RayActorError) else "failed"
            cause = failures[rank]
            raise LearnerFailed(f"learner rank {rank} {verb} in {what}: {on_one_line(cause)}") from cause
        return [task.result() for task in tasks]

    async def _wait(self, tasks: Sequence[asyncio.Future[Any]], ping: bool) -> list[int]:
        """Wait until all tasks are done or one has failed, or ranks are silent; return these."""
        ended = asyncio.ensure_future(asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION))
        try:
            silent: list[int] = []
            while not ended.done() and not silent:
                await asyncio.wait({ended}, timeout=PING_S if ping else None)
                silent = [] if ended.done() else await self._silent_ranks(ended)
            return silent
        finally:
            ended.cancel()

    async def _silent_ranks(self, ended: asyncio.Future[Any]) -> list[int]:
        """Return the ranks that do not answer a ping within ``hang_timeout_s``; none once ``ended`` is done.

        A dead one answers, with its error: it is found by its call."""
        pings = [asyncio.ensure_future(_answered(actor.ping.remote())) for actor in self._actors]
        answered = asyncio.ensure_future(asyncio.wait(pings))
        await asyncio.wait({answered, ended}, timeout=self._hang_timeout_s, return_when=asyncio.FIRST_COMPLETED)
        silent = [rank for rank, ping in enumerate(pings) if not ping.done()]
        for task in (answered, *pings):
            task.cancel()
        return [] if ended.done() else silent


def shard_groups(groups: Sequence[TrainingGroup], ranks: int) -> list[list[RankBatch]]:
    """Give every trajectory to one rank: all of them in order, split into ``ranks`` pieces of nearly equal cost.

    In order, so that most groups stay together, and their coarse view is fetched and prepared once. A trajectory that
    is not scored costs nothing, for it is not run. A rank that would get nothing is given one trajectory outside the
    loss, because all ranks must run the same number of passes."""
    places = [(group, member) for group in groups for member in range(len(group.advantages))]
    if not places:
        raise ValueError("no trajectories to learn from")
    costs = [group.tokens[member] if is_scored(group.advantages[member]) else 0 for group, member in places]
    idle = [RankBatch(groups[0].trajectories, (0,), ((math.nan,),))]
    return [_rank_batches([places[index] for index in piece]) or idle for piece in balanced_split(costs, ranks)]


def balanced_split(costs: Sequence[float], parts: int) -> list[range]:
    """Split ``range(len(costs))`` into consecutive pieces; an item goes to the piece in which its middle lies."""
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


def _rank_batches(places: Sequence[tuple[TrainingGroup, int]]) -> list[RankBatch]:
    members: dict[ray.ObjectRef, list[tuple[int, TurnAdvantages]]] = {}
    for group, member in places:
        members.setdefault(group.trajectories, []).append((member, group.advantages[member]))
    return [
        RankBatch(trajectories, tuple(member for member, _ in chosen), tuple(advantages for _, advantages in chosen))
        for trajectories, chosen in members.items()
    ]


async def _answered(ping: Awaitable[Any]) -> None:
    with suppress(RayError):
        await ping


async def _consume(stream: Any, keep: Callable[[ray.ObjectRef], Awaitable[None]]) -> Exception | None:
    """Hand on what a rank yields; return the first error of ``keep``, after which nothing more is handed on.

    To the end in any case: the rank would wait for room, and the others for the rank."""
    failure: Exception | None = None
    async for reference in stream:
        try:
            if failure is None:
                await keep(reference)
        except Exception as error:
            failure = error
    await stream.completed()
    return failure
