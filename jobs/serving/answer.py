"""``ergo-rl answer``: one question about one picture: both turns in words, the box and the crop as pictures."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from ergo_rl.actors.rollout_worker import EvalMode
from ergo_rl.episodes import images
from ergo_rl.episodes.parsing import parse_answer
from ergo_rl.episodes.types import Question, Trajectory
from ergo_rl.jobs.commands import DEFAULT_RECIPE, EXPECTED
from ergo_rl.jobs.config import ConfigError, TrainConfig, load_config
from ergo_rl.jobs.layout import CONFIG, POLICY, RECIPE
from ergo_rl.jobs.players import NotPlayed, Play, Player, add_endpoint, endpoint_at, start_player

_SHOWN_SIDE = 1600
"""Longest side of the picture with the box, pixels."""


async def answer(config: TrainConfig, question: Question, player: Player) -> Play | NotPlayed:
    """Both turns, at the budgets of the recipe."""
    try:
        return await player.play(question, EvalMode.usual(config.episode))
    finally:
        await player.close()


def write_pictures(question: Question, trajectory: Trajectory, folder: Path, name: str) -> list[Path]:
    """``NAME-box.png``, the picture with the box on it, and ``NAME-crop.png``, what turn 2 read at full resolution;
    nothing where there was no crop."""
    if trajectory.crop is None:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    picture, box = Image.fromarray(images.decode(question.image)), trajectory.crop.box
    scale = min(1.0, _SHOWN_SIDE / max(picture.size))
    picture = picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))))
    draw, edges = ImageDraw.Draw(picture), [edge * scale for edge in (box.x1, box.y1, box.x2, box.y2)]
    for colour, width in (("black", 7), ("white", 3)):  # white on black is seen on any background
        draw.rectangle(edges, outline=colour, width=width)
    paths = [folder / f"{name}-box.png", folder / f"{name}-crop.png"]
    picture.save(paths[0])
    Image.fromarray(np.asarray(trajectory.crop.pixels)).save(paths[1])
    return paths


def describe(play: Play, player: Player) -> str:
    """The two turns, the box, the answer and what it cost, in words."""
    trajectory, crop = play.trajectory, play.trajectory.crop
    lines = [f"turn 1 ({trajectory.box_outcome}): {trajectory.turns[0].text}"]
    if crop is not None:
        box, ratio = crop.box, trajectory.area_ratio
        lines += [f"box: [{box.x1}, {box.y1}, {box.x2}, {box.y2}] of the original, {ratio:.1%} of its area"]
        lines += [f"turn 2: {trajectory.turns[1].text}"]
    said = parse_answer(trajectory.turns[-1].text) if len(trajectory.turns) == 2 else None
    lines.append(f"answer: {said}" if said is not None else f"no answer ({trajectory.outcome})")
    tokens = play.visual_tokens(player.family)
    lines.append(
        f"visual tokens: {' + '.join(map(str, tokens))} = {sum(tokens)}; "
        f"sampled tokens: {play.reply_tokens}; {play.seconds:.2f} s"
    )
    return "\n".join(lines)


def settings(model: str, recipe: Path | None, overrides: Sequence[str]) -> TrainConfig:
    """The recipe that says prompts and budgets: the one named, else that of an exported folder or a run, else the
    default one. model: a folder, a hub name, or a run's folder: its finished policy.

    Raises ConfigError, OSError."""
    own = Path(model) / RECIPE
    if model and (Path(model) / CONFIG).is_file() and not (Path(model) / "config.json").is_file():
        own, policy = Path(model) / CONFIG, Path(model) / POLICY
        if not policy.is_dir():
            raise ConfigError(f"the run {model} has no finished policy; write one: ergo-rl export {model}")
        model = str(policy)
    chosen = recipe or (own if model and own.is_file() else Path(DEFAULT_RECIPE))
    models = [f"rollout.engine.model={model}", f"learner.model={model}"] if model else []
    return load_config(chosen, [*models, *overrides])


async def ask(options: argparse.Namespace, config: TrainConfig, question: Question) -> int:
    """Play it, print it, write the pictures; the exit status."""
    endpoint = await endpoint_at(options.url, options.served_model, config) if options.url else None
    if endpoint is None:
        print(f"starting {config.rollout.engine.model} (20 to 60 s on a CPU)", file=sys.stderr)
    player = await start_player(config, endpoint, options.family)
    play = await answer(config, question, player)
    if isinstance(play, NotPlayed):
        print(f"ergo-rl answer: {play.reason}", file=sys.stderr)
        return 1
    print(describe(play, player))
    name = question.image.stem if isinstance(question.image, Path) else "picture"
    for path in write_pictures(question, play.trajectory, options.out, name):
        print(path)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="ergo-rl answer",
        description="Ask about a picture: prints both turns and the answer, and writes the picture with the box and "
        "the crop that the second turn read. Greedy decoding.",
        epilog='example: ergo-rl answer street.jpg "What does the sign say?" --model exported/panels',
    )
    parser.add_argument("image", type=Path)
    parser.add_argument("question")
    parser.add_argument("--options", nargs="+", default=[], metavar="TEXT", help="of a multiple-choice question")
    parser.add_argument("--model", default="", help="Hugging Face folder, hub name or run (default: the recipe's)")
    add_endpoint(parser)
    parser.add_argument("--out", type=Path, default=Path(), help="folder for the pictures (default: this one)")
    parser.add_argument("--recipe", type=Path, help=f"prompts and budgets (default: the model's {RECIPE}, or panels)")
    parser.add_argument("--set", nargs="+", default=[], metavar="key=value", help="values that override the recipe's")
    given = parser.parse_args(argv)
    try:
        images.size(given.image)  # said before an engine starts
        config = settings(given.model, given.recipe, given.set)
        question = Question("asked", given.image, given.question, "", tuple(given.options))
        return asyncio.run(ask(given, config, question))
    except (images.UnreadableImage, *EXPECTED) as error:
        print(f"ergo-rl answer: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
