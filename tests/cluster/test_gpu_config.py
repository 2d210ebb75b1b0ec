"""What ``ergo-rl plan`` assumes of the engines of each recipe for GPUs is what vLLM's build for GPUs configures on an
H100; and the weights of the published models, at full depth, find their places in its classes. No GPU is needed, but
that build: ``make rehearse``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from ergo_rl.jobs.config import load_config
from ergo_rl.jobs.cost_model import GIB, engine_batch
from ergo_rl.jobs.placement_plan import make_plan
from tests.cluster.faked_h100 import no_driver
from tests.cluster.shapes import MODELS
from tests.conftest import ROOT

pytestmark = pytest.mark.skipif("ERGO_RL_REHEARSE" not in os.environ, reason="vLLM for GPUs: make rehearse")
RECIPES = ("ergo-3b", "ergo-7b", "ergo-7b-judge", "panels-gpu", "qwen3-vl-8b")
ENGINES = [*((recipe, "rollout") for recipe in RECIPES), ("ergo-7b-judge", "reward"), ("panels-gpu", "reward")]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    command = [sys.executable, "-m", "tests.cluster.faked_h100", *(f"configs/{recipe}.yaml" for recipe in RECIPES)]
    there = no_driver(tmp_path_factory.mktemp("driver"))
    done = subprocess.run(command, cwd=ROOT, env=there, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(("recipe", "role"), ENGINES)
def test_engine_when_configured_for_an_h100_then_it_is_what_the_plan_assumes(
    recipe: str, role: str, found: Any
) -> None:
    config = load_config(ROOT / "configs" / f"{recipe}.yaml")
    engine = config.rollout.engine if role == "rollout" else config.reward.verifier.engine
    planned = make_plan(config).engines[role]
    tokens = {part.name: part.bytes for part in planned.parts}["KV cache, at least"] / engine.max_model_len
    assert found[recipe][role] == {
        "runner": "V2",
        "batch": engine_batch(engine),
        "seqs": engine.max_num_seqs,
        "async": True,
        "length": engine.max_model_len,
        "dtype": "bfloat16",
        "share": engine.gpu_memory_utilization,
        "cache": engine.extra.get("kv_cache_memory_bytes"),
        "images": planned.images.bytes / GIB,
        "ways": engine.tensor_parallel_size,
        "numbers a token": tokens / 2,
        "graphs": "NONE" if engine.enforce_eager else "FULL_AND_PIECEWISE",
        "largest graph": 0 if engine.enforce_eager else min(512, 2 * engine.max_num_seqs),
        "attention": ["FLASH_ATTN", "FLASH_ATTN", 3],
    }


def test_recipes_when_listed_here_then_none_for_gpus_is_forgotten(found: Any) -> None:
    assert set(RECIPES) == {path.stem for path in (ROOT / "configs").glob("*.yaml")} - {"panels"}
    assert {(recipe, role) for recipe in RECIPES for role in found[recipe]} == set(ENGINES)


@pytest.mark.parametrize("name", MODELS)
def test_weights_at_full_depth_when_published_then_the_gpus_classes_take_each(name: str, found: Any) -> None:
    assert tuple(found["weights"][name]) == MODELS[name]
