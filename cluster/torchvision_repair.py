"""Make ``import torchvision`` work beside a torch that its compiled operators were not built for.

A CUDA build of torchvision beside a CPU build of torch cannot load its operator library. It goes on without it, then
registers fake implementations for two operators that do not exist, and the import fails (pytorch/vision #9085).
Declaring the two operators is enough: the image transforms, all that Qwen's processors use, are pure Python.
Remove when package indexes serve matching CPU builds of torch and torchvision by default.

Standard library only, and no import of this project: where it is needed, the set-up script copies this file into the
environment and has every interpreter call ``repair_torchvision`` when it starts (vLLM starts processes that import
torchvision before they load plugins). A copy, because loading ``ergo_rl`` that early would hide the one that a Ray job
ships as its working directory.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_declared: list[torch.library.Library] = []  # torch drops the operators when the library object is freed


def repair_torchvision() -> None:
    """Declare the operators before this process first imports torchvision, if their library cannot be loaded.

    Imports nothing by itself; where the library loads, or torchvision is already imported, it does nothing."""
    # By name: the other finder may come from the copy in site-packages.
    hooked = any(type(finder).__name__ == _BeforeTorchvision.__name__ for finder in sys.meta_path)
    if not hooked and "torchvision" not in sys.modules:
        sys.meta_path.insert(0, _BeforeTorchvision())


class _BeforeTorchvision(importlib.abc.MetaPathFinder):
    """Acts once, at the first import of torchvision, and never finds a module itself."""

    def find_spec(self, name: str, path: object, target: object = None) -> None:
        if name != "torchvision" or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec("torchvision")
        for folder in (spec.submodule_search_locations or []) if spec else []:
            import torch

            try:
                for library in Path(folder).glob("_C*.so"):
                    torch.ops.load_library(library)
            except OSError:
                _declare_operators()
        return None


def _declare_operators() -> None:
    import torch

    if hasattr(torch.ops.torchvision, "nms"):  # declared by another copy of this module
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        library.define(schema)
    _declared.append(library)
