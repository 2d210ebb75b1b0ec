"""Groups through Arrow and back, pixels included."""

from __future__ import annotations

import io
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from ergo_rl.actors.rollout_worker import GroupResult, summarize
from ergo_rl.actors.snapshot import SCHEMAS, read_groups, write_groups
from ergo_rl.actors.trajectory_store import Group
from ergo_rl.episodes.types import Box, Question, Score, Trajectory, Turn, Unscored
from tests.factories import shared_view, trajectory, view


def unchanged(value: Any) -> Any:
    """In place of the object store: the trajectories themselves are their reference."""
    return value


def group(number: int) -> Group:
    coarse = shared_view(3, 2, number)
    crop = view(2, 3, 5, Box(3, 4, 50, 60))
    found = trajectory(f"q{number}", 0, coarse=coarse, crop=crop, version=number)
    lost = trajectory(f"q{number}", 1, replies=(4,), coarse=coarse, seed=3, version=number)
    turn = replace(
        found.turns[0],
        text="<zoom>…</zoom> \U0001f50d",
        engine_cached_tokens=32,
        updates=((2, number + 1), (4, number + 2)),
    )
    found = replace(found, turns=(turn, found.turns[1]))
    question = Question(f"q{number}", b"", "Which “mark”?", "B", ("ring", "bar"), (Box(1, 2, 3, 4),), "panels")
    played = GroupResult(question.id, (summarize(found), summarize(lost)))
    scores = (Score(2.5, {"region": 1.0, "box": 0.0}, (1.5, 1.0)), Unscored("the reply was cut", "cut"))
    trajectories: Any = (found, lost)
    return Group(number, question, played, scores, trajectories)


def written(groups: list[Group]) -> dict[str, io.BytesIO]:
    files: Any = {name: io.BytesIO() for name in SCHEMAS}
    write_groups(groups, files, get=unchanged)
    return {name: io.BytesIO(file.getvalue()) for name, file in files.items()}


def same(one: Any, other: Any) -> bool:
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and one.shape == other.shape and bool((one == other).all())
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, Trajectory | Turn) or hasattr(one, "pixels"):
        return all(same(getattr(one, field.name), getattr(other, field.name)) for field in fields(one))
    return bool(one == other)


def test_snapshot_round_trip_is_bit_by_bit() -> None:
    groups = [group(7), group(9)]
    found = list(read_groups(written(groups), put=unchanged))  # type: ignore[arg-type]
    assert len(found) == 2
    for before, after in zip(groups, found, strict=True):
        assert (after.number, after.question, after.result, after.scores) == (
            before.number, before.question, before.result, before.scores,
        )  # fmt: skip
        assert same(before.trajectories, after.trajectories)


def test_snapshot_stores_the_coarse_view_once() -> None:
    files = written([group(1)])
    views = pa.ipc.open_stream(files["views"]).read_all()
    assert views.num_rows == 2
    files["views"].seek(0)
    (found,) = read_groups(files, put=unchanged)  # type: ignore[arg-type]
    first, second = found.trajectories  # type: ignore[misc]
    assert first.views[0] is second.views[0]


def test_snapshot_without_groups_is_empty() -> None:
    assert list(read_groups(written([]), put=unchanged)) == []  # type: ignore[arg-type]


def test_snapshot_truncated_stream_raises() -> None:
    files = written([group(1)])
    files["views"] = io.BytesIO(files["views"].getvalue()[:400])
    with pytest.raises((pa.ArrowInvalid, OSError, ValueError)):
        list(read_groups(files, put=unchanged))  # type: ignore[arg-type]


def test_snapshot_of_an_older_version_has_no_kind_and_loads() -> None:
    files = written([group(1)])
    table = pa.ipc.open_stream(files["trajectories"]).read_all().drop_columns(["unscored_kind"])
    files["trajectories"] = io.BytesIO()
    with pa.ipc.new_stream(files["trajectories"], table.schema) as writer:
        writer.write_table(table)
    files["trajectories"].seek(0)
    (found,) = read_groups(files, put=unchanged)  # type: ignore[arg-type]
    assert found.scores[1] == Unscored("the reply was cut"), "it is asked once more"
