"""The samples of a run: groups in text and pictures, one folder each, for people and for the report."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from PIL import Image, ImageDraw

from ergo_rl.actors.trajectory_store import Group
from ergo_rl.episodes.types import Score, Trajectory, Verdict, View
from ergo_rl.jobs.credit import Advantages
from ergo_rl.jobs.layout import GROUP, TRAJECTORIES, VIEW, crop_name

_LONGEST = 1024
"""Side of the picture with boxes, pixels: a small coarse view is enlarged three times at most, up to this."""


def write_group(
    folder: Path, step: int, group: Group, trajectories: Sequence[Trajectory], advantages: Advantages
) -> None:
    """``folder`` gets ``group.json`` (the question and the size of its image), ``trajectories.jsonl`` (a line for each:
    replies, box, reward parts, advantage), ``view.png`` (the coarse view as it was seen), ``coarse.png`` (the same
    with every box on it) and each crop.

    advantages: of each trajectory those of its turns, or one for all of it; NaN where it left the loss."""
    folder.mkdir(parents=True, exist_ok=True)
    coarse, question = trajectories[0].views[0], group.question
    about = {
        "step": step,
        "number": group.number,
        "original": [coarse.box.width, coarse.box.height],
        "question": {name: getattr(question, name) for name in ("id", "text", "options", "answer", "source")},
        "boxes": [asdict(box) for box in question.boxes],
    }
    Image.fromarray(coarse.pixels).save(folder / VIEW)
    _with_boxes(coarse, trajectories).save(folder / "coarse.png")
    with (folder / TRAJECTORIES).open("w", encoding="utf-8") as file:
        for trajectory, score, earned in zip(trajectories, group.scores, advantages, strict=True):
            if trajectory.crop is not None:
                Image.fromarray(trajectory.crop.pixels).save(folder / crop_name(trajectory.sample))
            file.write(json.dumps(_readable(group, trajectory, score, earned)) + "\n")
    (folder / GROUP).write_text(json.dumps(about) + "\n", encoding="utf-8")  # last: the folder is complete


def _readable(group: Group, trajectory: Trajectory, score: Verdict, advantages: Sequence[float]) -> dict[str, object]:
    crop = trajectory.crop
    return {
        "question_id": trajectory.question_id,
        "question": group.question.text,
        "answer": group.question.answer,
        "sample": trajectory.sample,
        "replies": [turn.text for turn in trajectory.turns],
        "policy_versions": [turn.policy_version for turn in trajectory.turns],
        "updates": [turn.updates for turn in trajectory.turns],
        "outcome": trajectory.outcome,
        "box_outcome": trajectory.box_outcome,
        "crop": None if crop is None else asdict(crop.box),
        "area_ratio": trajectory.area_ratio,
        "total": score.total if isinstance(score, Score) else None,
        "parts": dict(score.parts) if isinstance(score, Score) else None,
        "unscored": None if isinstance(score, Score) else score.reason,
        "advantages": [None if math.isnan(one) else one for one in advantages],
    }


def _with_boxes(coarse: View, trajectories: Sequence[Trajectory]) -> Image.Image:
    """The coarse view, a small one enlarged, with the box of every trajectory on it."""
    scale = max(1, min(3, _LONGEST // max(coarse.width, coarse.height)))
    picture = Image.fromarray(coarse.pixels).resize(
        (coarse.width * scale, coarse.height * scale), Image.Resampling.NEAREST
    )
    draw = ImageDraw.Draw(picture)
    sx, sy = picture.width / coarse.box.width, picture.height / coarse.box.height
    for crop in (trajectory.crop for trajectory in trajectories):
        if crop is not None:
            box = crop.box
            edges = (box.x1 * sx, box.y1 * sy, box.x2 * sx - 1, box.y2 * sy - 1)
            draw.rectangle(edges, outline="black", width=4)  # white on black is seen on any background
            draw.rectangle(edges, outline="white", width=2)
    return picture
