"""Translate an OpenAI chat request into a question, and an episode into a chat completion. No server, no network."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, Strict, StrictStr, ValidationError

from ergo_rl.episodes.families import ModelFamily
from ergo_rl.episodes.parsing import BoxOutcome, parse_answer
from ergo_rl.episodes.types import Outcome
from ergo_rl.errors import ErgoError
from ergo_rl.jobs.policy_clients import EpisodeResult

Json = dict[str, Any]

_FIXED: Mapping[str, tuple[Any, str]] = {
    "stream": (False, "the reply comes in one piece"),
    "n": (1, "there is one reply"),
    "temperature": (0, "decoding is greedy"),
    "logprobs": (False, "log-probs are not given"),
    "presence_penalty": (0, "decoding is greedy"),
    "frequency_penalty": (0, "decoding is greedy"),
}
"""Parameters that may have one value only, and why."""


class ChatError(ErgoError, ValueError):
    """A request that gets an error: a sentence, the parameter to blame, a code for programs, an HTTP status."""

    def __init__(
        self, message: str, param: str | None = None, code: str = "invalid_request", status: int = 400
    ) -> None:
        super().__init__(message)
        self.param, self.code, self.status = param, code, status

    @property
    def body(self) -> Json:
        """The error in OpenAI's shape."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def _encodable(text: str) -> str:
    """JSON can spell out half of a surrogate pair, which is no text. Raises ValueError."""
    text.encode()
    return text


Text = Annotated[StrictStr, AfterValidator(_encodable)]


class TextPart(BaseModel):
    type: Literal["text"]
    text: Text


class ImageUrl(BaseModel):
    url: StrictStr


class ImagePart(BaseModel):
    type: Literal["image_url"]
    image_url: ImageUrl


class UserMessage(BaseModel):
    role: Literal["user"]
    content: Annotated[list[Annotated[TextPart | ImagePart, Field(discriminator="type")]], Strict()]


class ErgoOptions(BaseModel):
    """``"ergo": {"options": ["red", "blue"]}``: the options of a multiple-choice question."""

    model_config = ConfigDict(extra="forbid")
    options: Annotated[list[Text], Strict(), Field(max_length=26)] = []


class ChatRequest(BaseModel):
    """The body of ``POST /v1/chat/completions``. JSON's null means the same as leaving a parameter out."""

    model_config = ConfigDict(extra="forbid")
    messages: Annotated[list[UserMessage], Strict(), Field(min_length=1, max_length=1)]
    model: Any = None
    ergo: ErgoOptions = ErgoOptions()
    max_tokens: Any = None
    max_completion_tokens: Any = None
    stream: Any = None
    n: Any = None
    temperature: Any = None
    logprobs: Any = None
    presence_penalty: Any = None
    frequency_penalty: Any = None
    # Without effect: greedy decoding draws nothing, and nothing is stored.
    seed: Any = None
    top_p: Any = None
    user: Any = None
    metadata: Any = None
    safety_identifier: Any = None
    store: Any = None


@dataclass(frozen=True, slots=True)
class ChatQuestion:
    """The one question about one image that a chat asks."""

    text: str
    image_url: str
    """As it was sent."""
    options: tuple[str, ...] = ()


def read_chat(body: bytes, model: str, reply_tokens: int) -> ChatQuestion:
    """Read the body of a chat request.

    model: the one that is served. reply_tokens: the most tokens of both replies; a smaller limit in a request could not
    be kept. Raises ChatError for everything that would be answered otherwise than the request says."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ChatError(f"the body is not JSON: {type(error).__name__} {error}") from error
    if not isinstance(content, dict):
        raise ChatError("the body must be a JSON object with model and messages")
    content = {name: value for name, value in content.items() if value is not None}
    _check_parameters(content, reply_tokens)
    if content.get("model", model) != model:
        raise ChatError(f"this server has the model {model!r} only", "model", "model_not_found", 404)
    try:
        request = ChatRequest.model_validate(content)
    except ValidationError as error:
        raise _explained(error) from error
    parts = request.messages[0].content
    text = "\n".join(part.text for part in parts if isinstance(part, TextPart)).strip()
    urls = [part.image_url.url for part in parts if isinstance(part, ImagePart)]
    if len(urls) != 1 or not text:
        raise ChatError(f"the message must have a question and one image; it has {len(urls)} images"
                        + ("" if text else " and no text"), "messages")  # fmt: skip
    return ChatQuestion(text, urls[0], tuple(request.ergo.options))


def read_data_url(url: str) -> bytes:
    """The encoded image of ``data:image/png;base64,...``. Its media type is ignored. Raises ChatError."""
    head, comma, data = url.partition(",")
    if not comma or not head.lower().startswith("data:") or not head.lower().endswith(";base64"):
        raise invalid_image(f"an image is given as data:image/png;base64,..., not as {url[:40]!r}")
    try:
        return base64.b64decode(data, validate=True)
    except ValueError as error:
        raise invalid_image(f"the image is not base64: {error}") from error


def invalid_image(message: str) -> ChatError:
    return ChatError(message, "messages", "invalid_image")


def completion(name: str, created: int, model: str, result: EpisodeResult, family: ModelFamily) -> Json:
    """A ``chat.completion``. Its content is the answer or, where there is none, the last reply as it is. Token counts
    are those of both turns, each with its whole prompt. ``ergo`` says which part of the image was read."""
    trajectory, crop = result.trajectory, result.trajectory.crop
    last = trajectory.turns[-1].text
    answer = parse_answer(last) if crop is not None else None
    prompt_tokens = sum(turn.engine_prompt_length for turn in trajectory.turns)
    box = None if crop is None else crop.box
    coarse, fine = (*result.visual_tokens(family), 0)[:2]
    return {
        "id": name,
        "object": "chat.completion",
        "created": created,
        "model": model,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": last if answer is None else answer, "refusal": None},
                "logprobs": None,
                "finish_reason": "length" if trajectory.outcome is Outcome.TRUNCATED else "stop",
            }
        ],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": result.reply_tokens,
            "total_tokens": prompt_tokens + result.reply_tokens,
        },
        "ergo": {
            "answer": answer,
            "outcome": str(trajectory.outcome),
            "image_size": [trajectory.original.width, trajectory.original.height],
            "box": None if box is None else [box.x1, box.y1, box.x2, box.y2],
            "box_outcome": str(trajectory.box_outcome),
            "whole_image_fallback": box is not None and not BoxOutcome(trajectory.box_outcome).usable,
            "area_ratio": trajectory.area_ratio,
            "visual_tokens": {"coarse": coarse, "crop": fine},
            "replies": [turn.text for turn in trajectory.turns],
            "seconds": result.seconds,
        },
    }


def _check_parameters(content: Json, reply_tokens: int) -> None:
    """Raises ChatError for a parameter that is not known, or asks for something that is not done."""
    for name in content:
        if name not in ChatRequest.model_fields:
            shown = name[:80].encode("ascii", "replace").decode()
            raise ChatError(f"{shown} is not a parameter of this server; leave it out", shown, "unsupported_parameter")
    for name, (only, why) in _FIXED.items():
        if content.get(name, only) != only:
            raise ChatError(f"{name} can only be {json.dumps(only)}: {why}", name, "unsupported_parameter")
    for name in ("max_tokens", "max_completion_tokens"):
        limit = content.get(name, reply_tokens)
        if not isinstance(limit, int) or limit < reply_tokens:
            message = f"{name} must be at least {reply_tokens}, what the two replies may have together; leave it out"
            raise ChatError(message, name, "unsupported_parameter")


def _explained(error: ValidationError) -> ChatError:
    """The first thing that is wrong, as a sentence, by where it is."""
    first = error.errors(include_url=False, include_input=False)[0]
    if first["type"] == "value_error":
        return ChatError("the question is not text: surrogates not allowed", "messages")
    match first["loc"]:
        case ("ergo", *_):
            return ChatError('ergo takes {"options": [...]}, up to 26 texts', "ergo", "unsupported_parameter")
        case ("messages", _, "role", *_):
            return ChatError("the message must be the user's: the system prompt is the recipe's", "messages")
        case ("messages", _, "content"):
            return ChatError("the message's content must be a list of parts: a text and an image_url", "messages")
        case ("messages", _, "content", *_):
            return ChatError(
                'a part is {"type": "text", "text": ...} or {"type": "image_url", "image_url": {"url": ...}}',
                "messages",
            )
    return ChatError("messages must hold one message: a question about one image, without a history", "messages")
