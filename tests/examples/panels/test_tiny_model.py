"""The tiny Qwen2.5-VL: an ordinary Hugging Face folder, and the two that are committed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ergo_rl.cluster.compat import repair_torchvision
from ergo_rl.episodes.families import Qwen25VL, family_of, load_tokenizer
from ergo_rl.episodes.prompts import fill
from ergo_rl.episodes.types import Box, View
from ergo_rl.examples.panels.batches import TEXTS
from ergo_rl.examples.panels.scenes import COLOURS, MARKS, PROMPTS, PanelsConfig, Split, question
from ergo_rl.examples.panels.tiny_model import (
    REPLY_TAGS,
    TinyConfig,
    make_model,
    make_processor,
    make_tokenizer,
    save_folder,
)
from tests.conftest import ROOT

FAMILY = Qwen25VL()
SMALL = TinyConfig(hidden=32, layers=1, intermediate=48, vision_hidden=32, vision_layers=1, vision_intermediate=48)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer(TEXTS)


@pytest.fixture(scope="module")
def folder(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "model"
    save_folder(make_model(tokenizer, SMALL, seed=0), make_processor(tokenizer), path, {"README.md": "# Tiny\n"})
    return path


def test_special_tokens_are_one_id_each_and_leave_the_decoded_text(tokenizer: Any) -> None:
    for token in (*FAMILY.vision_tokens, *FAMILY.control_tokens):
        (one,) = tokenizer.encode(token, add_special_tokens=False)
        assert tokenizer.decode([one], skip_special_tokens=True) == ""
    assert len(FAMILY.banned_ids(tokenizer)) == len(set(FAMILY.banned_ids(tokenizer))) == 5
    for tag in REPLY_TAGS:
        (one,) = tokenizer.encode(tag, add_special_tokens=False)
        assert tokenizer.decode([one], skip_special_tokens=True) == tag


def test_replies_are_short(tokenizer: Any) -> None:
    def length(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False))

    assert length("168") == 3 and length("[12,34,56,168]") == 14  # digits one by one
    assert all(length(word) == length(f" {word}") == 1 for word in (*COLOURS, *MARKS))
    assert length("<think>a ring</think><answer>ring</answer><|im_end|>") == 8


@settings(max_examples=200)
@given(st.text())
def test_any_text_survives(tokenizer: Any, text: str) -> None:
    import unicodedata

    text = unicodedata.normalize("NFC", text)  # Qwen's tokenizer normalises
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_the_chat_template_writes_what_the_family_writes(folder: Path) -> None:
    repair_torchvision()
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    asked = question(PanelsConfig(), 0, Split.TRAIN, 0)
    content = [{"type": "image"}, {"type": "text", "text": asked.text}]
    messages = [{"role": "user", "content": content}]
    written = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert written == FAMILY.first_prompt("", fill(PROMPTS.coarse, asked, FAMILY))
    messages += [{"role": "assistant", "content": "seen"}, {"role": "user", "content": content}]
    longer = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert longer == written + "seen<|im_end|>" + FAMILY.next_prompt(fill(PROMPTS.fine, asked, FAMILY))


def check_folder(path: Path) -> Any:
    """Loads as a user would load it; returns the model."""
    repair_torchvision()
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(path)
    processor = AutoProcessor.from_pretrained(path)
    tokenizer, config = processor.tokenizer, json.loads((path / "config.json").read_text())
    assert family_of(str(path)).model_type == "qwen2_5_vl"
    ids = load_tokenizer(str(path)).convert_tokens_to_ids
    assert config["image_token_id"] == ids("<|image_pad|>") and config["video_token_id"] == ids("<|video_pad|>")
    assert config["vision_start_token_id"] == ids("<|vision_start|>")
    assert config["vision_end_token_id"] == ids("<|vision_end|>")
    assert len(tokenizer) == model.get_output_embeddings().weight.shape[0]
    assert model.generation_config.eos_token_id == ids("<|im_end|>")
    assert model.generation_config.pad_token_id == ids("<|endoftext|>")
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert (path / "model.safetensors").stat().st_mode & 0o444 == 0o444  # anybody may read it
    view = View(Box(0, 0, 672, 672), np.zeros((168, 84, 3), np.uint8))
    pixels, grids = FAMILY.image_inputs(processor.image_processor, [view])
    assert pixels.shape == (72, 1176) and grids.tolist() == [[1, 12, 6]]
    inputs = processor(
        text=[FAMILY.first_prompt("", FAMILY.image_placeholder)], images=[view.pixels], return_tensors="pt"
    )
    assert (inputs["input_ids"] == config["image_token_id"]).sum() == 18
    assert model(**inputs).logits.shape == (1, inputs["input_ids"].shape[1], len(tokenizer))
    return model


def test_a_fresh_folder_loads_everywhere(folder: Path) -> None:
    model = check_folder(folder)
    assert (folder / "README.md").read_text() == "# Tiny\n"
    assert model.lm_head.weight.data_ptr() != model.model.language_model.embed_tokens.weight.data_ptr()


def test_saving_replaces_an_older_folder_as_a_whole(folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "stale").write_text("old")
    save_folder(make_model(tokenizer, SMALL, seed=0), make_processor(tokenizer), target)
    assert not (target / "stale").exists() and (target / "config.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_embeddings_can_be_tied_and_the_seed_decides_the_weights(tokenizer: Any) -> None:
    from dataclasses import replace

    tied = make_model(tokenizer, replace(SMALL, tie_embeddings=True), seed=0)
    assert tied.lm_head.weight is tied.model.language_model.embed_tokens.weight
    first, again, other = (make_model(tokenizer, SMALL, seed).lm_head.weight for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("role", ["policy", "reward"])
def test_the_committed_models_load_and_are_small(role: str) -> None:
    path = ROOT / "models" / f"panels-{role}"
    model = check_folder(path)
    assert 1_000_000 < sum(parameter.numel() for parameter in model.parameters()) < 1_500_000
    assert (path / "model.safetensors").stat().st_size < 6_000_000
    assert "ergo-rl pretrain panels" in (path / "README.md").read_text()


def test_the_committed_policy_knows_where_and_points_badly() -> None:
    scores = json.loads((ROOT / "models" / "panels-policy" / "scores.json").read_text())["scores"]
    assert scores["questions"] >= 512
    assert scores["well_formed"] >= 0.95 and scores["well_formed_sampled"] >= 0.95
    assert 0.30 <= scores["coverage"] <= 0.60
    assert scores["accuracy_where_legible"] >= 0.85


def test_the_committed_reward_model_reads_crops_and_else_guesses() -> None:
    scores = json.loads((ROOT / "models" / "panels-reward" / "scores.json").read_text())["scores"]
    assert scores["original_resolution"] >= 0.97 and scores["legible"] >= 0.95
    for name in ("other_panel", "anywhere_else"):
        assert abs(scores[name] - 0.25) <= 0.05
