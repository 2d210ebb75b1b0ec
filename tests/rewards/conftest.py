"""A real HTTP server on this machine that speaks as much of the OpenAI protocol as a verifier needs."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

Answer = tuple[int, bytes, dict[str, str]]
"""Status, body, headers."""


def says(text: str | None) -> Answer:
    return 200, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode(), {}


def fails(status: int, **headers: str) -> Answer:
    return status, b'{"error": "no"}', {name.replace("_", "-"): value for name, value in headers.items()}


@dataclass
class Endpoint:
    """Plays ``script`` one answer a request, then repeats ``answer``; keeps what it was asked."""

    script: list[Answer] = field(default_factory=list)
    answer: Callable[[dict[str, Any]], Answer] = lambda body: says("<answer>B</answer>")
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    """By names with capitals, such as Authorization: clients differ in how they write them."""
    paths: list[str] = field(default_factory=list)
    in_flight: int = 0
    most_in_flight: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    url: str = ""


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    state = Endpoint()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with state.lock:
                state.in_flight += 1
                state.most_in_flight = max(state.most_in_flight, state.in_flight)
                state.bodies.append(body)
                state.headers.append({name.title(): value for name, value in self.headers.items()})
                state.paths.append(self.path)
                scripted = state.script.pop(0) if state.script else None
            status, content, headers = scripted or state.answer(body)
            with state.lock:
                state.in_flight -= 1
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            """Silent."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    yield state
    server.shutdown()
    server.server_close()
    thread.join()
