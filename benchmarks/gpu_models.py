"""What ``benchmarks.gpu_check`` measures with: the sizes of both devices, random models, pictures, notes of a job."""

from __future__ import annotations

import io
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ergo_rl.cluster.compat import repair_torchvision
from ergo_rl.episodes.types import Question
from ergo_rl.jobs.cost_model import KNOWN

TOKENIZER = "models/panels-policy"
SMALL: dict[str, Any] = {
    "model_type": "qwen2_5_vl",
    "tie_word_embeddings": True,
    "text_config": {
        "model_type": "qwen2_5_vl_text", "vocab_size": 2048, "hidden_size": 128, "intermediate_size": 256,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]},
    },
    "vision_config": {
        "model_type": "qwen2_5_vl_vision", "depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4,
        "out_hidden_size": 128, "patch_size": 14, "spatial_merge_size": 2, "fullatt_block_indexes": [1],
    },
}  # fmt: skip
"""The shape of both random models in a dry run: as the 3B one, its vocabulary is larger than the tokenizer's."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """policy, latency: names in ``jobs/model_shapes.json``, empty for ``SMALL``; small, large: visual tokens of the
    latencies, small of the colocated steps, too; reply: tokens of each turn; scale: of the learner's trajectories, 1
    has the method's lengths."""

    gpu: bool
    panels: str
    policy: str
    latency: str
    small: int
    large: int
    reply: int
    questions: int
    scale: float
    repeats: int

    @property
    def dtype(self) -> str:
        return "bfloat16" if self.gpu else "float32"


GPU = Sizes(
    True, "configs/panels-gpu.yaml", "Qwen/Qwen2.5-VL-3B-Instruct", "Qwen/Qwen2.5-VL-7B-Instruct", 640, 16_384, 64, 4,
    1.0, 5,
)  # fmt: skip
CPU = Sizes(False, "configs/panels.yaml", "", "", 16, 256, 8, 1, 0.05, 3)


class Notes:
    """What a job has found so far, by section; in a file that is whole at any moment."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.found: dict[str, dict[str, Any]] = {}

    def __call__(self, section: str, **figures: Any) -> None:
        self.found.setdefault(section, {}).update(figures)
        aside = self._path.with_suffix(".new")
        aside.write_text(json.dumps(self.found))
        os.replace(aside, self._path)


def models(sizes: Sizes, folder: Path, note: Notes) -> None:
    """``policy``: random weights of the policy's shape; ``latency``: no weights, vLLM makes up its own."""
    repair_torchvision()
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

    from ergo_rl.examples.panels.tiny_model import make_processor, save_folder

    tokenizer: Any = AutoTokenizer.from_pretrained(TOKENIZER)
    ids = {f"{name}_token_id": f"<|{name}|>" for name in ("vision_start", "vision_end")}
    ids |= {f"{name}_token_id": f"<|{name}_pad|>" for name in ("image", "video")}
    special = {key: tokenizer.convert_tokens_to_ids(token) for key, token in ids.items()}
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    processor = make_processor(tokenizer, most=max(sizes.large, 1280))
    dtype = getattr(torch, sizes.dtype)

    def config_of(name: str) -> Any:
        cells = json.loads(KNOWN.read_text())[name] if name else dict(SMALL)
        text = cells.pop("text_config") | ends
        return AutoConfig.for_model(cells.pop("model_type"), text_config=text, **cells, **special)

    started = time.monotonic()
    torch.manual_seed(0)
    with torch.device("cuda" if sizes.gpu else "cpu"):  # 4 billion random numbers: a second, not a minute
        model: Any = AutoModelForImageTextToText.from_config(config_of(sizes.policy), dtype=dtype)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    save_folder(model, processor, folder / "policy")
    size = sum(file.stat().st_size for file in (folder / "policy").glob("*.safetensors"))
    empty = config_of(sizes.latency)
    empty.architectures, empty.dtype = [type(model).__name__], dtype
    empty.save_pretrained(folder / "latency")
    processor.save_pretrained(folder / "latency")
    parameters = sum(each.numel() for each in model.parameters())
    note("models", parameters=parameters, bytes=size, seconds=time.monotonic() - started)


def picture(seed: int, side: int) -> bytes:
    """A JPEG of side x side pixels, another one for each seed: a cache of any kind would make latencies nonsense."""
    noise = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def question(seed: int, side: int) -> Question:
    return Question(f"picture-{seed}", picture(seed, side), "Which mark is on the red panel?", "ring")
