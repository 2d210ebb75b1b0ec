"""A real tokenizer, made here: byte-level BPE without merges, with Qwen's special tokens."""

from __future__ import annotations

import pytest

from ergo_rl.episodes.families import Qwen25VL, Tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    from tokenizers import Tokenizer as RustTokenizer
    from tokenizers import decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = RustTokenizer(models.BPE({byte: place for place, byte in enumerate(alphabet)}, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([*Qwen25VL.vision_tokens, *Qwen25VL.control_tokens])
    return PreTrainedTokenizerFast(tokenizer_object=bpe)
