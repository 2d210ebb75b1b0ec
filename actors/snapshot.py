"""Scored groups as Arrow streams, pixels included: what a checkpoint keeps of the trajectory store.

There are three streams with one record batch per group, so that only one group at a time is in memory: ``groups`` (one
row), ``trajectories`` (a row per sample, in the order of ``Group.scores``) and ``views`` (a row per distinct view; the
coarse view of a group is written once, and shared again when it is read).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import IO, Any

import numpy as np
import pyarrow as pa
import ray

from ergo_rl.actors.rollout_worker import GroupResult, summarize
from ergo_rl.actors.trajectory_store import Group
from ergo_rl.episodes.types import (
    Box,
    Finish,
    Outcome,
    Question,
    Score,
    Trajectory,
    Turn,
    Unscored,
    Verdict,
    View,
)

_CORNERS = pa.list_(pa.int32(), 4)
_TURN = pa.struct(
    {
        "prompt_ids": pa.list_(pa.int32()),
        "completion_ids": pa.list_(pa.int32()),
        "logprobs": pa.list_(pa.float32()),
        "text": pa.string(),
        "finish": pa.string(),
        "engine_prompt_length": pa.int64(),
        "policy_version": pa.int64(),
        "engine_cached_tokens": pa.int64(),
        "updates": pa.list_(pa.list_(pa.int64(), 2)),
    }
)
SCHEMAS = {
    "groups": pa.schema(
        {
            "number": pa.int64(),
            "id": pa.string(),
            "text": pa.string(),
            "answer": pa.string(),
            "options": pa.list_(pa.string()),
            "boxes": pa.list_(_CORNERS),
            "source": pa.string(),
        }
    ),
    "trajectories": pa.schema(
        {
            "sample": pa.int64(),
            "outcome": pa.string(),
            "box_outcome": pa.string(),
            "views": pa.list_(pa.int32()),
            "turns": pa.list_(_TURN),
            "total": pa.float64(),
            "parts": pa.map_(pa.string(), pa.float64()),
            "by_turn": pa.list_(pa.float64(), 2),
            "unscored": pa.string(),
            "unscored_kind": pa.string(),
        }
    ),
    "views": pa.schema({"box": _CORNERS, "width": pa.int32(), "height": pa.int32(), "pixels": pa.large_binary()}),
}
"""By stream name."""


def write_groups(groups: Iterable[Group], files: Mapping[str, IO[bytes]], get: Callable[[Any], Any] = ray.get) -> None:
    """Fetch the trajectories of one group after the other and append them to the three ``files`` (by stream name).

    Blocks on Ray's object store: call it in a thread. Raises ray.exceptions.ObjectLostError if trajectories are
    gone."""
    writers = {name: pa.ipc.new_stream(pa.PythonFile(files[name], "w"), schema) for name, schema in SCHEMAS.items()}
    for group in groups:
        rows = _rows(group, get(group.trajectories))
        for name, writer in writers.items():
            writer.write_batch(pa.RecordBatch.from_pylist(rows[name], SCHEMAS[name]))
    for writer in writers.values():
        writer.close()


def read_groups(files: Mapping[str, IO[bytes]], put: Callable[[Any], Any] = ray.put) -> Iterator[Group]:
    """Read groups as ``write_groups`` wrote them; their trajectories go into the object store, owned by this process.

    Raises pyarrow.ArrowInvalid or ValueError for other files."""
    readers = [pa.ipc.open_stream(files[name]) for name in SCHEMAS]
    for batches in zip(*readers, strict=True):
        for batch in batches:
            batch.validate(full=True)  # else Arrow ends the process on offsets that lead nowhere
        (head,), rows, views = (batch.to_pylist() for batch in batches)
        yield _group(head, rows, [_view(view) for view in views], put)


def _rows(group: Group, trajectories: tuple[Trajectory, ...]) -> dict[str, list[dict[str, Any]]]:
    views: dict[int, View] = {id(view): view for trajectory in trajectories for view in trajectory.views}
    places = {key: place for place, key in enumerate(views)}
    question = group.question
    head = {
        "number": group.number,
        "boxes": [_corners(box) for box in question.boxes],
        "options": list(question.options),
        **{name: getattr(question, name) for name in ("id", "text", "answer", "source")},
    }
    pairs = zip(trajectories, group.scores, strict=True)
    return {
        "groups": [head],
        "trajectories": [
            _row(trajectory, [places[id(view)] for view in trajectory.views], score) for trajectory, score in pairs
        ],
        "views": [
            {"box": _corners(v.box), "width": v.width, "height": v.height, "pixels": v.pixels.tobytes()}
            for v in views.values()
        ],
    }


def _row(trajectory: Trajectory, views: list[int], score: Verdict) -> dict[str, Any]:
    if isinstance(score, Score):
        earned: dict[str, Any] = {
            "total": score.total,
            "parts": list(score.parts.items()),
            "by_turn": list(score.turns),
        }
    else:
        earned = {"unscored": score.reason, "unscored_kind": score.kind}
    return {
        "sample": trajectory.sample,
        "outcome": str(trajectory.outcome),
        "box_outcome": str(trajectory.box_outcome),
        "views": views,
        "turns": [{name: getattr(turn, name) for name in _TURN.names} for turn in trajectory.turns],
        **earned,
    }


def _group(head: dict[str, Any], rows: list[dict[str, Any]], views: list[View], put: Callable[[Any], Any]) -> Group:
    question = Question(
        id=head["id"],
        image=b"",
        text=head["text"],
        answer=head["answer"],
        options=tuple(head["options"]),
        boxes=tuple(Box(*corners) for corners in head["boxes"]),
        source=head["source"],
    )
    trajectories = tuple(_trajectory(question.id, row, views) for row in rows)
    result = GroupResult(question.id, tuple(map(summarize, trajectories)))
    return Group(head["number"], question, result, tuple(map(_verdict, rows)), put(trajectories))


def _trajectory(question_id: str, row: dict[str, Any], views: list[View]) -> Trajectory:
    return Trajectory(
        question_id=question_id,
        sample=row["sample"],
        views=tuple(views[_index(place)] for place in row["views"]),
        turns=tuple(map(_turn, row["turns"])),
        outcome=Outcome(row["outcome"]),
        box_outcome=row["box_outcome"],
    )


def _index(place: int) -> int:
    if place < 0:
        raise ValueError(f"{place} is no place of a view")
    return place


def _turn(cells: dict[str, Any]) -> Turn:
    arrays = {"prompt_ids": np.int32, "completion_ids": np.int32, "logprobs": np.float32}
    made = {name: np.asarray(cells[name], kind) for name, kind in arrays.items()}
    updates = tuple((at, version) for at, version in cells.get("updates") or ())
    return Turn(**{**cells, **made, "finish": Finish(cells["finish"]), "updates": updates})


def _verdict(row: dict[str, Any]) -> Verdict:
    if row["unscored"] is not None:
        noted = filter(None, [row.get("unscored_kind")])  # none by older versions
        return Unscored(row["unscored"], *noted)
    first, second = row["by_turn"]
    return Score(row["total"], dict(row["parts"]), (first, second))


def _view(cells: dict[str, Any]) -> View:
    pixels = np.frombuffer(cells["pixels"], np.uint8).reshape(cells["height"], cells["width"], 3)
    return View(Box(*cells["box"]), pixels)


def _corners(box: Box) -> list[int]:
    return [box.x1, box.y1, box.x2, box.y2]
