import numpy as np

from benchmarks.learner import Mixture, figures, verdict
from learners.batch import Sample, expand, side_by_side
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
        passed = sum(len(members) * max(lengths[one] for one in members) for members in side_by_side(lengths, 16384))
        assert 1 - sum(lengths) / passed < 0.1
        assert 1 - sum(lengths) / (len(lengths) * max(lengths)) > 0.2
