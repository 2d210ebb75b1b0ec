import pytest

from ergo_rl.learners.config import Attention, LearnerConfig, LossConfig, ObjectiveName, OptimizerConfig, Schedule


def test_warm_up_then_schedule_by_hand() -> None:
    rates = {
        schedule: [
            OptimizerConfig(lr=1.0, schedule=schedule, warmup_steps=2, total_steps=6).learning_rate(step)
            for step in range(8)
        ]
        for schedule in Schedule
    }
    assert rates[Schedule.CONSTANT] == [0.5, 1, 1, 1, 1, 1, 1, 1]
    assert rates[Schedule.LINEAR] == [0.5, 1, 1, 0.75, 0.5, 0.25, 0, 0]
    assert rates[Schedule.COSINE] == pytest.approx([0.5, 1, 1, 0.853553, 0.5, 0.146447, 0, 0], abs=1e-6)


def test_falling_schedule_without_its_end_when_asked_for_a_rate_then_it_is_refused() -> None:
    assert OptimizerConfig(lr=1.0).learning_rate(10**6) == 1.0, "a constant one needs none"
    with pytest.raises(ValueError, match="schedule=cosine needs"):
        OptimizerConfig(lr=1.0, schedule=Schedule.COSINE).learning_rate(0)


@pytest.mark.parametrize(
    "wrong", [{"zero_stage": 4}, {"zero_stage": 0}, {"ranks": 0}, {"temperature": 0.0}, {"attention": Attention.FLASH}]
)
def test_impossible_values_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        LearnerConfig(**wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"clip_low": 1.5},
        {"clip_high": -0.1},
        {"dual_clip": 1.0},
        {"dual_clip": 3.0, "objective": ObjectiveName.CISPO},
        {"mismatch_low": 1.0},
        {"mismatch_high": 0.5},
        {"longest_reply": 0},
        {"kl": -0.1},
    ],
)
def test_impossible_losses_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        LossConfig(**wrong)
