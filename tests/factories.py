"""Small real things for tests: a random Qwen2.5-VL folder, and trajectories written in token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ergo_rl.cluster.compat import repair_torchvision
from ergo_rl.episodes.families import ModelFamily, Qwen25VL
from ergo_rl.episodes.types import Box, Finish, Outcome, Trajectory, Turn, View

FAMILY = Qwen25VL()
SPECIAL = (*FAMILY.control_tokens, *FAMILY.vision_tokens)
WORDS = 256
"""Ids below this are plain bytes in the tokenizer of ``tiny_model``; special tokens follow, in the order of SPECIAL."""
IDS = {token: WORDS + place for place, token in enumerate(SPECIAL)}
IMAGE_PAD = IDS[FAMILY.image_pad]


def tiny_model(
    path: Path,
    *,
    tied: bool = False,
    seed: int = 0,
    text: Mapping[str, Any] = {},
    vision: Mapping[str, Any] = {},
    image_token_id: int = IMAGE_PAD,
) -> Path:
    """A random Qwen2.5-VL of 0.15 M parameters with tokenizer and processor, as an ordinary Hugging Face folder.

    text, vision: other values of the two parts of its configuration.
    Weights are drawn wide enough that attention and positions matter."""
    repair_torchvision()
    import torch
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        PreTrainedTokenizerFast,
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2VLImageProcessor,
    )

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={symbol: place for place, symbol in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    assert tokenizer.convert_tokens_to_ids(FAMILY.image_pad) == IMAGE_PAD

    torch.manual_seed(seed)
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 2048,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
            "bos_token_id": None, "eos_token_id": IDS["<|im_end|>"], "initializer_range": 0.1,
            "tie_word_embeddings": tied, **text,
        },
        vision_config={
            "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64,
            "window_size": 56, "fullatt_block_indexes": [1], "initializer_range": 0.1, **vision,
        },
        image_token_id=image_token_id, video_token_id=IDS["<|video_pad|>"],
        vision_start_token_id=IDS["<|vision_start|>"], vision_end_token_id=IDS["<|vision_end|>"],
        tie_word_embeddings=tied,
    )  # fmt: skip
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    Qwen2VLImageProcessor(size={"shortest_edge": 4 * 28 * 28, "longest_edge": 1280 * 28 * 28}).save_pretrained(path)
    return path


def view(columns: int, rows: int, seed: int = 0, box: Box | None = None, family: ModelFamily = FAMILY) -> View:
    """A view of random pixels with ``columns x rows`` visual tokens."""
    width, height = columns * family.multiple, rows * family.multiple
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return View(box or Box(0, 0, width, height), pixels)


@cache
def shared_view(columns: int, rows: int, seed: int) -> View:
    """One object however often it is asked for, as the coarse view of a group."""
    return view(columns, rows, seed)


def trajectory(
    name: str = "q0",
    sample: int = 0,
    *,
    replies: Sequence[int] = (5, 7),
    coarse: View | None = None,
    crop: View | None = None,
    seed: int = 0,
    version: int = 0,
    family: ModelFamily = FAMILY,
) -> Trajectory:
    """A trajectory of as many turns as ``replies`` has lengths, with random plain tokens and random
    log-probs, and the prompt lengths that an engine would report."""
    rng = np.random.default_rng((seed, sample))
    views = (coarse or view(3, 2, seed, family=family), crop or view(2, 4, seed + 1, family=family))[: len(replies)]
    turns, length = [], 0
    for place, (count, shown) in enumerate(zip(replies, views, strict=True)):
        head = rng.integers(0, WORDS, 3 + place).tolist()
        tail = rng.integers(0, WORDS, 4).tolist()
        prompt = [*head, IDS["<|vision_start|>"], IMAGE_PAD, IDS["<|vision_end|>"], *tail]
        completion = [*rng.integers(0, WORDS, count - 1).tolist(), IDS["<|im_end|>"]]
        length += len(prompt) - 1 + family.visual_tokens(shown)
        turns.append(
            Turn(
                prompt_ids=np.asarray(prompt, np.int32),
                completion_ids=np.asarray(completion, np.int32),
                logprobs=rng.normal(-5.5, 0.2, count).astype(np.float32),
                text="",
                finish=Finish.STOP,
                engine_prompt_length=length,
                policy_version=version,
            )
        )
        length += count
    outcome = Outcome.ANSWERED if len(turns) == 2 else Outcome.BAD_BOX
    return Trajectory(name, sample, views, tuple(turns), outcome, "ok" if len(turns) == 2 else "no_tag")
