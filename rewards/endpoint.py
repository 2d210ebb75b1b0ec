"""Chat completions of an OpenAI-compatible endpoint (``vllm serve``, a gateway, a hosted model).

Whatever an endpoint sends is a reply or a failed call, in bounded time and bytes; never another error."""

from __future__ import annotations

import asyncio
import base64
import io
import ipaddress
import json
import os
import urllib.request
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import httpx
from PIL import Image

from ergo_rl.episodes.types import View
from ergo_rl.errors import ErgoError
from ergo_rl.rewards.config import EndpointConfig

if TYPE_CHECKING:
    import openai

_TRANSIENT = frozenset((408, 409, 425, 429))
"""Statuses, beside every 5xx, that another attempt may not meet."""
_REFUSED = frozenset((400, 413, 415, 422, 451))
"""Statuses that are about the request and not about the endpoint: another attempt meets them again."""
LONGEST_REPLY = 4 << 20
"""Bytes; a chat completion has a few thousand."""
_GREEDY = {"temperature": 0.0, "top_p": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
"""Sent with every request: a server has defaults of its own (``generation_config.json``), which are not greedy."""


_FINISHED = frozenset(("", "stop", "eos", "eos_token", "end_turn", "stop_sequence", "tool_calls", "function_call"))
"""Reasons with which a reply has come to its end (not all servers give one). Any other, and it was cut: by a length, or
because the server gave the request up."""
_FILTERED = frozenset(("content_filter", "safety", "recitation", "blocklist", "prohibited_content", "refusal"))
_BESIDE_CONTENT = ("reasoning_content", "reasoning", "tool_calls", "function_call")
"""Parts of a message beside which it may have no content."""


class VerifierUnavailable(ErgoError, RuntimeError):
    """The verifier gave no reply to this question; the message says why. Never scored as 0."""

    kind = "unavailable"
    """Of the ``Unscored`` that it becomes."""


class NoVerdict(VerifierUnavailable):
    """The verifier answers, but not to this question, nor would it to another attempt: no outage."""

    def __init__(self, message: str, kind: str) -> None:
        super().__init__(message)
        self.kind = kind


class ReplyTooLarge(ErgoError, RuntimeError):
    """A reply that is longer than any chat completion, or is packed so that its length is not known."""


@dataclass(frozen=True, slots=True)
class ChatReply:
    text: str
    finished: bool
    """False where the reply was cut, most often by the length limit."""
    prompt_tokens: int
    """As the endpoint reports it; 0 where it does not."""
    reply_tokens: int
    """As the endpoint reports it; 0 where it does not."""
    filtered: bool = False
    """A content filter, or the model itself, refused to answer."""


class ChatEndpoint:
    """The openai client with our limits: bounded concurrency, time and bytes, our back-off, and no API key in messages.

    Example::

        chat = ChatEndpoint(EndpointConfig(url="http://host:8000/v1", model="verifier"))
        reply = await chat.complete({"model": "verifier", "messages": [{"role": "user", "content": "Which colour?"}]})
    """

    def __init__(self, config: EndpointConfig) -> None:
        """Raises ValueError where the URL, the model's name or the named API key is missing."""
        if not config.url or not config.model:
            raise ValueError("reward.verifier.endpoint needs url and model")
        self._config, self._key = config, api_key(config.api_key_env) if config.api_key_env else ""
        self._url = f"{config.url.rstrip('/')}/chat/completions"
        self._proxy = "" if _is_loopback(config.url) else _proxy_for(config.url)
        self._slots = asyncio.Semaphore(config.concurrency)
        self._client, self._headers = _open_client(config, self._key)

    async def complete(self, body: Mapping[str, Any]) -> ChatReply:
        """Send ``body`` to ``/chat/completions``, again where that may help, and return the reply.

        Sampling is greedy unless the body says otherwise. Raises VerifierUnavailable, and NoVerdict where the endpoint
        refuses this body for good."""
        extra = {name: value for name, value in self._config.extra_body.items() if value is not None}
        request = {**_GREEDY, **extra, **body}
        if "max_tokens" in request:
            request[self._config.limit_name] = request.pop("max_tokens")
        async with self._slots:
            attempt = 0
            while True:
                attempt += 1
                try:
                    return await self._ask(request)
                except Exception as error:  # a reply may break what decodes it in any way
                    if not _is_transient(error) or attempt > self._config.retries:
                        raise self._failed(error, attempt) from error
                    wait_s = self._wait_s(attempt, error)
                await asyncio.sleep(wait_s)

    async def _ask(self, request: Mapping[str, Any]) -> ChatReply:
        """Make one attempt. The whole of it is bounded in time, so that an endless reply is none."""
        async with asyncio.timeout(self._config.timeout_s):
            response = await self._client.post(
                "/chat/completions", cast_to=httpx.Response, body=request, options={"headers": self._headers}
            )
        return _read(response)

    async def close(self) -> None:
        await self._client.close()

    def _wait_s(self, attempt: int, error: Exception) -> float:
        """Return the wait behind a failed attempt: doubled each time, or what ``Retry-After`` asks, up to the limit."""
        wait_s = self._config.backoff_s * 2.0 ** min(attempt - 1, 60)
        try:
            asked = float(error.response.headers.get("retry-after", 0))  # type: ignore[attr-defined]
        except (AttributeError, ValueError):
            asked = 0.0
        return min(max(wait_s, asked), self._config.max_backoff_s)

    def _failed(self, error: Exception, attempts: int) -> VerifierUnavailable:
        """Return what a failed call is reported as."""
        import openai

        if isinstance(error, openai.APIStatusError):
            status = error.status_code
            if _is_transient(error):
                return VerifierUnavailable(self._say(f"status {status}, {attempts} attempts"))
            message = self._say(f"status {status}: {_text_of(error)}")
            return NoVerdict(message, "refused") if status in _REFUSED else VerifierUnavailable(message)
        if isinstance(error, NotAReply):
            return VerifierUnavailable(self._say(str(error)))
        cause = error.__cause__ if isinstance(error, openai.APIConnectionError) and error.__cause__ else error
        if isinstance(cause, TimeoutError):
            limit = f"no whole reply within {self._config.timeout_s:g} s (reward.verifier.endpoint.timeout_s)"
            return VerifierUnavailable(self._say(f"ReadTimeout, {attempts} attempts: {limit}"))
        through = f" through the proxy {self._proxy}" if self._proxy else ""
        return VerifierUnavailable(
            self._say(f"{type(cause).__name__} {cause}".rstrip() + f"{through}, {attempts} attempts")
        )

    def _say(self, problem: str) -> str:
        """Return a message of bounded length. Messages are logged, and an endpoint may repeat a wrong key."""
        text = f"{self._url}: {problem[:4000]}"
        return (text.replace(self._key, "***") if self._key else text)[:700]


class NotAReply(ErgoError, ValueError):
    """A body that is not a chat completion."""


def png_url(view: View) -> str:
    """Return the view's pixels, loss-free, as a data URL."""
    file = io.BytesIO()
    Image.fromarray(view.pixels).save(file, format="PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def api_key(variable: str) -> str:
    """Return the API key that an environment variable holds, without blanks and line ends.

    Raises ValueError where the variable is not set, or its value cannot be sent."""
    if not (key := os.environ.get(variable, "").strip()):
        raise ValueError(f"reward.verifier.endpoint.api_key_env names {variable}, which is not set on this machine")
    if not (key.isascii() and key.isprintable()):
        raise ValueError(f"the API key in {variable} has characters that no HTTP header can have")
    return key


def _read(response: httpx.Response) -> ChatReply:
    """Return the reply in a response. Raises NotAReply where there is none."""
    try:
        completion = json.loads(response.content, parse_constant=_refuse_constant)
        choice = completion["choices"][0]
        message, finish = choice["message"], str(choice.get("finish_reason") or "").lower()
        text, usage = _joined(message.get("content")), completion.get("usage")
        refused = isinstance(text, _Refusal) or bool(message.get("refusal"))
        filtered, finished = refused or finish in _FILTERED, finish in _FINISHED or finish in _FILTERED
        says_nothing = filtered or not finished or any(message.get(name) for name in _BESIDE_CONTENT)
        prompt_tokens, reply_tokens = (_tokens(usage, name) for name in ("prompt_tokens", "completion_tokens"))
    except (LookupError, TypeError, AttributeError, ValueError, RecursionError):
        raise NotAReply(f"not a chat completion: {response.content[:400].decode('utf-8', 'replace')}") from None
    if text is None and says_nothing:
        text = ""
    if not isinstance(text, str):
        raise NotAReply(f"a reply without text: {str(message)[:400]}")
    return ChatReply(text, finished, prompt_tokens, reply_tokens, filtered)


class _Refusal(str):
    """The text of parts of which one is a refusal."""


def _joined(content: Any) -> Any:
    """Return the text of a content that comes in parts, thoughts among them left out; any other content as it is."""
    if not isinstance(content, list):
        return content
    text = "".join(part["text"] for part in content if part["type"] in ("text", "output_text"))
    return _Refusal(text) if any(part["type"] == "refusal" for part in content) else text


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _tokens(usage: Any, name: str) -> int:
    count = 0 if usage is None else usage.get(name)
    if count is not None and not (isinstance(count, int) and 0 <= count < 1 << 31):
        raise ValueError(f"{name} is {count}")
    return count or 0


def _open_client(config: EndpointConfig, key: str) -> tuple[openai.AsyncOpenAI, dict[str, Any]]:
    """Return a client, and the headers of every request."""
    import openai  # takes a second, which commands without an endpoint need not spend

    client = openai.AsyncOpenAI(
        base_url=config.url,
        api_key="unused",  # without a value the client takes OPENAI_API_KEY; ours is in the headers below
        max_retries=0,
        # Redirects stay refused: the key and the crop go to the address that was configured and to no other.
        http_client=httpx.AsyncClient(  # type: ignore[arg-type] # newer clients prefer httpx2, and take this one, too
            timeout=config.timeout_s,
            limits=httpx.Limits(max_connections=config.concurrency),
            follow_redirects=False,
            trust_env=not _is_loopback(config.url),  # a proxy cannot reach this machine's loopback
            event_hooks={"response": [_bound]},
        ),
    )
    # OPENAI_ORG_ID and OPENAI_PROJECT_ID are about another account; the client would send them to any endpoint.
    omitted = {"OpenAI-Organization": openai.Omit(), "OpenAI-Project": openai.Omit()}
    headers = {"Authorization": f"Bearer {key}" if key else openai.Omit(), "Accept-Encoding": "identity", **omitted}
    return client, headers


async def _bound(response: httpx.Response) -> None:
    """Bound the bytes of a reply before it is read, and refuse what would grow when it is unpacked."""
    packed = response.headers.get("content-encoding", "identity").strip().lower()
    if packed not in ("", "identity"):
        raise ReplyTooLarge(f"a reply in content encoding {packed[:40]}, which was not asked for")
    assert isinstance(response.stream, httpx.AsyncByteStream)
    response.stream = _BoundedStream(response.stream)


class _BoundedStream(httpx.AsyncByteStream):
    def __init__(self, stream: httpx.AsyncByteStream) -> None:
        self._stream = stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        size = 0
        async for chunk in self._stream:
            if (size := size + len(chunk)) > LONGEST_REPLY:
                raise ReplyTooLarge(f"a reply of more than {LONGEST_REPLY >> 20} MiB")
            yield chunk

    async def aclose(self) -> None:
        await self._stream.aclose()


def _is_transient(error: Exception) -> bool:
    """Tell whether another attempt may succeed: no connection, no whole reply in time, a busy or broken server."""
    import openai

    if isinstance(error, openai.APIStatusError):
        return error.status_code in _TRANSIENT or error.status_code >= 500
    return isinstance(error, openai.APIConnectionError | TimeoutError)


def _text_of(error: openai.APIStatusError) -> str:
    try:
        return error.response.text
    except Exception as problem:  # an unknown charset
        return f"(unreadable: {type(problem).__name__})"


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _proxy_for(url: str) -> str:
    """Return the proxy that the environment names for ``url``, without its password; empty: none."""
    parts = urlsplit(url)
    if urllib.request.proxy_bypass(parts.hostname or ""):
        return ""
    proxies = urllib.request.getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all") or ""
    return proxy.rpartition("@")[2].removeprefix(f"{parts.scheme}://")
