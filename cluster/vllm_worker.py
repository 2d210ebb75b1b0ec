"""What this project adds to vLLM's worker processes: the receiving end of a weight transfer, and repairs.

The receiver is registered under ``BACKEND`` in vLLM's own factory. vLLM loads this module in two ways: by the plugin
entry point of an installed project, and by ``worker_extension_cls``, an import path that every worker loads before it
makes its transfer engine (a Ray job that ships the repository as its working directory has no entry points).
"""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from vllm.config import WeightTransferConfig
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from ergo_rl.cluster.compat import die_with_parent, patch_always_send_images, patch_cpu_seeded_sampling
from ergo_rl.cluster.weight_buckets import BucketSpec, map_file, unpack

BACKEND = "ergo_rl"
WORKER_EXTENSION = f"{__name__}.WorkerExtension"


@dataclass
class ConnectInfo(WeightTransferInitInfo):
    """Prepare a direct transfer. Files in shared memory need no preparation."""

    transport: str
    """Of a vLLM engine: nccl | ipc."""
    payload: dict[str, Any]
    """That engine's own init info."""
    timeout_s: float


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """A bucket in a file, or a message for vLLM's engine."""

    path: str = ""
    spec: dict[str, list[Any]] | None = None
    """The fields of ``BucketSpec``."""
    payload: Any = None
    """The update info of vLLM's engine, pickled where its transport carries more than plain types."""


class WeightReceiver(WeightTransferEngine[ConnectInfo, UpdateInfo]):
    """Loads checkpoint-format weights from files in shared memory by itself, and from a learner on GPUs by vLLM's own
    engines, through vLLM's layerwise reload in both cases: on CPU vLLM packs linear weights when it loads them, so a
    plain ``load_weights`` fails with a size mismatch."""

    init_info_cls = ConnectInfo
    update_info_cls = UpdateInfo
    _direct: WeightTransferEngine[Any, Any] | None = None
    _timeout_s = 0.0
    _updating = False

    def init_transfer_engine(self, init_info: ConnectInfo) -> None:
        """Replace the connection of before by a new one."""
        self.shutdown()
        direct = WeightTransferEngineFactory.create_engine(
            WeightTransferConfig(backend=init_info.transport), self.vllm_config, self.device, self.model
        )
        direct.init_transfer_engine(direct.parse_init_info(init_info.payload))
        self._direct, self._timeout_s = direct, init_info.timeout_s

    def start_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

        if self._updating:
            # The last update broke off. A layer that had some of its weights would count them twice and finish early.
            finalize_layerwise_reload(self.model, self.model_config)
        self._updating = True
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":  # the base class synchronises an accelerator; a CPU has none
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: UpdateInfo) -> None:
        if update_info.spec is not None:
            model: Any = self.model
            spec = BucketSpec(**update_info.spec)
            # Each tensor keeps the memory of its whole bucket while its layer waits for its remaining weights: most of
            # the time that ends before the next bucket.
            model.load_weights(unpack(map_file(update_info.path, spec.bytes), spec))
            return
        if self._direct is None:
            raise RuntimeError("the engine is not connected to a learner")
        payload = update_info.payload
        payload = pickle.loads(payload) if isinstance(payload, bytes) else payload  # noqa: S301: from our own learner
        with limit_time(self._timeout_s, self._direct.shutdown):
            self._direct.receive_weights(self._direct.parse_update_info(payload))

    def finish_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        if self._direct is not None:
            self._direct.finish_weight_update()  # the same, and it lets go of the learner's memory
        else:
            finalize_layerwise_reload(self.model, self.model_config)
        self._updating = False
        self._refresh_tied_heads()

    def _refresh_tied_heads(self) -> None:
        """Process a head that is tied to the embeddings again. It receives no weights of its own, so the layerwise
        reload leaves it out, and its packed copy (CPU) would keep the OLD weights while ``named_parameters`` shows the
        new ones. Remove when vLLM re-processes tied heads on reload."""
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        if getattr(self.model_config.hf_text_config, "tie_word_embeddings", False) or getattr(
            self.model_config.hf_config, "tie_word_embeddings", False
        ):
            for module in self.model.modules():
                if isinstance(module, ParallelLMHead):
                    module.quant_method.process_weights_after_loading(module)

    def shutdown(self) -> None:
        if self._direct is not None:
            self._direct.shutdown()
        self._direct = None


@contextmanager
def limit_time(seconds: float, abort: Callable[[], None]) -> Iterator[None]:
    """Call ``abort`` if the block takes longer, and raise TimeoutError when the block ends. NCCL itself waits forever
    for a process that is gone, and a call that was aborted returns as if it had worked."""
    late = threading.Event()

    def give_up() -> None:
        late.set()
        abort()

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        if late.is_set():
            raise TimeoutError(f"the weights did not come within {seconds:g} s")


def register() -> None:
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, WeightReceiver)


class WorkerExtension:
    """Nothing but the import: loading this class prepares a vLLM worker (transfer engine, repairs)."""


register()
patch_cpu_seeded_sampling()
patch_always_send_images()
die_with_parent()
