"""Each case runs in a process of its own: the shim acts on a process, and pytest's has long imported everything."""

import ctypes
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from benchmarks.lives import still
from ergo_rl.cluster.compat import die_with_parent
from tests.conftest import ROOT

# The set-up script may have hooked every interpreter of this environment; most cases start without that.
UNHOOKED = """
import sys

sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__name__ != "_BeforeTorchvision"]
from ergo_rl.cluster.torchvision_repair import repair_torchvision
"""


def run_fresh(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_repair_torchvision_twice_then_image_processor_works() -> None:
    # 56 x 56 pixels in patches of 14: a grid of 4 x 4, 16 rows of 3 channels x 2 frames x 14 x 14 = 1176 values.
    code = """
        repair_torchvision()
        repair_torchvision()
        import numpy as np
        from transformers import Qwen2VLImageProcessor

        processor = Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=56 * 56)
        made = processor(images=[np.zeros((56, 56, 3), dtype=np.uint8)], return_tensors="pt")
        repair_torchvision()
        print(made["image_grid_thw"].tolist(), tuple(made["pixel_values"].shape))
    """
    assert run_fresh(UNHOOKED + textwrap.dedent(code)) == "[[1, 4, 4]] (16, 1176)"


def test_every_interpreter_of_this_environment_imports_torchvision() -> None:
    # Whether by matching builds or by the hook that the set-up script installed: vLLM's processes ask nobody.
    assert run_fresh("import torchvision.transforms.v2 as v2; print(v2.functional.resize.__name__)") == "resize"


def test_the_copy_in_the_environment_leaves_the_choice_of_packages_open() -> None:
    # The copy imports neither torch nor this project, which then comes from wherever the process looks first; a second
    # repair by the project's own module adds no second finder, and what the first declared stays.
    code = """
        import importlib.util, gc
        spec = importlib.util.spec_from_file_location("ergo_rl_torchvision", sys.argv[1])
        copy = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(copy)
        copy.repair_torchvision()
        print([name for name in ("ergo_rl", "torch", "torchvision") if name in sys.modules])
        from ergo_rl.cluster.torchvision_repair import repair_torchvision

        repair_torchvision()
        print(sum(type(finder).__name__ == "_BeforeTorchvision" for finder in sys.meta_path))
        assert importlib.util.find_spec("torchvision")
        gc.collect()
        import torchvision

        gc.collect()
        import torch

        print(torch.ops.torchvision.nms.default.name())
    """
    unhooked = UNHOOKED[: UNHOOKED.index("from ergo_rl")]
    module = str(ROOT / "cluster" / "torchvision_repair.py")
    assert run_fresh(unhooked + textwrap.dedent(code), module).splitlines() == ["[]", "1", "torchvision::nms"]


def test_repair_torchvision_imports_nothing() -> None:
    code = "repair_torchvision(); print([name for name in ('torch', 'torchvision') if name in sys.modules])"
    assert run_fresh(UNHOOKED + code) == "[]"


def test_repair_torchvision_missing_package_is_reported() -> None:
    code = """
        sys.path = [path for path in sys.path if "site-packages" not in path]
        repair_torchvision()
        try:
            import torchvision
        except ModuleNotFoundError as error:
            print(error)
    """
    assert run_fresh(UNHOOKED + textwrap.dedent(code)) == "No module named 'torchvision'"


PARENT = """
import multiprocessing, time

def child(told):
    from ergo_rl.cluster.compat import die_with_parent
    die_with_parent()
    told.send(multiprocessing.current_process().pid)
    time.sleep(1000)

if __name__ == "__main__":
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    spawn.Process(target=child, args=(there,)).start()
    print(here.recv(), flush=True)
    time.sleep(1000)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a service of Linux")
@pytest.mark.parametrize("stopped", [False, True])
def test_die_with_parent_killed_parent_then_child_ends_even_if_stopped(stopped: bool, tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        if stopped:
            os.kill(child, signal.SIGSTOP)
        assert still([(child, "")])
        parent.kill()
    deadline = time.monotonic() + 20
    while still([(child, "")]) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not still([(child, "")])


def test_die_with_parent_outside_vllm_changes_nothing() -> None:
    """This process was not spawned by multiprocessing: it does not end with the shell that runs the tests."""
    die_with_parent()
    found = ctypes.c_int(-1)
    assert ctypes.CDLL(None).prctl(2, ctypes.byref(found), 0, 0, 0) == 0 and found.value == 0  # PR_GET_PDEATHSIG
