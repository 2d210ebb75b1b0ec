"""Attention over sequences end to end: few calls, the same numbers as transformers' own, one call for each sequence."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import varlen

from ergo_rl.episodes.families import Qwen3VL, Qwen25VL
from ergo_rl.learners import model as module
from ergo_rl.learners.batch import Batcher, Sample
from ergo_rl.learners.config import LearnerConfig
from ergo_rl.learners.model import PolicyModel, sdpa_varlen
from tests.factories import FAMILY, IDS, IMAGE_PAD, tiny_model, trajectory, view

GRIDS = torch.tensor([[1, 12, 12], [1, 10, 14], [1, 4, 6], [1, 12, 12]])
"""Of patches: whole windows (8 x 8) and all kinds of rests, and two images of one shape."""


@contextmanager
def counted() -> Iterator[list[int]]:
    """The sequences (first dimension) of each call of torch's attention."""
    real, calls = nn.functional.scaled_dot_product_attention, []

    def count(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(len(query))
        return real(query, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.functional, "scaled_dot_product_attention", count)
        yield calls


@pytest.mark.parametrize("family", [Qwen25VL, Qwen3VL])
def test_tower_when_it_calls_attention_by_length_then_output_and_gradients_are_transformers_to_the_bit(
    tiny: Path, tiny_qwen3: Path, family: type
) -> None:
    from transformers import AutoModelForImageTextToText

    folder = tiny_qwen3 if family is Qwen3VL else tiny
    plain = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    towers = plain.model.visual, PolicyModel(LearnerConfig(model=str(folder))).vlm.model.visual
    pixels = torch.randn(
        int(GRIDS.prod(-1).sum()), 6 * family.patch_size**2, generator=torch.Generator().manual_seed(0)
    )
    outcomes = []
    for tower in towers:
        with counted() as calls:
            output = tower(pixels, grid_thw=GRIDS).pooler_output
        (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
        outcomes.append((output, {name: weight.grad for name, weight in tower.named_parameters()}, len(calls)))
    (wanted, gradients, many), (ours, others, few) = outcomes
    assert torch.equal(ours, wanted) and few < many
    used = [name for name, gradient in gradients.items() if gradient is not None]
    assert used and all(torch.equal(others[name], gradients[name]) for name in used)


def test_attention_calls_of_a_micro_batch_when_the_model_is_as_deep_as_the_7b_then_a_few_a_layer(
    tmp_path: Path,
) -> None:
    """Five views of 640 visual tokens, 20 x 32 of them: 5 x 8 windows of 4 x 4 each. transformers makes 28 layers x 200
    windows + 4 layers x 5 images = 5,620 calls in the tower; a call a layer is 32."""
    depth = {
        "depth": 32,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "window_size": 112,
        "hidden_size": 16,
        "num_heads": 1,
    }
    folder = tiny_model(tmp_path, text={"num_hidden_layers": 28}, vision=depth)
    policy = PolicyModel(LearnerConfig(model=str(folder)))
    from transformers import AutoImageProcessor

    batcher = Batcher(FAMILY, AutoImageProcessor.from_pretrained(folder), IMAGE_PAD, IDS["<|im_end|>"], 16384)
    shared = view(20, 32, 0)
    played = [trajectory("q", n, coarse=shared, crop=view(20, 32, n + 1), seed=n) for n in range(4)]
    (batch,) = batcher.batches(batcher.plan([Sample(one, (1.0,)) for one in played]))
    assert len(batch.view_grids) == 5
    with counted() as calls, torch.no_grad():
        policy(batch, 1.0, ())
    assert calls.count(200) == 28 and calls.count(5) == 4, "the tower: every layer once"
    assert len(calls) == 32 + 28, "and every layer of the language model once, for four rows of one length"


@pytest.mark.parametrize("causal", [False, True])
def test_varlen_kernel_when_there_is_one_then_it_gets_all_sequences_in_one_call(
    monkeypatch: pytest.MonkeyPatch, causal: bool
) -> None:
    """In place of the kernel, which needs a GPU: its definition, with torch's own signature. Two key heads for four."""
    monkeypatch.setattr(module, "has_varlen_kernel", lambda query: True)
    calls, lengths, signature = [], [3, 5, 3], inspect.signature(varlen.varlen_attn)

    def kernel(*args: Any, **kwargs: Any) -> Tensor:
        told = signature.bind(*args, **kwargs).arguments
        calls.append(told)
        assert told["cu_seq_q"].tolist() == told["cu_seq_k"].tolist() == [0, 3, 8, 11]
        assert told["cu_seq_q"].dtype == torch.int32 and told["max_q"] == told["max_k"] == 5 and told["enable_gqa"]
        assert told["window_size"] == ((-1, 0) if causal else (-1, -1))
        parts = zip(*(told[name].split(lengths) for name in ("query", "key", "value")), strict=True)
        return torch.cat([one_by_one(*(part.transpose(0, 1)[None] for part in three)) for three in parts])

    def one_by_one(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=causal, scale=0.3, enable_gqa=True
        )[0].transpose(0, 1)

    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(1, heads, 11, 8, generator=generator) for heads in (4, 2, 2)]
    layer = nn.Module()
    layer.num_key_value_groups = 2  # type: ignore[assignment]

    def attention() -> Tensor:
        told = {"cu_seq_lens_q": torch.tensor([0, 3, 8, 11], dtype=torch.int32), "max_length_q": 5}
        return sdpa_varlen(layer, *tensors, None, is_causal=causal, scaling=0.3, **told)[0]  # type: ignore[arg-type]

    by_kernel = attention()
    assert len(calls) == 1 and by_kernel.shape == (1, 11, 4, 8)
    monkeypatch.setattr(module, "has_varlen_kernel", lambda query: False)
    torch.testing.assert_close(by_kernel, attention(), atol=1e-6, rtol=0)


def test_varlen_kernel_when_torchs_own_is_given_shapes_alone_then_it_takes_ours() -> None:
    """On the meta device nothing is computed, but torch's own function checks what it is given, at the 7B's widths."""
    query, key = (torch.empty(11, heads, 128, dtype=torch.bfloat16, device="meta") for heads in (28, 4))
    starts = torch.empty(4, dtype=torch.int32, device="meta")
    output = varlen.varlen_attn(query, key, key, starts, starts, 5, 5, window_size=(-1, 0), enable_gqa=True, scale=0.1)
    assert output.shape == query.shape and output.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("dtype", "width", "fits"), [(torch.float32, 80, False), (torch.bfloat16, 81, False), (torch.bfloat16, 512, False)]
)
def test_varlen_kernel_when_the_tensor_is_not_for_it_then_torchs_plain_attention_is_taken(
    dtype: torch.dtype, width: int, fits: bool
) -> None:
    assert module.has_varlen_kernel(torch.empty(1, 2, 3, width, dtype=dtype)) is fits
    assert not module.has_varlen_kernel(torch.empty(1, 2, 3, 80, dtype=torch.bfloat16)), "a CPU has none"


def test_sliding_windows_when_packed_then_they_are_refused() -> None:
    one: Callable[..., Any] = sdpa_varlen
    with pytest.raises(ValueError, match="set learner"):
        one(nn.Module(), *[torch.zeros(1, 1, 2, 8)] * 3, None, cu_seq_lens_q=None, max_length_q=2, sliding_window=4)
