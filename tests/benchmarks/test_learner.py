import numpy as np
import pytest
import torch

from benchmarks.learner import Mixture, PlainLoop, figures, verdict
from ergo_rl.episodes.families import family_of, load_tokenizer
from ergo_rl.learners.batch import Batcher, Sample, expand, pad_bins
from ergo_rl.learners.config import LearnerConfig
from ergo_rl.learners.losses import TokenBatch, policy_loss
from ergo_rl.learners.model import PolicyModel
from tests.factories import FAMILY, IDS, IMAGE_PAD

MARKS = (IDS["<|vision_start|>"], IDS["<|vision_end|>"], IMAGE_PAD)


def test_figures_by_hand() -> None:
    """80 tokens: 100 passed in 4 s (median of 1, 4, 9), 90 in 2 s, 80 in 1 s."""
    found = figures(
        {"one_batch": 100, "budget": 90, "packed": 80},
        {"one_batch": [9.0, 1.0, 4.0], "budget": [2.0], "packed": [1.0]},
        tokens=80,
    )
    assert [found[f"{way}/padding"] for way in ("one_batch", "budget", "packed")] == [0.2, 0.1111, 0.0]
    assert [found[f"{way}/tokens_per_s"] for way in ("one_batch", "budget", "packed")] == [20.0, 40.0, 80.0]
    assert [found[f"{way}/speedup"] for way in ("one_batch", "budget", "packed")] == [1.0, 2.0, 4.0]
    good, line = verdict(found)
    assert not good and line.startswith(
        "TOO MUCH PADDING; one batch: 20% padding, 20 tokens/s (1.00 times); budget: 11%"
    )
    assert verdict(found | {"budget/padding": 0.09})[0]


def test_the_token_budget_holds_padding_below_ten_per_cent() -> None:
    """At the lengths of the method: 64 trajectories, 16,384 tokens a micro-batch; one batch would pad a fifth."""
    lengths = []
    for seed in range(3):
        played = Mixture().trajectories(FAMILY, MARKS, groups=8, seed=seed)
        lengths = [len(expand(Sample(one, (1.0,)), FAMILY, IMAGE_PAD)) for one in played]
        assert len({len(one.turns) for one in played}) == 2 and np.std(lengths) > 200
        passed = sum(len(members) * max(lengths[one] for one in members) for members in pad_bins(lengths, 16384))
        assert 1 - sum(lengths) / passed < 0.1
        assert 1 - sum(lengths) / (len(lengths) * max(lengths)) > 0.2


def test_the_plain_loop_minimises_what_the_learner_does() -> None:
    """Else it would be no comparison: the loss of the same trajectories, from padded rows and logits of every position,
    and from ours."""
    from transformers import AutoImageProcessor, AutoModelForImageTextToText

    model = "models/panels-policy"
    family, tokenizer = family_of(model), load_tokenizer(model)
    start, end, pad = map(tokenizer.convert_tokens_to_ids, ("<|vision_start|>", "<|vision_end|>", family.image_pad))
    played = Mixture().scaled(0.05).trajectories(family, (start, end, pad), groups=1, seed=0)
    samples = [Sample(one, (0.5 if one.sample % 2 else -0.5,)) for one in played]
    rows, images = [expand(sample, family, pad) for sample in samples], AutoImageProcessor.from_pretrained(model)

    plain = PlainLoop.__new__(PlainLoop)
    plain._engine = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32)
    plain._images, plain._pad = images, end
    plain._tokens = sum(int(row.loss_mask.sum()) for row in rows)
    config = LearnerConfig(model=model)
    policy, batcher = PolicyModel(config), Batcher(family, images, pad, end, 1 << 20)
    ours = 0.0
    with torch.no_grad():
        theirs = float(plain._loss(rows))
        for batch in batcher.batches(batcher.plan(samples)):
            logprobs, entropy = policy(batch, 1.0, ())
            rows_of = TokenBatch(
                logprobs, entropy, batch.rollout_logprobs, batch.advantages, batch.loss_mask, batch.turns
            )
            loss = config.loss
            loss.mismatch_low, loss.mismatch_high = 0.0, float("inf")  # the plain loop masks nothing
            ours += float(policy_loss(rows_of, loss)[0]) / plain._tokens
    assert theirs == pytest.approx(ours, rel=1e-4) and abs(ours) > 1e-3
