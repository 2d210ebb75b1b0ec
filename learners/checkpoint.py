"""Weights as a Hugging Face folder, and DeepSpeed's own state for going on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor


def export(vlm: Any, weights: Mapping[str, Tensor], source: str, path: Path) -> None:
    """Weights by module names -> a folder with the names ``save_pretrained`` writes, and the processor of
    ``source``."""
    from transformers import AutoProcessor

    vlm.save_pretrained(path, state_dict=dict(weights))
    AutoProcessor.from_pretrained(source).save_pretrained(path)


def save(engine: Any, path: Path, step: int) -> None:
    """Every rank's part of the optimiser state, weights and step. Every rank must call it."""
    engine.save_checkpoint(str(path), tag=f"step-{step}", client_state={"step": step})


def restore(engine: Any, path: Path) -> int:
    """The newest state under ``path``; returns its step. Raises FileNotFoundError where there is none."""
    found, state = engine.load_checkpoint(str(path))
    if found is None:
        raise FileNotFoundError(f"no learner state under {path}")
    return int(state["step"])
