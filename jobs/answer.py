"""Show an answer: both turns as text, the box and the crop as images; and the recipe that a model answers with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from ergo_rl.episodes import images
from ergo_rl.episodes.families import ModelFamily
from ergo_rl.episodes.prompts import parse_answer
from ergo_rl.episodes.types import Question, Trajectory
from ergo_rl.jobs.cli_common import DEFAULT_RECIPE
from ergo_rl.jobs.config import ConfigError, TrainConfig, load_config
from ergo_rl.jobs.policy_clients import EpisodeResult
from ergo_rl.jobs.run_paths import CONFIG, POLICY, RECIPE

_SHOWN_SIDE = 1600
"""Longest side of the image with the box, in pixels."""


def draw_box(question: Question, trajectory: Trajectory) -> Image.Image:
    """The image of the question, at most 1600 pixels wide or high, with the box that was read in turn 2."""
    image = Image.fromarray(images.decode(question.image))
    scale = min(1.0, _SHOWN_SIDE / max(image.size))
    image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    if trajectory.crop is not None:
        box = trajectory.crop.box
        draw, edges = ImageDraw.Draw(image), [edge * scale for edge in (box.x1, box.y1, box.x2, box.y2)]
        for colour, width in (("black", 7), ("white", 3)):  # white on black is visible on any background
            draw.rectangle(edges, outline=colour, width=width)
    return image


def write_images(question: Question, trajectory: Trajectory, folder: Path, name: str) -> list[Path]:
    """Write ``NAME-box.png``, the image with the box, and ``NAME-crop.png``, what turn 2 read; nothing where there was
    no crop. Returns the paths."""
    if trajectory.crop is None:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}-box.png", folder / f"{name}-crop.png"]
    draw_box(question, trajectory).save(paths[0])
    Image.fromarray(np.asarray(trajectory.crop.pixels)).save(paths[1])
    return paths


def describe(result: EpisodeResult, family: ModelFamily) -> str:
    """The two turns, the box, the answer and what it cost, as text."""
    trajectory, crop = result.trajectory, result.trajectory.crop
    lines = [f"turn 1 ({trajectory.box_outcome}): {trajectory.turns[0].text}"]
    if crop is not None:
        box, ratio = crop.box, trajectory.area_ratio
        lines += [f"box: [{box.x1}, {box.y1}, {box.x2}, {box.y2}] of the original, {ratio:.1%} of its area"]
        lines += [f"turn 2: {trajectory.turns[1].text}"]
    said = parse_answer(trajectory.turns[-1].text) if len(trajectory.turns) == 2 else None
    lines.append(f"answer: {said}" if said is not None else f"no answer ({trajectory.outcome})")
    tokens = result.visual_tokens(family)
    lines.append(
        f"visual tokens: {' + '.join(map(str, tokens))} = {sum(tokens)}; "
        f"sampled tokens: {result.reply_tokens}; {result.seconds:.2f} s"
    )
    return "\n".join(lines)


def config_of_model(model: str, recipe: Path | None = None, overrides: Sequence[str] = ()) -> TrainConfig:
    """The configuration, with prompts and budgets, that a model answers with.

    model: a folder, a hub name, or the folder of a run, whose finished policy is meant; empty: the recipe's. recipe:
    where None, that of the exported folder or run, or else the default recipe. Raises ConfigError, OSError."""
    own = Path(model) / RECIPE
    if model and (Path(model) / CONFIG).is_file() and not (Path(model) / "config.json").is_file():
        own, policy = Path(model) / CONFIG, Path(model) / POLICY
        if not policy.is_dir():
            raise ConfigError(f"the run {model} has no finished policy; write one: ergo-rl export {model}")
        model = str(policy)
    chosen = recipe or (own if model and own.is_file() else Path(DEFAULT_RECIPE))
    models = [f"rollout.engine.model={model}", f"learner.model={model}"] if model else []
    return load_config(chosen, [*models, *overrides])
