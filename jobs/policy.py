"""A policy that answers questions about images, from Python; and its answers as text and images."""

from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np
from PIL import Image, ImageDraw

from ergo_rl.actors.rollout_worker import EvalMode
from ergo_rl.episodes import images
from ergo_rl.episodes.families import ModelFamily
from ergo_rl.episodes.prompts import parse_answer
from ergo_rl.episodes.types import Box, Question, Trajectory
from ergo_rl.jobs.cli import DEFAULT_RECIPE
from ergo_rl.jobs.config import ConfigError, TrainConfig, load_config
from ergo_rl.jobs.policy_clients import EpisodeResult, PolicyClient, start_client
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
    return load_config(chosen, [*([f"model={model}"] if model else []), *overrides])


T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Answer:
    """What the policy answered, and how it got there."""

    answer: str | None
    """None where the episode ended without an answer; ``trajectory.outcome`` says why."""
    box: Box | None
    """The region that turn 2 read, in pixels of the image; None without a crop."""
    image: Image.Image
    """The image, at most 1600 pixels wide or high, with the box drawn on it."""
    trajectory: Trajectory
    """Both turns: prompts, replies, views."""


class Policy:
    """A policy on an engine in this process.

    Works in a script and in a notebook: the engine lives on an event loop in a thread of its own.

    Example::

        with Policy.load("exported/panels") as policy:
            found = policy.answer("street.jpg", "What does the sign say?")
            print(found.answer, found.box)
    """

    def __init__(self, client: PolicyClient, config: TrainConfig, loop: _LoopThread | None = None) -> None:
        self._client, self._config, self._loop = client, config, loop or _LoopThread()

    @classmethod
    def load(cls, model: str | Path, *, recipe: Path | None = None, overrides: Sequence[str] = ()) -> Policy:
        """Start an engine for ``model``; takes 20 to 60 s on a CPU.

        model: a Hugging Face folder, a hub name, or the folder of a run, whose finished policy is meant. recipe: says
        prompts and visual-token budgets; where None, that of the folder or run, or else the default recipe. overrides:
        as ``key=value``. Raises ConfigError, OSError."""
        config, loop = config_of_model(str(model), recipe, overrides), _LoopThread()
        try:
            client = loop.run(start_client(config, None, ""))
        except BaseException:
            loop.close()
            raise
        return cls(client, config, loop)

    def answer(
        self, image: str | Path | bytes | Image.Image | np.ndarray, question: str, options: Sequence[str] = ()
    ) -> Answer:
        """Answer a question about an image in two turns, greedily.

        image: a path, an encoded image, a PIL image, or uint8[height, width, 3]. options: of a multiple-choice
        question. Raises EpisodeError where the image or the text cannot be used, or the engine has died."""
        asked = Question("asked", _path_or_encoded(image), question, "", tuple(options))
        result = self._loop.run(self._client.run_episode(asked, EvalMode.usual(self._config.episode)))
        trajectory = result.trajectory
        said = parse_answer(trajectory.turns[-1].text) if len(trajectory.turns) == 2 else None
        box = None if trajectory.crop is None else trajectory.crop.box
        return Answer(said, box, draw_box(asked, trajectory), trajectory)

    def close(self) -> None:
        """Stop the engine. Calling it again does nothing."""
        if not self._loop.closed:
            self._loop.run(self._client.close())
            self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _LoopThread:
    """An event loop that runs in a thread until it is closed: an engine belongs to one loop for all its life."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="ergo-rl policy", daemon=True)
        self._thread.start()
        self.closed = False

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self.closed = True


def _path_or_encoded(image: str | Path | bytes | Image.Image | np.ndarray) -> Path | bytes:
    if isinstance(image, bytes):
        return image
    if isinstance(image, str | Path):
        return Path(image)
    encoded = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).convert("RGB").save(encoded, "PNG")
    return encoded.getvalue()
