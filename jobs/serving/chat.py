"""An OpenAI chat request as a question, a played episode as a chat completion. No server, no engine, no network."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ergo_rl.episodes.families import ModelFamily
from ergo_rl.episodes.prompts import parse_answer
from ergo_rl.episodes.types import BoxOutcome, Outcome
from ergo_rl.jobs.players import Play

Json = dict[str, Any]

_FIXED: Mapping[str, tuple[Any, str]] = {
    "stream": (False, "the reply comes in one piece"),
    "n": (1, "there is one reply"),
    "temperature": (0, "decoding is greedy"),
    "logprobs": (False, "log-probs are not given"),
    "presence_penalty": (0, "decoding is greedy"),
    "frequency_penalty": (0, "decoding is greedy"),
}
"""Parameters that may have one value only, and why. JSON's null is the same as leaving a parameter out."""
_LIMITS = ("max_tokens", "max_completion_tokens")
_WITHOUT_EFFECT = ("seed", "top_p", "user", "metadata", "safety_identifier", "store")
"""Greedy decoding draws nothing, and nothing is kept."""
_KNOWN = frozenset(("model", "messages", "ergo", *_FIXED, *_LIMITS, *_WITHOUT_EFFECT))


class Refused(ValueError):
    """The request gets an error: a sentence, the parameter that is to blame, a word for programs, an HTTP status."""

    def __init__(
        self, message: str, param: str | None = None, code: str = "invalid_request", status: int = 400
    ) -> None:
        super().__init__(message)
        self.param, self.code, self.status = param, code, status

    @property
    def body(self) -> Json:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True, slots=True)
class Asked:
    """What a chat asks: one question about one picture, whose URL is as it came."""

    text: str
    image_url: str
    options: tuple[str, ...] = ()


def read_chat(body: bytes, model: str, reply_tokens: int) -> Asked:
    """The body of a chat request. model: the one that is served; reply_tokens: as many as both replies may have, so a
    smaller limit in the request could not be kept.

    Raises Refused for everything that would be played otherwise than the request says."""
    try:
        request = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refused(f"the body is not JSON: {type(error).__name__} {error}") from error
    if not isinstance(request, dict):
        raise Refused("the body must be a JSON object with model and messages")
    request = {name: value for name, value in request.items() if value is not None}
    _check_parameters(request, reply_tokens)
    if request.get("model", model) != model:
        raise Refused(f"this server has the model {model!r} only", "model", "model_not_found", 404)
    text, image_url = _question(request.get("messages"))
    options = _options(request.get("ergo"))
    try:
        "".join((text, *options)).encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can spell out
        raise Refused(f"the question is not text: {error.reason}", "messages") from error
    return Asked(text, image_url, options)


def read_data_url(url: str) -> bytes:
    """The encoded picture of ``data:image/png;base64,...``; what it says of itself is not believed. Raises Refused."""
    head, comma, data = url.partition(",")
    if not comma or not head.lower().startswith("data:") or not head.lower().endswith(";base64"):
        raise _no_picture(f"a picture is given as data:image/png;base64,..., not as {url[:40]!r}")
    try:
        return base64.b64decode(data, validate=True)
    except ValueError as error:
        raise _no_picture(f"the picture is not base64: {error}") from error


def completion(name: str, created: int, model: str, play: Play, family: ModelFamily) -> Json:
    """A ``chat.completion``. Its content is the answer, or, where there is none, the last reply as it is. Tokens are
    those of both turns, each with its whole prompt. ``ergo`` says what was looked at."""
    trajectory, crop = play.trajectory, play.trajectory.crop
    last = trajectory.turns[-1].text
    answer = parse_answer(last) if crop is not None else None
    prompt_tokens = sum(turn.engine_prompt_length for turn in trajectory.turns)
    box = None if crop is None else crop.box
    coarse, fine = (*play.visual_tokens(family), 0)[:2]
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
            "completion_tokens": play.reply_tokens,
            "total_tokens": prompt_tokens + play.reply_tokens,
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
            "seconds": play.seconds,
        },
    }


def _check_parameters(request: Json, reply_tokens: int) -> None:
    """Raises Refused for one that is not known, or asks for something else than is done."""
    for name in request:
        if name not in _KNOWN:
            shown = name[:80].encode("ascii", "replace").decode()
            raise Refused(f"{shown} is not a parameter of this server; leave it out", shown, "unsupported_parameter")
    for name, (only, why) in _FIXED.items():
        if request.get(name, only) != only:
            raise Refused(f"{name} can only be {json.dumps(only)}: {why}", name, "unsupported_parameter")
    for name in _LIMITS:
        limit = request.get(name, reply_tokens)
        if not isinstance(limit, int) or limit < reply_tokens:
            message = f"{name} must be at least {reply_tokens}, what the two replies may have together; leave it out"
            raise Refused(message, name, "unsupported_parameter")


def _question(messages: Any) -> tuple[str, str]:
    """The words and the picture's URL of the only message."""
    if not isinstance(messages, list) or len(messages) != 1 or not isinstance(messages[0], dict):
        raise Refused("messages must hold one message: a question about one picture, without a history", "messages")
    if messages[0].get("role") != "user":
        raise Refused("the message must be the user's: the system prompt is the recipe's", "messages")
    parts = messages[0].get("content")
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise Refused("the message's content must be a list of parts: a text and an image_url", "messages")
    texts, urls = list[str](), list[str]()
    for part in parts:
        kind, url = part.get("type"), part.get("image_url")
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind == "image_url" and isinstance(url, dict) and isinstance(url.get("url"), str):
            urls.append(url["url"])
        else:
            raise Refused('a part is {"type": "text", "text": ...} or {"type": "image_url", "image_url": {"url": ...}}',
                          "messages")  # fmt: skip
    text = "\n".join(texts).strip()
    if len(urls) != 1 or not text:
        raise Refused(f"the message must have a question and one picture; it has {len(urls)} pictures"
                      + ("" if text else " and no text"), "messages")  # fmt: skip
    return text, urls[0]


def _options(extra: Any) -> tuple[str, ...]:
    """Of ``"ergo": {"options": ["red", "blue"]}``: of a multiple-choice question, shown where the recipe's prompts show
    them."""
    if extra is None:
        return ()
    options = extra.get("options", []) if isinstance(extra, dict) and not extra.keys() - {"options"} else None
    if not isinstance(options, list) or len(options) > 26 or not all(isinstance(one, str) for one in options):
        raise Refused('ergo takes {"options": [...]}, up to 26 texts', "ergo", "unsupported_parameter")
    return tuple(options)


def _no_picture(message: str) -> Refused:
    return Refused(message, "messages", "invalid_image")
