"""Find out how large a model is, parameters and widths, from its config alone: no weights are read or allocated."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ergo_rl.cluster.compat import repair_torchvision
from ergo_rl.jobs.config import ConfigError

KNOWN = Path(__file__).with_name("model_shapes.json")
"""Sizes from the configs of known hub models, so that a plan needs no network."""


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Parameters and widths of a model; the widths are those of its config."""

    parameters: int
    """All of them, tied ones counted once."""
    vision: int
    """Parameters of the vision tower."""
    linear: tuple[tuple[str, int, int], ...]
    """(last part of the name, inputs, outputs) of each linear layer in the language model's blocks."""
    layers: int
    hidden: int
    intermediate: int
    kv_width: int
    kv_heads: int
    vocabulary: int
    vision_layers: int
    vision_hidden: int
    vision_intermediate: int
    patches_per_token: int

    def adapters(self, rank: int, targets: list[str]) -> int:
        """Parameters of LoRA adapters of this rank."""
        return sum(rank * (inputs + outputs) for name, inputs, outputs in self.linear if name in targets)


@lru_cache
def model_spec(model: str) -> ModelSpec:
    """The size of a local folder, of a name in ``model_shapes.json``, or of a hub name.

    Raises ConfigError where the config cannot be loaded."""
    repair_torchvision()
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = _config_of(model, AutoConfig)
    with torch.device("meta"):
        vlm: Any = AutoModelForImageTextToText.from_config(config)
    text, vision = config.text_config, config.vision_config
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return ModelSpec(
        parameters=sum(parameter.numel() for parameter in vlm.parameters()),
        vision=sum(parameter.numel() for parameter in vlm.model.visual.parameters()),
        linear=tuple(
            (name.rpartition(".")[2], module.in_features, module.out_features)
            for name, module in vlm.model.language_model.named_modules()
            if isinstance(module, torch.nn.Linear)
        ),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=text.intermediate_size,
        kv_width=text.num_key_value_heads * head,
        kv_heads=text.num_key_value_heads,
        vocabulary=text.vocab_size,
        vision_layers=vision.depth,
        vision_hidden=vision.hidden_size,
        vision_intermediate=vision.intermediate_size,
        patches_per_token=vision.spatial_merge_size**2,
    )


def _config_of(model: str, auto_config: Any) -> Any:
    known = json.loads(KNOWN.read_text())
    if model in known:
        cells = dict(known[model])
        return auto_config.for_model(cells.pop("model_type"), **cells)
    try:
        return auto_config.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"the size of {model} is not known: {str(error).splitlines()[0]}; give a local folder, or one of "
            f"{', '.join(sorted(known))}"
        ) from error
