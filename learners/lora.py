"""LoRA (Hu et al., arXiv 2106.09685): small trained adapters beside the frozen linear layers of the language model.

Engines and exported folders never see an adapter: weights leave the learner merged, base + alpha / rank * up @ down."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ergo_rl.errors import ErgoError
from ergo_rl.learners.config import LoraConfig

ADAPTER_NAME = "default"
"""The name under which peft keeps a layer's only adapter."""


class PeftMissing(ErgoError, ImportError):
    """``learner.lora.rank`` is set, and peft is not installed."""


@dataclass(frozen=True, slots=True, eq=False)
class Weight:
    """A weight as engines load it: the parameter and, where it has one, its adapter."""

    name: str
    """The model's own module name, without a trace of adapters."""
    base: nn.Parameter
    """[out, in] with an adapter, any shape without."""
    adapter: tuple[nn.Parameter, nn.Parameter, float] | None = None
    """down [rank, in], up [out, rank], and the scale alpha / rank."""

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All parameters that must be whole (gathered) for ``value``."""
        return [self.base] if self.adapter is None else [self.base, *self.adapter[:2]]

    @property
    def bytes(self) -> int:
        # ZeRO-3 leaves parameters with 0 elements; ds_numel is their true number
        return int(getattr(self.base, "ds_numel", self.base.numel())) * self.base.element_size()

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(getattr(self.base, "ds_shape", self.base.shape))

    @torch.no_grad()
    def value(self, copy: bool = True, device: str | torch.device = "cpu") -> Tensor:
        """Return the weight on ``device`` in the precision of the passes, merged in fp32.

        Without ``copy`` it may share the parameter's memory."""
        if self.adapter is None:
            return self.base.detach().to(device, copy=copy)
        down, up, scale = self.adapter
        merged = self.base.float() + scale * (up.float() @ down.float())
        return merged.to(device, self.base.dtype)


def add_adapters(vlm: Any, config: LoraConfig) -> None:
    """Put adapters beside every target layer of the language model, and freeze everything else.

    A new adapter changes nothing: ``up`` is 0. ``down`` is drawn from a fixed seed, so that all ranks hold the same.
    Raises PeftMissing, and ValueError for a target that the model does not have."""
    try:
        from peft import LoraConfig as Peft
        from peft import inject_adapter_in_model
    except ImportError as error:
        raise PeftMissing(
            "learner.lora.rank is set, which needs the package peft: pip install 'ergo-rl[lora]'"
        ) from error
    modules = vlm.model.language_model.named_modules()
    linear = {name.rpartition(".")[2] for name, module in modules if isinstance(module, nn.Linear)}
    if unknown := sorted(set(config.targets) - linear):
        raise ValueError(f"learner.lora.targets: {unknown} are no linear layers of this model; it has {sorted(linear)}")
    settings = Peft(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=rf"model\.language_model\..*\.({'|'.join(config.targets)})",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        inject_adapter_in_model(settings, vlm, ADAPTER_NAME)


def named_weights(vlm: Any) -> Iterator[Weight]:
    """Yield every weight once, by the name it has without adapters.

    These are the model's own module names (``model.visual...``, ``model.language_model...``, ``lm_head.weight``; the
    last is absent where embeddings are tied), which vLLM's loaders accept."""
    adapters = {
        f"{path}.weight": (
            module.lora_A[ADAPTER_NAME].weight,
            module.lora_B[ADAPTER_NAME].weight,
            float(module.scaling[ADAPTER_NAME]),
        )
        for path, module in vlm.named_modules()
        if hasattr(module, "lora_A")
    }
    for name, parameter in vlm.named_parameters():
        if ".lora_A." not in name and ".lora_B." not in name:
            plain = name.replace(".base_layer.", ".")
            yield Weight(plain, parameter, adapters.get(plain))
