"""``ergo-rl serve``: a chat endpoint as OpenAI's that looks twice before it answers, on Ray Serve."""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import socket
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ergo_rl.actors.rollout_worker import EvalMode
from ergo_rl.cluster.compat import bind_serve_localhost
from ergo_rl.cluster.engine import EngineDied
from ergo_rl.cluster.placement import Cluster
from ergo_rl.cluster.worker_pool import PoolExhausted
from ergo_rl.episodes import images
from ergo_rl.episodes.families import family_of
from ergo_rl.episodes.types import Question
from ergo_rl.jobs.commands import EXPECTED
from ergo_rl.jobs.config import ConfigError, TrainConfig
from ergo_rl.jobs.layout import RECIPE
from ergo_rl.jobs.players import EndpointPlayer, LocalPlayer, NotPlayed, add_endpoint, endpoint_at, start_player
from ergo_rl.jobs.serving.answer import settings
from ergo_rl.jobs.serving.chat import Asked, Json, Refused, completion, read_chat, read_data_url
from ergo_rl.rewards.config import EndpointConfig

_HEALTH_EVERY_S = 2.0
"""Ray Serve replaces a replica that has failed three times in a row."""


@dataclass(frozen=True, slots=True)
class ServeConfig:
    """model: its name in requests and replies; max_body_bytes: of a request, and of a picture that is fetched;
    fetch_images: also take pictures by http(s) URL; created: Unix seconds."""

    model: str
    max_body_bytes: int = 64 * 2**20
    fetch_images: bool = False
    created: int = field(default_factory=lambda: int(time.time()))


class Chat:
    """Answers HTTP requests with a player's episodes. Many at once: they share its engine."""

    def __init__(self, player: LocalPlayer | EndpointPlayer, config: TrainConfig, how: ServeConfig) -> None:
        self._player, self._config, self._how = player, config, how
        sampling = config.rollout.sampling
        self._reply_tokens = sampling.coarse_max_tokens + sampling.fine_max_tokens

    async def respond(self, request: Request) -> Response:
        """Every error in OpenAI's shape, with a sentence."""
        try:
            return JSONResponse(await self._respond(request))
        except Refused as error:
            return JSONResponse(error.body, error.status)

    async def check(self) -> None:
        """Raises EngineDied when the engine is gone."""
        if isinstance(self._player, LocalPlayer):
            await self._player.check()

    async def _respond(self, request: Request) -> Json:
        match request.method, request.url.path:
            case "POST", "/v1/chat/completions":
                body = await self._body(request)
                asked = await asyncio.to_thread(read_chat, body, self._how.model, self._reply_tokens)
                return await self._answer(asked)
            case "GET", "/v1/models":
                model = {"id": self._how.model, "object": "model", "created": self._how.created, "owned_by": "ergo-rl"}
                return {"object": "list", "data": [model]}
            case "GET", "/health":
                try:
                    await self.check()
                except EngineDied as error:
                    raise _unavailable(f"the engine has died: {error}") from error
                return {"status": "ok"}
        raise Refused(
            f"there is no {request.method} {request.url.path[:80]} here, but POST /v1/chat/completions, "
            "GET /v1/models and GET /health", code="not_found", status=404,
        )  # fmt: skip

    async def _body(self, request: Request) -> bytes:
        """The body, given up as soon as it is too large."""
        most, body = self._how.max_body_bytes, bytearray()
        announced = request.headers.get("content-length", "")
        if announced.isascii() and announced.isdigit() and int(announced) > most:
            raise _too_large("the request", most)
        async for chunk in request.stream():
            body += chunk
            if len(body) > most:
                raise _too_large("the request", most)
        return bytes(body)

    async def _answer(self, asked: Asked) -> Json:
        name = f"chatcmpl-{uuid.uuid4().hex}"
        encoded = await self._picture(asked.image_url)
        try:
            await asyncio.to_thread(images.size, encoded, self._config.episode.max_image_pixels)
        except images.UnreadableImage as error:  # said before it waits for its turn
            raise Refused(f"the picture cannot be used: {error}", "messages", "invalid_image") from error
        question = Question(name, encoded, asked.text, "", asked.options)
        play = await self._player.play(question, EvalMode.usual(self._config.episode))
        if isinstance(play, NotPlayed) and play.passing:
            raise _unavailable(play.reason)
        if isinstance(play, NotPlayed):
            raise Refused(f"the question cannot be played: {play.reason}", "messages", "unplayable")
        return completion(name, int(time.time()), self._how.model, play, self._player.family)

    async def _picture(self, url: str) -> bytes:
        """Encoded. Raises Refused."""
        if not url.lower().startswith(("http://", "https://")):
            return await asyncio.to_thread(read_data_url, url)
        if not self._how.fetch_images:
            raise Refused(
                "this server fetches no pictures (ergo-rl serve --fetch-images would); send a data URL instead: "
                "data:image/png;base64,...", "messages", "invalid_image",
            )  # fmt: skip
        found = bytearray()
        try:
            async with httpx.AsyncClient(timeout=30) as client, client.stream("GET", url) as reply:
                reply.raise_for_status()
                async for chunk in reply.aiter_bytes():
                    found += chunk
                    if len(found) > self._how.max_body_bytes:
                        raise _too_large("the picture", self._how.max_body_bytes)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            message = f"the picture was not fetched: {type(error).__name__} {error}"
            raise Refused(message, "messages", "invalid_image") from error
        return bytes(found)


class Replica:
    """What Ray Serve runs, restarts and asks for its health."""

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it
        self, config: TrainConfig, how: ServeConfig, endpoint: EndpointConfig | None, family: str
    ) -> None:
        bind_serve_localhost()
        self._chat = Chat(await start_player(config, endpoint, family), config, how)

    async def __call__(self, request: Request) -> Response:
        return await self._chat.respond(request)

    async def check_health(self) -> None:
        await self._chat.check()


def start(config: TrainConfig, how: ServeConfig, endpoint: EndpointConfig | None, options: argparse.Namespace) -> None:
    """Start it on the Ray that this process is connected to; returns when every replica answers.

    Raises ConfigError where Ray Serve already runs there, PoolExhausted where no replica comes up."""
    from ray import serve

    if serve.status().proxies:
        raise ConfigError("Ray Serve already runs on this cluster; end it (serve shutdown), or use another cluster")
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    serve.start(
        proxy_location="HeadOnly",
        http_options={"host": options.host, "port": options.port},
        logging_config={"log_level": "WARNING", "enable_access_log": False},
    )
    resources, at_once = config.rollout.resources, 2 * config.rollout.engine.max_num_seqs
    replica = serve.deployment(
        name="chat",
        num_replicas=options.replicas,
        ray_actor_options={"num_cpus": resources.cpus, "num_gpus": resources.gpus},
        max_ongoing_requests=at_once,
        max_queued_requests=4 * at_once,
        health_check_period_s=_HEALTH_EVERY_S,
        graceful_shutdown_timeout_s=5.0,
        max_constructor_retry_count=2,
    )(Replica)
    try:
        serve.run(replica.bind(config, how, endpoint, options.family), name="ergo-rl")
    except RuntimeError as error:
        raise PoolExhausted(f"no replica came up: {error}") from error


def free(host: str, port: int) -> None:
    """Raises ConfigError unless one can listen there."""
    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            pass
    except (OSError, OverflowError) as error:
        raise ConfigError(f"{host}:{port} is not free to listen on ({error}); name another --host or --port") from error


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="ergo-rl serve",
        description="An OpenAI-compatible chat endpoint (POST /v1/chat/completions, one picture as a data URL) that "
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
    parser.add_argument("--fetch-images", action="store_true", help="also fetch pictures by http(s) URL, from "
                        "wherever a request says, this machine's own network included")  # fmt: skip
    add_endpoint(parser)
    parser.add_argument(
        "--recipe", type=Path, help=f"prompts and budgets (default: the run's or model's {RECIPE}, or panels)"
    )
    parser.add_argument("--set", nargs="+", default=[], metavar="key=value", help="values that override the recipe's")
    options = parser.parse_args(argv)
    if options.replicas < 1 or options.max_body_mib < 1:
        parser.error("--replicas and --max-body-mib must be at least 1")
    try:
        config = settings(options.model, options.recipe, options.set)
        endpoint = asyncio.run(endpoint_at(options.url, options.served_model, config)) if options.url else None
        model = endpoint.model if endpoint else config.rollout.engine.model
        if endpoint is None:
            family_of(model, config.episode.family)  # said before Ray and an engine start
        name = options.name or Path(options.model or model).name
        how = ServeConfig(name, options.max_body_mib * 2**20, options.fetch_images)
        run(config, how, endpoint, options)
    except EXPECTED as error:
        print(f"ergo-rl serve: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("ended", file=sys.stderr)
    return 0


def run(config: TrainConfig, how: ServeConfig, endpoint: EndpointConfig | None, options: argparse.Namespace) -> None:
    """Serve until Ctrl-C or SIGTERM (KeyboardInterrupt)."""
    from ray import serve

    if config.cluster.address is None:
        free(options.host, options.port)
    with Cluster.connect(config.cluster):
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # Ray has set its own
        print(f"starting {how.model} (20 to 60 s on a CPU)", file=sys.stderr)
        try:
            start(config, how, endpoint, options)
            print(f"{how.model}: http://{options.host}:{options.port}/v1 (Ctrl-C ends it)", flush=True)
            while True:
                signal.pause()
        finally:
            serve.shutdown()


def _too_large(what: str, most: int) -> Refused:
    return Refused(f"{what} has more than {most} bytes (--max-body-mib)", None, "too_large", 413)


def _unavailable(reason: str) -> Refused:
    return Refused(f"{reason.rstrip('.')}; try again in a minute", None, "unavailable", 503)


if __name__ == "__main__":
    raise SystemExit(main())
