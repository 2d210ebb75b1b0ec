"""Evaluation arithmetic: intervals, baselines' boxes, agreement of r_region with coverage, when it is due."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from PIL import Image

from ergo_rl.actors.rollout_worker import GroupResult, SkippedQuestion, TrajectorySummary
from ergo_rl.actors.trajectory_store import Group
from ergo_rl.episodes.images import decode
from ergo_rl.episodes.types import Box, Outcome, Question, Score, Unscored
from ergo_rl.jobs.config import EvaluationConfig, MetricsConfig, TrainConfig, load_config
from ergo_rl.jobs.evaluation import (
    BoxSource,
    Evaluation,
    HeldOut,
    choose_box,
    evaluate,
    is_right,
    launch_workers,
    wilson,
)
from ergo_rl.questions.dataset import write_questions
from ergo_rl.rewards.config import Backend, EndpointConfig, VerifierConfig
from tests.backends.memory import MemoryBackend, Rollouts
from tests.conftest import ROOT

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
        facts = TrajectorySummary(
            Outcome.ANSWERED, "ok", crop, 0.18, 90, (20, 10), (0, 0), answer="ring" if paid else "dot"
        )
        parts = {"region": float(paid), "accuracy": float(paid)}
        return Group(0, question(), GroupResult("q", (facts,)), (Score(1.0, parts),), ray.ObjectRef.nil())

    groups = tuple(group(covered, paid) for covered in (True, False) for paid in (True, False))
    right = tuple(is_right(one, 0.01) for one in groups)
    found = Evaluation(groups, (), right).metrics(MetricsConfig())
    assert found["eval/region_precision"] == found["eval/region_recall"] == 0.5
    assert found["eval/coverage"] == found["eval/accuracy"] == 0.5
    bounds = Evaluation(groups, (), right).intervals(MetricsConfig())
    assert bounds["eval/coverage"] == pytest.approx(wilson(2, 4)) and bounds["eval/region_recall"] == wilson(1, 2)
    assert bounds["eval/area_ratio"] == pytest.approx((0.18, 0.18))


def test_evaluation_counts_every_row_whatever_the_reward_model_did() -> None:
    """Ten rows: four right answers, of which the reward model scored two; four wrong ones; two that failed."""

    def group(number: int) -> Group:
        answer = "ring" if number < 4 else "dot"
        facts = TrajectorySummary(Outcome.ANSWERED, "ok", TARGET, 0.1, 90, (20, 10), (0, 0), answer=answer)
        score = Unscored("status 503") if number in (0, 1) else Score(1.0, {"region": 1.0, "accuracy": 1.0})
        return Group(number, question(), GroupResult("q", (facts,)), (score,), ray.ObjectRef.nil())

    groups = tuple(map(group, range(8)))
    failed = (SkippedQuestion("8", "no picture"), SkippedQuestion("9", "no picture"))
    told = Evaluation(groups, failed, tuple(is_right(one, 0.01) for one in groups))
    found = told.metrics(MetricsConfig())
    assert found["eval/accuracy"] == 0.4 and found["eval/questions"] == 10 and found["eval/trajectories"] == 8
    assert found["eval/failed"] == found["eval/unscored"] == 2
    assert told.intervals(MetricsConfig())["eval/accuracy"] == pytest.approx(wilson(4, 10))
    none = Evaluation((), failed, ()).metrics(MetricsConfig())
    assert none == {"eval/accuracy": 0.0, "eval/questions": 2.0, "eval/failed": 2.0}


def held_out(tmp_path: Path, *files: Sequence[Question], **keys: Any) -> TrainConfig:
    paths = []
    for number, rows in enumerate(files):
        paths.append(str(tmp_path / f"{number}.parquet"))
        write_questions(Path(paths[-1]), iter(rows), rows_per_group=2)
    config = load_config(ROOT / "configs" / "panels.yaml")
    return replace(config, evaluation=replace(config.evaluation, paths=paths, **{"questions": 0, **keys}))


def test_held_out_gives_each_row_once_bad_ones_with_their_reason(tmp_path: Path) -> None:
    bad = replace(question("bad"), image=b"no picture")
    config = held_out(tmp_path, [question("a"), bad, question("b"), bad, question("c")])
    rows = list(HeldOut(config))
    assert [type(row) for row in rows] == [Question, SkippedQuestion, Question, SkippedQuestion, Question]
    assert isinstance(rows[1], SkippedQuestion) and rows[1].question_id == "1/0.parquet/1: bad"
    assert "0.parquet, row 1 (id 'bad'), column 'image'" in rows[1].reason
    assert len(list(HeldOut(replace(config, evaluation=replace(config.evaluation, questions=2))))) == 2


def test_held_out_equal_ids_are_kept_apart(tmp_path: Path) -> None:
    """Also where an id looks like the name that another row gets, and where the files have one name in two folders."""
    config = held_out(tmp_path, [question("0"), question("1"), question("2/1.parquet/0: 0")], [question("0")])
    rows = HeldOut(config)
    wanted = ["1/0.parquet/0: 0", "1", "1/0.parquet/2: 2/1.parquet/0: 0", "2/1.parquet/0: 0"]
    assert [row.id for row in rows if isinstance(row, Question)] == [*rows.names]
    assert [*rows.names[:2], rows.names[3]] == [*wanted[:2], wanted[3]] and len(set(rows.names)) == 4
    folders = [tmp_path / "4k", tmp_path / "8k"]
    for folder in folders:
        folder.mkdir()
        write_questions(folder / "test.parquet", iter([question("0")]))
    rows = HeldOut(replace(config, evaluation=replace(config.evaluation, paths=list(map(str, folders)))))
    assert rows.names == ("1/test.parquet/0: 0", "2/test.parquet/0: 0")


def test_held_out_ids_that_are_missing_or_unreadable_have_their_place(tmp_path: Path) -> None:
    """One id that is no UTF-8, an empty one, a missing one, a number and its text: five rows, five names."""
    written = held_out(tmp_path, [question(name) for name in ("7", "x", "y", "z", "w")]).evaluation.paths[0]
    table = pq.read_table(written)
    raw = pa.array([b"7", b"\xff", b" ", None, b"w"], pa.binary())
    ids = pa.StringArray.from_buffers(5, raw.buffers()[1], raw.buffers()[2], raw.buffers()[0])
    pq.write_table(table.set_column(0, "id", ids), tmp_path / "a.parquet")
    pq.write_table(table.set_column(0, "id", pa.array([7, 8, 9, 10, 11])), tmp_path / "b.parquet")
    config = load_config(
        ROOT / "configs" / "panels.yaml", [f"evaluation.paths=[{tmp_path}/a.parquet,{tmp_path}/b.parquet]"]
    )
    rows = HeldOut(replace(config, evaluation=replace(config.evaluation, questions=0)))
    assert rows.names == (
        "1/a.parquet/0: 7", "1/a.parquet/1", "1/a.parquet/2", "1/a.parquet/3", "w",
        "2/b.parquet/0: 7", "8", "9", "10", "11",
    )  # fmt: skip
    assert [isinstance(row, Question) for row in rows] == [True, False, False, False, True, *[True] * 5]


def test_held_out_takes_a_folder_or_a_pattern(tmp_path: Path) -> None:
    config = held_out(tmp_path, [question("a")], [question("b")])
    for path in (str(tmp_path), str(tmp_path / "*.parquet")):
        rows = HeldOut(replace(config, evaluation=replace(config.evaluation, paths=[path])))
        assert rows.names == ("a", "b") and len(list(rows)) == 2


def test_held_out_hides_targets_and_names_what_has_none(tmp_path: Path) -> None:
    cut = question("cut")
    cut = replace(cut, image=cut.image[:60])  # type: ignore[index]
    hidden, none, broken = HeldOut(held_out(tmp_path, [question("a"), question("b", boxes=()), cut]), hide_target=True)
    assert isinstance(hidden, Question) and decode(hidden.image)[30, 20].tolist() == [0, 0, 0]
    assert isinstance(none, SkippedQuestion) and "no target to hide" in none.reason
    assert isinstance(broken, SkippedQuestion) and broken.question_id == "cut"


def test_evaluate_reads_rows_as_they_are_needed(tmp_path: Path) -> None:
    """20 rows, 4 in flight: the fifth is read when one of the first four is done. One is not played; an oracle's box
    that cannot be made fails its question alone."""
    config = held_out(tmp_path, [question(f"q{number}", boxes=(TARGET,) * (number != 7)) for number in range(20)])
    backend = MemoryBackend(unplayable={"q5"})
    rollouts, rewards = backend.start_workers(None, config, {})
    rollouts.version, done, ahead = 0, [0], [0]

    def rows() -> Iterator[Question | SkippedQuestion]:
        for number, row in enumerate(HeldOut(config)):
            ahead.append(number - done[0])
            yield row

    async def rollout(*arguments: Any, **keys: Any) -> Any:
        found = await Rollouts.rollout(rollouts, *arguments, **keys)
        done[0] += 1
        return found

    rollouts.rollout = rollout
    how = replace(config.evaluation, in_flight=4)
    found = asyncio.run(evaluate(rows(), rollouts, rewards, how, 0.01, BoxSource.ORACLE))
    assert [one.question_id for one in found.failed] == ["q5", "q7"] and "has no boxes" in found.failed[1].reason
    assert [group.question.id for group in found.groups] == [f"q{n}" for n in range(20) if n not in (5, 7)]
    assert max(ahead) <= 5, "four in flight, and the row that failed before it was played"


def test_evaluation_is_due_at_its_interval() -> None:
    config = EvaluationConfig(paths=["heldout.parquet"], every=4)
    assert [step for step in range(11) if config.due(step, 10)] == [0, 4, 8, 10]
    assert not any(EvaluationConfig(paths=["heldout.parquet"]).due(step, 10) for step in range(11))
    assert not any(EvaluationConfig(every=4).due(step, 10) for step in range(11))


def test_probe_is_due_with_every_so_many_evaluations_and_the_last() -> None:
    config = EvaluationConfig(paths=["heldout.parquet"], every=2, probe=2)
    assert [step for step in range(0, 11, 2) if config.probe_due(step, 10)] == [0, 4, 8, 10]
    assert not any(EvaluationConfig(paths=["heldout.parquet"], every=2).probe_due(step, 10) for step in range(11))


def test_api_key_that_is_not_set_is_said_before_a_worker_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VERIFIER_KEY", raising=False)
    model = Path(__file__).parents[2] / "models" / "panels-policy"
    config = TrainConfig()
    config.rollout.engine.model = str(model)
    endpoint = EndpointConfig(url="http://verifier:8000/v1", model="m", api_key_env="VERIFIER_KEY")
    config.reward.verifier = VerifierConfig(backend=Backend.ENDPOINT, endpoint=endpoint)
    nothing: Any = None  # no cluster is asked for anything
    with pytest.raises(ValueError, match="VERIFIER_KEY, which is not set"):
        launch_workers(nothing, config)
