"""What vLLM makes of the engines of the recipes on an H100 that is not there, by recipe and role, and where it puts the
weights of published models: prints a JSON object.

A process of its own, because it replaces vLLM's platform, and needs a driver's library that is none (``no_driver``).
For vLLM's build for GPUs. What would ask the driver is answered here, all else is vLLM's code and ours."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ergo_rl.cluster.compat import repair_torchvision
from ergo_rl.cluster.config import EngineConfig
from ergo_rl.cluster.engine import Engine
from ergo_rl.jobs.config import TrainConfig, load_config
from ergo_rl.rewards.config import Backend
from tests.cluster.shapes import MODELS, folder_of, join_groups, load

DRIVER = """
cuCtxGetCurrent cuCtxSetCurrent cuDeviceGetAttribute cuDevicePrimaryCtxRetain cuGetErrorString cuGetProcAddress_v2
cuMemAddressFree cuMemAddressReserve cuMemCreate cuMemGetAllocationGranularity cuMemMap cuMemRelease cuMemSetAccess
cuMemUnmap cuPointerGetAttribute cuTensorMapEncodeTiled
"""
"""What vLLM's compiled parts want of libcuda before they load."""


def no_driver(folder: Path) -> dict[str, str]:
    """The environment of a process that finds a libcuda.so.1 which answers everything with CUDA_ERROR_NO_DEVICE."""
    code = "".join(f"int {name}(void) {{ return 100; }}\n" for name in DRIVER.split())
    (folder / "libcuda.c").write_text(code, encoding="utf-8")
    command = ["cc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", "libcuda.so.1", "libcuda.c"]
    subprocess.run(command, cwd=folder, check=True)
    return os.environ | {"LD_LIBRARY_PATH": f"{folder}{os.pathsep}{os.environ.get('LD_LIBRARY_PATH', '')}"}


def pretend() -> None:
    repair_torchvision()
    import vllm.config.vllm
    from vllm import platforms
    from vllm.platforms.cuda import NonNvmlCudaPlatform
    from vllm.platforms.interface import DeviceCapability

    class H100(NonNvmlCudaPlatform):
        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
            return DeviceCapability(9, 0)

        @classmethod
        def get_device_name(cls, device_id: int = 0) -> str:
            return "NVIDIA H100 80GB HBM3"

        @classmethod
        def get_device_total_memory(cls, device_id: int = 0) -> int:
            return 80 << 30

        @classmethod
        def num_compute_units(cls, device_id: int = 0) -> int:
            return 132

        @classmethod
        def device_count(cls) -> int:
            return 8

    platforms._current_platform = H100()
    vllm.config.vllm.HAS_TRITON = True  # it asks triton for a driver


class Caught(Exception):
    """Carries the arguments out of Engine.start, at the point where vLLM would start."""


def arguments_of(config: EngineConfig) -> Any:
    from vllm.v1.engine.async_llm import AsyncLLM

    def catch(arguments: Any) -> None:
        raise Caught(arguments)

    AsyncLLM.from_engine_args = catch
    try:
        asyncio.run(Engine.start(config))
    except Caught as caught:
        return caught.args[0]


def described(config: EngineConfig) -> dict[str, Any]:
    from vllm.config import set_current_vllm_config
    from vllm.platforms import current_platform
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version
    from vllm.v1.attention.selector import get_attn_backend

    made = arguments_of(config).create_engine_config(UsageContext.ENGINE_CONTEXT)
    model, parallel = made.model_config, made.parallel_config
    vision = model.hf_config.vision_config
    with set_current_vllm_config(made):
        text = get_attn_backend(model.get_head_size(), model.dtype, made.cache_config.cache_dtype)
        tower = current_platform.get_vit_attn_backend(vision.hidden_size // vision.num_heads, model.dtype)
        version = get_flash_attn_version()
    return {
        "runner": "V2" if made.use_v2_model_runner else "V1",
        "batch": made.scheduler_config.max_num_batched_tokens,
        "seqs": made.scheduler_config.max_num_seqs,
        "async": made.scheduler_config.async_scheduling,
        "length": model.max_model_len,
        "dtype": str(model.dtype).removeprefix("torch."),
        "share": made.cache_config.gpu_memory_utilization,
        "cache": made.cache_config.kv_cache_memory_bytes,
        "images": model.multimodal_config.mm_processor_cache_gb,
        "ways": parallel.tensor_parallel_size,
        "numbers a token": 2
        * model.get_num_layers(parallel)
        * model.get_num_kv_heads(parallel)
        * model.get_head_size(),
        "graphs": made.compilation_config.cudagraph_mode.name,
        "largest graph": max(made.compilation_config.cudagraph_capture_sizes, default=0),
        "attention": [text.get_name(), tower.name, version],
    }


def engines(config: TrainConfig) -> Iterator[tuple[str, EngineConfig]]:
    yield "rollout", config.rollout.engine
    if config.reward.verifier.backend is Backend.ENGINE:
        yield "reward", config.reward.verifier.engine


def main(recipes: list[str]) -> None:
    pretend()
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent)
        for recipe in recipes:
            for role, engine in engines(load_config(Path(recipe))):
                local = replace(engine, model=str(folder_of(engine.model, folder)))
                found.setdefault(Path(recipe).stem, {})[role] = described(local)
        join_groups(folder)
        found["weights"] = {name: load(name, folder) for name in MODELS}
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
