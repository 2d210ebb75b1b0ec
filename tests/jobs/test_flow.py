"""The flow of questions without machines: pools that answer at once, or in an order of the test's choosing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from actors.rollout_pool import Rollout
from actors.rollout_worker import Played, TrajectoryFacts, Unplayable
from actors.trajectory_store import Group, TrajectoryStore
from episodes.questions import OnBadRow
from episodes.types import Outcome, Question, Score
from jobs.flow import Flow

FACTS = TrajectoryFacts(Outcome.ANSWERED, "ok", None, 0.1, 100, (5, 5), (0, 0))


class Questions:
    """q0, q1, ... without end."""

    def __init__(self) -> None:
        self.skipped = SimpleNamespace(total=lambda: 0)
        self._numbers = count()

    def __next__(self) -> Question:
        return Question(f"q{next(self._numbers)}", b"", "?", "ring")


def flow_of(
    equal: Sequence[int], unplayable: Sequence[int] = (), delay: Callable[[int], float] = lambda _: 0.0
) -> Flow:
    """Two trajectories a question, of rewards 0 and 1; of 1 and 1 for the questions ``equal``."""

    async def play(question: Question, seed: int) -> Rollout | Unplayable:
        number = int(question.id[1:])
        await asyncio.sleep(delay(number))
        if number in unplayable:
            return Unplayable(question.id, "no picture")
        return Rollout(Played(question.id, (FACTS, FACTS)), ray.ObjectRef.nil())

    async def score(question: Question, trajectories: Any) -> tuple[Score, ...]:
        return Score(1.0 if int(question.id[1:]) in equal else 0.0), Score(1.0)

    pools: Any = SimpleNamespace(play=play, score=score, restarts=0)
    questions: Any = Questions()
    return Flow(questions, pools, pools, TrajectoryStore(), 0, OnBadRow.SKIP)


def unlike(group: Group) -> bool:
    return len({score.total for score in group.scores if isinstance(score, Score)}) > 1


def steps(flow: Flow, spare: int, how_many: int = 1, ahead: int = 0, size: int = 4) -> list[list[str]]:
    """The questions of each step, as the training loop takes them."""

    async def story() -> list[list[str]]:
        taken = []
        flow.allow(size * ahead)
        for _ in range(how_many):
            flow.allow(size)
            groups = await asyncio.wait_for(flow.take(size, oldest=0, wanted=unlike, spare=spare), timeout=10)
            taken.append([group.question.id for group in groups])
        await flow.stop()
        return taken

    return asyncio.run(story())


def test_without_it_groups_are_taken_as_they_come() -> None:
    flow = flow_of(equal=[1, 2])
    assert steps(flow, spare=0, how_many=2) == [["q0", "q1", "q2", "q3"], ["q4", "q5", "q6", "q7"]]
    assert flow.metrics()["count/equal_groups_replaced"] == 0


def test_equal_groups_are_replaced_and_counted() -> None:
    """q1 and q2 teach nothing: q4 and q5 are played for them, q5 teaches nothing either: q6. The next step goes on."""
    flow = flow_of(equal=[1, 2, 5])
    assert steps(flow, spare=12, how_many=2) == [["q0", "q3", "q4", "q6"], ["q7", "q8", "q9", "q10"]]
    assert flow.metrics()["count/equal_groups_replaced"] == 3


def test_no_more_than_allowed_is_played() -> None:
    """Nothing teaches anything: 4 questions and 3 in their place, the last four of which are taken as they are."""
    flow = flow_of(equal=range(100))
    assert steps(flow, spare=3, how_many=2) == [["q3", "q4", "q5", "q6"], ["q10", "q11", "q12", "q13"]]
    assert flow.metrics()["count/equal_groups_replaced"] == 6


@pytest.mark.parametrize("spare", [2, 12])
def test_what_is_taken_does_not_depend_on_what_is_finished_first(spare: int) -> None:
    equal = [0, 2, 3, 5]
    orders: list[Callable[[int], float]] = [lambda n: 0.01 * n, lambda n: 0.03 - 0.002 * n, lambda n: 0.01 * (n % 3)]
    first, *others = [steps(flow_of(equal, delay=delay), spare, how_many=2) for delay in orders]
    assert all(other == first for other in others)


def test_ahead_of_the_learner_what_was_played_already_comes_next() -> None:
    """One step ahead: q0 to q7 are in flight, q4 takes the place of q1, and as many stay ahead."""
    flow = flow_of(equal=[1])
    assert steps(flow, spare=12, how_many=2, ahead=1) == [["q0", "q2", "q3", "q4"], ["q5", "q6", "q7", "q8"]]


def test_beside_questions_that_cannot_be_played() -> None:
    flow = flow_of(equal=[2], unplayable=[1])
    assert steps(flow, spare=12) == [["q0", "q3", "q4", "q5"]]
    metrics = flow.metrics()
    assert (metrics["count/unplayable"], metrics["count/equal_groups_replaced"]) == (1, 1)
