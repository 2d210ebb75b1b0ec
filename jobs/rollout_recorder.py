"""Writes samples of a run: groups as text and images, one folder each, for people and for the report."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from PIL import Image, ImageDraw

from ergo_rl.actors.trajectory_store import Group
from ergo_rl.episodes.types import Score, Trajectory, Verdict, View
from ergo_rl.jobs.advantage_estimator import GroupAdvantages
from ergo_rl.jobs.run_paths import GROUP, TRAJECTORIES, VIEW, crop_name, replace_file, step_folder

logger = logging.getLogger(__name__)

_LONGEST = 1024
"""Longest side in pixels to which the image with boxes is enlarged, at most three times."""


class RolloutRecorder:
    """Records one group every few steps in ``folder/step-N``."""

    def __init__(self, folder: Path, every: int) -> None:
        """every: steps; 0: never."""
        self._folder, self._every = folder, every

    def is_due(self, step: int) -> bool:
        return self._every > 0 and step % self._every == 0

    def record(self, step: int, group: Group, trajectories: Sequence[Trajectory], advantages: GroupAdvantages) -> None:
        """Write the group; a disk that does not take it costs this sample alone."""
        try:
            record_group(self._folder / step_folder(step), step, group, trajectories, advantages)
        except OSError as error:
            logger.warning("the sample of step %d could not be written: %s", step, error)


def record_group(
    folder: Path, step: int, group: Group, trajectories: Sequence[Trajectory], advantages: GroupAdvantages
) -> None:
    """Write a group into ``folder``.

    ``group.json`` holds the question and the size of its image, ``trajectories.jsonl`` a line per trajectory (replies,
    box, parts of the reward, advantages), ``view.png`` the coarse view, ``coarse.png`` the same with every box on it;
    and each crop is an image."""
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
    replace_file(folder / GROUP, (json.dumps(about) + "\n").encode())  # written last: now the folder is complete


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
        "advantages": [None if math.isnan(value) else value for value in advantages],
    }


def _with_boxes(coarse: View, trajectories: Sequence[Trajectory]) -> Image.Image:
    """Draw the box of every trajectory on the coarse view, enlarged where it is small."""
    scale = max(1, min(3, _LONGEST // max(coarse.width, coarse.height)))
    image = Image.fromarray(coarse.pixels).resize(
        (coarse.width * scale, coarse.height * scale), Image.Resampling.NEAREST
    )
    draw = ImageDraw.Draw(image)
    sx, sy = image.width / coarse.box.width, image.height / coarse.box.height
    for crop in (trajectory.crop for trajectory in trajectories):
        if crop is not None:
            box = crop.box
            edges = (box.x1 * sx, box.y1 * sy, box.x2 * sx - 1, box.y2 * sy - 1)
            draw.rectangle(edges, outline="black", width=4)  # white on black is visible on any background
            draw.rectangle(edges, outline="white", width=2)
    return image
