"""The receiving end of a weight transfer, inside vLLM's worker processes.

Registered under ``BACKEND`` in vLLM's own factory. Two ways lead here, because a Ray job ships the repository
as its working directory and then has no entry points: vLLM's plugin entry point (installed project), and
``worker_extension_cls`` as an import path, which vLLM loads in every worker before it makes the transfer engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from ergo_rl.cluster.buckets import Layout, tensors_of
from ergo_rl.cluster.collective import Group, GroupLost
from ergo_rl.cluster.compat import end_with_parent, keep_discarded_draws, keep_pictures
from ergo_rl.cluster.meeting import Meeting
from ergo_rl.cluster.shared_memory import mapped

BACKEND = "ergo_rl_buckets"
WORKER_EXTENSION = f"{__name__}.WorkerExtension"


@dataclass
class Membership(WeightTransferInitInfo):
    """A place in a group (``cluster.meeting.Meeting``, its fields). first_rank: of this engine's first worker process.
    Files need none of it."""

    meeting: dict[str, Any]
    first_rank: int


@dataclass
class Arrival(WeightTransferUpdateInfo):
    """One bucket, in which lies what the fields of ``cluster.buckets.Layout`` say: a file in shared memory of this
    machine, or, without a path, what the group ``generation`` is sent next."""

    layout: dict[str, list[Any]]
    path: str = ""
    generation: int = 0


class BucketTransferEngine(WeightTransferEngine[Membership, Arrival]):
    """Loads checkpoint-format weights, bucket by bucket, through vLLM's layerwise reload: on CPU vLLM packs
    linear weights when it loads them, so a plain ``load_weights`` fails with a size mismatch."""

    init_info_cls = Membership
    update_info_cls = Arrival
    _group: Group | None = None
    _generation = 0
    _updating = False

    def init_transfer_engine(self, init_info: Membership) -> None:
        """Leave the group of before, meet the new one. Raises GroupLost."""
        self.shutdown()
        meeting = Meeting(**init_info.meeting)
        self._group = Group(meeting, init_info.first_rank + self.parallel_config.rank, self.device)
        self._generation = meeting.generation

    def start_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

        if self._updating:
            # One that broke off. A layer that had some of its weights would count them twice, and be done too early.
            finalize_layerwise_reload(self.model, self.model_config)
        self._updating = True
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":  # the base class synchronises an accelerator; a CPU has none
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: Arrival) -> None:
        model: Any = self.model
        layout = Layout(**update_info.layout)
        # Each tensor keeps the memory of its whole bucket while its layer waits for its remaining weights: most of the
        # time that ends before the next bucket.
        model.load_weights(tensors_of(self._flat(update_info, layout.bytes), layout))

    def _flat(self, arrival: Arrival, size: int) -> Tensor:
        if arrival.path:
            return mapped(arrival.path, size)
        if self._group is None or arrival.generation != self._generation:
            raise GroupLost(f"a bucket of group {arrival.generation} for a member of group {self._generation}")
        return self._group.receive(size)

    def finish_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)
        self._updating = False
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
        if self._group is not None:
            self._group.close()
        self._group, self._generation = None, 0


def register() -> None:
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, BucketTransferEngine)


class WorkerExtension:
    """Nothing but the import: loading this class prepares a vLLM worker (transfer engine, repairs)."""


register()
keep_discarded_draws()
keep_pictures()
end_with_parent()
