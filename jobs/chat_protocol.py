"""Translate an OpenAI chat request into a question, and an episode into a chat completion. No server, no network."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, Strict, StrictStr, ValidationError

from ergo_rl.episodes.families import ModelFamily
from ergo_rl.episodes.prompts import parse_answer
from ergo_rl.episodes.types import BoxOutcome, Outcome
from ergo_rl.errors import ErgoError
from ergo_rl.jobs.policy_clients import EpisodeResult

Json = dict[str, Any]

_ONLY: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "n": ((1,), "there is one reply"),
    "temperature": ((0,), "decoding is greedy"),
    "presence_penalty": ((0,), "decoding is greedy"),
    "frequency_penalty": ((0,), "decoding is greedy"),
    "repetition_penalty": ((1,), "decoding is greedy"),
    "logit_bias": (({},), "decoding is greedy"),
    "ignore_eos": ((False,), "a reply ends where the policy ends it"),
    "logprobs": ((False,), "log-probs are not given"),
    "top_logprobs": ((0,), "log-probs are not given"),
    "response_format": (({"type": "text"},), "the reply is text"),
    "tools": (([],), "the policy calls no tools"),
    "tool_choice": (("none", "auto"), "the policy calls no tools"),
    "chat_template_kwargs": (({},), "the prompts are the recipe's"),
    "service_tier": (("auto", "default"), "there is one service"),
}
"""Parameters that clients send with values that ask for nothing: those values, and why no other is taken."""
_ADDRESS = re.compile(r"\s+at 0x[0-9a-fA-F]+")


class ChatError(ErgoError, ValueError):
    """A request that gets an error: a sentence, the parameter to blame, a code for programs, an HTTP status."""

    def __init__(
        self, message: str, param: str | None = None, code: str = "invalid_request", status: int = 400
    ) -> None:
        super().__init__(_ADDRESS.sub("", message))  # Python's own texts name objects by their address in memory
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


def _one_as_list(stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop


class StreamOptions(BaseModel):
    include_usage: bool = False


class ChatRequest(BaseModel):
    """The body of ``POST /v1/chat/completions``. JSON's null means the same as leaving a parameter out."""

    model_config = ConfigDict(extra="forbid")
    messages: Annotated[list[UserMessage], Strict(), Field(min_length=1, max_length=1)]
    model: Any = None
    ergo: ErgoOptions = ErgoOptions()
    max_tokens: Annotated[int, Strict(), Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Strict(), Field(ge=1)] | None = None
    stop: Annotated[list[Text], BeforeValidator(_one_as_list), Strict(), Field(max_length=16)] = []
    stream: Annotated[bool, Strict()] = False
    stream_options: StreamOptions = StreamOptions()
    n: Any = None
    temperature: Any = None
    presence_penalty: Any = None
    frequency_penalty: Any = None
    repetition_penalty: Any = None
    logit_bias: Any = None
    ignore_eos: Any = None
    logprobs: Any = None
    top_logprobs: Any = None
    response_format: Any = None
    tools: Any = None
    tool_choice: Any = None
    chat_template_kwargs: Any = None
    service_tier: Any = None
    # Without effect: greedy decoding draws nothing, nothing is stored, and no tool is called.
    seed: Any = None
    top_p: Any = None
    top_k: Any = None
    min_p: Any = None
    parallel_tool_calls: Any = None
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
    max_tokens: int | None = None
    """Most tokens of the text that is shown: the answer. The replies behind it have the recipe's limits."""
    stop: tuple[str, ...] = ()
    """Texts before which the text that is shown ends."""
    stream: bool = False
    usage_in_stream: bool = False


def read_chat(body: bytes, model: str) -> ChatQuestion:
    """Read the body of a chat request.

    model: the one that is served. Raises ChatError for everything that would be answered otherwise than the request
    says."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ChatError(f"the body is not JSON: {type(error).__name__} {error}") from error
    if not isinstance(content, dict):
        raise ChatError("the body must be a JSON object with model and messages")
    content = {name: value for name, value in content.items() if value is not None}
    _check_parameters(content)
    _drop_empty_system(content)
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
    limits = [limit for limit in (request.max_tokens, request.max_completion_tokens) if limit is not None]
    stop = tuple(filter(None, request.stop))
    return ChatQuestion(
        text, urls[0], tuple(request.ergo.options), min(limits, default=None), stop,
        request.stream, request.stream_options.include_usage,
    )  # fmt: skip


def read_data_url(url: str) -> bytes:
    """The encoded image of ``data:image/png;base64,...``: of any media type, also with line breaks and without padding.

    Raises ChatError."""
    head, comma, data = url.partition(",")
    if not comma or not head.lower().startswith("data:") or not head.lower().endswith(";base64"):
        raise invalid_image(f"an image is given as data:image/png;base64,..., not as {url[:40]!r}")
    data = "".join(data.split()).rstrip("=")
    try:
        return base64.b64decode(data + "=" * (-len(data) % 4), validate=True)
    except ValueError as error:
        raise invalid_image(f"the image is not base64: {error}") from error


def invalid_image(message: str) -> ChatError:
    return ChatError(message, "messages", "invalid_image")


def completion(
    name: str, created: int, model: str, result: EpisodeResult, family: ModelFamily, shorten: Callable[[str], str] = str
) -> Json:
    """A ``chat.completion``. Its content is the answer or, where there is none, the last reply as it is; ``shorten``
    cuts it to what the request allows. Token counts are those of both turns, each with its whole prompt. ``ergo`` says
    which part of the image was read."""
    trajectory, crop = result.trajectory, result.trajectory.crop
    last = trajectory.turns[-1].text
    answer = parse_answer(last) if crop is not None else None
    shown = last if answer is None else answer
    content = shorten(shown)
    cut = trajectory.outcome is Outcome.TRUNCATED or content != shown
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
                "message": {"role": "assistant", "content": content, "refusal": None},
                "logprobs": None,
                "finish_reason": "length" if cut else "stop",
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


def stream_events(reply: Json, usage: bool) -> Iterator[str]:
    """A completion as the server-sent events of a stream: all of its text in one piece, for clients that only stream.

    usage: whether an event with the token counts comes before the end."""
    common = {name: reply[name] for name in ("id", "created", "model")} | {"object": "chat.completion.chunk"}
    choice = reply["choices"][0]
    said = {"index": 0, "delta": choice["message"], "logprobs": None, "finish_reason": None}
    end = {"index": 0, "delta": {}, "logprobs": None, "finish_reason": choice["finish_reason"]}
    events = [common | {"choices": [said]}, common | {"choices": [end], "ergo": reply["ergo"]}]
    if usage:
        events.append(common | {"choices": [], "usage": reply["usage"]})
    for event in events:
        yield f"data: {json.dumps(event)}\n\n"
    yield "data: [DONE]\n\n"


def _drop_empty_system(content: Json) -> None:
    """Remove a system message that says nothing, as harnesses send where a task has no instruction."""
    match content.get("messages"):
        case [{"role": "system" | "developer", "content": "" | [] | None}, *others] if others:
            content["messages"] = others


def _check_parameters(content: Json) -> None:
    """Raises ChatError for a parameter that is not known, or asks for something that is not done."""
    for name in content:
        if name not in ChatRequest.model_fields:
            shown = name[:80].encode("ascii", "replace").decode()
            raise ChatError(f"{shown} is not a parameter of this server; leave it out", shown, "unsupported_parameter")
    for name, (neutral, why) in _ONLY.items():
        if name in content and content[name] not in neutral:
            only = " or ".join(map(json.dumps, neutral))
            raise ChatError(f"{name} can only be {only}: {why}", name, "unsupported_parameter")


def _explained(error: ValidationError) -> ChatError:
    """The first thing that is wrong, as a sentence, by where it is."""
    first = error.errors(include_url=False, include_input=False)[0]
    if first["type"] == "value_error":
        return ChatError("a text of the request is not text: surrogates not allowed", str(first["loc"][0]))
    match first["loc"]:
        case (("max_tokens" | "max_completion_tokens") as limit, *_):
            return ChatError(f"{limit} must be a whole number of at least 1", str(limit))
        case (("stop" | "stream" | "stream_options") as name, *_):
            return ChatError(f"{name} is not as in OpenAI's interface: {first['msg']}", str(name))
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
