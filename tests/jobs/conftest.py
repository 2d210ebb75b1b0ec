"""A chat endpoint on a real HTTP server that says what a test wants."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ergo_rl.episodes.types import Box, Question
from ergo_rl.jobs.config import TrainConfig, load_config
from tests.conftest import ROOT

LOOK, READ = "<think>there</think><zoom>[28, 28, 84, 84]</zoom>", "<think>a ring</think><answer>ring</answer>"


@dataclass
class Server:
    """``say``: messages of a request -> its reply, or a status."""

    say: Callable[[list[dict[str, Any]]], str | int]
    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Looks in turn 1, reads in turn 2; serves one model."""
    with chat_endpoint(monkeypatch) as state:
        yield state


@contextmanager
def chat_endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    state = Server(lambda messages: READ if messages[-2:][0]["role"] == "assistant" else LOOK)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send(200, {"data": [{"id": "tiny", "about": 500 * "tiny "}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            state.bodies.append(body)
            said = state.say(body["messages"])
            if isinstance(said, int):
                return self._send(said, {"error": "no"})
            choice = {"message": {"content": said}, "finish_reason": "stop"}
            return self._send(200, {"choices": [choice], "usage": {"prompt_tokens": 50, "completion_tokens": 7}})

        def _send(self, status: int, content: dict[str, Any]) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

        def log_message(self, *_: object) -> None: ...

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    state.url = f"http://127.0.0.1:{http.server_port}/v1"
    yield state
    http.shutdown()
    http.server_close()


@pytest.fixture(scope="module")
def config() -> TrainConfig:
    """The panels recipe; an endpoint is asked once."""
    quick = [f"reward.verifier.endpoint.{key}" for key in ("retries=0", "timeout_s=20")]
    return load_config(ROOT / "configs" / "panels.yaml", quick)


def scene() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (672, 672, 3), dtype=np.uint8)


def question(name: str = "q", source: str = "", image: bytes = b"", boxes: bool = True) -> Question:
    """About an image of 672 x 672 random pixels."""
    file = io.BytesIO()
    Image.fromarray(scene()).save(file, "PNG", compress_level=0)
    target = (Box(120, 120, 300, 300),) if boxes else ()
    return Question(name, image or file.getvalue(), "Which mark?", "ring", (), target, source)
