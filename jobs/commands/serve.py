"""``ergo-rl serve``: an OpenAI-compatible chat endpoint that answers in two turns, on Ray Serve."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path

from ergo_rl.episodes.families import family_of
from ergo_rl.jobs.chat_server import ServeConfig, serve_until_stopped
from ergo_rl.jobs.cli import add_endpoint, command
from ergo_rl.jobs.policy import config_of_model
from ergo_rl.jobs.policy_clients import endpoint_at
from ergo_rl.jobs.run_paths import RECIPE


@command("serve")
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="ergo-rl serve",
        description="An OpenAI-compatible chat endpoint (POST /v1/chat/completions, one image as a data URL) that "
        "looks at a small copy, then at the part that it named, and answers. Greedy decoding. Ctrl-C ends it.",
        epilog="example: ergo-rl serve runs/panels, then: OpenAI(base_url='http://127.0.0.1:8000/v1', api_key='none')",
    )
    parser.add_argument(
        "model", nargs="?", default="", help="run, Hugging Face folder or hub name (default: the recipe's)"
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; there are no keys (default: %(default)s)"
    )
    parser.add_argument("--port", type=int, default=8000, help="(default: %(default)s)")
    parser.add_argument(
        "--replicas", type=int, default=1, help="engines, each as large as a rollout worker (default: 1)"
    )
    parser.add_argument("--name", default="", help="the model's name in requests (default: the last part of its path)")
    parser.add_argument("--max-body-mib", type=int, default=64, help="largest request, MiB (default: %(default)s)")
    parser.add_argument("--fetch-images", action="store_true", help="also fetch images by http(s) URL, from public "
                        "addresses")  # fmt: skip
    parser.add_argument("--fetch-private-images", action="store_true", help="fetch them from wherever a request says, "
                        "this machine and its own network included")  # fmt: skip
    add_endpoint(parser)
    parser.add_argument(
        "--recipe", type=Path, help=f"prompts and budgets (default: the run's or model's {RECIPE}, or panels)"
    )
    parser.add_argument("--set", nargs="+", default=[], metavar="key=value", help="values that override the recipe's")
    options = parser.parse_args(argv)
    if options.replicas < 1 or options.max_body_mib < 1:
        parser.error("--replicas and --max-body-mib must be at least 1")
    try:
        config = config_of_model(options.model, options.recipe, options.set)
        endpoint = asyncio.run(endpoint_at(options.url, options.served_model, config)) if options.url else None
        model = endpoint.model if endpoint else config.rollout.engine.model
        if endpoint is None:
            family_of(model, config.episode.family)  # reported before Ray and an engine start
        settings = ServeConfig(
            options.name or Path(options.model or model).name, options.max_body_mib * 2**20,
            options.fetch_images or options.fetch_private_images, options.fetch_private_images, options.host,
            options.port, options.replicas,
        )  # fmt: skip
        serve_until_stopped(config, settings, endpoint, options.family)
    except KeyboardInterrupt:  # the usual end of a server
        print("ended", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
