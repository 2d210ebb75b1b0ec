"""The frozen verifier: a vision-language model that answers a question from a crop, and from nothing else.

It runs in a vLLM engine of this job (``EngineVerifier``) or behind a URL (``EndpointVerifier``)."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
from PIL import Image

from ergo_rl.cluster.engine import Engine, EngineDied, EngineImage, EngineRefused, Sampling
from ergo_rl.cluster.worker_pool import WorkerDied
from ergo_rl.episodes import images
from ergo_rl.episodes.families import ModelFamily, Qwen25VL, Tokenizer, family_of, load_tokenizer
from ergo_rl.episodes.plugins import import_class
from ergo_rl.episodes.prompts import ReservedText, around_image, fill
from ergo_rl.episodes.types import Box, Question, View
from ergo_rl.rewards.config import Backend, VerifierConfig
from ergo_rl.rewards.endpoint import ChatEndpoint, NoVerdict, VerifierUnavailable, png_url

_THOUGHTS = re.compile(r"<(?:think(?:ing)?|thoughts?|reasoning)>|\u25c1think\u25b7", re.IGNORECASE)
_THOUGHTS_END = re.compile(r"</(?:think(?:ing)?|thoughts?|reasoning)>|\u25c1/think\u25b7", re.IGNORECASE)
"""Tags of thoughts in the open models' chat templates."""
_REFUSAL = re.compile(
    r"\b(?:can(?:no|')?t|can not|unable to|not able to|won't|will not)\s+(?:assist|help|comply|fulfil+|engage)\b"
    r"(?:\s+you)?(?:\s+with\b(?:\s+(?:this|that|the|your|such|these|those|requests?|images?|questions?))*)?\s*(?:[.!]|$)|"
    r"(?:无法|不能)(?:协助|帮助|满足|提供帮助)",
    re.IGNORECASE,
)
"""To refuse is not to find nothing in the crop: "I cannot tell the colour" is an answer, and a wrong one."""


class VerifierDied(WorkerDied):
    """The verifier's engine is gone: its worker must be replaced."""


class Verifier(Protocol):
    async def answer(self, question: Question, crop: View) -> str:
        """Return the reply to the crop and the question's words.

        Raises VerifierUnavailable where there is none (retries included), NoVerdict where asking again would not help,
        VerifierDied where there will be none."""
        ...

    async def close(self) -> None: ...


async def open_verifier(config: VerifierConfig) -> Verifier:
    """Start the verifier of ``config.backend``. Raises ValueError for an endpoint without URL, model or key."""
    if config.backend is Backend.ENGINE:
        return await EngineVerifier.start(config)
    return EndpointVerifier(config)


class EngineVerifier:
    """A verifier in a vLLM engine of this job, sampled greedily."""

    def __init__(self, engine: Engine, family: ModelFamily, tokenizer: Tokenizer, config: VerifierConfig) -> None:
        self._engine, self._family, self._tokenizer, self._config = engine, family, tokenizer, config
        self._sampling = Sampling(
            max_tokens=config.max_tokens,
            temperature=0.0,
            stop_ids=(tokenizer.convert_tokens_to_ids(family.turn_end),),
            banned_ids=family.banned_ids(tokenizer),
        )

    @classmethod
    async def start(cls, config: VerifierConfig) -> EngineVerifier:
        model = config.engine.model
        family, tokenizer = family_of(model, config.family), load_tokenizer(model)
        family.reserve(tokenizer)
        return cls(await Engine.start(config.engine), family, tokenizer, config)

    async def answer(self, question: Question, crop: View) -> str:
        prompts = self._config.prompts
        try:
            prompt = self._family.first_prompt(prompts.system, fill(prompts.verify, question, self._family))
            token_ids = self._tokenizer.encode(prompt, add_special_tokens=False)
            view = await asyncio.to_thread(resize_view, crop, self._family, self._config.max_visual_tokens)
            completion = await self._engine.generate(token_ids, [EngineImage.of(view.pixels)], self._sampling)
        except (ReservedText, EngineRefused) as error:
            raise VerifierUnavailable(f"{type(error).__name__}: {error}") from error
        except EngineDied as error:
            raise VerifierDied(f"the verifier's engine died: {error}") from error
        return verdict(completion.text, completion.stopped, self._config.max_tokens)

    async def close(self) -> None:
        self._engine.close()


class EndpointVerifier:
    """A verifier behind an OpenAI-compatible URL, at temperature 0; the crop travels as a PNG data URL."""

    def __init__(self, config: VerifierConfig) -> None:
        """Raises ValueError where the URL, the model's name or the named API key is missing."""
        self._config, self._chat = config, ChatEndpoint(config.endpoint)

    async def answer(self, question: Question, crop: View) -> str:
        reply = await self._chat.complete(await asyncio.to_thread(self._body, question, crop))
        if reply.filtered:
            raise NoVerdict("the verifier's reply was filtered: it gives no verdict on this crop", "filtered")
        return verdict(reply.text, reply.finished, self._config.max_tokens)

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
            "model": self._config.endpoint.model,
            "messages": [
                *([{"role": "system", "content": system}] if system else []),
                # some servers refuse a part without text
                {"role": "user", "content": [part for part in parts if part.get("text", "an image")]},
            ],
            "max_tokens": self._config.max_tokens,
        }


def verdict(text: str, finished: bool, max_tokens: int) -> str:
    """Return what a verifier's reply answers: the text behind its thoughts.

    Raises NoVerdict for a reply that was cut, is empty, or only thinks: nobody has judged the crop then."""
    if not finished:
        raise NoVerdict(
            f"the verifier's reply was cut at {max_tokens} tokens (reward.verifier.max_tokens): {text[-80:]!r}", "cut"
        )
    thoughts = [closed.end() for closed in _THOUGHTS_END.finditer(text)]
    answer = text[thoughts[-1] :].strip() if thoughts else text
    if _THOUGHTS.search(answer):
        raise NoVerdict(f"the verifier's reply is thoughts without an answer: {text[-80:]!r}", "thoughts")
    if not answer.strip():
        raise NoVerdict(f"the verifier's reply is empty: {text[-80:]!r}", "thoughts" if thoughts else "empty")
    if _REFUSAL.search(answer):
        raise NoVerdict(f"the verifier refuses to answer: {answer[:80]!r}", "filtered")
    return answer


def family_of_verifier(config: VerifierConfig) -> ModelFamily:
    """Return the family that crops are sized for. Raises ValueError, OSError as ``family_of`` does."""
    if config.backend is Backend.ENGINE:
        return family_of(config.engine.model, config.family)
    return import_class(config.family, ModelFamily)() if config.family else Qwen25VL()  # an endpoint resizes itself


def recut(question: Question, boxes: Iterable[Box], config: VerifierConfig) -> dict[Box, View]:
    """Return the boxes cut from the question's own image at ``config.fine_tokens``.

    Raises UnreadableImage, ValueError where they cannot be."""
    family = family_of_verifier(config)
    pixels = images.decode(question.image, max_pixels=1 << 40)  # the rollout has decoded it within its own limit
    return {box: images.view(pixels, box, family, config.fine_tokens) for box in boxes}


def strip_for_verifier(question: Question) -> Question:
    """Return the question without original image, ground truth and boxes, from which it could be answered blindly."""
    return replace(question, image=b"", answer="", boxes=())


def resize_view(view: View, family: ModelFamily, budget: int) -> View:
    """Return the view sized so that ``family``'s processor leaves it as it is, within ``budget`` visual tokens.

    A view that has that size already (made for the same family) is returned itself."""
    size = family.fit(view.width, view.height, budget)
    if size == (view.width, view.height):
        return view
    return View(view.box, np.asarray(Image.fromarray(view.pixels).resize(size, Image.Resampling.BICUBIC)))
