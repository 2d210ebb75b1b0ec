"""Attention over rows that lie end to end in one sequence: no padding, and no token sees another row.

Two ways to the same numbers. ``sdpa``: torch's attention row by row, each with a plain causal mask, as transformers'
Qwen-VL towers do for images; it needs no package and no mask of tokens x tokens, so it is also the quickest on a CPU.
``flash_attention_2``: one call for all rows, told their boundaries (``cu_seq_lens``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ergo_rl.learners.config import Attention, LearnerConfig, Packing

ROW_BY_ROW = "sdpa_row_by_row"
"""Under this name transformers knows ``row_by_row``."""


def implementation(config: LearnerConfig) -> dict[str, str]:
    """``attn_implementation`` of ``from_pretrained``, part by part: the vision tower packs its images by itself.

    Raises ValueError where FlashAttention is asked for and not installed."""
    if config.attention is Attention.FLASH:
        from transformers.utils import is_flash_attn_2_available

        if not is_flash_attn_2_available():
            raise ValueError(
                "learner.attention=flash_attention_2 needs a GPU and the package flash-attn, which is not here; "
                "learner.attention=sdpa does without"
            )
    language = config.attention.value
    if config.packing is Packing.SEQUENCES and config.attention is Attention.SDPA:
        from transformers import AttentionInterface

        AttentionInterface.register(ROW_BY_ROW, row_by_row)
        language = ROW_BY_ROW
    return {"": config.attention.value, "vision_config": config.attention.value, "text_config": language}


def boundaries(lengths: Tensor, attention: Attention) -> dict[str, Any]:
    """What the attention needs to know of rows of these lengths, int64[B], as keyword arguments of the model."""
    if attention is Attention.SDPA:
        return {"row_lengths": lengths.tolist()}
    starts = nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    longest = int(lengths.max())
    return {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": longest, "max_length_k": longest}


def row_by_row(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    row_lengths: Sequence[int],
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each of the rows that follow one another.

    query [1, heads, tokens, width]; key and value [1, key heads, tokens, width]; ``row_lengths`` add up to the tokens.
    Returns [1, tokens, heads, width], and None for the weights, which nobody needs. Raises ValueError for a window."""
    if sliding_window is not None:
        raise ValueError("learner.packing=sequences does not know sliding windows; set learner.packing=none")
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    rows = zip(*(tensor.split(list(row_lengths), dim=2) for tensor in (query, key, value)), strict=True)
    seen = [
        sdpa_attention_forward(module, q, k, v, attention_mask, dropout=dropout, scaling=scaling, is_causal=True)[0]
        for q, k, v in rows
    ]
    return torch.cat(seen, dim=1), None
