"""Models by name and revision, out of a hub cache in huggingface_hub's own layout, without a network."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ergo_rl.episodes.families import ModelNotFound, family_of, load_tokenizer
from ergo_rl.jobs.config import TrainConfig, load_config
from ergo_rl.jobs.cost_model import model_spec
from ergo_rl.jobs.fingerprints import inputs_of
from ergo_rl.learners.checkpoint import export
from ergo_rl.learners.config import LearnerConfig
from ergo_rl.learners.learner import _image_processor
from ergo_rl.learners.model import PolicyModel
from ergo_rl.model_names import engine_arguments, pretrained, split_revision
from tests.conftest import ROOT
from tests.factories import tiny_model

NAME = "lab/tiny"
OLD, NEW = "a" * 40, "b" * 40


@pytest.mark.parametrize(
    ("model", "name", "revision"),
    [
        ("org/name", "org/name", None),
        ("org/name@v1.0", "org/name", "v1.0"),
        ("org/name@refs/pr/3", "org/name", "refs/pr/3"),
        ("org/name@", "org/name@", None),
        ("@main", "@main", None),
        ("", "", None),
    ],
)
def test_split_revision_takes_what_stands_behind_the_first_at(model: str, name: str, revision: str | None) -> None:
    assert split_revision(model) == (name, revision)
    assert engine_arguments(model) == {"model": name, "revision": revision, "tokenizer_revision": revision}
    assert pretrained(model).get("revision") == revision


def test_split_revision_of_a_folder_with_an_at_is_the_folder(tmp_path: Path) -> None:
    (tmp_path / "mine@home").mkdir()
    assert split_revision(str(tmp_path / "mine@home")) == (str(tmp_path / "mine@home"), None)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two commits of one model: ``main`` is the newer one, the tag ``v1`` the older, which has another longest text and
    another size of images. Files are links into ``blobs``, as the hub's own client lays them out."""
    home = tmp_path / "hub" / "models--lab--tiny"
    for seed, (commit, ref) in enumerate(((OLD, "v1"), (NEW, "main"))):
        made = tiny_model(tmp_path / ref, seed=seed, text={"max_position_embeddings": 1024 * (1 + seed)})
        processor = json.loads((made / "preprocessor_config.json").read_text())
        processor["size"]["longest_edge"] = 1000 * (1 + seed)
        (made / "preprocessor_config.json").write_text(json.dumps(processor))
        for folder in ("blobs", "refs", f"snapshots/{commit}"):
            (home / folder).mkdir(parents=True, exist_ok=True)
        (home / "refs" / ref).write_text(commit)
        for file in made.iterdir():
            blob = home / "blobs" / f"{seed}{file.name}"
            file.rename(blob)
            os.symlink(f"../../blobs/{blob.name}", home / "snapshots" / commit / file.name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return home


def trained_on(model: str) -> TrainConfig:
    config = load_config(ROOT / "configs" / "panels.yaml", [f"model={model}"])
    return replace(config, questions=replace(config.questions, paths=[]))


def test_every_place_that_loads_takes_the_revision(cache: Path, tmp_path: Path) -> None:
    """Of a tag, a commit and no revision: configuration, tokenizer, processor, weights, size, fingerprint, export."""
    heads = {}
    for model, commit, longest in ((f"{NAME}@v1", OLD, 1000), (f"{NAME}@{OLD}", OLD, 1000), (NAME, NEW, 2000)):
        family_of(model), load_tokenizer(model), model_spec(model)
        assert _image_processor(model).size["longest_edge"] == longest
        policy = PolicyModel(LearnerConfig(model=model)).vlm
        assert policy.config.text_config.max_position_embeddings == 1024 * longest // 1000
        heads[model] = policy.lm_head.weight
        assert inputs_of(trained_on(model))["learner.model"] == commit
        export(policy, dict(policy.named_parameters()), model, tmp_path / f"out {commit}")
        written = json.loads((tmp_path / f"out {commit}" / "processor_config.json").read_text())
        assert f'"longest_edge": {longest}' in json.dumps(written)
    assert torch.equal(heads[f"{NAME}@v1"], heads[f"{NAME}@{OLD}"]) and not torch.equal(
        heads[NAME], heads[f"{NAME}@v1"]
    )


def test_revision_that_is_not_there_is_refused_in_a_sentence(cache: Path) -> None:
    with pytest.raises(
        ModelNotFound, match=r"the model lab/tiny at revision v9 cannot be loaded: OSError: .*"
    ) as error:
        family_of(f"{NAME}@v9")
    assert "\n" not in str(error.value)
