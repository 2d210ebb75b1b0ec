"""LoRA (Hu et al., arXiv 2106.09685): small trained adapters beside the frozen linear layers of the language model.

Engines and other programs never see an adapter: a weight leaves the learner merged, base + alpha / rank * up @ down."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ergo_rl.learners.config import LoraConfig

NAME = "default"
"""The one adapter of a layer, in peft's books."""


class PeftMissing(ImportError):
    """``learner.lora.rank`` is set, and peft is not installed."""


@dataclass(frozen=True, slots=True, eq=False)
class Weight:
    """A weight as others load it, by the model's own module name: the parameter and, where it has one, its adapter.

    base [out, in] (or of any shape without an adapter); down [rank, in], up [out, rank] and the scale alpha / rank."""

    name: str
    base: nn.Parameter
    adapter: tuple[nn.Parameter, nn.Parameter, float] | None = None

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All that ``value`` needs whole."""
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
        """On ``device`` in the precision of the passes, merged in fp32. Without ``copy`` it may be the parameter's own
        memory."""
        if self.adapter is None:
            return self.base.detach().to(device, copy=copy)
        down, up, scale = self.adapter
        merged = self.base.float() + scale * (up.float() @ down.float())
        return merged.to(device, self.base.dtype)


def add_adapters(vlm: Any, config: LoraConfig) -> None:
    """Put adapters beside every target of every block of the language model, and freeze everything else. An adapter
    starts as no change at all: ``up`` is 0; ``down`` is drawn from a fixed seed, so that all ranks hold the same.

    Raises PeftMissing, and ValueError for a target that the model does not have."""
    try:
        from peft import LoraConfig as Peft
        from peft import inject_adapter_in_model
    except ImportError as error:
        raise PeftMissing(
            "learner.lora.rank is set, which needs the package peft: pip install 'ergo-rl[lora]'"
        ) from error
    linear = {
        name.rpartition(".")[2] for name, module in vlm.model.language_model.named_modules() if _is_linear(module)
    }
    if unknown := sorted(set(config.targets) - linear):
        raise ValueError(f"learner.lora.targets: {unknown} are no linear layers of this model; it has {sorted(linear)}")
    settings = Peft(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=rf"model\.language_model\..*\.({'|'.join(config.targets)})",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        inject_adapter_in_model(settings, vlm, NAME)


def weights_of(vlm: Any) -> Iterator[Weight]:
    """Every weight once, by the names it has without adapters."""
    adapters = {
        f"{path}.weight": (module.lora_A[NAME].weight, module.lora_B[NAME].weight, float(module.scaling[NAME]))
        for path, module in vlm.named_modules()
        if hasattr(module, "lora_A")
    }
    for name, parameter in vlm.named_parameters():
        if ".lora_A." not in name and ".lora_B." not in name:
            plain = name.replace(".base_layer.", ".")
            yield Weight(plain, parameter, adapters.get(plain))


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)
