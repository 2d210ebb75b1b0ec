"""The four terms and their sum, in numbers of the paper."""

from __future__ import annotations

import pytest

from ergo_rl.episodes.types import Box, BoxOutcome, Outcome, Score, Trajectory, Unscored
from ergo_rl.rewards.base import Reading, chosen_region
from ergo_rl.rewards.box import SoftBox
from ergo_rl.rewards.config import RewardConfig
from ergo_rl.rewards.format import thought_then
from ergo_rl.rewards.tce import TERMS, TotalReward, weights_of
from tests.rewards.builders import GOOD_BOX, LOOK, QUESTION, READ, SCENE, ended_early, played

PAPER = ("region", "box", "accuracy", "format")
NO_BOX = ended_early("I would look left", Outcome.BAD_BOX)
CUT_LOOK = ended_early("<think>I see", Outcome.TRUNCATED)
FALLEN_BACK = played(look="I would look left", box=SCENE, box_outcome=BoxOutcome.NO_TAG)


def term(name: str, trajectory: Trajectory, reading: Reading = None) -> float | Unscored:
    return TERMS[name](RewardConfig())(QUESTION, trajectory, reading)


# --- r_region ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reading", "value"),
    [
        ("<answer>B</answer>", 1),
        ("<think>a ring</think><answer>ring</answer>", 1),
        ("B", 1),  # no tag: the bare text
        ("The answer is (B).", 1),
        ("<answer>B", 1),
        ("<answer>A</answer>", 0),
        ("<answer>A, B, C, D</answer>", 0),
        ("<answer></answer>", 0),
        ("", 0),
        ("I cannot tell.", 0),
        ("<answer>I cannot tell</answer> B", 0),  # the tag counts, what is around it does not
    ],
)
def test_region_is_what_the_reward_model_reads(reading: str, value: float) -> None:
    assert term("region", played(), reading) == value


def test_region_without_an_answer_of_the_reward_model_is_unscored() -> None:
    assert term("region", played(), Unscored("status 503")) == Unscored("status 503")


@pytest.mark.parametrize("trajectory", [NO_BOX, CUT_LOOK, FALLEN_BACK])
def test_no_chosen_region_is_zero_and_nobody_is_asked(trajectory: Trajectory) -> None:
    assert chosen_region(trajectory) is None
    assert term("region", trajectory) == 0 and term("box", trajectory) == 0


def test_a_region_that_nobody_asked_about_is_a_bug() -> None:
    with pytest.raises(ValueError, match="nobody asked"):
        term("region", played(), None)


def test_a_region_is_judged_even_where_the_answer_was_cut_off() -> None:
    cut = played(read="<think>I see", outcome=Outcome.TRUNCATED)
    assert (term("region", cut, "B"), term("box", cut), term("accuracy", cut), term("format", cut)) == (1, 1, 0, 0)


# --- r_box -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("box", "value"),
    [
        (GOOD_BOX, 1),
        (Box(0, 0, 600, 1000), 1),  # exactly gamma
        (Box(0, 0, 601, 1000), 0),
        (Box(0, 0, 770, 770), 1),  # 0.593: the paper's threshold lets it pass
        (SCENE, 0),
    ],
)
def test_box_pays_up_to_gamma(box: Box, value: float) -> None:
    assert term("box", played(box=box)) == value


def test_gamma_comes_from_the_config() -> None:
    assert TERMS["box"](RewardConfig(gamma=0.03))(QUESTION, played(), None) == 0  # the box is 4 %


@pytest.mark.parametrize("outcome", [outcome for outcome in BoxOutcome if outcome.usable])
def test_reordered_and_clamped_boxes_are_boxes(outcome: BoxOutcome) -> None:
    trajectory = played(box_outcome=outcome)
    assert (term("region", trajectory, "B"), term("box", trajectory), term("format", trajectory)) == (1, 1, 1)


# --- r_acc -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("read", "value"),
    [(READ, 1), ("<answer>ring</answer>", 1), ("<answer>C</answer>", 0), ("B", 0), ("<answer></answer>", 0), ("", 0)],
)
def test_accuracy_is_the_policys_own_tagged_answer(read: str, value: float) -> None:
    assert term("accuracy", played(read=read)) == value


def test_accuracy_counts_after_the_fallback_but_never_without_turn_two() -> None:
    assert term("accuracy", FALLEN_BACK) == 1
    assert term("accuracy", ended_early("<answer>B</answer>", Outcome.BAD_BOX)) == 0
    assert term("accuracy", ended_early("<answer>B</answer>", Outcome.TRUNCATED)) == 0
    assert term("accuracy", played(outcome=Outcome.TRUNCATED)) == 0


# --- r_format ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "well_formed"),
    [
        ("<think>x</think><zoom>[1, 2, 3, 4]</zoom>", True),
        (" \n<think>\nx\n</think>\n\n<zoom>[1, 2, 3, 4]</zoom>\n", True),
        ("<think></think><zoom></zoom>", True),  # what is in the tags is for others to judge
        ("<think>a < b</think><zoom>1</zoom>", True),
        ("<zoom>1</zoom>", False),
        ("<think>x</think>", False),
        ("<think>x<zoom>1</zoom>", False),
        ("<think>x<think><zoom>1</zoom>", False),  # the released client's prompt asks for this
        ("<zoom>1</zoom><think>x</think>", False),
        ("<think>x<zoom>1</zoom></think>", False),
        ("<think>x</think><zoom>1</zoom><zoom>2</zoom>", False),
        ("<think>x</think><think>y</think><zoom>1</zoom>", False),
        ("Well: <think>x</think><zoom>1</zoom>", False),
        ("<think>x</think> so <zoom>1</zoom>", False),
        ("<think>x</think><zoom>1</zoom>.", False),
        ("<think>x</think><zoom>1</zoom><answer>B</answer>", False),
        ("<THINK>x</THINK><zoom>1</zoom>", False),
        ("", False),
    ],
)
def test_thought_then_zoom(reply: str, well_formed: bool) -> None:
    assert thought_then(reply, "zoom") is well_formed
    answer = reply.replace("answer", "other").replace("zoom", "answer").replace("other", "zoom")
    assert thought_then(answer, "answer") is well_formed


@pytest.mark.parametrize(
    ("trajectory", "value"),
    [
        (played(), 1),
        (played(look="<zoom>[10, 10, 30, 30]</zoom>"), 0),
        (played(read="<answer>B</answer>"), 0),
        (played(read="<think>x</think><answer> </answer>"), 0),
        (played(look=READ, read=LOOK), 0),
        (NO_BOX, 0),
        (CUT_LOOK, 0),
        (FALLEN_BACK, 0),
        (played(box=SCENE, box_outcome=BoxOutcome.EMPTY), 0),  # well-formed tags around a useless box
        (played(outcome=Outcome.TRUNCATED), 0),
    ],
)
def test_format_needs_both_turns(trajectory: Trajectory, value: float) -> None:
    assert term("format", trajectory) == value


# --- the sum -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trajectory", "reading", "total", "parts"),
    [
        (played(), "B", 3.5, (1, 1, 1, 1)),
        (played(), "A", 2.5, (0, 1, 1, 1)),
        (played(box=SCENE), "B", 3.0, (1, 0, 1, 1)),
        (played(read="<think>x</think><answer>C</answer>"), "B", 2.5, (1, 1, 0, 1)),
        (played(read="<answer>B</answer>"), "B", 2.5, (1, 1, 1, 0)),
        (played(read="<answer>C</answer>"), "A", 0.5, (0, 1, 0, 0)),
        (FALLEN_BACK, None, 1.0, (0, 0, 1, 0)),
        (NO_BOX, None, 0.0, (0, 0, 0, 0)),
        (CUT_LOOK, None, 0.0, (0, 0, 0, 0)),
    ],
)
def test_the_total_by_hand(trajectory: Trajectory, reading: Reading, total: float, parts: tuple[int, ...]) -> None:
    names = ("region", "box", "accuracy", "format")
    score = TotalReward(RewardConfig())(QUESTION, trajectory, reading)
    assert isinstance(score, Score) and (score.total, score.parts) == (total, dict(zip(names, parts, strict=True)))


def test_what_each_turn_earned() -> None:
    """Region 1 and box 0.5 to turn 1, accuracy 1 to turn 2, and to each turn 1 for its own tags."""

    def turns(trajectory: Trajectory, reading: Reading) -> tuple[float, float]:
        score = TotalReward(RewardConfig())(QUESTION, trajectory, reading)
        assert isinstance(score, Score)
        return score.turns

    assert turns(played(), "B") == (2.5, 2.0)
    assert turns(played(read="<answer>B</answer>"), "B") == (2.5, 1.0)  # no thought in turn 2: its own fault
    assert turns(played(read="<think>hm</think><answer>C</answer>"), "A") == (1.5, 1.0)
    assert turns(played(look="<zoom>[10, 10, 30, 30]</zoom>"), "B") == (1.5, 2.0)
    assert turns(NO_BOX, None) == (0.0, 0.0)


def test_the_soft_box_by_hand() -> None:
    """gamma 0.6 and a crop of 4 % of the scene: 1 - 0.04 / 0.6; nothing for a region that is not enough."""
    term = SoftBox(RewardConfig())
    assert term(QUESTION, played(), "B") == pytest.approx(1 - 0.04 / 0.6)
    assert term(QUESTION, played(), "C") == 0.0
    assert term(QUESTION, played(box=SCENE), "B") == 0.0  # the whole image is above gamma
    assert term(QUESTION, NO_BOX, None) == 0.0
    assert term(QUESTION, played(), Unscored("status 503")) == Unscored("status 503")
    weights = {"accuracy": 1.0, "format": 1.0, "soft_box": 0.5}
    score = TotalReward(RewardConfig(beta=0.0, weights=weights))(QUESTION, played(), "B")
    assert isinstance(score, Score) and score.total == pytest.approx(3 + 0.5 * (1 - 0.04 / 0.6))


def test_weights_change_the_total_and_not_the_parts() -> None:
    config = RewardConfig(alpha=2.0, beta=0.25, weights={"accuracy": 0.0, "format": 4.0})
    score = TotalReward(config)(QUESTION, played(), "B")
    assert score == Score(6.25, {"region": 1, "box": 1, "accuracy": 1, "format": 1}, turns=(6.25, 4.0))


def test_one_part_that_cannot_be_judged_makes_the_whole_unscored() -> None:
    assert TotalReward(RewardConfig())(QUESTION, played(), Unscored("status 503")) == Unscored("region: status 503")
    # ... but what was played and lost stays a real zero, whatever the reward model does
    assert TotalReward(RewardConfig())(QUESTION, NO_BOX, None) == Score(0.0, dict.fromkeys(PAPER, 0.0))


@pytest.mark.parametrize("name", ["acuracy", "region", "box"])
def test_a_weight_without_a_term_is_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=f"takes accuracy, format, soft_box .*, not {name}"):
        weights_of(RewardConfig(weights={name: 1.0}))
