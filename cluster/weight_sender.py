"""Weight sync, the learner's side: direct transfers from a learner's ranks to the engines.

Every transport is one of vLLM's trainer-side weight transfer engines (``vllm.distributed.weight_transfer``), or has
their interface: made on every rank from a client and a source of weights, ``send_weights`` on every rank, rank 0 sends.
On GPUs they are vLLM's own (``nccl``, ``ipc``: packed into buffers, double-buffered), so the learner imports vLLM only
there (7 s). **No GPU has run them in this project**; on CPUs ``tests/cluster/test_vllm_transfer.py`` runs their code
against stand-ins for NCCL and CUDA IPC. ``SharedMemoryEngine`` is the transport between processes without GPUs.

What vLLM's engines lack and is added here: time limits (``EngineClient``, ``vllm_worker.limit_time``), engines that are
independent actors (its Ray client gives all of them the same NCCL ranks), and ranks that stay in step after a failure
on rank 0.
"""

from __future__ import annotations

import pickle
import socket
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

import ray
import torch
import torch.distributed
from ray.exceptions import RayTaskError
from torch import Tensor

from ergo_rl.cluster.config import Transport
from ergo_rl.cluster.weight_buckets import Bucket, SharedFile, SharedFiles, memory_domain
from ergo_rl.cluster.weight_sync import WeightSyncFailed
from ergo_rl.cluster.worker_pool import on_one_line


class TensorSpec(NamedTuple):
    """Has the fields of vLLM's ``ParamMeta``."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class Weights(Protocol):
    """The weights of one learner rank. Under ZeRO-3 a bucket is gathered when its iterator reaches it, so all ranks
    iterate in step."""

    def weights(self) -> Iterator[Bucket]:
        """On the CPU; each bucket is valid until the next one is asked for."""

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """On the device, each a copy: vLLM packs several before it sends them."""

    def tensor_specs(self) -> list[TensorSpec]:
        """What ``named_weights`` yields, in its order, without gathering anything."""


class WeightStream:
    """A ``WeightSource`` for vLLM's trainer engines, which only use these two methods of it."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._running: Iterator[tuple[str, Tensor]] | None = None

    def metadata(self) -> list[TensorSpec]:
        return self._weights.tensor_specs()

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        self._running = self._weights.named_weights()
        return self._running

    def finish(self) -> None:
        """Run through what the engine has left over after a failure: the other ranks gather it in any case."""
        for _ in self if self._running is None else self._running:
            pass
        self._running = None


@dataclass(frozen=True, slots=True)
class SendResult:
    """Of one rank. A value and no exception, because an exception of a rank ends all ranks."""

    failure: str = ""
    seconds: float = 0.0
    """For which the slowest engine paused."""


class EngineClient:
    """A ``VLLMWeightSyncClient`` over Ray: each call goes to all engines and returns when all have answered.

    No call raises. After the first failure the rest do nothing, so that the ranks of a learner finish the transfer in
    step; ``failure`` says what went wrong."""

    def __init__(self, transport: str, engines: Sequence[Any], processes: int, timeout_s: float) -> None:
        """engines: actors with the methods of ``RolloutWorker``; processes: of each engine, with a rank each."""
        self._transport, self._engines, self._processes, self._timeout_s = transport, engines, processes, timeout_s
        self._transfer = ""
        self._asked: tuple[str, list[ray.ObjectRef]] = ("", [])
        """Method and calls that have not been waited for."""
        self.failure = ""
        self.version = 0
        self.seconds = 0.0
        self.abort: Callable[[], None] = lambda: None
        """Called at the first failure, to end what waits for the engines elsewhere."""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        infos = [init_info] * len(self._engines)
        if (first := init_info.get("rank_offset")) is not None:  # NCCL: every worker process has a rank of its own
            infos = [info | {"rank_offset": first + index * self._processes} for index, info in enumerate(infos)]
        self._call("init_weight_transfer", [(self._transport, info, self._timeout_s) for info in infos])

    def start_weight_update(self) -> None:
        self._transfer = uuid.uuid4().hex
        self._begin("start_weight_update", [(self._transfer,)] * len(self._engines))

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # vLLM carries only plain types to its workers; CUDA IPC handles contain classes.
        payload = pickle.dumps(update_info) if self._transport == "ipc" else update_info
        update = {"transport": self._transport, "payload": payload}
        self._begin("update_weights", [(self._transfer, update)] * len(self._engines))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        answers = self._call("finish_weight_update", [(self._transfer, self.version)] * len(self._engines))
        self.seconds = max(answers, default=0.0)

    def fail(self, why: str) -> None:
        if not self.failure:
            self.failure = why
            self.abort()

    def _begin(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> None:
        """vLLM's engines expect the answers here; ours writes a bucket meanwhile, and calls ``wait``."""
        begin = self._ask if self._transport == "shared_memory" else self._call
        begin(method, arguments)

    def _call(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        self._ask(method, arguments)
        return self.wait()

    def _ask(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> None:
        if self.failure:
            return
        asked = zip(self._engines, arguments, strict=True)
        self._asked = method, [getattr(engine, method).remote(*words) for engine, words in asked]

    def wait(self) -> list[Any]:
        """The engines' answers to the last call; none after a failure."""
        (method, calls), self._asked = self._asked, ("", [])
        try:
            answers: list[Any] = ray.get(calls, timeout=self._timeout_s)
        except Exception as error:  # whatever an engine raises, or its death
            cause = error.cause if isinstance(error, RayTaskError) else error  # Ray's own text is a whole traceback
            why = f"{type(cause).__name__} {on_one_line(cause)[:300]}"
            self.fail(f"{method} of {self._culprit(calls)}: {why}")
            return []
        return answers

    @staticmethod
    def _culprit(calls: Sequence[ray.ObjectRef]) -> str:
        answered, silent = ray.wait(list(calls), num_returns=len(calls), timeout=0)
        for call in (*answered, *silent):
            try:
                ray.get(call, timeout=0)
            except Exception:
                return f"rollout worker {calls.index(call)}"
        return "a rollout worker"


class TrainerEngine(Protocol):
    """Interface of vLLM's ``TrainerWeightTransferEngine``, as far as it is used."""

    def send_weights(self) -> None: ...

    def shutdown(self) -> None: ...


class SharedMemoryEngine:
    """One bucket after the other in a file in memory that the engines' workers map. As with vLLM's CUDA IPC engine
    every rank offers its file, and an engine takes the one that it can open."""

    def __init__(self, client: EngineClient, weights: Weights, rank: int) -> None:
        self._client, self._weights, self._is_sender = client, weights, rank == 0
        self._files = SharedFiles()
        self._domain = memory_domain()
        self._writes = _all_gather(self._domain).index(self._domain) == rank
        if self._is_sender:
            client.init_weight_transfer_engine({})

    def send_weights(self) -> None:
        """Each bucket is gathered and written while the engines load the one before."""
        lent: SharedFile | None = None
        for index, bucket in enumerate(self._weights.weights()):
            if self._is_sender and index == 0:  # generation pauses only now that there is something to load
                self._client.start_weight_update()
            file = self._file(bucket) if self._writes else None
            self._release(lent)
            lent = file
            paths = dict(entry for entry in _all_gather(file and (self._domain, str(file.path))) if entry)
            if self._is_sender:
                self._client.update_weights({"paths": paths, "spec": asdict(bucket.spec)})
        self._release(lent)
        if self._is_sender:
            self._client.finish_weight_update()

    def shutdown(self) -> None:
        self._files.close()

    def _release(self, file: SharedFile | None) -> None:
        if self._is_sender:
            self._client.wait()
        _all_gather(None)  # the engines have opened the file when rank 0 has their answers
        if file is not None:
            self._files.release(file)

    def _file(self, bucket: Bucket) -> SharedFile | None:
        try:
            return self._files.acquire(bucket.parts)
        except OSError as error:  # no memory is left
            self._client.fail(str(error))
            return None


class WeightSender:
    """One learner rank's end of a connection to the engines."""

    def __init__(self, client: EngineClient, stream: WeightStream | None, engine: TrainerEngine) -> None:
        """stream: what a vLLM engine sends."""
        self._client, self._stream, self._engine = client, stream, engine

    @classmethod
    def connect(
        cls,
        transport: Transport,
        engines: Sequence[Any],
        processes: int,
        timeout_s: float,
        weights: Weights,
        rank: int,
        device: torch.device,
    ) -> WeightSender:
        """Connect to the engines; every rank must call it. Raises WeightSyncFailed."""
        on_gpu = device.type != "cpu"
        name = "nccl" if transport is Transport.BROADCAST else "ipc" if on_gpu else "shared_memory"
        client, stream = EngineClient(name, engines, processes, timeout_s), WeightStream(weights)

        def make() -> TrainerEngine:
            if name == "shared_memory":
                return SharedMemoryEngine(client, weights, rank)
            torch.cuda.set_device(device)  # of this thread
            return vllm_engine(name, client, stream, rank, 1 + processes * len(engines))

        engine = _within(timeout_s, client, make)
        # Only NCCL waits for the engines elsewhere than in the client. Aborted, vLLM's engine runs through the source
        # without sending anything, so this rank stays in step with the others.
        client.abort = engine.shutdown if name == "nccl" else lambda: None
        return cls(client, None if name == "shared_memory" else stream, engine)

    def send(self, version: int) -> SendResult:
        """Replace the weights of all engines; every rank must call it. After a failure the connection is of no use."""
        self._client.version = version
        try:
            self._engine.send_weights()
        except Exception as error:  # of vLLM, NCCL or CUDA
            if self._stream is None:
                raise
            self._client.fail(f"{type(error).__name__} {str(error)[:300]}")
            self._stream.finish()
        return SendResult(self._client.failure, self._client.seconds)

    def close(self) -> None:
        self._engine.shutdown()


def vllm_engine(name: str, client: EngineClient, stream: WeightStream, rank: int, world_size: int) -> TrainerEngine:
    """Make vLLM's trainer engine for ``nccl`` or ``ipc``."""
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
    from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    # An IPC buffer holds at least the largest tensor, or vLLM refuses it.
    largest = max(spec.dtype.itemsize * torch.Size(spec.shape).numel() for spec in stream.metadata())
    size = max(largest, BUFFER_BYTES)
    info: Any
    if name == "nccl":
        with socket.create_server((ray.util.get_node_ip_address(), 0)) as listener:
            address, port = listener.getsockname()[:2]
        info = NCCLTrainerInitInfo(address, port, world_size, packed_buffer_size_bytes=size, rank=rank)
    else:
        info = IPCTrainerInitInfo(packed=True, packed_buffer_size_bytes=size, rank=rank)
    engine: TrainerEngine = WeightTransferTrainerFactory.trainer_init(info, client=client, source=stream)
    return engine


BUFFER_BYTES = 1 << 29
"""Of one packed buffer of vLLM's; with NCCL there are two at each end, beside the weights."""


def _within(seconds: float, client: EngineClient, make: Callable[[], TrainerEngine]) -> TrainerEngine:
    """Call ``make`` in a thread: NCCL waits forever for a process that does not come, and only a communicator that
    exists can be aborted. Raises WeightSyncFailed, and abandons the thread, when time is up or the client fails."""
    made: list[TrainerEngine] = []
    failures: list[Exception] = []
    ended = threading.Event()
    client.abort = ended.set

    def work() -> None:
        try:
            made.append(make())
        except Exception as error:  # of vLLM, NCCL or CUDA
            failures.append(error)
        ended.set()

    threading.Thread(target=work, daemon=True).start()
    ended.wait(seconds + ANSWER_S)
    if client.failure or not made:
        why = f"{type(failures[0]).__name__} {failures[0]}" if failures else f"not connected within {seconds:g} s"
        raise WeightSyncFailed(client.failure or why)
    return made[0]


ANSWER_S = 1.0
"""The client says which engine gave no answer in time, so it is waited for a little longer."""


def _all_gather(value: Any) -> list[Any]:
    """The values of all ranks; the learner's ranks are torch's default group, where there is more than one."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values
