"""vLLM's own weight transfer engines, both ends, with our client, source and receiver between them. NCCL, CUDA streams
and CUDA IPC are stand-ins here; everything else is vLLM's code and ours, as a GPU runs it."""
# ruff: noqa: E402

from __future__ import annotations

import json
import queue
import time
from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ergo_rl.cluster.compat import repair_torchvision

repair_torchvision()
from vllm.distributed.weight_transfer import ipc_engine, nccl_common, nccl_engine, packed_tensor
from vllm.distributed.weight_transfer.base import VLLMWeightSyncClient

from ergo_rl.cluster import weight_sender
from ergo_rl.cluster.config import Transport
from ergo_rl.cluster.vllm_worker import WeightReceiver, limit_time
from ergo_rl.cluster.weight_sender import EngineClient, TensorSpec, WeightSender
from ergo_rl.cluster.weight_sync import WeightSyncFailed

CUDA: Any = SimpleNamespace(type="cuda", index=0)


class Model:
    """Keeps what it is told to load."""

    def __init__(self) -> None:
        self.loaded: dict[str, torch.Tensor] = {}

    def load_weights(self, weights: Any) -> None:
        self.loaded |= {name: tensor.clone() for name, tensor in weights}

    def modules(self) -> list[Any]:
        return []


class Weights:
    """Seven tensors of 4 * 100 bytes, so that a buffer of 1,000 bytes is full after three."""

    def __init__(self) -> None:
        self.gathered = 0

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        for index in range(7):
            self.gathered += 1
            yield f"layer.{index}", torch.full((10, 10), float(index))

    def tensor_specs(self) -> list[TensorSpec]:
        return [TensorSpec(f"layer.{index}", torch.float32, (10, 10)) for index in range(7)]


class Group:
    """In place of vLLM's PyNcclCommunicator: rank 0 puts, the others get."""

    def __init__(self, rank: int, queues: list[queue.Queue[torch.Tensor]]) -> None:
        self.rank, self.queues, self.aborted = rank, queues, False
        self.sent = 0

    def broadcast(self, tensor: torch.Tensor, src: int, stream: Any = None) -> None:
        if self.aborted:
            return  # as vLLM's
        if self.rank == src:
            self.sent += 1
            for other in self.queues:
                other.put(tensor.clone())
            return
        while not self.aborted:  # as NCCL: for ever
            try:
                tensor.copy_(self.queues[self.rank - 1].get(timeout=0.05))
                return
            except queue.Empty:
                pass

    def destroy(self) -> None:
        self.aborted = True


class World:
    """Two engines of one process each, called through ``EngineClient`` as Ray actors are."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.queues: list[queue.Queue[torch.Tensor]] = [queue.Queue(), queue.Queue()]
        self.models = [Model(), Model()]
        self.joined: list[tuple[int, int]] = []
        self.calls: list[str] = []
        self.receivers = [self.receiver(model) for model in self.models]
        self.groups: dict[int, Group] = {}
        self.broken = ""

        def join(master_address: str, master_port: int, rank: int, world_size: int, device: Any) -> Group:
            self.joined.append((rank, world_size))
            self.groups[rank] = Group(rank, self.queues)
            return self.groups[rank]

        patch.setattr(nccl_common, "stateless_init_process_group", join)
        empty = torch.empty
        patch.setattr(torch, "empty", lambda *size, device=None, **rest: empty(*size, **rest))
        patch.setattr(torch.accelerator, "current_device_index", lambda: 0)
        patch.setattr(torch.accelerator, "synchronize", lambda: None)
        patch.setattr(torch.cuda, "set_device", lambda device: None)
        patch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
        patch.setattr(torch.cuda, "ipc_collect", lambda: None)
        patch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(synchronize=lambda: None))
        patch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid="gpu-0"))
        patch.setattr(
            packed_tensor, "_get_streams", lambda _, count: (SimpleNamespace(synchronize=lambda: None),) * count
        )
        patch.setattr("vllm.model_executor.model_loader.reload.initialize_layerwise_reload", lambda model: None)
        patch.setattr("vllm.model_executor.model_loader.reload.finalize_layerwise_reload", lambda *_: None)
        patch.setattr(weight_sender, "BUFFER_BYTES", 1000)
        patch.setattr("ray.util.get_node_ip_address", lambda: "127.0.0.1")
        patch.setattr(EngineClient, "_call", self.call)
        self.patch = patch

    @staticmethod
    def receiver(model: Model) -> WeightReceiver:
        parallel = SimpleNamespace(data_parallel_index=0, world_size=1, rank=0)
        text: Any = SimpleNamespace(tie_word_embeddings=False)
        config: Any = SimpleNamespace(hf_text_config=text, hf_config=text)
        vllm_config: Any = SimpleNamespace(parallel_config=parallel, model_config=config)
        return WeightReceiver(SimpleNamespace(backend="ergo_rl"), vllm_config, CUDA, model)  # type: ignore[arg-type]

    def call(self, method: str, arguments: Any) -> list[Any]:
        """In place of Ray: every engine at once, in threads, since they wait for the learner."""
        from concurrent.futures import ThreadPoolExecutor

        client = self.client
        if client.failure:
            return []
        self.calls.append(method)
        with ThreadPoolExecutor(2) as threads:
            answers = [
                threads.submit(self.engine, *call, method) for call in zip(self.receivers, arguments, strict=True)
            ]
        try:
            return [answer.result() for answer in answers]
        except Exception as error:
            client.fail(f"{method}: {error}")
            return []

    def engine(self, receiver: WeightReceiver, arguments: tuple[Any, ...], method: str) -> float:
        if method == self.broken:
            raise RuntimeError("its GPU fell off the bus")
        if method == "init_weight_transfer":
            transport, info, timeout_s = arguments
            request = {"transport": transport, "payload": info, "timeout_s": timeout_s}
            request = json.loads(json.dumps(request))  # only plain types reach a worker
            receiver.init_transfer_engine(receiver.parse_init_info(request))
        elif method == "start_weight_update":
            receiver.start_weight_update()
        elif method == "update_weights":
            receiver.update_weights({"payload": arguments[1]["payload"]})
        else:
            receiver.finish_weight_update()
        return 0.5

    def connect(self, transport: Transport, weights: Weights, timeout_s: float = 20.0) -> WeightSender:
        self.patch.setattr(
            weight_sender, "EngineClient", lambda *args: setattr(self, "client", EngineClient(*args)) or self.client
        )
        return WeightSender.connect(transport, [None, None], 1, timeout_s, weights, 0, CUDA)  # type: ignore[arg-type]

    def holds_everything(self) -> bool:
        expected = dict(Weights().named_weights())
        return all(
            model.loaded.keys() == expected.keys()
            and all(torch.equal(model.loaded[name], tensor) for name, tensor in expected.items())
            for model in self.models
        )


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


def test_engine_client_satisfies_vllms_protocol() -> None:
    assert isinstance(EngineClient("nccl", [], 1, 1.0), VLLMWeightSyncClient)


def test_nccl_send_delivers_all_weights(world: World) -> None:
    """Three buffers: three tensors, three, one. The learner is rank 0, every engine has a rank of its own."""
    weights = Weights()
    sender = world.connect(Transport.BROADCAST, weights)
    assert sorted(world.joined) == [(0, 3), (1, 3), (2, 3)]
    for version in (1, 2):
        result = sender.send(version)
        assert (result.failure, result.seconds) == ("", 0.5)
        assert world.client.version == version and world.groups[0].sent == 3 * version
    assert world.holds_everything() and weights.gathered == 14
    sender.close()
    assert world.groups[0].aborted and not world.groups[1].aborted


def test_ipc_send_delivers_all_weights(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers of 1,000 bytes hold two tensors of 400: four messages, in one memory that is written over each time."""
    shared: list[torch.Tensor] = []

    def reduce_tensor(tensor: torch.Tensor) -> Any:
        shared.append(tensor)
        return None, (torch.Tensor, len(shared) - 1, 2, 3, 4, 5, "device")

    monkeypatch.setattr(packed_tensor, "reduce_tensor", reduce_tensor)
    monkeypatch.setattr("torch.multiprocessing.reductions.rebuild_cuda_tensor", lambda *args: shared[args[1]])
    sender = world.connect(Transport.IPC, Weights())
    assert sender.send(1).failure == ""
    assert world.holds_everything() and [buffer.numel() for buffer in shared] == [1000]
    assert world.calls == [
        "init_weight_transfer",
        "start_weight_update",
        *["update_weights"] * 4,
        "finish_weight_update",
    ]
    assert all(receiver._direct is not None for receiver in world.receivers)
    assert isinstance(world.receivers[0]._direct, ipc_engine.IPCWeightTransferEngine)


def test_ipc_buffer_holds_the_largest_tensor(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's IPC engine refuses a tensor that is larger than its buffer."""
    monkeypatch.setattr(weight_sender, "BUFFER_BYTES", 8)
    sender = world.connect(Transport.IPC, Weights())
    assert sender._engine.packed_buffer_size_bytes == 400  # type: ignore[attr-defined]


@pytest.mark.parametrize("method", ["start_weight_update", "update_weights", "finish_weight_update"])
def test_nccl_send_with_failing_engine_ends_and_gathers_everything(world: World, method: str) -> None:
    weights = Weights()
    sender = world.connect(Transport.BROADCAST, weights)
    world.broken = method
    result = sender.send(1)
    assert result.failure == f"{method}: its GPU fell off the bus"
    assert world.groups[0].aborted and weights.gathered == 7, "the other ranks gather every bucket in any case"


def test_nccl_receive_from_a_gone_learner_times_out(world: World) -> None:
    """NCCL would wait forever, and an aborted call returns as if it had worked: garbage must not pass for weights."""
    world.connect(Transport.BROADCAST, Weights(), timeout_s=0.3)
    names = {"names": ["w"], "dtype_names": ["float32"], "shapes": [[2]]}
    started = time.monotonic()
    with pytest.raises(TimeoutError, match=r"the weights did not come within 0\.3 s"):
        world.receivers[0].update_weights({"payload": names})
    assert 0.3 <= time.monotonic() - started < 10 and world.groups[1].aborted


def test_nccl_connect_with_failing_engine_raises_at_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's own rendezvous would wait for 300 s."""
    world.broken = "init_weight_transfer"
    monkeypatch.setattr(nccl_engine, "open_trainer_endpoint", lambda info: time.sleep(30))
    started = time.monotonic()
    with pytest.raises(WeightSyncFailed, match="init_weight_transfer: its GPU fell off the bus"):
        world.connect(Transport.BROADCAST, Weights())
    assert time.monotonic() - started < 10


def test_limit_time_in_time_does_not_abort() -> None:
    aborted: list[int] = []
    with limit_time(30.0, lambda: aborted.append(1)):
        pass
    assert not aborted
