"""A reward model behind an OpenAI-compatible URL (``vllm serve``, a gateway, a hosted model)."""

from __future__ import annotations

import asyncio
import base64
import io
import os
from dataclasses import dataclass
from typing import Any

import httpx
from PIL import Image

from ergo_rl.episodes.prompts import around_image
from ergo_rl.episodes.types import Question, View
from ergo_rl.rewards.config import EndpointConfig, VerifierConfig
from ergo_rl.rewards.verifier import VerifierUnavailable

_PASSING = frozenset((408, 409, 425, 429))  # with every 5xx: statuses that may be gone at the next attempt


@dataclass(frozen=True, slots=True)
class ChatReply:
    """finished: False where the length limit cut the reply; token counts as the endpoint reports them, 0 where not."""

    text: str
    finished: bool
    prompt_tokens: int
    reply_tokens: int


class ChatEndpoint:
    """Chat completions over HTTP: bounded concurrency, retries of what may pass, the key out of messages."""

    def __init__(self, config: EndpointConfig) -> None:
        """Raises ValueError where the URL, the model's name or the named API key is missing."""
        self._endpoint = endpoint = config
        if not endpoint.url or not endpoint.model:
            raise ValueError("reward.verifier.endpoint needs url and model")
        self._secret = _api_key(endpoint.api_key_env) if endpoint.api_key_env else ""
        headers = {"Authorization": f"Bearer {self._secret}"} if self._secret else {}
        self._slots = asyncio.Semaphore(endpoint.concurrency)
        self._client = httpx.AsyncClient(
            headers=headers,
            timeout=httpx.Timeout(endpoint.timeout_s),
            limits=httpx.Limits(max_connections=endpoint.concurrency),
        )

    async def complete(self, body: dict[str, Any]) -> ChatReply:
        """Raises VerifierUnavailable."""
        retries, wait_s, longest_s = self._endpoint.retries, self._endpoint.backoff_s, self._endpoint.max_backoff_s
        async with self._slots:
            while True:
                try:
                    return await self._ask(body)
                except _Passing as error:
                    if retries == 0:
                        raise VerifierUnavailable(f"{error}, {self._endpoint.retries + 1} attempts") from error
                    await asyncio.sleep(min(max(wait_s, error.retry_after_s), longest_s))
                    retries, wait_s = retries - 1, wait_s * 2

    async def close(self) -> None:
        await self._client.aclose()

    async def _ask(self, body: dict[str, Any]) -> ChatReply:
        url = f"{self._endpoint.url.rstrip('/')}/chat/completions"
        try:
            reply = await self._client.post(url, json=body)
        except httpx.TransportError as error:  # no connection, timeout, broken off
            raise _Passing(f"{url}: {type(error).__name__} {error}".rstrip()) from error
        if reply.status_code in _PASSING or reply.status_code >= 500:
            raise _Passing(f"{url}: status {reply.status_code}", _seconds(reply.headers.get("Retry-After", "")))
        if reply.status_code != 200:
            raise VerifierUnavailable(f"{url}: status {reply.status_code}: {self._quoted(reply)}")
        try:
            found = reply.json()
            text, finish = found["choices"][0]["message"]["content"], found["choices"][0].get("finish_reason")
            usage = found.get("usage") or {}
            counts = [int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")]
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise VerifierUnavailable(f"{url}: not a chat completion: {self._quoted(reply)}") from error
        if not isinstance(text, str):
            raise VerifierUnavailable(f"{url}: a reply without text: {self._quoted(reply)}")
        return ChatReply(text, finish != "length", *counts)

    def _quoted(self, reply: httpx.Response) -> str:
        """For messages, which are logged: an endpoint may repeat the key that it does not like."""
        text = reply.text.replace(self._secret, "***") if self._secret else reply.text
        return text[:500]


class EndpointVerifier:
    """Chat completions with the crop as a PNG data URL, at temperature 0."""

    def __init__(self, config: VerifierConfig) -> None:
        """Raises ValueError where the URL, the model's name or the named API key is missing."""
        self._config, self._endpoint = config, config.endpoint
        self._chat = ChatEndpoint(config.endpoint)

    async def answer(self, question: Question, crop: View) -> str:
        body = await asyncio.to_thread(self._body, question, crop)
        return (await self._chat.complete(body)).text

    async def close(self) -> None:
        await self._chat.close()

    def _body(self, question: Question, crop: View) -> dict[str, Any]:
        before, after = around_image(self._config.prompts.verify, question)
        parts: list[dict[str, Any]] = [
            {"type": "text", "text": before},
            {"type": "image_url", "image_url": {"url": png_url(crop)}},
            {"type": "text", "text": after},
        ]
        system = self._config.prompts.system
        return {
            "model": self._endpoint.model,
            "messages": [
                *([{"role": "system", "content": system}] if system else []),
                {"role": "user", "content": [part for part in parts if part.get("text", "an image")]},
            ],
            "max_tokens": self._config.max_tokens,
            "temperature": 0.0,
        }


def png_url(view: View) -> str:
    """The view's pixels, loss-free, as a data URL."""
    file = io.BytesIO()
    Image.fromarray(view.pixels).save(file, format="PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")


class _Passing(Exception):
    """A failure that may be gone at the next attempt."""

    def __init__(self, message: str, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


def _seconds(retry_after: str) -> float:
    """A Retry-After header in seconds; its other form, a date, is left to our own back-off."""
    return float(retry_after) if retry_after.isascii() and retry_after.isdigit() else 0.0


def _api_key(variable: str) -> str:
    if not (key := os.environ.get(variable, "")):
        raise ValueError(f"reward.verifier.endpoint.api_key_env names {variable}, which is not set on this machine")
    return key
