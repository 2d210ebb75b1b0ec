"""Published models without their weights: shapes from ``jobs/model_shapes.json``, no hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ergo_rl.jobs.cost_model import _config_of


def model_on_meta(name: str) -> Any:
    """transformers' model as the learner publishes it, in bfloat16 and without memory."""
    import torch
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(_config_of(name, ""), dtype=torch.bfloat16)


def folder_of(name: str, parent: Path) -> Path:
    """A folder with the configuration alone; a name that is a folder itself is returned as it is."""
    if Path(name).exists():
        return Path(name)
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    config, folder = _config_of(name, ""), parent / name.replace("/", "--")
    config.architectures = [MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)].__name__]
    config.dtype = "bfloat16"
    config.save_pretrained(folder)
    return folder
