"""Who waits for whom, in numbers that can be checked by hand: a step is rollout + 2 s of learning."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from ergo_rl.actors.config import RolloutConfig
from ergo_rl.cluster.config import Size
from ergo_rl.jobs import autoscale
from ergo_rl.jobs.autoscale import WINDOW, AutoscalePolicy, autoscaling


def steps(policy: AutoscalePolicy, rollout_s: float, workers: int, count: int = WINDOW + 1) -> list[int]:
    """Answers after each of ``count`` steps; the first with another number of workers is not counted."""
    return [policy.record_step(rollout_s, rollout_s + 2.0, workers) for _ in range(count)]


def test_policy_grows_after_a_window_in_which_the_learner_waits_most_of_the_step() -> None:
    assert steps(AutoscalePolicy(Size(1, 3)), 6.0, 1) == [1, 1, 1, 1, 1, 2]  # 6 of 8 s: 75 %


def test_policy_keeps_the_number_between_the_thresholds() -> None:
    for rollout_s in (1.0, 2.9):  # 33 %, 59 %
        assert set(steps(AutoscalePolicy(Size(1, 3)), rollout_s, 2, 20)) == {2}


def test_policy_shrinks_waiting_workers_down_to_min() -> None:
    policy = AutoscalePolicy(Size(1, 3))
    assert steps(policy, 0.5, 3)[-1] == 2  # 0.5 of 2.5 s: 20 %
    assert steps(policy, 0.6, 2)[-1] == 1  # 23 %
    assert set(steps(policy, 0.5, 1, 20)) == {1}


def test_policy_settles_when_a_step_of_rollouts_takes_6_s_by_the_number_of_workers() -> None:
    """75 % with one, 60 % with two (3 of 5 s, not above the threshold): two, for good."""
    policy, workers, seen = AutoscalePolicy(Size(1, 8)), 1, []
    for _ in range(100):
        workers = policy.record_step(6.0 / workers, 6.0 / workers + 2.0, workers)
        seen.append(workers)
    assert seen[5] == 2 and set(seen[6:]) == {2}


def test_policy_never_exceeds_max() -> None:
    policy = AutoscalePolicy(Size(1, 2))
    assert steps(policy, 30.0, 1)[-1] == 2 and set(steps(policy, 15.0, 2, 30)) == {2}


def test_policy_removes_a_worker_without_gain_and_does_not_add_it_again() -> None:
    """One machine's cores are all in use: with two workers playing takes as long as with one."""
    policy = AutoscalePolicy(Size(1, 4))
    assert steps(policy, 6.0, 1)[-1] == 2
    assert steps(policy, 5.5, 2)[-1] == 1  # 8 % less; 10 % is the least
    assert set(steps(policy, 6.0, 1, 30)) == {1}


def test_policy_ignores_a_single_slow_step() -> None:
    policy = AutoscalePolicy(Size(1, 3))
    steps(policy, 1.0, 1)
    assert policy.record_step(3.0, 5.0, 1) == 1  # (4 x 1 + 3) of (4 x 3 + 5): 41 %


def test_policy_brings_a_number_set_by_hand_back_between_min_and_max() -> None:
    assert steps(AutoscalePolicy(Size(1, 2)), 2.0, 4) == [4, 4, 4, 4, 4, 2]
    assert steps(AutoscalePolicy(Size(2, 3)), 2.0, 1)[-1] == 2


class SlowPool:
    """A pool whose new workers come up when told, or never."""

    def __init__(self, comes: bool) -> None:
        self.config, self.workers, self.comes = RolloutConfig(workers={"min": 1, "max": 2}), 1, comes
        self.go, self.asked = asyncio.Event(), list[int]()

    def __len__(self) -> int:
        return self.workers

    def free(self) -> str:
        return "free in the cluster: {'CPU': 0.0}"

    async def resize(self, workers: int) -> None:
        self.asked.append(workers)
        await self.go.wait()
        if not self.comes:
            raise TimeoutError("1 of 1 new rollout workers did not start; there are 1 now")
        self.workers = workers


@pytest.mark.parametrize("comes", [True, False])
def test_autoscaler_waits_for_a_worker_in_the_background_and_says_so(
    comes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autoscale, "SAY_EVERY_S", 0.01)
    said: list[str] = []
    console: Any = SimpleNamespace(say=said.append)
    waits = {"time/rollout_s": 6.0, "time/step_s": 8.0}

    async def story() -> None:
        pool: Any = SlowPool(comes)
        async with autoscaling(pool, console) as autoscaler:
            assert autoscaler is not None
            for _ in range(WINDOW + 10):  # ten of them while it waits: asked for once
                autoscaler.record_step(waits)
            await asyncio.sleep(0.1)
            assert (
                pool.asked == [2] and said[0] == "autoscale: 1 -> 2 rollout workers: the learner waits 75% of the step"
            )
            assert said[1] == "autoscale: still waiting for 2 rollout workers; free in the cluster: {'CPU': 0.0}"
            pool.go.set()
            await asyncio.sleep(0.05)
            assert len(pool) == (2 if comes else 1)
            if not comes:
                assert said[-1] == "autoscale: 1 of 1 new rollout workers did not start; there are 1 now"
                for _ in range(WINDOW):
                    autoscaler.record_step(waits)
                await asyncio.sleep(0.05)
                assert pool.asked == [2, 2], "tried again after another window"

    asyncio.run(story())


def test_autoscaling_of_a_fixed_number_does_nothing() -> None:
    async def story() -> None:
        async with autoscaling(SimpleNamespace(config=RolloutConfig(workers=3)), None) as autoscaler:  # type: ignore[arg-type]
            assert autoscaler is None

    asyncio.run(story())


@pytest.mark.parametrize(
    "value", [0, -1, True, 1.5, "2", None, {"min": 1}, {"min": 3, "max": 2}, {"min": 0, "max": 2}, []]
)
def test_number_of_workers_is_refused_when_it_is_none(value: Any) -> None:
    with pytest.raises(
        ValueError, match=r"rollout\.workers is .*it takes a whole number from 1, or \{min: 1, max: 4\}"
    ):
        RolloutConfig(workers=value)
    assert RolloutConfig(workers=2).size == Size(2, 2)
    assert RolloutConfig(workers={"min": 1, "max": 4}).size == Size(1, 4)
