from pathlib import Path
from typing import Any

import pytest

from ergo_rl.episodes.families import Qwen3VL
from tests.factories import tiny_model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2.5-VL folder."""
    return tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_qwen3(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3-VL folder."""
    from transformers import AutoTokenizer

    from ergo_rl.examples.panels.tiny_model import TinyConfig, make_model, make_processor, save_folder

    tokenizer: Any = AutoTokenizer.from_pretrained(tiny)
    small = TinyConfig(hidden=64, layers=2, heads=2, intermediate=96, vision_hidden=32, vision_layers=3, vision_heads=2)
    path, family = tmp_path_factory.mktemp("models") / "qwen3", Qwen3VL()
    save_folder(make_model(tokenizer, small, 0, family), make_processor(tokenizer, family), path)
    return path
