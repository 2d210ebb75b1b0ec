"""The reward terms and their sum, in numbers of the paper; and terms of a user's own."""

from __future__ import annotations

import pytest

from ergo_rl.episodes.types import Box, BoxOutcome, Outcome, Question, Score, Trajectory, Unscored
from ergo_rl.rewards.config import RewardConfig
from ergo_rl.rewards.terms import (
    TERMS,
    FunctionTerm,
    SoftBox,
    TotalReward,
    VerifierReply,
    is_thought_then,
    load_terms,
    named_terms,
    policy_crop,
    term_weights,
)
from tests.rewards.builders import GOOD_BOX, LOOK, QUESTION, READ, SCENE, Turns, crop_share, ended_early, played

PAPER = ("region", "box", "accuracy", "format")
NO_BOX = ended_early("I would look left", Outcome.BAD_BOX)
CUT_LOOK = ended_early("<think>I see", Outcome.TRUNCATED)
FALLEN_BACK = played(look="I would look left", box=SCENE, box_outcome=BoxOutcome.NO_TAG)


def term(name: str, trajectory: Trajectory, reply: VerifierReply = None) -> float | Unscored:
    return TERMS[name](RewardConfig())(QUESTION, trajectory, reply)


# --- r_region ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "value"),
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
def test_region_is_whether_the_verifier_answers_right(reply: str, value: float) -> None:
    assert term("region", played(), reply) == value


def test_region_is_unscored_when_the_verifier_has_no_reply() -> None:
    assert term("region", played(), Unscored("status 503")) == Unscored("status 503")


@pytest.mark.parametrize("trajectory", [NO_BOX, CUT_LOOK, FALLEN_BACK])
def test_region_and_box_are_zero_without_a_crop(trajectory: Trajectory) -> None:
    assert policy_crop(trajectory) is None
    assert term("region", trajectory) == 0 and term("box", trajectory) == 0


def test_region_raises_when_the_verifier_was_not_asked() -> None:
    with pytest.raises(ValueError, match="was not asked about its crop"):
        term("region", played(), None)


def test_region_and_box_count_when_the_answer_was_cut_off() -> None:
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
def test_box_is_one_up_to_gamma(box: Box, value: float) -> None:
    assert term("box", played(box=box)) == value


def test_box_takes_gamma_from_the_config() -> None:
    assert TERMS["box"](RewardConfig(gamma=0.03))(QUESTION, played(), None) == 0  # the box is 4 %


@pytest.mark.parametrize("outcome", [outcome for outcome in BoxOutcome if outcome.usable])
def test_terms_count_every_usable_box_outcome(outcome: BoxOutcome) -> None:
    trajectory = played(box_outcome=outcome)
    assert (term("region", trajectory, "B"), term("box", trajectory), term("format", trajectory)) == (1, 1, 1)


# --- r_acc -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("read", "value"),
    [(READ, 1), ("<answer>ring</answer>", 1), ("<answer>C</answer>", 0), ("B", 0), ("<answer></answer>", 0), ("", 0)],
)
def test_accuracy_is_one_for_the_right_tagged_answer_only(read: str, value: float) -> None:
    assert term("accuracy", played(read=read)) == value


def test_accuracy_counts_after_the_fallback_but_not_without_turn_two() -> None:
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
        ("<think>a</think><zoom></zoom>", True),  # what is in the tag is for others to judge
        ("<think></think><zoom>[1, 2, 3, 4]</zoom>", False),
        ("<think> \n</think><zoom>[1, 2, 3, 4]</zoom>", False),
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
def test_is_thought_then_accepts_exactly_two_tags(reply: str, well_formed: bool) -> None:
    assert is_thought_then(reply, "zoom") is well_formed
    answer = reply.replace("answer", "other").replace("zoom", "answer").replace("other", "zoom")
    assert is_thought_then(answer, "answer") is well_formed


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
def test_format_needs_both_turns_well_formed(trajectory: Trajectory, value: float) -> None:
    assert term("format", trajectory) == value


# --- the sum -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trajectory", "reply", "total", "parts"),
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
def test_total_equals_the_sum_by_hand(
    trajectory: Trajectory, reply: VerifierReply, total: float, parts: tuple[int, ...]
) -> None:
    names = ("region", "box", "accuracy", "format")
    score = TotalReward(RewardConfig())(QUESTION, trajectory, reply)
    assert isinstance(score, Score) and (score.total, score.parts) == (total, dict(zip(names, parts, strict=True)))


def test_score_credits_each_turn_by_hand() -> None:
    """Region 1 and box 0.5 to turn 1, accuracy 1 to turn 2, and to each turn 1 for its own tags."""

    def turns(trajectory: Trajectory, reply: VerifierReply) -> tuple[float, float]:
        score = TotalReward(RewardConfig())(QUESTION, trajectory, reply)
        assert isinstance(score, Score)
        return score.turns

    assert turns(played(), "B") == (2.5, 2.0)
    assert turns(played(read="<answer>B</answer>"), "B") == (2.5, 1.0)  # no thought in turn 2: its own fault
    assert turns(played(read="<think>hm</think><answer>C</answer>"), "A") == (1.5, 1.0)
    assert turns(played(look="<zoom>[10, 10, 30, 30]</zoom>"), "B") == (1.5, 2.0)
    assert turns(NO_BOX, None) == (0.0, 0.0)


def test_soft_box_equals_the_formula_by_hand() -> None:
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


def test_weights_change_the_total_but_not_the_parts() -> None:
    config = RewardConfig(alpha=2.0, beta=0.25, weights={"accuracy": 0.0, "format": 4.0})
    score = TotalReward(config)(QUESTION, played(), "B")
    assert score == Score(6.25, {"region": 1, "box": 1, "accuracy": 1, "format": 1}, turns=(6.25, 4.0))


def test_total_is_unscored_when_one_term_is() -> None:
    assert TotalReward(RewardConfig())(QUESTION, played(), Unscored("status 503")) == Unscored("region: status 503")
    # ... but what was played and lost stays a real zero, whatever the verifier does
    assert TotalReward(RewardConfig())(QUESTION, NO_BOX, None) == Score(0.0, dict.fromkeys(PAPER, 0.0))


@pytest.mark.parametrize("name", ["acuracy", "region", "box"])
def test_term_weights_refuse_a_weight_without_a_term(name: str) -> None:
    with pytest.raises(ValueError, match=f"takes accuracy, format, soft_box .*, not {name}"):
        term_weights(RewardConfig(weights={name: 1.0}))


# --- terms of a user's own ---------------------------------------------------------------------------------------

WITH_SHARE = {"accuracy": 1.0, "format": 1.0, "crop_share": 0.5}


def scored(reward: TotalReward, trajectory: Trajectory, reply: VerifierReply = "B") -> Score:
    score = reward(QUESTION, trajectory, reply)
    assert isinstance(score, Score)
    return score


def test_function_named_in_the_config_is_a_term() -> None:
    """The crop is 200 x 200 of 1000 x 1000: 0.04, half of it paid, all of that to turn 1."""
    config = RewardConfig(terms={"crop_share": "tests.rewards.builders:crop_share"}, weights=WITH_SHARE)
    score = scored(TotalReward(config), played())
    assert score.parts["crop_share"] == 0.04
    assert score.total == 3.5 + 0.5 * 0.04 and score.turns == (2.5 + 0.5 * 0.04, 2.0)


def test_terms_handed_over_weigh_one_unless_the_config_says_otherwise() -> None:
    own = named_terms([crop_share, Turns, FunctionTerm(RewardConfig(), lambda question, trajectory, reply: 7)])
    assert list(own) == ["crop_share", "turns", "function_term"]
    assert term_weights(RewardConfig(weights=WITH_SHARE), own) == {
        "region": 1.0, "box": 0.5, "accuracy": 1.0, "format": 1.0,
        "crop_share": 0.5, "turns": 1.0, "function_term": 1.0,
    }  # fmt: skip
    score = scored(TotalReward(RewardConfig(weights=WITH_SHARE), own), played())
    assert score.total == 3.5 + 0.5 * 0.04 + 2 + 7


def test_function_may_return_unscored() -> None:
    reward = TotalReward(RewardConfig(), {"slow": lambda question, trajectory, reply: Unscored("timed out")})
    assert reward(QUESTION, played(), "B") == Unscored("slow: timed out")


@pytest.mark.parametrize("value", [None, float("nan"), float("inf"), "much"])
def test_function_that_returns_no_finite_number_is_named(value: object) -> None:
    def brief(question: Question, trajectory: Trajectory, reply: VerifierReply) -> float:
        return value  # type: ignore[return-value]

    with pytest.raises(ValueError, match=r"the reward function .*brief returned .*; return a finite number"):
        TotalReward(RewardConfig(), {"brief": brief})(QUESTION, played(), "B")


def test_terms_handed_over_need_names_of_their_own() -> None:
    with pytest.raises(ValueError, match="two reward terms are called crop_share"):
        named_terms([crop_share, crop_share])
    with pytest.raises(ValueError, match=r"has no name to use .*; pass \{name: term\}"):
        named_terms([lambda question, trajectory, reply: 0.0])
    assert named_terms({"share": crop_share}) == {"share": crop_share}
    with pytest.raises(ValueError, match=r"reward.terms: box is a term of ours"):
        load_terms(RewardConfig(), {"box": crop_share})
    config = RewardConfig(terms={"share": "tests.rewards.builders:crop_share"}, weights={"share": 1.0})
    with pytest.raises(ValueError, match=r"reward.terms names share, and so does a term that was handed over"):
        load_terms(config, {"share": crop_share})


def test_path_that_leads_to_no_term_is_refused() -> None:
    config = RewardConfig(terms={"look": "tests.rewards.builders:LOOK"}, weights={"look": 1.0})
    with pytest.raises(ValueError, match=r"it must be a subclass of .*RewardTerm, or a function "):
        load_terms(config)
