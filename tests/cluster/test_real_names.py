"""Every weight of the published models, in real shapes, finds its place in vLLM's class, and no place stays empty: from
the learner's buckets through vLLM's own loader, on torch's meta device, where nothing has memory."""
# ruff: noqa: E402

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ergo_rl.cluster.compat import repair_torchvision

repair_torchvision()
from ergo_rl.cluster.weight_buckets import BucketSpec, unpack
from ergo_rl.learners.config import LearnerConfig
from ergo_rl.learners.learner import _described, _in_buckets
from ergo_rl.learners.lora import named_weights
from tests.cluster.shapes import folder_of, model_on_meta

BUCKET = LearnerConfig().bucket_bytes


@pytest.fixture(scope="module", autouse=True)
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """vLLM asks for process groups even where there is one process. It also writes into the environment."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state as parallel

    before = dict(os.environ)
    with set_current_vllm_config(VllmConfig()):
        address = f"file://{tmp_path_factory.mktemp('group')}/store"
        parallel.init_distributed_environment(1, 0, address, 0, "gloo")
        parallel.ensure_model_parallel_initialized(1, 1)
    yield
    parallel.cleanup_dist_env_and_memory()
    os.environ.clear()
    os.environ.update(before)


def engine_model(name: str, folder: Path) -> Any:
    """vLLM's model as an engine makes it, before it has weights."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    arguments = EngineArgs(model=str(folder_of(name, folder)), dtype="bfloat16", max_model_len=4096, enforce_eager=True)
    config = arguments.create_engine_config()
    with set_default_torch_dtype(torch.bfloat16), torch.device("meta"):
        return initialize_model(config)


def sent(name: str) -> Iterator[tuple[str, torch.Tensor]]:
    for members in _in_buckets(named_weights(model_on_meta(name)), BUCKET):
        spec = BucketSpec.of(map(_described, members))
        yield from unpack(torch.empty(spec.bytes, dtype=torch.uint8, device="meta"), spec)


@pytest.mark.parametrize(
    ("name", "weights", "parameters"),
    [
        ("Qwen/Qwen2.5-VL-7B-Instruct", 729, 0),
        ("Qwen/Qwen2.5-VL-3B-Instruct", 824, 0),  # its head is its embeddings
        ("Qwen/Qwen3-VL-8B-Instruct", 750, 0),
        ("Qwen/Qwen3-VL-4B-Instruct", 713, 0),
    ],
)
def test_weights_when_published_then_vllms_model_takes_each_and_lacks_none(
    name: str, weights: int, parameters: int, tmp_path: Path
) -> None:
    model = engine_model(name, tmp_path)
    published = list(sent(name))
    loaded = model.load_weights(iter(published))
    wanted = dict(model.named_parameters())
    assert loaded == wanted.keys()
    assert len({key for key, _ in published}) == len(published) == weights
    assert len(wanted) == parameters
    # Nothing was dropped on the way: what is fused has the sizes of its parts together.
    assert sum(tensor.numel() for _, tensor in published) == sum(parameter.numel() for parameter in wanted.values())
