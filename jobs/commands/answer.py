"""``ergo-rl answer``: one question about one image: both turns as text, the box and the crop as images."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path

from ergo_rl.actors.rollout_worker import EvalMode
from ergo_rl.episodes import images
from ergo_rl.episodes.types import Question
from ergo_rl.jobs.cli import add_endpoint, command
from ergo_rl.jobs.config import TrainConfig
from ergo_rl.jobs.policy import config_of_model, describe, write_images
from ergo_rl.jobs.policy_clients import endpoint_at, start_client
from ergo_rl.jobs.run_paths import RECIPE


async def ask(config: TrainConfig, question: Question, url: str, served_model: str, family: str, out: Path) -> None:
    """Run the episode, print it, write the images."""
    endpoint = await endpoint_at(url, served_model, config) if url else None
    if endpoint is None:
        print(f"starting {config.rollout.engine.model} (20 to 60 s on a CPU)", file=sys.stderr)
    client = await start_client(config, endpoint, family)
    try:
        result = await client.run_episode(question, EvalMode.usual(config.episode))
    finally:
        await client.close()
    print(describe(result, client.family))
    name = question.image.stem if isinstance(question.image, Path) else "image"
    for path in write_images(question, result.trajectory, out, name):
        print(path)


@command("answer")
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="ergo-rl answer",
        description="Ask about an image: prints both turns and the answer, and writes the image with the box and the "
        "crop that the second turn read. Greedy decoding.",
        epilog='example: ergo-rl answer street.jpg "What does the sign say?" --model exported/panels',
    )
    parser.add_argument("image", type=Path)
    parser.add_argument("question")
    parser.add_argument("--options", nargs="+", default=[], metavar="TEXT", help="of a multiple-choice question")
    parser.add_argument("--model", default="", help="Hugging Face folder, hub name or run (default: the recipe's)")
    add_endpoint(parser)
    parser.add_argument("--out", type=Path, default=Path(), help="folder for the images (default: this one)")
    parser.add_argument("--recipe", type=Path, help=f"prompts and budgets (default: the model's {RECIPE}, or panels)")
    parser.add_argument("--set", nargs="+", default=[], metavar="key=value", help="values that override the recipe's")
    options = parser.parse_args(argv)
    images.size(options.image)  # an unreadable image is reported before an engine starts
    config = config_of_model(options.model, options.recipe, options.set)
    question = Question("asked", options.image, options.question, "", tuple(options.options))
    asyncio.run(ask(config, question, options.url, options.served_model, options.family, options.out))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
