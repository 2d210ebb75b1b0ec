"""Every kind of process is killed, one engine is stopped; the run ends well and every question is used exactly once."""

from __future__ import annotations

import signal
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.lives import ENGINE, Life, lines_of, living, small_run
from tests.system.background import Background

pytestmark = pytest.mark.system
G = 4
STALL_S = 30
VICTIMS = (
    ("rollout worker", "ray::RolloutWorker", None, signal.SIGKILL),
    ("its engine", ENGINE, "ray::RolloutWorker", signal.SIGKILL),
    ("reward worker", "ray::RewardWorker", None, signal.SIGKILL),
    ("learner rank", "ray::LearnerRank", None, signal.SIGKILL),
    ("engine that hangs", ENGINE, "ray::RolloutWorker", signal.SIGSTOP),
)
STEPS = 2 * len(VICTIMS) + 2


@pytest.mark.timeout(1500)
def test_killed_and_hung_processes_lose_no_question_and_use_none_twice(background: Background) -> None:
    background.result(__name__)


def story(tmp_path: Path) -> None:
    overrides = small_run(
        tmp_path, STEPS, max_staleness=1, **{
            "checkpoint.every": 1, "rollout.restarts": 6, "rollout.hang_timeout_s": STALL_S, "reward.restarts": 3,
            "recovery.backoff_s": 0.5, "rollout.backoff_s": 0.5,
        },
    )  # fmt: skip
    with living(overrides, tmp_path / "run.out") as life:
        life.wait_for_steps(1)
        for who, title, below, number in VICTIMS:
            hurt(life, who, title, below, number)
        if life.end() != 0:
            life.fail("the run failed")
        check(life)


def hurt(life: Life, who: str, title: str, below: str | None, number: int) -> None:
    """And wait until the run has made two more steps than it had: the first may have been under way already."""
    done = len(life.steps())
    life.send(life.of_kind(title, below), number)
    waited = life.wait_for_steps(min(done + 2, STEPS), timeout_s=300)
    print(f"{who}: {signal.Signals(number).name} after step {done}; two more steps took {waited:.1f} s")


def check(life: Life) -> None:
    steps = life.steps()
    assert [step["step"] for step in steps] == list(range(STEPS))
    used = lines_of(life.run / "questions.jsonl")
    assert [line["step"] for line in used] == list(range(STEPS))
    numbers = [question["number"] for line in used for question in line["questions"]]
    assert numbers == list(range(2 * STEPS)), "every number once, in order"
    assert all(question["samples"] == G for line in used for question in line["questions"])
    times = Counter(question["id"] for line in used for question in line["questions"])
    assert max(times.values()) == 1, "24 questions are one epoch"
    for line in used:
        assert all(question["oldest"] >= line["step"] - 1 for question in line["questions"]), "max_staleness is 1"
    assert all(step["reward/unscored"] == 0 and step["learner/length_mismatches"] == 0 for step in steps)
    last = steps[-1]
    assert last["count/rollout_restarts"] >= 3 and last["count/reward_restarts"] >= 1
    log = (life.run / "run.log").read_text()
    assert "starting the learner again" in log
