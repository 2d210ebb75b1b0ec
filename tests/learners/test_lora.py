"""LoRA: what is trained, and that what leaves the learner is the model that it trains."""

import math
import sys
from pathlib import Path

import pytest
import torch

from ergo_rl.learners.batch import Batcher, Sample
from ergo_rl.learners.config import LearnerConfig, LoraConfig
from ergo_rl.learners.lora import PeftMissing, Weight, named_weights
from ergo_rl.learners.model import PolicyModel
from tests.factories import FAMILY, IDS, IMAGE_PAD, trajectory, view

BANNED = tuple(sorted(IDS[token] for token in FAMILY.vision_tokens))
LORA = LoraConfig(rank=4, alpha=6, targets=["q_proj", "v_proj", "down_proj"])


def test_merged_weight_by_hand() -> None:
    base = torch.nn.Parameter(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    down, up = torch.nn.Parameter(torch.tensor([[1.0, -1.0]])), torch.nn.Parameter(torch.tensor([[2.0], [0.5]]))
    # up @ down = [[2, -2], [0.5, -0.5]], times 3
    assert Weight("w", base, (down, up, 3.0)).value().tolist() == [[7.0, -4.0], [4.5, 2.5]]
    assert Weight("w", base).value().tolist() == base.tolist() and Weight("w", base).bytes == 16


def test_impossible_lora_config_is_refused() -> None:
    for wrong in ({"rank": -1}, {"alpha": 0}, {"targets": []}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            LoraConfig(**wrong)  # type: ignore[arg-type]


def test_missing_peft_says_what_to_install(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(PeftMissing, match=r"pip install 'ergo-rl\[lora\]'"):
        PolicyModel(LearnerConfig(model=str(tiny), lora=LORA))


@pytest.fixture
def adapted(tiny: Path) -> PolicyModel:
    pytest.importorskip("peft")
    return PolicyModel(LearnerConfig(model=str(tiny), lora=LORA))


@pytest.fixture(scope="module")
def batcher(tiny: Path) -> Batcher:
    from transformers import AutoImageProcessor

    return Batcher(FAMILY, AutoImageProcessor.from_pretrained(tiny), IMAGE_PAD, IDS["<|im_end|>"], 4096)


def test_only_adapters_are_trained(adapted: PolicyModel, tiny: Path) -> None:
    trained = {name for name, parameter in adapted.vlm.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * 3 * 2  # layers x targets x (down, up)
    assert all("language_model" in name and ".lora_" in name for name in trained)
    plain = PolicyModel(LearnerConfig(model=str(tiny)))
    before = dict(plain.vlm.named_parameters())
    now = {weight.name: weight for weight in named_weights(adapted.vlm)}
    assert list(now) == list(before), "names and order as without adapters"
    assert all(torch.equal(weight.value(), before[name]) for name, weight in now.items()), "no change at the start"
    assert sum(weight.adapter is not None for weight in now.values()) == 6
    assert {weight.adapter[2] for weight in now.values() if weight.adapter} == {6 / 4}


def test_every_rank_draws_the_same_adapters(tiny: Path) -> None:
    pytest.importorskip("peft")
    draws = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        policy = PolicyModel(LearnerConfig(model=str(tiny), lora=LORA))
        draws.append([weight.adapter[0] for weight in named_weights(policy.vlm) if weight.adapter])
    assert all(torch.equal(first, second) for first, second in zip(*draws, strict=True))


def test_merged_weights_have_the_logprobs_of_the_policy(adapted: PolicyModel, batcher: Batcher, tiny: Path) -> None:
    """After three steps of AdamW on the adapters each weight is base + alpha / rank x up x down, and a plain model
    with these weights has the policy's log-probs."""
    samples = [Sample(trajectory(sample=n, crop=view(2, 3 + n), seed=n), (1.0,)) for n in range(3)]
    (batch,) = batcher.batches(batcher.plan(samples))
    frozen = {weight.name: weight.base.detach().clone() for weight in named_weights(adapted.vlm)}
    optimizer = torch.optim.AdamW([parameter for parameter in adapted.parameters() if parameter.requires_grad], lr=1e-2)
    with torch.no_grad():
        before, _ = adapted(batch, 1.0, BANNED)
    for _ in range(3):
        logprobs, _ = adapted(batch, 1.0, BANNED)
        (-logprobs.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    parts = dict(adapted.vlm.named_parameters())
    published = {weight.name: weight.value() for weight in named_weights(adapted.vlm)}
    moved = 0
    for name, value in published.items():
        wanted, path = frozen[name], name.removesuffix(".weight")
        if f"{path}.lora_A.default.weight" in parts:
            up, down = parts[f"{path}.lora_B.default.weight"], parts[f"{path}.lora_A.default.weight"]
            wanted, moved = wanted + 6 / 4 * (up @ down).detach(), moved + 1
        torch.testing.assert_close(value, wanted, atol=1e-6, rtol=0)
    assert moved == 6

    plain = PolicyModel(LearnerConfig(model=str(tiny)))
    plain.vlm.load_state_dict(published)
    with torch.no_grad():
        now, _ = adapted(batch, 1.0, BANNED)
        loaded, _ = plain(batch, 1.0, BANNED)
    assert (now - before).abs().max() > 0.1 and not math.isnan(float(now.sum()))
    torch.testing.assert_close(loaded, now, atol=1e-5, rtol=0)


def test_unknown_target_is_named(tiny: Path) -> None:
    pytest.importorskip("peft")
    with pytest.raises(ValueError, match=r"\['qkv'\] are no linear layers of this model; it has \['down_proj'"):
        PolicyModel(LearnerConfig(model=str(tiny), lora=LoraConfig(rank=2, targets=["q_proj", "qkv"])))
