"""Published models without their weights: shapes from ``jobs/model_shapes.json``, no hub, torch's meta device."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ergo_rl.jobs.cost_model import _config_of

if TYPE_CHECKING:
    import torch

MODELS = {
    "Qwen/Qwen2.5-VL-7B-Instruct": (729, 525),
    "Qwen/Qwen2.5-VL-3B-Instruct": (824, 580),
    "Qwen/Qwen3-VL-8B-Instruct": (750, 642),
    "Qwen/Qwen3-VL-4B-Instruct": (713, 605),
}
"""How many weights the learner publishes, and how many parameters vLLM's class has: it fuses some, and a head that is
tied to the embeddings is none of its own."""


def config_of(name: str, blocks: int | None) -> Any:
    """blocks: of the language model and of the tower; None: as published."""
    config = _config_of(name, "")
    if blocks is not None:
        config.text_config.num_hidden_layers = config.vision_config.depth = blocks
        if getattr(config.text_config, "layer_types", None):
            config.text_config.layer_types = config.text_config.layer_types[:blocks]
    return config


def folder_of(name: str, parent: Path, blocks: int | None = None) -> Path:
    """A folder with the configuration alone; a name that is a folder itself is returned as it is."""
    if Path(name).exists():
        return Path(name)
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    config, folder = config_of(name, blocks), parent / f"{name.replace('/', '--')}-{blocks}"
    config.architectures = [MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)].__name__]
    config.dtype = "bfloat16"
    config.save_pretrained(folder)
    return folder


def published(name: str, blocks: int | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """What an engine takes out of the learner's buckets, in bfloat16."""
    import torch
    from transformers import AutoModelForImageTextToText

    from ergo_rl.cluster.weight_buckets import BucketSpec, unpack
    from ergo_rl.learners.config import LearnerConfig
    from ergo_rl.learners.learner import _described, _in_buckets
    from ergo_rl.learners.lora import named_weights

    with torch.device("meta"):
        vlm = AutoModelForImageTextToText.from_config(config_of(name, blocks), dtype=torch.bfloat16)
    for members in _in_buckets(named_weights(vlm), LearnerConfig().bucket_bytes):
        spec = BucketSpec.of(map(_described, members))
        yield from unpack(torch.empty(spec.bytes, dtype=torch.uint8, device="meta"), spec)


def engine_model(folder: Path) -> Any:
    """vLLM's model as an engine makes it before it has weights; needs its process groups (``join_groups``)."""
    import torch
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    arguments = EngineArgs(model=str(folder), dtype="bfloat16", max_model_len=4096, enforce_eager=True)
    with set_default_torch_dtype(torch.bfloat16), torch.device("meta"):
        return initialize_model(arguments.create_engine_config())


def join_groups(folder: Path) -> None:
    """vLLM asks for process groups even where there is one process."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state as parallel

    with set_current_vllm_config(VllmConfig()):
        parallel.init_distributed_environment(1, 0, f"file://{folder}/store", 0, "gloo")
        parallel.ensure_model_parallel_initialized(1, 1)


def load(name: str, folder: Path, blocks: int | None = None) -> tuple[int, int]:
    """Give vLLM's model all that the learner publishes; returns how many weights and how many parameters there are.

    Raises AssertionError where a parameter gets nothing, a weight has no place, or numbers are lost on the way. The
    loader itself compares shapes."""
    model = engine_model(folder_of(name, folder, blocks))
    weights = dict(published(name, blocks))
    parameters = dict(model.named_parameters())
    loaded = model.load_weights(iter(weights.items()))
    assert loaded == parameters.keys(), loaded ^ parameters.keys()
    count = [sum(tensor.numel() for tensor in tensors.values()) for tensors in (weights, parameters)]
    assert count[0] == count[1], (name, count)
    return len(weights), len(parameters)
