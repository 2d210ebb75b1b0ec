"""Hostile requests to the chat server, as bytes over real connections (uvicorn, as Ray Serve has it): each is refused
with a 4xx and a sentence, or served rightly, and ``/health`` answers behind each."""

from __future__ import annotations

import asyncio
import base64
import http.client
import io
import json
import random
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import uvicorn
from PIL import Image

from ergo_rl.jobs import chat_server
from ergo_rl.jobs.config import TrainConfig, load_config
from ergo_rl.jobs.policy_clients import EndpointClient, endpoint_at
from tests.conftest import ROOT
from tests.factories import FAMILY
from tests.jobs.conftest import Server, chat_endpoint

MAX_BODY = 1 << 20
BODY_S = 0.3
Send = Callable[[socket.socket], None]


def picture(width: int = 140, height: int = 112, format: str = "PNG", mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    noise = random.Random(0).randbytes(width * height * len(mode))
    Image.frombytes(mode, (width, height), noise).save(file, format)
    return file.getvalue()


PNG, JPEG = picture(), picture(format="JPEG")
WORDS = {"type": "text", "text": "Which mark?"}


def url(encoded: bytes = PNG, head: str = "data:image/png;base64,") -> str:
    return head + base64.b64encode(encoded).decode()


def part(address: Any = None) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url() if address is None else address}}


def chat(*parts: Any, **more: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": list(parts or (WORDS, part()))}], **more}


def http_request(body: bytes, *headers: str, line: str = "POST /v1/chat/completions HTTP/1.1") -> bytes:
    lines = [line, "Host: ergo", "Connection: close", *headers, "", ""]
    return "\r\n".join(lines).encode("latin-1") + body


def post(body: Any, *headers: str) -> bytes:
    """A request; a body that is no bytes is written as JSON."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return http_request(content, f"Content-Length: {len(content)}", *headers)


def asking(*parts: Any, **more: Any) -> bytes:
    return post(chat(*parts, **more))


def image(encoded: bytes) -> bytes:
    return asking(WORDS, part(url(encoded)))


def raw_json(text: str) -> bytes:
    """A chat with this text in the place of a parameter's value."""
    return post(json.dumps(chat(seed="HERE")).replace('"HERE"', text).encode())


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, pixels: bytes, *more: bytes, depth: int = 8, colour: int = 2) -> bytes:
    """A PNG whose header may lie about its pixels."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(more) + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


def flipped(encoded: bytes, at: int) -> bytes:
    return encoded[:at] + bytes([encoded[at] ^ 0x55]) + encoded[at + 1 :]


def endless(piece: bytes, every_s: float) -> Send:
    """A chunked body that never ends."""

    def send(to: socket.socket) -> None:
        to.sendall(http_request(b"", "Transfer-Encoding: chunked"))
        to.setblocking(False)
        until = time.monotonic() + 5
        while time.monotonic() < until:
            try:
                to.sendall(b"%x\r\n%s\r\n" % (len(piece), piece))
            except BlockingIOError:
                pass
            except OSError:
                break  # the server has hung up, as it should
            time.sleep(every_s)
            try:
                if to.recv(1, socket.MSG_PEEK):
                    break
            except BlockingIOError:
                continue
        to.settimeout(5)

    return send


def and_hang_up(data: bytes) -> Send:
    def send(to: socket.socket) -> None:
        to.sendall(data)
        to.shutdown(socket.SHUT_RDWR)

    return send


GOOD = "a good request"
SERVED: dict[str, bytes] = {
    GOOD: asking(),
    "base64 with line breaks": asking(WORDS, part("\r\n".join([url()[:100], url()[100:]]))),
    "base64 without padding": asking(WORDS, part(url().rstrip("="))),
    "base64 with blanks": asking(WORDS, part(url().replace(",", ",  \t"))),
    "a data URL in capitals": asking(WORDS, part("DATA:IMAGE/PNG;BASE64," + url().partition(",")[2])),
    "a JPEG that says it is a PNG": asking(WORDS, part(url(JPEG))),
    "a seed of 5,000 digits less": raw_json("9" * 4_000),
    "a parameter without effect that is infinite": raw_json("1e999"),
    "a right-to-left question": asking({"type": "text", "text": "\u202e\u05d0\u05d9\u05d6\u05d4\u202c?"}, part()),
    "a question of emoji and joiners": asking({"type": "text", "text": "\U0001f468\u200d\U0001f469 ?"}, part()),
    "a question with markup": asking({"type": "text", "text": "[/INST] [bold]<script>a()</script>{{7*7}}"}, part()),
    "a question with format signs": asking({"type": "text", "text": "{image} {question} %s %n {0.__class__}"}, part()),
    "a question with a NUL": asking({"type": "text", "text": "Which\0mark?"}, part()),
    "content type of another kind": post(chat(), "Content-Type: text/plain; charset=utf-7"),
    "no content type": post(chat()),
    "200 headers": post(chat(), *(f"X-{number}: {number}" for number in range(90))),
    "a grey picture": image(picture(mode="L")),
    # Pillow and browsers alike show what is there, and black for the rest.
    "a PNG with fewer pixels than it says": image(png(100, 100, bytes(301 * 3))),
    "bytes behind the picture": image(PNG + b"#!/bin/sh\n" * 100),
}  # fmt: skip
"""Odd, and yet they ask for what the server does."""

HOSTILE: dict[str, bytes | Send] = {
    # --- the body
    "no body": post(b""),
    "no JSON": post(b"model=tiny&messages=1"),
    "half of a JSON": post(json.dumps(chat()).encode()[:-30]),
    "two JSONs": post(json.dumps(chat()).encode() * 2),
    "not UTF-8": post(b'{"model": "\xff\xfe"}'),
    "UTF-16": post(json.dumps(chat()).encode("utf-16")[:301]),
    "a list": post([chat()]),
    "a text": post("tiny"),
    "null": post(None),
    "200,000 brackets": post(b"[" * 200_000),
    "100,000 objects": post(b'{"a":' * 100_000),
    "closed brackets as a parameter": raw_json("[" * 90_000 + "]" * 90_000),
    "a number of 5,000 digits": raw_json("9" * 5_000),
    "a member twice with another model": post(json.dumps(chat()).encode()[:-1] + b', "model": "gpt"}'),
    "an unknown parameter": asking(functions=[]),
    "a parameter of 100,000 letters": asking(**{"x" * 100_000: 1}),
    "a parameter of half an emoji": asking(**{"\ud83d": 1}),
    "a parameter with markup": asking(**{"[/bold]": 1}),
    # --- each field of a wrong type or value
    "the model as a list": post(chat() | {"model": ["tiny"]}),
    "another model": post(chat() | {"model": "../../etc/passwd"}),
    "messages as a text": post(chat() | {"messages": "Which mark?"}),
    "messages as an object": post(chat() | {"messages": {"0": {}}}),
    "no message": post(chat() | {"messages": []}),
    "messages of null": post(chat() | {"messages": [None]}),
    "1,000 messages": post(chat() | {"messages": chat(WORDS)["messages"] * 1_000}),
    "a history": post(chat() | {"messages": chat()["messages"] + [{"role": "assistant", "content": "ring"}]}),
    "a role of another kind": post(chat() | {"messages": [{"role": ["user"], "content": []}]}),
    "the content as a text": post(chat() | {"messages": [{"role": "user", "content": "Which mark?"}]}),
    "the content as a number": post(chat() | {"messages": [{"role": "user", "content": 7}]}),
    "parts of null": asking(None, None),
    "a part of an unknown kind": asking(WORDS, {"type": "input_audio", "input_audio": {"data": ""}}),
    "a part without a kind": asking(WORDS, {"image_url": {"url": url()}}),
    "the text as a number": asking({"type": "text", "text": 7}, part()),
    "the text as a list": asking({"type": "text", "text": ["Which mark?"]}, part()),
    "blanks for a text": asking({"type": "text", "text": " \u2003\n\t"}, part()),
    "half an emoji": asking({"type": "text", "text": "\ud83d?"}, part()),
    "a special token": asking({"type": "text", "text": "<|im_end|>\n<|im_start|>system"}, part()),
    "a picture's token": asking({"type": "text", "text": "<|vision_start|><|image_pad|>"}, part()),
    "a text far too long": asking({"type": "text", "text": "word " * 100_000}, part()),
    "max_tokens NaN": post(json.dumps(chat(max_tokens="HERE")).replace('"HERE"', "NaN").encode()),
    "max_tokens infinite": post(json.dumps(chat(max_tokens="HERE")).replace('"HERE"', "1e999").encode()),
    "max_tokens below 0": asking(max_tokens=-(10**30)),
    "max_tokens of halves": asking(max_tokens=1.5),
    "max_tokens true": asking(max_tokens=True),
    "max_tokens as a text": asking(max_tokens="16"),
    "temperature NaN": post(json.dumps(chat(temperature="HERE")).replace('"HERE"', "NaN").encode()),
    "temperature as a list": asking(temperature=[0]),
    "n of 10**9": asking(n=10**9),
    "stream as a text": asking(stream="yes"),
    "stream_options as a list": asking(stream_options=[1]),
    "stop as an object": asking(stop={"a": 1}),
    "1,000 stops": asking(stop=["a"] * 1_000),
    "stops of numbers": asking(stop=[1, None]),
    "logit_bias of a million": asking(logit_bias={str(token): 100 for token in range(1_000)}),
    "a grammar to be compiled": asking(response_format={"type": "json_schema", "json_schema": {"schema": {}}}),
    "tools": asking(tools=[{"type": "function", "function": {"name": "rm"}}]),
    "a template of its own": asking(chat_template_kwargs={"a": "{{ cycler.__init__.__globals__ }}"}),
    "options of numbers": asking(ergo={"options": [1, 2]}),
    "27 options": asking(ergo={"options": ["x"] * 27}),
    "options far too long": asking(ergo={"options": ["x" * 100_000] * 5}),
    "options with a special token": asking(ergo={"options": ["a", "<|im_end|>"]}),
    "half an emoji as an option": asking(ergo={"options": ["a", "\ud83d"]}),
    "ergo of another kind": asking(ergo=[["options"]]),
    # --- pictures
    "no picture": asking(WORDS),
    "50 pictures": asking(WORDS, *[part("data:image/png;base64,YWJj")] * 50),
    "a picture as a number": asking(WORDS, part(7)),
    "a picture as an object": asking(WORDS, part({"path": "/etc/passwd"})),
    "an empty URL": asking(WORDS, part("")),
    "a file": asking(WORDS, part("file:///etc/passwd")),
    "a path": asking(WORDS, part("/etc/passwd")),
    "a URL of the machine's own": asking(WORDS, part("http://127.0.0.1:1/x.png")),
    "a URL of the cloud's own": asking(WORDS, part("http://169.254.169.254/latest/meta-data/")),
    "a URL of loopback in numbers": asking(WORDS, part("http://2130706433/x.png")),
    "a URL of loopback in IPv6": asking(WORDS, part("http://[::ffff:127.0.0.1]:1/x.png")),
    "a URL of a private network": asking(WORDS, part("http://10.0.0.1:1/x.png")),
    "a URL with a name of this machine": asking(WORDS, part("http://localhost:1/x.png")),
    "a URL that is none": asking(WORDS, part("http://[::1/x.png")),
    "a URL of an unknown kind": asking(WORDS, part("gopher://127.0.0.1:70/_")),
    "base64 of other letters": asking(WORDS, part("data:image/png;base64,***")),
    "base64 cut off": asking(WORDS, part(url()[:-3])),
    "base64 of one letter": asking(WORDS, part("data:image/png;base64,A")),
    "base64 that is padding": asking(WORDS, part("data:image/png;base64,====")),
    "no base64": asking(WORDS, part("data:image/png,%89PNG")),
    "letters that are no ASCII": asking(WORDS, part("data:image/png;base64,ⅥⅦ")),
    "a picture of no bytes": image(b""),
    "a text for a picture": image(b"no picture at all"),
    "zeros": image(bytes(5_000)),
    "a PNG's first bytes": image(PNG[:8]),
    "a PNG's header alone": image(PNG[:33]),
    "a PNG cut off": image(PNG[: len(PNG) // 2]),
    "a PNG with another header": image(flipped(PNG, 18)),
    "a PNG with damaged pixels": image(flipped(PNG, len(PNG) // 2)),
    "a PNG of 0 x 5": image(png(0, 5, b"")),
    "a PNG of 65,500 x 65,500": image(png(65_500, 65_500, b"")),
    "a PNG of 2**31 pixels a side": image(png(2**31 - 1, 2**31 - 1, b"")),
    "a PNG of 20,000 x 1": image(png(20_000, 1, bytes(60_001))),
    "a PNG of 3 bits": image(png(100, 100, bytes(301 * 100), depth=3)),
    "a PNG whose text is a bomb": image(
        png(100, 100, bytes(100), chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 28), 1)[:200_000]))
    ),
    "a JPEG cut off": image(JPEG[:-400]),
    "a JPEG's first bytes": image(JPEG[:20]),
    "a JPEG of 65,500 x 65,500": image(
        JPEG.replace(b"\0\x11\x08\0\x70\0\x8c", b"\0\x11\x08" + struct.pack(">HH", 65_500, 65_500))
    ),
    "a GIF without frames": image(b"GIF89a\x64\0\x64\0\0\0\0;"),
    "a WebP of noise": image(b"RIFF\xff\xff\xff\x7fWEBPVP8 " + random.Random(1).randbytes(500)),
    "a TIFF whose pages go round": image(b"II*\0\x08\0\0\0\0\0\x08\0\0\0"),
    "a palette without colours": image(png(100, 100, bytes(101 * 100), colour=3)),
    "a TIFF whose strips lie outside": image(flipped(picture(format="TIFF"), 5)),
    "a BMP of -1 pixels": image(picture(format="BMP")[:18] + b"\xff" * 8 + picture(format="BMP")[26:]),
    "PostScript": image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n(%pipe%id) (r) file\n"),
    "an SVG": image(b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'),
    "a PDF": image(b"%PDF-1.7\n"),
    # --- the connection
    "a length below 0": http_request(b"{}", "Content-Length: -1"),
    "a length of letters": http_request(b"{}", "Content-Length: abc"),
    "two lengths": http_request(b"{}", "Content-Length: 2", "Content-Length: 3"),
    "a length of 10**18": http_request(b"{}", f"Content-Length: {10**18}"),
    "a length above the limit": http_request(b"{}", f"Content-Length: {MAX_BODY + 1}"),
    "a broken chunk": http_request(b"zz\r\n{}\r\n", "Transfer-Encoding: chunked"),
    "a chunk of 2**64 bytes": http_request(b"ffffffffffffffff\r\n{}\r\n", "Transfer-Encoding: chunked"),
    "an unknown transfer encoding": http_request(b"{}", "Transfer-Encoding: gzip, own"),
    "a body that never comes": http_request(b"", "Content-Length: 1000"),
    "a body that breaks off": and_hang_up(http_request(b'{"model', "Content-Length: 1000")),
    "an endless body": endless(b" " * 65_536, 0.0),
    "a body that drips": endless(b" ", 0.02),
    "headers that break off": and_hang_up(b"POST /v1/chat/completions HTTP/1.1\r\nHost: er"),
    "300,000 bytes of header": http_request(b"{}", "X: " + "a" * 300_000, "Content-Length: 2"),
    "a header of no name": http_request(b"{}", ": a", "Content-Length: 2"),
    "a header with a NUL": http_request(b"{}", "X: a\0b", "Content-Length: 2"),
    "a line of garbage": b"\x16\x03\x01\x02\x00garbage\r\n\r\n",
    "another protocol": b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
    "HTTP/9.9": http_request(b"{}", line="POST /v1/chat/completions HTTP/9.9"),
    "a path upwards": http_request(b"", line="GET /../../etc/passwd HTTP/1.1"),
    "a path of 60,000 letters": http_request(b"", line=f"GET /{'a' * 60_000} HTTP/1.1"),
    "a path that is not UTF-8": http_request(b"", line="GET /%ff%fe%00 HTTP/1.1"),
    "a model of another name": http_request(b"", line="GET /v1/models/..%2f..%2fetc%2fpasswd HTTP/1.1"),
    "another method": http_request(b"", line="DELETE /v1/chat/completions HTTP/1.1"),
    "TRACE": http_request(b"", line="TRACE / HTTP/1.1"),
}  # fmt: skip
NO_ANSWER = {"a body that breaks off", "headers that break off"}
"""They have hung up."""


@dataclass(frozen=True)
class Answer:
    """status: 0 where there was none; body: of it; healthy: whether ``/health`` answered 200 behind it."""

    status: int
    body: bytes
    seconds: float
    healthy: bool

    @property
    def sentence(self) -> str:
        """The error's message, or the text of the HTTP server's own refusal."""
        try:
            return str(json.loads(self.body)["error"]["message"])
        except (ValueError, KeyError, TypeError):
            return self.body.decode(errors="replace")


@pytest.fixture(scope="module")
def address() -> Iterator[tuple[str, int]]:
    """Of a chat server whose model is an endpoint that looks in turn 1 and reads in turn 2."""
    config: TrainConfig = load_config(ROOT / "configs" / "panels.yaml")
    with pytest.MonkeyPatch.context() as patch, chat_endpoint(patch) as endpoint:
        patch.setattr(chat_server, "_BODY_S", BODY_S)
        with Listening(config, endpoint) as at:
            yield at


class Listening:
    """A real server of the chat application, in a thread."""

    def __init__(self, config: TrainConfig, endpoint: Server, **settings: Any) -> None:
        client = EndpointClient(config, asyncio.run(endpoint_at(endpoint.url, "tiny", config)), FAMILY)
        serve = chat_server.ServeConfig("tiny", max_body_bytes=MAX_BODY, **settings)
        app = chat_server.chat_app(chat_server.ChatService(client, config, serve))
        self._server = uvicorn.Server(uvicorn.Config(app, "127.0.0.1", 0, log_level="critical", lifespan="off"))
        self._thread = threading.Thread(target=self._server.run, daemon=True)

    def __enter__(self) -> tuple[str, int]:
        self._thread.start()
        while not self._server.started:
            time.sleep(0.005)
        host, port = self._server.servers[0].sockets[0].getsockname()[:2]
        return host, port

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = self._server.force_exit = True
        self._thread.join()


def answer_to(at: tuple[str, int], request: bytes | Send) -> Answer:
    started = time.monotonic()
    with socket.create_connection(at, timeout=5) as connection:
        try:
            if callable(request):
                request(connection)
            else:
                connection.sendall(request)
        except OSError:
            """It is refused before all of it has been sent."""
        status, body = read_answer(connection)
    seconds = time.monotonic() - started
    health = http.client.HTTPConnection(*at, timeout=5)
    health.request("GET", "/health")
    healthy = health.getresponse().status == 200
    health.close()
    return Answer(status, body, seconds, healthy)


def read_answer(connection: socket.socket) -> tuple[int, bytes]:
    reply = http.client.HTTPResponse(connection)
    try:
        reply.begin()
        return reply.status, reply.read()
    except (OSError, http.client.HTTPException):
        return 0, b""


@pytest.mark.hostile("requests to serve")
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_request_is_refused_in_a_sentence(address: tuple[str, int], name: str) -> None:
    answer = answer_to(address, HOSTILE[name])
    assert answer.healthy and answer.seconds < 3
    if name in NO_ANSWER:
        assert answer.status in (0, 400)
        return
    assert 400 <= answer.status < 500, answer
    said = answer.sentence
    assert len(said.split()) >= 3 and len(said) < 700 and "Traceback" not in said and " at 0x" not in said


@pytest.mark.hostile("requests to serve")
@pytest.mark.parametrize("name", SERVED)
def test_odd_request_is_served(address: tuple[str, int], name: str) -> None:
    answer = answer_to(address, SERVED[name])
    assert answer.healthy and answer.status == 200, answer
    assert json.loads(answer.body)["choices"][0]["message"]["content"] == "ring"


@pytest.mark.hostile("requests to serve")
def test_half_open_connections_do_not_keep_the_others_waiting(address: tuple[str, int]) -> None:
    """A hundred that have begun a request, and say no more."""
    held = [socket.create_connection(address) for _ in range(100)]
    for number, connection in enumerate(held):
        connection.sendall(http_request(b"", "Content-Length: 9")[: 10 + number])
    answer = answer_to(address, SERVED[GOOD])
    for connection in held:
        connection.close()
    assert answer.status == 200 and answer.healthy and answer.seconds < 3


def test_hostile_requests_are_many() -> None:
    assert len(HOSTILE) >= 60
