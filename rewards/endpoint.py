"""Chat completions of an OpenAI-compatible endpoint (``vllm serve``, a gateway, a hosted model)."""

from __future__ import annotations

import asyncio
import base64
import io
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PIL import Image

from ergo_rl.episodes.types import View
from ergo_rl.errors import ErgoError
from ergo_rl.rewards.config import EndpointConfig

if TYPE_CHECKING:
    import openai

_TRANSIENT = frozenset((408, 409, 425, 429))
"""Statuses, beside every 5xx, that another attempt may not meet."""


class VerifierUnavailable(ErgoError, RuntimeError):
    """The verifier gave no reply to this question; the message says why. Never scored as 0."""


@dataclass(frozen=True, slots=True)
class ChatReply:
    text: str
    finished: bool
    """False where the length limit cut the reply."""
    prompt_tokens: int
    """As the endpoint reports it; 0 where it does not."""
    reply_tokens: int
    """As the endpoint reports it; 0 where it does not."""


class ChatEndpoint:
    """The openai client with our limits: bounded concurrency, our back-off, and no API key in messages.

    Example::

        chat = ChatEndpoint(EndpointConfig(url="http://host:8000/v1", model="verifier"))
        reply = await chat.complete({"model": "verifier", "messages": [{"role": "user", "content": "Which colour?"}]})
    """

    def __init__(self, config: EndpointConfig) -> None:
        """Raises ValueError where the URL, the model's name or the named API key is missing."""
        if not config.url or not config.model:
            raise ValueError("reward.verifier.endpoint needs url and model")
        self._key = _api_key(config.api_key_env) if config.api_key_env else ""
        self._url = f"{config.url.rstrip('/')}/chat/completions"
        self._slots = asyncio.Semaphore(config.concurrency)
        self._client, self._headers = _open_client(config, self._key)

    async def complete(self, body: dict[str, Any]) -> ChatReply:
        """Send ``body`` to ``/chat/completions``, again where that may help, and return the reply.

        Raises VerifierUnavailable."""
        import openai

        async with self._slots:
            try:
                raw = await self._client.chat.completions.with_raw_response.create(**body, extra_headers=self._headers)
            except openai.APIConnectionError as error:  # no connection, timeout, broken off
                cause = error.__cause__ or error
                problem = f"{self._url}: {type(cause).__name__} {cause}".rstrip()
                raise VerifierUnavailable(f"{problem}, {_attempts(error)} attempts") from error
            except openai.APIStatusError as error:
                problem = f"{self._url}: status {error.status_code}"
                if _is_transient(error.status_code):
                    raise VerifierUnavailable(f"{problem}, {_attempts(error)} attempts") from error
                raise VerifierUnavailable(f"{problem}: {self._quoted(error.response.text)}") from error
        try:
            completion = raw.parse()
            choice, usage = completion.choices[0], completion.usage
            text, finish = choice.message.content, choice.finish_reason
            counts = [int(getattr(usage, name, 0) or 0) for name in ("prompt_tokens", "completion_tokens")]
        except (openai.OpenAIError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise VerifierUnavailable(f"{self._url}: not a chat completion: {self._quoted(raw.text)}") from error
        if not isinstance(text, str):
            raise VerifierUnavailable(f"{self._url}: a reply without text: {self._quoted(raw.text)}")
        return ChatReply(text, finish != "length", *counts)

    async def close(self) -> None:
        await self._client.close()

    def _quoted(self, text: str) -> str:
        """Return the start of ``text`` for a message. Messages are logged, and an endpoint may repeat a wrong key."""
        return (text.replace(self._key, "***") if self._key else text)[:500]


def png_url(view: View) -> str:
    """Return the view's pixels, loss-free, as a data URL."""
    file = io.BytesIO()
    Image.fromarray(view.pixels).save(file, format="PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def _open_client(config: EndpointConfig, key: str) -> tuple[openai.AsyncOpenAI, dict[str, Any]]:
    """Return a client, and the headers of every request."""
    import openai  # takes a second, which commands without an endpoint need not spend

    class Client(openai.AsyncOpenAI):
        # The client has no public setting for these two. Should a new version no longer call them, it falls back to its
        # own rules, and tests/rewards/test_verifier.py fails.
        def _should_retry(self, response: Any) -> bool:
            return _is_transient(response.status_code)

        def _calculate_retry_timeout(self, remaining_retries: int, options: Any, response_headers: Any = None) -> float:
            wait_s = config.backoff_s * 2.0 ** (config.retries - remaining_retries)
            return min(max(wait_s, self._parse_retry_after_header(response_headers) or 0.0), config.max_backoff_s)

    client = Client(
        base_url=config.url,
        api_key="unused",  # without a value the client takes OPENAI_API_KEY; ours is in the headers below
        timeout=config.timeout_s,
        max_retries=config.retries,
        # Redirects stay refused: the key and the crop go to the address that was configured and to no other.
        http_client=openai.DefaultAsyncHttpxClient(timeout=config.timeout_s, follow_redirects=False),
    )
    # OPENAI_ORG_ID and OPENAI_PROJECT_ID are about another account; the client would send them to any endpoint.
    omitted = {"OpenAI-Organization": openai.Omit(), "OpenAI-Project": openai.Omit()}
    return client, {"Authorization": f"Bearer {key}" if key else openai.Omit(), **omitted}


def _is_transient(status: int) -> bool:
    return status in _TRANSIENT or status >= 500


def _attempts(error: openai.APIConnectionError | openai.APIStatusError) -> int:
    return int(error.request.headers.get("x-stainless-retry-count", 0)) + 1


def _api_key(variable: str) -> str:
    if not (key := os.environ.get(variable, "")):
        raise ValueError(f"reward.verifier.endpoint.api_key_env names {variable}, which is not set on this machine")
    return key
