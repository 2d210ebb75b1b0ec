"""The receiving end of a weight transfer, inside vLLM's worker processes.

Registered under ``BACKEND`` in vLLM's own factory. Two ways lead here, because a Ray job ships the repository
as its working directory and then has no entry points: vLLM's plugin entry point (installed project), and
``worker_extension_cls`` as an import path, which vLLM loads in every worker before it makes the transfer engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from cluster.compat import end_with_parent, keep_discarded_draws, keep_pictures

BACKEND = "ergo_rl_files"
WORKER_EXTENSION = f"{__name__}.WorkerExtension"


@dataclass
class NoInit(WeightTransferInitInfo):
    """There is nothing to agree on beforehand."""


@dataclass
class BucketFile(WeightTransferUpdateInfo):
    """One bucket: a safetensors file on a file system that this worker sees (shared memory)."""

    path: str


class FileWeightTransferEngine(WeightTransferEngine[NoInit, BucketFile]):
    """Loads checkpoint-format weights, bucket by bucket, through vLLM's layerwise reload: on CPU vLLM packs
    linear weights when it loads them, so a plain ``load_weights`` fails with a size mismatch."""

    init_info_cls = NoInit
    update_info_cls = BucketFile

    def init_transfer_engine(self, init_info: NoInit) -> None:
        return None

    def start_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":  # the base class synchronises an accelerator; a CPU has none
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: BucketFile) -> None:
        model: Any = self.model
        with safe_open(update_info.path, framework="pt", device="cpu") as bucket:
            # Each tensor keeps the mapping, while its layer waits for its remaining weights; the file may be removed.
            model.load_weights((name, bucket.get_tensor(name)) for name in bucket.keys())  # noqa: SIM118

    def finish_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)
        self._refresh_tied_heads()

    def _refresh_tied_heads(self) -> None:
        """A head tied to the embeddings receives no weights of its own, so the layerwise reload does not
        process it again and its packed copy (CPU) would keep the OLD weights, while ``named_parameters`` shows
        the new ones. Remove when vLLM re-processes tied heads on reload."""
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        if getattr(self.model_config.hf_text_config, "tie_word_embeddings", False) or getattr(
            self.model_config.hf_config, "tie_word_embeddings", False
        ):
            for module in self.model.modules():
                if isinstance(module, ParallelLMHead):
                    module.quant_method.process_weights_after_loading(module)

    def shutdown(self) -> None:
        return None


def register() -> None:
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, FileWeightTransferEngine)


class WorkerExtension:
    """Nothing but the import: loading this class prepares a vLLM worker (transfer engine, repairs)."""


register()
keep_discarded_draws()
keep_pictures()
end_with_parent()
