"""The scheduler without machines: pools that answer at once, or in an order of the test's choosing."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from hypothesis import given, settings
from hypothesis import strategies as st

from ergo_rl.actors.rollout_pool import Rollout
from ergo_rl.actors.rollout_worker import GroupResult, SkippedQuestion, TrajectorySummary
from ergo_rl.actors.trajectory_store import Group
from ergo_rl.episodes.config import OnBadRow
from ergo_rl.episodes.types import Outcome, Question, Score
from ergo_rl.jobs.checkpoint_manager import scheduler_from_json, scheduler_to_json
from ergo_rl.jobs.rollout_scheduler import RolloutScheduler, SchedulerState
from ergo_rl.questions.dataset import Cursor

FACTS = TrajectorySummary(Outcome.ANSWERED, "ok", None, 0.1, 100, (5, 5), (0, 0))
EPOCH = 10


class Questions:
    """q0, q1, ... without end, ten to an epoch."""

    def __init__(self) -> None:
        self.skipped = SimpleNamespace(total=lambda: 0)
        self.cursor = Cursor()

    def restore(self, cursor: Cursor) -> None:
        self.cursor = cursor

    def __next__(self) -> Question:
        epoch, position = self.cursor.epoch, self.cursor.position
        if position == EPOCH:
            epoch, position = epoch + 1, 0
        self.cursor = Cursor(epoch, position + 1)
        return Question(f"q{epoch * EPOCH + position}", b"", "?", "ring")


def scheduler_of(
    equal: Sequence[int] = (),
    unplayable: Sequence[int] = (),
    delay: Callable[[int], float] = lambda _: 0.0,
    state: SchedulerState | None = None,
    version: Callable[[], int] = lambda: 0,
    keep_stale: bool = False,
) -> RolloutScheduler:
    """Two trajectories a question, of rewards 0 and 1; of 1 and 1 for the questions ``equal``."""

    async def rollout(question: Question, seed: int) -> Rollout | SkippedQuestion:
        number = int(question.id[1:])
        await asyncio.sleep(delay(number))
        if number in unplayable:
            return SkippedQuestion(question.id, "no image")
        facts = replace(FACTS, policy_versions=(version(), version()))
        return Rollout(GroupResult(question.id, (facts, facts)), ray.ObjectRef.nil())

    async def score(question: Question, trajectories: Any) -> tuple[Score, ...]:
        return Score(1.0 if int(question.id[1:]) in equal else 0.0), Score(1.0)

    class Pools(SimpleNamespace):
        def __len__(self) -> int:
            return 1

    pools: Any = Pools(rollout=rollout, score=score, restarts=0)
    questions: Any = Questions()
    return RolloutScheduler(questions, pools, pools, 0, OnBadRow.SKIP, state, keep_stale)


def unlike(group: Group) -> bool:
    return len({score.total for score in group.scores if isinstance(score, Score)}) > 1


def steps(scheduler: RolloutScheduler, spare: int, how_many: int = 1, ahead: int = 0, size: int = 4) -> list[list[str]]:
    """The questions of each step, as the training loop takes them."""

    async def story() -> list[list[str]]:
        taken = []
        for _ in range(how_many):
            scheduler.keep_ahead(size * (1 + ahead))
            groups = await asyncio.wait_for(scheduler.take(size, oldest=0, wanted=unlike, spare=spare), timeout=10)
            taken.append([group.question.id for group in groups])
        await scheduler.stop()
        return taken

    return asyncio.run(story())


def test_take_without_spare_groups_takes_them_as_they_come() -> None:
    scheduler = scheduler_of(equal=[1, 2])
    assert steps(scheduler, spare=0, how_many=2) == [["q0", "q1", "q2", "q3"], ["q4", "q5", "q6", "q7"]]
    assert scheduler.metrics()["count/equal_groups_replaced"] == 0


def test_take_replaces_equal_groups_and_counts_them() -> None:
    """q1 and q2 teach nothing: q4 and q5 are played for them, q5 teaches nothing either: q6. The next step goes on."""
    scheduler = scheduler_of(equal=[1, 2, 5])
    assert steps(scheduler, spare=12, how_many=2) == [["q0", "q3", "q4", "q6"], ["q7", "q8", "q9", "q10"]]
    assert scheduler.metrics()["count/equal_groups_replaced"] == 3


def test_take_replaces_no_more_than_spare_groups() -> None:
    """Nothing teaches anything: 4 questions and 3 in their place, the last four of which are taken as they are."""
    scheduler = scheduler_of(equal=range(100))
    assert steps(scheduler, spare=3, how_many=2) == [["q3", "q4", "q5", "q6"], ["q10", "q11", "q12", "q13"]]
    assert scheduler.metrics()["count/equal_groups_replaced"] == 6


@pytest.mark.parametrize("spare", [2, 12])
def test_take_does_not_depend_on_which_group_finishes_first(spare: int) -> None:
    equal = [0, 2, 3, 5]
    orders: list[Callable[[int], float]] = [lambda n: 0.01 * n, lambda n: 0.03 - 0.002 * n, lambda n: 0.01 * (n % 3)]
    first, *others = [steps(scheduler_of(equal, delay=delay), spare, how_many=2) for delay in orders]
    assert all(other == first for other in others)


def test_take_ahead_of_the_learner_replaces_from_what_is_in_flight() -> None:
    """One step ahead: q0 to q7 are in flight, q4 takes the place of q1, and as many stay ahead."""
    scheduler = scheduler_of(equal=[1])
    assert steps(scheduler, spare=12, how_many=2, ahead=1) == [["q0", "q2", "q3", "q4"], ["q5", "q6", "q7", "q8"]]


def test_take_replaces_equal_groups_beside_unplayable_questions() -> None:
    scheduler = scheduler_of(equal=[2], unplayable=[1])
    assert steps(scheduler, spare=12) == [["q0", "q3", "q4", "q5"]]
    metrics = scheduler.metrics()
    assert (metrics["count/unplayable"], metrics["count/equal_groups_replaced"]) == (1, 1)


def test_stale_groups_are_replaced_so_that_take_ends() -> None:
    """q0 to q3 are played by version 0 while version 3 is asked for: q4 to q7 come in their place."""
    now = [0]
    scheduler = scheduler_of(version=lambda: now[0])

    async def story() -> list[str]:
        scheduler.keep_ahead(4)
        await asyncio.sleep(0.05)
        now[0] = 3
        groups = await asyncio.wait_for(scheduler.take(4, oldest=3, wanted=unlike, spare=0), timeout=10)
        return [group.question.id for group in groups]

    assert asyncio.run(story()) == ["q4", "q5", "q6", "q7"]
    assert scheduler.metrics()["count/stale_groups"] == 4


@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_keep_ahead_bounds_how_far_rollouts_run_ahead(ahead: int) -> None:
    """A learner that takes its time, pools that answer at once: what is played, scored or waiting is never more than
    4 groups for each version that the learner may be behind and the one it is at; and nothing is older than that."""
    now, most = [0], 0
    scheduler = scheduler_of(version=lambda: now[0])

    async def story() -> list[int]:
        nonlocal most
        ages = []
        for step in range(5):
            scheduler.keep_ahead(4 * (1 + ahead))
            scheduler.keep_ahead(4 * (1 + ahead))  # asking twice is asking once
            groups = await asyncio.wait_for(scheduler.take(4, oldest=step - ahead, wanted=unlike, spare=0), timeout=10)
            await asyncio.sleep(0.02)  # the learner learns, all that may be played is played
            state = scheduler.state()
            most = max(most, len(state.in_flight) + len(state.groups) + 4)
            ages += [step - group.oldest_version for group in groups]
            now[0] = step + 1
        return ages

    ages = asyncio.run(story())
    assert most == 4 * (1 + ahead)
    assert max(ages) == ahead and scheduler.metrics()["count/stale_groups"] == 0


def test_stale_groups_are_handed_out_with_keep_stale() -> None:
    now = [0]
    scheduler = scheduler_of(version=lambda: now[0], keep_stale=True)

    async def story() -> list[str]:
        scheduler.keep_ahead(2)
        await asyncio.sleep(0.05)
        now[0] = 3
        groups = await asyncio.wait_for(scheduler.take(2, oldest=3, wanted=unlike, spare=0), timeout=10)
        return [group.question.id for group in groups]

    assert asyncio.run(story()) == ["q0", "q1"]
    assert scheduler.metrics()["count/stale_groups"] == 2


@settings(max_examples=60)
@given(
    stops=st.lists(st.integers(0, 3), max_size=4),
    delays=st.lists(st.integers(0, 5), min_size=1, max_size=7),
    unplayable=st.sets(st.integers(0, 20), max_size=5),
    ahead=st.integers(0, 2),
)
def test_every_question_is_used_once_however_often_the_scheduler_is_resumed(
    stops: list[int], delays: list[int], unplayable: set[int], ahead: int
) -> None:
    """A run is cut into lives of so many whole steps; each one begins from the state that the one before left, which
    went through JSON but for its groups. What it drops in the middle of a step is taken again."""
    used: list[str] = []
    state = SchedulerState()

    async def life(steps: int, state: SchedulerState) -> SchedulerState:
        scheduler = scheduler_of(
            unplayable=sorted(unplayable), delay=lambda n: 0.001 * delays[n % len(delays)], state=state
        )
        for _ in range(steps):
            scheduler.keep_ahead(3 * (1 + ahead))
            groups = await asyncio.wait_for(scheduler.take(3, oldest=0, wanted=unlike, spare=0), timeout=10)
            used.extend(group.question.id for group in groups)
            state = scheduler.state()
        scheduler.keep_ahead(3 * (1 + ahead))
        await scheduler.take(1, oldest=0, wanted=unlike, spare=0)  # a step that is dropped
        await scheduler.stop()
        return state

    for steps in [*stops, 2]:
        state = through_json(asyncio.run(life(steps, state)))
    order = [f"q{number}" for number in range(100) if number not in unplayable]
    assert used == order[: len(used)] and len(used) == 3 * (sum(stops) + 2)


def through_json(state: SchedulerState) -> SchedulerState:
    cells = json.loads(json.dumps(scheduler_to_json(state)))
    return scheduler_from_json(cells, state.groups)


def test_state_without_a_number_is_refused() -> None:
    with pytest.raises(ValueError, match=r"numbers 2 to 3 should be there once each, found \[3\]"):
        SchedulerState(next_number=2, started=4, skipped=(3,))
