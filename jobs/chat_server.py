"""Serve an OpenAI-compatible chat endpoint that answers in two turns: a FastAPI application on Ray Serve."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import math
import signal
import socket
import sys
import time
import uuid
from collections.abc import AsyncIterable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import httpx
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from ergo_rl.actors.rollout_worker import EvalMode, FairSemaphore, too_long
from ergo_rl.cluster.compat import bind_serve_localhost
from ergo_rl.cluster.engine import EngineDied
from ergo_rl.cluster.placement import Cluster
from ergo_rl.cluster.worker_pool import PoolExhausted
from ergo_rl.episodes import images
from ergo_rl.episodes.families import load_tokenizer
from ergo_rl.episodes.types import Question
from ergo_rl.jobs.chat_protocol import (
    ChatError,
    ChatQuestion,
    ChatRequest,
    Json,
    completion,
    invalid_image,
    read_chat,
    read_data_url,
    stream_events,
)
from ergo_rl.jobs.config import ConfigError, TrainConfig
from ergo_rl.jobs.policy_clients import EndpointClient, EngineClient, EpisodeError, start_client
from ergo_rl.rewards.config import EndpointConfig

_HEALTH_EVERY_S = 2.0
"""Ray Serve replaces a replica that has failed three times in a row."""
_BODY_S = 60.0
"""How long the body of a request may take to arrive, and an image to be fetched."""
_BODIES = 8
"""Bodies of the largest size that may be held at once."""


@dataclass(frozen=True, slots=True)
class ServeConfig:
    """How a policy is served, apart from the recipe."""

    model: str
    """Its name in requests and replies."""
    max_body_bytes: int = 64 * 2**20
    """Most bytes of a request, and of an image that is fetched."""
    fetch_images: bool = False
    """Also take images by http(s) URL, from public addresses."""
    fetch_private: bool = False
    """From all others, too: this machine, its networks, a cloud's metadata."""
    host: str = "127.0.0.1"
    port: int = 8000
    replicas: int = 1
    """Engines, each as large as a rollout worker."""
    created: int = field(default_factory=lambda: int(time.time()))
    """Unix seconds, shown in the list of models."""


class ChatService:
    """Answers chats with a client's episodes; concurrent requests share its engine."""

    def __init__(self, client: EngineClient | EndpointClient, config: TrainConfig, settings: ServeConfig) -> None:
        self.settings = settings
        self._client, self._config = client, config
        engine, pixels = config.rollout.engine, config.episode.max_image_pixels
        self._tokenizer = load_tokenizer(engine.model) if isinstance(client, EngineClient) else None
        self.requests = Budget(requests_at_once(config), "requests")
        self.body_bytes = Budget(_BODIES * settings.max_body_bytes, "bytes of requests")
        # A picture is held decoded while it is answered: two of the largest size at once, or many small ones.
        self._pixels = FairSemaphore(2 * pixels)

    async def check(self) -> None:
        """Raises EngineDied when the engine is gone."""
        if isinstance(self._client, EngineClient):
            await self._client.check()

    async def answer(self, asked: ChatQuestion, take_bytes: Callable[[int], None]) -> Json:
        """The completion for a chat. ``take_bytes`` counts those of a fetched image. Raises ChatError."""
        name = f"chatcmpl-{uuid.uuid4().hex}"
        question = Question(name, b"", asked.text, "", asked.options)
        if reason := too_long(question, self._config.rollout.engine.max_model_len):
            raise ChatError(reason, "messages")
        encoded = await self._image(asked.image_url, take_bytes)
        try:  # before the question waits for its turn
            size = await asyncio.to_thread(images.size, encoded, self._config.episode.max_image_pixels)
        except images.UnreadableImage as error:
            raise invalid_image(f"the image cannot be used: {error}") from error
        question = replace(question, image=encoded)
        try:
            async with self._pixels.acquire(math.prod(size)):
                result = await self._client.run_episode(question, EvalMode.usual(self._config.episode))
        except EpisodeError as error:
            if error.transient:
                raise _unavailable(str(error)) from error
            raise ChatError(f"the question cannot be answered: {error}", "messages", "unplayable") from error
        shorten = partial(self._shorten, asked)
        return completion(name, int(time.time()), self.settings.model, result, self._client.family, shorten)

    def _shorten(self, asked: ChatQuestion, text: str) -> str:
        """The text up to the first of the request's stops, and of at most ``max_tokens`` tokens. The tokens of an
        endpoint are not known, so its text is not cut by them."""
        for stop in asked.stop:
            text = text.partition(stop)[0]
        if asked.max_tokens is None or self._tokenizer is None:
            return text
        ids = self._tokenizer.encode(text, add_special_tokens=False)
        return text if len(ids) <= asked.max_tokens else self._tokenizer.decode(ids[: asked.max_tokens])

    async def _image(self, url: str, take_bytes: Callable[[int], None]) -> bytes:
        """The encoded image of a data URL or, where that is allowed, of an http(s) URL. Raises ChatError."""
        if not url.lower().startswith(("http://", "https://")):
            return await asyncio.to_thread(read_data_url, url)
        if not self.settings.fetch_images:
            raise invalid_image(
                "this server fetches no images (ergo-rl serve --fetch-images would); send a data URL instead: "
                "data:image/png;base64,..."
            )
        try:
            async with (
                asyncio.timeout(_BODY_S),  # in all: httpx bounds each read, so a server could drip for ever
                httpx.AsyncClient(timeout=30) as http,
            ):
                at, how = httpx.URL(url), dict[str, Any]()
                if not self.settings.fetch_private:
                    how = {"headers": {"Host": at.netloc.decode()}, "extensions": {"sni_hostname": at.host}}
                    at = at.copy_with(host=await public_address(at.host))  # asked once: names can change their mind
                async with http.stream("GET", at, **how) as reply:
                    reply.raise_for_status()
                    return await collect(reply.aiter_bytes(), "the image", self.settings.max_body_bytes, take_bytes)
        except TimeoutError as error:
            raise invalid_image(f"the image was not fetched within {_BODY_S:.0f} s") from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise invalid_image(f"the image was not fetched: {type(error).__name__} {error}") from error


async def public_address(host: str) -> str:
    """An address of ``host``. Raises ChatError unless all of them are public: whoever sends requests must not reach
    through this server what only this server reaches."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise invalid_image(f"the image was not fetched: there is no host {host[:80]!r} ({error})") from error
    addresses = [ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in found]
    for address in addresses:
        plain = getattr(address, "ipv4_mapped", None) or address
        if not plain.is_global or plain.is_multicast:
            raise invalid_image(
                f"the image was not fetched: {host[:80]!r} is at {plain}, which is not public (ergo-rl serve "
                "--fetch-private-images would)"
            )
    return str(addresses[0])


class Budget:
    """How much all requests together may hold. What exceeds it is refused at once, so that nothing queues in memory."""

    def __init__(self, limit: int, what: str) -> None:
        self.limit, self._what, self.held = limit, what, 0

    @contextmanager
    def hold(self) -> Iterator[Callable[[int], None]]:
        """Yield a function that takes an amount, and raises ChatError where too much is held; give all of it back at
        the end."""
        taken = 0

        def take(amount: int) -> None:
            nonlocal taken
            if self.held + amount > self.limit:
                raise _unavailable(f"the server is busy: it takes {self.limit} {self._what} at once")
            self.held += amount
            taken += amount

        try:
            yield take
        finally:
            self.held -= taken


def requests_at_once(config: TrainConfig) -> int:
    """Chats that a replica takes at once: what its engine runs, and four times as many that wait."""
    return 10 * config.rollout.engine.max_num_seqs


def chat_app(service: ChatService) -> FastAPI:
    """The application: chat completions, the list of models, health. Every error has OpenAI's shape and a sentence."""
    app = FastAPI(title="ergo-rl", docs_url=None, redoc_url=None)  # those pages load scripts from other hosts
    limit = service.settings.max_body_bytes
    schema = {"content": {"application/json": {"schema": ChatRequest.model_json_schema()}}}

    @app.post("/v1/chat/completions", openapi_extra={"requestBody": schema})
    async def chat_completions(request: Request) -> Any:
        with service.requests.hold() as take_place, service.body_bytes.hold() as take_bytes:
            take_place(1)
            body = await read_body(request, limit, take_bytes)
            asked = await asyncio.to_thread(read_chat, body, service.settings.model)
            reply = await service.answer(asked, take_bytes)
        if not asked.stream:
            return reply
        return StreamingResponse(stream_events(reply, asked.usage_in_stream), media_type="text/event-stream")

    settings = service.settings
    served = {"id": settings.model, "object": "model", "created": settings.created, "owned_by": "ergo-rl"}

    @app.get("/v1/models")
    async def models() -> Any:
        return {"object": "list", "data": [served]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Any:
        if name != settings.model:
            raise ChatError(f"this server has the model {settings.model!r} only", "model", "model_not_found", 404)
        return served

    @app.get("/health")
    async def health() -> Any:
        try:
            await service.check()
        except EngineDied as error:
            raise _unavailable(f"the engine has died: {error}") from error
        return {"status": "ok"}

    @app.exception_handler(ChatError)
    async def refuse(request: Request, error: ChatError) -> JSONResponse:
        return JSONResponse(error.body, error.status)

    @app.exception_handler(HTTPException)
    async def no_such_route(request: Request, error: HTTPException) -> JSONResponse:
        message = (
            f"there is no {request.method} {request.url.path[:80]} here, but POST /v1/chat/completions, "
            "GET /v1/models and GET /health"
        )
        return await refuse(request, ChatError(message, code="not_found", status=404))

    return app


async def read_body(request: Request, limit: int, take_bytes: Callable[[int], None]) -> bytes:
    """The body, which Starlette would read at any length and for any time.

    Raises ChatError as soon as it exceeds ``limit`` bytes or a minute."""
    announced = request.headers.get("content-length", "")
    if announced.isascii() and announced.isdigit() and int(announced) > limit:
        raise _too_large("the request", limit)
    try:
        async with asyncio.timeout(_BODY_S):
            return await collect(request.stream(), "the request", limit, take_bytes)
    except TimeoutError as error:
        raise ChatError(f"the request did not arrive within {_BODY_S:.0f} s", None, "timeout", 408) from error


async def collect(chunks: AsyncIterable[bytes], what: str, limit: int, take_bytes: Callable[[int], None]) -> bytes:
    """Join ``chunks``. Raises ChatError above ``limit`` bytes, or where ``take_bytes`` refuses."""
    content = bytearray()
    async for chunk in chunks:
        take_bytes(len(chunk))
        content += chunk
        if len(content) > limit:
            raise _too_large(what, limit)
    return bytes(content)


class Replica:
    """The deployment that Ray Serve runs, restarts and asks for its health."""

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it
        self, config: TrainConfig, settings: ServeConfig, endpoint: EndpointConfig | None, family: str
    ) -> None:
        bind_serve_localhost()
        self._service = ChatService(await start_client(config, endpoint, family), config, settings)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by ``serve.ingress()`` behind the constructor, so that the application has its engine."""
        return chat_app(self._service)

    async def check_health(self) -> None:
        await self._service.check()


def deploy(config: TrainConfig, settings: ServeConfig, endpoint: EndpointConfig | None, family: str) -> None:
    """Deploy on the Ray cluster that this process is connected to; returns when every replica answers.

    Raises ConfigError where Ray Serve already runs there, PoolExhausted where no replica comes up."""
    from ray import serve

    if serve.status().proxies:
        raise ConfigError("Ray Serve already runs on this cluster; end it (serve shutdown), or use another cluster")
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    serve.start(
        proxy_location="HeadOnly",
        http_options={"host": settings.host, "port": settings.port},
        logging_config={"log_level": "WARNING", "enable_access_log": False},
    )
    resources, chats = config.rollout.resources, requests_at_once(config)
    replica = serve.deployment(
        name="chat",
        num_replicas=settings.replicas,
        ray_actor_options={"num_cpus": resources.cpus, "num_gpus": resources.gpus},
        max_ongoing_requests=2 * chats,  # above the application's own limit, so that /health never waits behind chats
        max_queued_requests=2 * chats,
        health_check_period_s=_HEALTH_EVERY_S,
        graceful_shutdown_timeout_s=5.0,
        max_constructor_retry_count=2,
    )(serve.ingress()(Replica))
    try:
        serve.run(replica.bind(config, settings, endpoint, family), name="ergo-rl")
    except RuntimeError as error:
        raise PoolExhausted(f"no replica came up: {error}") from error


def check_port(host: str, port: int) -> None:
    """Raises ConfigError unless a server can listen there."""
    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            pass
    except (OSError, OverflowError) as error:
        raise ConfigError(f"{host}:{port} is not free to listen on ({error}); name another --host or --port") from error


def serve_until_stopped(
    config: TrainConfig, settings: ServeConfig, endpoint: EndpointConfig | None = None, family: str = "qwen2_5_vl"
) -> None:
    """Serve until Ctrl-C or SIGTERM, which both raise KeyboardInterrupt. family: of the endpoint's model.

    Raises ConfigError, PoolExhausted, OSError."""
    from ray import serve

    if config.cluster.address is None:
        check_port(settings.host, settings.port)
    with Cluster.connect(config.cluster):
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # replaces Ray's handler
        print(f"starting {settings.model} (20 to 60 s on a CPU)", file=sys.stderr)
        try:
            deploy(config, settings, endpoint, family)
            print(f"{settings.model}: http://{settings.host}:{settings.port}/v1 (Ctrl-C ends it)", flush=True)
            while True:
                signal.pause()
        finally:
            serve.shutdown()


def _too_large(what: str, limit: int) -> ChatError:
    return ChatError(f"{what} has more than {limit} bytes (--max-body-mib)", None, "too_large", 413)


def _unavailable(reason: str) -> ChatError:
    return ChatError(f"{reason.rstrip('.')}; try again in a minute", None, "unavailable", 503)
