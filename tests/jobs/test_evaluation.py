"""Evaluation arithmetic: intervals, baselines' boxes, agreement of r_region with coverage, when it is due."""

from __future__ import annotations

import io

import pytest
import ray
from PIL import Image

from ergo_rl.actors.rollout_worker import GroupResult, SkippedQuestion, TrajectorySummary
from ergo_rl.actors.trajectory_store import Group
from ergo_rl.episodes.types import Box, Outcome, Question, Score
from ergo_rl.jobs.config import EvaluationConfig, MetricsConfig
from ergo_rl.jobs.evaluation import BoxSource, Evaluation, choose_box, wilson

TARGET = Box(10, 20, 30, 40)


def question(name: str = "q", boxes: tuple[Box, ...] = (TARGET,)) -> Question:
    file = io.BytesIO()
    Image.new("RGB", (200, 100)).save(file, "PNG")
    return Question(name, file.getvalue(), "?", "ring", boxes=boxes)


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"),
    [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0), (81, 100, 0.7222, 0.8749), (0, 0, 0.0, 1.0)],
)
def test_wilson_intervals_equal_published_tables(hits: int, count: int, low: float, high: float) -> None:
    assert wilson(hits, count) == pytest.approx((low, high), abs=1e-4)


def test_choose_box_gives_the_boxes_of_the_baselines() -> None:
    config = EvaluationConfig(oracle_margin=1.0, random_area=0.25)
    assert choose_box(question(), BoxSource.POLICY, config) is None
    assert choose_box(question(), BoxSource.WHOLE, config) == Box(0, 0, 200, 100)
    assert choose_box(question(), BoxSource.ORACLE, config) == Box(0, 0, 50, 60), (
        "20 more on each side, within the image"
    )
    drawn = [choose_box(question(f"q{n}"), BoxSource.RANDOM, config) for n in range(50)]
    assert all(box is not None and (box.width, box.height) == (100, 50) for box in drawn)
    assert len(set(drawn)) > 40
    assert drawn[7] == choose_box(question("q7"), BoxSource.RANDOM, config), "the same question, the same box"
    with pytest.raises(ValueError, match="'q' has no boxes; an oracle needs them"):
        choose_box(question(boxes=()), BoxSource.ORACLE, config)


def test_evaluation_metrics_compare_region_reward_with_coverage() -> None:
    """Four crops: covered and paid, covered and not paid, not covered and paid, neither."""

    def group(covered: bool, paid: bool) -> Group:
        crop = Box(0, 0, 60, 60) if covered else Box(100, 0, 160, 60)
        facts = TrajectorySummary(Outcome.ANSWERED, "ok", crop, 0.18, 90, (20, 10), (0, 0))
        parts = {"region": float(paid), "accuracy": float(paid)}
        return Group(0, question(), GroupResult("q", (facts,)), (Score(1.0, parts),), ray.ObjectRef.nil())

    groups = tuple(group(covered, paid) for covered in (True, False) for paid in (True, False))
    found = Evaluation(groups, (SkippedQuestion("bad", "no picture"),)).metrics(MetricsConfig())
    assert found["eval/region_precision"] == found["eval/region_recall"] == 0.5
    assert found["eval/coverage"] == found["eval/accuracy"] == 0.5
    bounds = Evaluation(groups, ()).intervals(MetricsConfig())
    assert bounds["eval/coverage"] == pytest.approx(wilson(2, 4)) and bounds["eval/region_recall"] == wilson(1, 2)
    assert bounds["eval/area_ratio"] == pytest.approx((0.18, 0.18))
    assert found["eval/unplayable"] == 1 and found["eval/trajectories"] == 4
    assert Evaluation((), (SkippedQuestion("bad", "no picture"),)).metrics(MetricsConfig()) == {"eval/unplayable": 1.0}


def test_evaluation_is_due_at_its_interval() -> None:
    config = EvaluationConfig(paths=["heldout.parquet"], every=4)
    assert [step for step in range(11) if config.due(step, 10)] == [0, 4, 8, 10]
    assert not any(EvaluationConfig(paths=["heldout.parquet"]).due(step, 10) for step in range(11))
    assert not any(EvaluationConfig(every=4).due(step, 10) for step in range(11))
