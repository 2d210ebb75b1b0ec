"""A tiny Qwen2.5-VL or Qwen3-VL and its tokenizer, from scratch: ordinary Hugging Face classes at toy sizes.

Everything the real family has is there (special tokens, chat template, mRoPE, patch merger, untied head), so that a
program that runs on the tiny folder runs on the released weights.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from ergo_rl.cluster.compat import repair_torchvision
from ergo_rl.episodes.families import ModelFamily, Qwen3VL, Qwen25VL

REPLY_TAGS = ("<think>", "</think>", "<zoom>", "</zoom>", "<answer>", "</answer>")
"""One token each, but ordinary text: they survive decoding without special tokens."""

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' or 'image' in part or 'image_url' in part %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' or 'video' in part %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Qwen2.5-VL's, less the system message that it puts where none is given."""


@dataclass
class TinyConfig:
    """About 1.2 million parameters."""

    hidden: int = 128
    """Width of the language part."""
    layers: int = 3
    """Layers of the language part."""
    heads: int = 4
    """Query heads of the language part; half as many key-value heads."""
    intermediate: int = 384
    """Width of the language part's MLP."""
    vision_hidden: int = 96
    """Width of the vision tower."""
    vision_layers: int = 3
    """Layers of the vision tower, all with full attention."""
    vision_heads: int = 4
    """Heads of the vision tower."""
    vision_intermediate: int = 256
    """Width of the vision tower's MLP."""
    initializer_range: float = 0.08
    """Standard deviation of fresh weights; about 1/sqrt(hidden). 0.02 leaves attention uniform for long."""
    tie_embeddings: bool = False
    """Share the input embedding with the output head (tests of weight transfer want both)."""
    max_positions: int = 4096
    """Longest sequence, tokens."""


def make_tokenizer(texts: Iterable[str], family: ModelFamily | None = None, vocabulary: int = 400) -> Any:
    """Train a Qwen2 tokenizer (byte-level BPE, every digit by itself) on ``texts``, with Qwen's special tokens."""
    repair_torchvision()
    from transformers import Qwen2Tokenizer
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    family = family or Qwen25VL()
    special = (*family.control_tokens, *family.vision_tokens)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(_without(texts, (*special, *REPLY_TAGS)), trainer)
    learnt = json.loads(bpe.to_str())["model"]
    merges: Any = [tuple(pair) for pair in learnt["merges"]]
    tokenizer = Qwen2Tokenizer(
        vocab=learnt["vocab"],
        merges=merges,
        eos_token=family.turn_end,
        pad_token="<|endoftext|>",
        model_max_length=4096,
    )
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in REPLY_TAGS])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _without(texts: Iterable[str], tokens: tuple[str, ...]) -> Iterable[str]:
    """Texts with added tokens blanked out, so that the BPE learns nothing across them."""
    for text in texts:
        for token in tokens:
            text = text.replace(token, "\n")
        yield text


def make_model(tokenizer: Any, config: TinyConfig, seed: int, family: ModelFamily | None = None) -> Any:
    """Make a fresh model of ``family`` (Qwen2.5-VL by default) in float32 whose special ids are the tokenizer's.

    Raises ValueError for a family that has no tiny model."""
    repair_torchvision()
    from transformers import AutoModelForImageTextToText

    family = family or Qwen25VL()
    ids = tokenizer.convert_tokens_to_ids
    settings = _SETTINGS.get(family.model_type)
    if settings is None:
        raise ValueError(f"there is no tiny model of {family.model_type}; there are: {', '.join(_SETTINGS)}")
    complete = settings(
        config,
        {
            "vocab_size": len(tokenizer),
            "hidden_size": config.hidden,
            "intermediate_size": config.intermediate,
            "num_hidden_layers": config.layers,
            "num_attention_heads": config.heads,
            "num_key_value_heads": config.heads // 2,
            "max_position_embeddings": config.max_positions,
            "initializer_range": config.initializer_range,
            "tie_word_embeddings": config.tie_embeddings,
            "bos_token_id": None,
            "eos_token_id": ids(family.turn_end),
            "pad_token_id": ids("<|endoftext|>"),
        },
        {
            "depth": config.vision_layers,
            "hidden_size": config.vision_hidden,
            "intermediate_size": config.vision_intermediate,
            "num_heads": config.vision_heads,
            "out_hidden_size": config.hidden,
            "patch_size": family.patch_size,
            "spatial_merge_size": family.merge_size,
            "initializer_range": config.initializer_range,
        },
        {
            "image_token_id": ids("<|image_pad|>"),
            "video_token_id": ids("<|video_pad|>"),
            "vision_start_token_id": ids("<|vision_start|>"),
            "vision_end_token_id": ids("<|vision_end|>"),
            "tie_word_embeddings": config.tie_embeddings,
        },
    )
    torch.manual_seed(seed)
    model: Any = AutoModelForImageTextToText.from_config(complete).float()
    model.generation_config.eos_token_id = ids(family.turn_end)
    model.generation_config.pad_token_id = ids("<|endoftext|>")
    model.generation_config.bos_token_id = None
    return model


Settings = dict[str, Any]


def _qwen25(config: TinyConfig, text: Settings, vision: Settings, ids: Settings) -> Any:
    from transformers import Qwen2_5_VLConfig

    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": _mrope_sections(config)}
    windows = {"window_size": 4 * Qwen25VL().multiple, "fullatt_block_indexes": list(range(config.vision_layers))}
    return Qwen2_5_VLConfig(text_config=text | {"rope_parameters": rope}, vision_config=vision | windows, **ids)


def _qwen3(config: TinyConfig, text: Settings, vision: Settings, ids: Settings) -> Any:
    """All but the last vision layer feed a layer of the language part (DeepStack), as far as there are such layers."""
    from transformers import Qwen3VLConfig

    rope = {
        "rope_type": "default",
        "rope_theta": 10_000.0,
        "mrope_section": _mrope_sections(config),
        "mrope_interleaved": True,
    }
    deep = list(range(min(config.vision_layers - 1, config.layers)))
    return Qwen3VLConfig(
        text_config=text | {"rope_parameters": rope, "head_dim": config.hidden // config.heads},
        vision_config=vision | {"deepstack_visual_indexes": deep, "num_position_embeddings": 256},
        **ids,
    )


_SETTINGS = {Qwen25VL.model_type: _qwen25, Qwen3VL.model_type: _qwen3}


def _mrope_sections(config: TinyConfig) -> list[int]:
    """Time, height and width parts of half a head: [4, 6, 6] of 16, as [16, 24, 24] of 64 in the released model."""
    half = config.hidden // config.heads // 2
    spatial = half * 3 // 8
    return [half - 2 * spatial, spatial, spatial]


def make_processor(tokenizer: Any, family: ModelFamily | None = None, most: int = 1280) -> Any:
    """Make the family's processor, whose own resize is an identity on views of its least to ``most`` visual tokens."""
    repair_torchvision()
    from transformers import (
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
        Qwen3VLProcessor,
        Qwen3VLVideoProcessor,
    )

    family = family or Qwen25VL()
    unit = family.multiple**2
    size = {"shortest_edge": family.min_visual_tokens * unit, "longest_edge": most * unit}
    if isinstance(family, Qwen3VL):
        patches = {"patch_size": family.patch_size, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        return Qwen3VLProcessor(
            image_processor=Qwen2VLImageProcessor(size=size, **patches),
            tokenizer=tokenizer,
            video_processor=Qwen3VLVideoProcessor(size=size),
            chat_template=CHAT_TEMPLATE,
        )
    limits = {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**limits),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(size=size),
        chat_template=CHAT_TEMPLATE,
    )


def save_folder(model: Any, processor: Any, folder: Path, extra: dict[str, str] | None = None) -> None:
    """Save an ordinary Hugging Face folder, written beside its place and renamed, so that no reader finds half of it.

    ``extra``: further text files, name -> content. An older folder of that name is replaced."""
    fresh, old = folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    fresh.mkdir(parents=True)
    model.save_pretrained(fresh)
    processor.save_pretrained(fresh)
    for name, text in (extra or {}).items():
        (fresh / name).write_text(text)
    for file in fresh.iterdir():
        file.chmod(0o644)  # safetensors writes files that only their owner may read
    if folder.exists():
        os.rename(folder, old)
    os.rename(fresh, folder)
    shutil.rmtree(old, ignore_errors=True)
