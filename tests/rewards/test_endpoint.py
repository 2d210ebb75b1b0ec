"""Hostile replies of an endpoint, over real HTTP: each is a failed call, in bounded time and bytes."""

from __future__ import annotations

import asyncio
import gzip
import json
import resource
import socket
import socketserver
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from ergo_rl.rewards.config import EndpointConfig, LimitName
from ergo_rl.rewards.endpoint import ChatEndpoint, NoVerdict, VerifierUnavailable, api_key
from tests.rewards.conftest import Endpoint, fails

GOOD = {"choices": [{"message": {"content": "red"}, "finish_reason": "stop"}]}
Send = Callable[[socket.socket], None]


def http(body: bytes | str = b"", status: str = "200 OK", *headers: str) -> Send:
    body = body.encode() if isinstance(body, str) else body
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers, "", ""]
    return lambda to: to.sendall("\r\n".join(lines).encode("latin-1") + body)


def raw(data: bytes) -> Send:
    return lambda to: to.sendall(data)


def chunks(piece: bytes, every_s: float, most: int = 10**6) -> Send:
    def send(to: socket.socket) -> None:
        to.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(most):
            to.sendall(b"%x\r\n%s\r\n" % (len(piece), piece))
            time.sleep(every_s)

    return send


def drip_headers(to: socket.socket) -> None:
    to.sendall(b"HTTP/1.1 200 OK\r\n")
    for number in range(100):
        to.sendall(b"X-%d: a\r\n" % number)
        time.sleep(0.05)


def changed(**changes: object) -> str:
    return json.dumps(GOOD | changes)


def choice(**changes: object) -> str:
    return json.dumps({"choices": [GOOD["choices"][0] | changes]})


BOMB = b" " * (64 << 20)
HOSTILE: dict[str, Send] = {
    "no bytes": raw(b""),
    "no http": raw(b"\x16\x03\x01\x02\x00garbage\r\n\r\n"),
    "ssh": raw(b"SSH-2.0-OpenSSH_9.2\r\n"),
    "half a status line": raw(b"HTTP/1.1 20"),
    "a status of letters": raw(b"HTTP/1.1 abc OK\r\n\r\n"),
    "status 99999": raw(b"HTTP/1.1 99999 OK\r\n\r\n"),
    "half a body": raw(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{"),
    "a negative length": raw(b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n{}"),
    "two lengths": raw(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}"),
    "a broken chunk": raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n"),
    "300,000 bytes of header": raw(b"HTTP/1.1 200 OK\r\nX: " + b"a" * 300_000 + b"\r\n\r\n"),
    "headers without end": drip_headers,
    "silence": lambda to: time.sleep(2),
    "a byte now and then": chunks(b" ", 0.05, 100),
    "64 MiB of blanks": chunks(b" " * 2**20, 0, 64),
    "64 MiB at once": http(BOMB),
    "a gzip bomb": http(gzip.compress(BOMB, 1), "200 OK", "Content-Encoding: gzip"),
    "a deflate bomb": http(zlib.compress(BOMB, 1), "200 OK", "Content-Encoding: deflate"),
    "no gzip": http(b"not gzip", "200 OK", "Content-Encoding: gzip"),
    "an unknown encoding": http(json.dumps(GOOD), "200 OK", "Content-Encoding: zstd, br, own"),
    "empty body": http(),
    "html": http("<html>[/x]</html>", "200 OK", "Content-Type: text/html"),
    "not utf-8": http(b"\xff\xfe\x00", "200 OK", "Content-Type: application/json; charset=nonsense"),
    "a half json": http('{"choices": [{"message": {"content": "re'),
    "200,000 brackets": http("[" * 200_000),
    "200,000 objects": http('{"a":' * 200_000),
    "a number of 5,000 digits": http('{"choices": %s}' % ("9" * 5000)),
    "NaN": http('{"choices": NaN}'),
    "infinite tokens": http(changed(usage={"prompt_tokens": 0})[:-2] + ', "completion_tokens": 1e999}}'),
    "Infinity": http('{"choices": [{"message": {"content": "red"}}], "usage": {"prompt_tokens": Infinity}}'),
    "usage as a list": http(changed(usage=[1])),
    "negative usage": http(changed(usage={"prompt_tokens": -5})),
    "null": http("null"),
    "a text": http('"red"'),
    "a list": http("[1, 2]"),
    "an empty object": http("{}"),
    "choices null": http('{"choices": null}'),
    "choices empty": http('{"choices": []}'),
    "choices as a text": http('{"choices": "red"}'),
    "choices as an object": http('{"choices": {"a": 1}}'),
    "no message": http('{"choices": [{}]}'),
    "message as a text": http('{"choices": [{"message": "red"}]}'),
    "no content": http('{"choices": [{"message": {}}]}'),
    "content null": http(choice(message={"content": None})),
    "content as a number": http(choice(message={"content": 7})),
    "content as parts of no type": http(choice(message={"content": [{"text": "red"}]})),
    "content as parts without text": http(choice(message={"content": [{"type": "text", "text": 7}]})),
    "content as texts": http(choice(message={"content": ["red"]})),
    "an error with status 200": http('{"error": {"message": "[/INST] no such model"}}'),
    "an event stream": http('data: {"choices": []}\n\ndata: [DONE]\n\n', "200 OK", "Content-Type: text/event-stream"),
    "a redirect to elsewhere": http(b"", "307 Temporary Redirect", "Location: http://169.254.169.254/latest/"),
    "a redirect to a file": http(b"", "302 Found", "Location: file:///etc/passwd"),
    "a redirect to itself": http(b"", "308 Permanent Redirect", "Location: /v1/chat/completions"),
    "304": http(b"", "304 Not Modified"),
    "retry after 99,999 s": http(b"", "429 Too Many", "Retry-After: 99999"),
    "retry after 400 digits": http(b"", "429 Too Many", "Retry-After: " + "9" * 400),
    "retry after never": http(b"", "503 Busy", "Retry-After: nan"),
    "x-should-retry": http(b"", "500 Broken", "X-Should-Retry: false"),
    "400 in an unknown charset": http(b"\xff\xfe", "400 No", "Content-Type: text/html; charset=nonsense"),
    "400 with a gzip bomb": http(gzip.compress(BOMB, 1), "400 No", "Content-Encoding: gzip"),
    "401 of 64 MiB": http(BOMB, "401 No"),
}


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, dict[str, Send]]]:
    """A threaded server that sends the bytes of the one reply that it is told."""
    told: dict[str, Send] = {}

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            try:
                got = b""
                while b"\r\n\r\n" not in got and (more := self.request.recv(65536)):
                    got += more
                told["reply"](self.request)
            except OSError:
                """The client has hung up, as it should."""

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True
        block_on_close = False

    with Server(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}/v1", told
        running.shutdown()


def config_for(url: str, **changes: Any) -> EndpointConfig:
    usual = {"url": url, "model": "m", "timeout_s": 0.4, "retries": 1, "backoff_s": 0.0}
    return EndpointConfig(**(usual | changes))


def ask(url: str, **changes: Any) -> str:
    async def run() -> str:
        chat = ChatEndpoint(config_for(url, **changes))
        try:
            return (await chat.complete({"messages": [], "max_tokens": 8})).text
        finally:
            await chat.close()

    return asyncio.run(run())


@dataclass(frozen=True)
class Outcome:
    error: Exception | None
    seconds: float
    grown_kib: int


@pytest.fixture(scope="module")
def outcomes(server: tuple[str, dict[str, Send]]) -> dict[str, Outcome]:
    """What one client makes of every hostile reply, one after another, and of a good one at the end."""
    url, told = server

    async def run() -> dict[str, Outcome]:
        chat, found = ChatEndpoint(config_for(url, max_backoff_s=0.0)), dict[str, Outcome]()
        for name, reply in {**HOSTILE, "good": http(json.dumps(GOOD))}.items():
            told["reply"], error = reply, None
            before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
            try:
                await chat.complete({"messages": []})
            except Exception as caught:
                error = caught
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            found[name] = Outcome(error, time.monotonic() - started, grown)
        await chat.close()
        return found

    return asyncio.run(run())


@pytest.mark.hostile("replies of endpoints")
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_reply_is_a_failed_call_in_bounded_time_and_memory(outcomes: dict[str, Outcome], name: str) -> None:
    outcome = outcomes[name]
    assert isinstance(outcome.error, VerifierUnavailable), outcome.error
    assert outcome.seconds < 15  # two attempts of 0.4 s, beside whatever else the machine does
    assert outcome.grown_kib < 200 << 10  # the server sends 64 MiB
    assert "/v1/chat/completions: " in str(outcome.error) and len(str(outcome.error)) <= 700


def test_good_reply_is_read_behind_all_hostile_ones(outcomes: dict[str, Outcome]) -> None:
    assert outcomes["good"].error is None and len(HOSTILE) >= 40


def test_key_is_stripped_and_in_no_message(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VERIFIER_KEY", " s3cret\r\n")
    endpoint.answer = lambda body: (400, b"s3cret is no key " + b"x" * 300 + b"s3cret", {})
    with pytest.raises(VerifierUnavailable, match=r"\*\*\* is no key") as caught:
        ask(endpoint.url, api_key_env="VERIFIER_KEY")
    assert "s3cret" not in str(caught.value) and endpoint.headers[-1]["Authorization"] == "Bearer s3cret"
    monkeypatch.setenv("VERIFIER_KEY", "s3\ncret")
    with pytest.raises(ValueError, match="the API key in VERIFIER_KEY has characters that no HTTP header can have"):
        api_key("VERIFIER_KEY")
    monkeypatch.setenv("VERIFIER_KEY", " \n")
    with pytest.raises(ValueError, match="VERIFIER_KEY, which is not set"):
        api_key("VERIFIER_KEY")


def test_limit_name_and_extra_body_are_the_configurations(endpoint: Endpoint) -> None:
    ask(endpoint.url, timeout_s=5.0)
    assert endpoint.bodies[-1] == {
        "messages": [], "max_tokens": 8, "temperature": 0.0, "top_p": 1.0, "presence_penalty": 0.0,
        "frequency_penalty": 0.0, "repetition_penalty": 1.0,
    }  # fmt: skip
    extra = {"repetition_penalty": None, "chat_template_kwargs": {"enable_thinking": False}}
    ask(endpoint.url, timeout_s=5.0, limit_name=LimitName.MAX_COMPLETION_TOKENS, extra_body=extra)
    body = endpoint.bodies[-1]
    assert body["max_completion_tokens"] == 8 and body["chat_template_kwargs"] == {"enable_thinking": False}
    assert not {"max_tokens", "repetition_penalty"} & body.keys()


def test_proxy_is_bypassed_for_loopback_and_named_elsewhere(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(variable, "http://user:s3cret@127.0.0.1:9")
    for variable in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    assert ask(endpoint.url, timeout_s=5.0) == "<answer>B</answer>"
    with pytest.raises(
        VerifierUnavailable, match=r"ConnectError .* through the proxy 127\.0\.0\.1:9, 1 attempts"
    ) as no:
        ask("http://verifier.example:8000/v1", retries=0, timeout_s=5.0)
    assert "s3cret" not in str(no.value)


@pytest.mark.parametrize("status", [400, 413, 422])
def test_refused_question_is_no_outage(endpoint: Endpoint, status: int) -> None:
    endpoint.answer = lambda body: fails(status)
    with pytest.raises(NoVerdict, match=f"status {status}") as caught:
        ask(endpoint.url, timeout_s=5.0)
    assert caught.value.kind == "refused" and len(endpoint.bodies) == 1


@pytest.mark.parametrize("status", [401, 403, 404])
def test_wrong_key_or_url_is_an_outage(endpoint: Endpoint, status: int) -> None:
    endpoint.answer = lambda body: fails(status)
    with pytest.raises(VerifierUnavailable, match=f"status {status}") as caught:
        ask(endpoint.url, timeout_s=5.0)
    assert caught.value.kind == "unavailable"
