"""Every weight of the published models, by name and shape, finds its place in vLLM's class, and no place stays empty:
from the learner's buckets through vLLM's own loader, where nothing has memory. At full depth: ``make rehearse``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from ergo_rl.cluster.compat import repair_torchvision
from ergo_rl.cluster.devices import vllm_build
from tests.cluster.shapes import MODELS, engine_model, folder_of, join_groups, load, published

pytestmark = pytest.mark.skipif(vllm_build() != "cpu", reason="vLLM's other builds make no model without a GPU")


@pytest.fixture(scope="module", autouse=True)
def groups(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    repair_torchvision()
    before = dict(os.environ)  # vLLM writes into it
    join_groups(tmp_path_factory.mktemp("groups"))
    yield
    from vllm.distributed import parallel_state

    parallel_state.destroy_model_parallel()
    parallel_state.destroy_distributed_environment()
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.parametrize("name", MODELS)
def test_weights_when_published_then_vllms_model_takes_each_and_lacks_none(name: str, tmp_path: Path) -> None:
    """Two blocks, because all have the same names."""
    weights, parameters = load(name, tmp_path, blocks=2)
    assert weights > parameters > 30


def test_weight_when_its_name_is_unknown_or_it_is_left_out_then_the_comparison_says_so(tmp_path: Path) -> None:
    """The control of the test above: what vLLM's loader itself refuses, and what it does not notice."""
    name = "Qwen/Qwen2.5-VL-3B-Instruct"
    weights = dict(published(name, 1))
    model = engine_model(folder_of(name, tmp_path, 1))
    first = next(iter(weights))
    with pytest.raises(ValueError, match="nobody"):
        model.load_weights([("model.visual.nobody.weight", weights[first])])
    lost = weights.pop("model.language_model.norm.weight")
    assert lost.shape == (2048,)
    assert model.load_weights(iter(weights.items())) == dict(model.named_parameters()).keys() - {
        "language_model.model.norm.weight"
    }
