"""Who plays a question for ``answer`` and ``evaluate``: an engine in this process, the job's rollout workers, or any
OpenAI-compatible endpoint. All of them play the same episode (``episodes.coarse_to_fine``)."""

from __future__ import annotations

import argparse
import asyncio
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import httpx

from ergo_rl.actors.config import SamplingConfig
from ergo_rl.actors.rollout_pool import RolloutPool
from ergo_rl.actors.rollout_worker import Manner, RolloutWorker, Unplayable
from ergo_rl.cluster.engine import EngineDied
from ergo_rl.episodes.coarse_to_fine import CoarseToFine
from ergo_rl.episodes.extensions import imported
from ergo_rl.episodes.families import FAMILIES, ModelFamily, family_of
from ergo_rl.episodes.images import UnreadableImage
from ergo_rl.episodes.prompts import ReservedText, around_image, fill
from ergo_rl.episodes.types import Box, Question, Trajectory, View
from ergo_rl.jobs.config import ConfigError, TrainConfig
from ergo_rl.rewards.config import EndpointConfig
from ergo_rl.rewards.endpoint_verifier import ChatEndpoint, ChatReply, png_url
from ergo_rl.rewards.verifier import VerifierUnavailable


@dataclass(frozen=True, slots=True)
class Play:
    """One question played once, greedily. seconds: from the first request to the last reply; reply_tokens: sampled."""

    trajectory: Trajectory
    seconds: float
    reply_tokens: int

    def visual_tokens(self, family: ModelFamily) -> tuple[int, ...]:
        """Of the coarse view and, where there is one, of the crop."""
        return tuple(family.visual_tokens(view) for view in self.trajectory.views)


@dataclass(frozen=True, slots=True)
class NotPlayed:
    """Why; ``passing``: the endpoint or the engine did not answer, which another time it may."""

    reason: str
    passing: bool = False


class Player(Protocol):
    @property
    def family(self) -> ModelFamily: ...

    async def play(self, question: Question, manner: Manner, box: Box | None = None) -> Play | NotPlayed: ...

    async def close(self) -> None: ...


class LocalPlayer:
    """A vLLM engine in this process; no Ray."""

    def __init__(self, worker: RolloutWorker, family: ModelFamily, sampling: SamplingConfig) -> None:
        self._worker, self.family, self._sampling = worker, family, sampling

    @classmethod
    async def start(cls, config: TrainConfig, family: ModelFamily) -> LocalPlayer:
        worker = RolloutWorker(config.rollout, config.episode)
        await worker.start()
        return cls(worker, family, greedy(config))

    async def play(self, question: Question, manner: Manner, box: Box | None = None) -> Play | NotPlayed:
        try:
            played, found = await self._worker.play(question, (0,), 0, self._sampling, box, manner)
        except EngineDied as error:
            return NotPlayed(f"the engine has died: {error}", passing=True)
        if isinstance(played, Unplayable):
            return NotPlayed(played.reason)
        return Play(found[0], played.seconds, sum(played.facts[0].reply_tokens))

    async def check(self) -> None:
        """Raises EngineDied when the engine is gone."""
        await self._worker.check()

    async def close(self) -> None:
        self._worker.close()


class PoolPlayer:
    """The rollout workers of a job."""

    def __init__(self, rollouts: RolloutPool, family: ModelFamily) -> None:
        self._rollouts, self.family = rollouts, family
        self._sampling = replace(rollouts.config.sampling, temperature=0.0)

    async def play(self, question: Question, manner: Manner, box: Box | None = None) -> Play | NotPlayed:
        rollout = await self._rollouts.play(
            question, seed=0, samples=1, sampling=self._sampling, box=box, manner=manner
        )
        if isinstance(rollout, Unplayable):
            return NotPlayed(rollout.reason)
        (trajectory,) = await rollout.trajectories
        return Play(trajectory, rollout.played.seconds, sum(rollout.played.facts[0].reply_tokens))

    async def close(self) -> None:
        await self._rollouts.close()


class EndpointPlayer:
    """Any OpenAI-compatible endpoint that takes pictures as data URLs, two of them in a conversation. The chat template
    is the endpoint's own; so is what it does where it is given no system prompt."""

    def __init__(self, config: TrainConfig, endpoint: EndpointConfig, family: ModelFamily) -> None:
        self._chat, self._config, self._model, self.family = ChatEndpoint(endpoint), config, endpoint.model, family
        self._episodes = CoarseToFine(family, Letters(), config.episode)

    async def play(self, question: Question, manner: Manner, box: Box | None = None) -> Play | NotPlayed:
        episodes = manner.episodes(self._episodes)
        prompts, sampling, replies = self._config.episode.prompts, self._config.rollout.sampling, list[ChatReply]()
        words = [around_image(prompts.direct if manner.direct else prompts.coarse, question)]
        words.append(around_image(prompts.fine, question))
        try:
            scene = await asyncio.to_thread(episodes.open_scene, question)
            fill(prompts.direct, question, self.family)
        except (UnreadableImage, ReservedText, ValueError) as error:
            return NotPlayed(f"{type(error).__name__}: {error}")

        async def generate(letters: Sequence[int], views: Sequence[View], turn: int) -> Written:
            messages: list[dict[str, Any]] = [{"role": "system", "content": prompts.system}] if prompts.system else []
            for place, view in enumerate(views):
                messages.append({"role": "user", "content": await asyncio.to_thread(_parts, *words[place], view)})
                if place < turn:  # what turn 1 said, or what was put into its mouth
                    said = letters[len(scene.coarse_prompt) : -len(scene.fine_prompt)]
                    content = "".join(map(chr, said)).removesuffix(self.family.turn_end)
                    messages.append({"role": "assistant", "content": content})
            longest = sampling.coarse_max_tokens if turn == 0 and not manner.direct else sampling.fine_max_tokens
            body = {"model": self._model, "messages": messages, "max_tokens": longest, "temperature": 0.0}
            replies.append(await self._chat.complete(body))
            return Written(replies[-1], self.family)

        started = time.monotonic()
        try:
            if manner.direct:
                trajectory = await episodes.answer_at_once(scene, 0, generate)
            else:
                trajectory = await episodes.play(scene, 0, generate, box)
        except VerifierUnavailable as error:
            return NotPlayed(str(error), passing=True)
        return Play(trajectory, time.monotonic() - started, sum(reply.reply_tokens for reply in replies))

    async def close(self) -> None:
        await self._chat.close()


class Letters:
    """A tokenizer for episodes whose token ids are an endpoint's own business: every letter is its code point."""

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        return [ord(letter) for letter in text]

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = False) -> str:
        return "".join(map(chr, token_ids))

    def convert_tokens_to_ids(self, tokens: str) -> int:
        raise NotImplementedError("special tokens have no code point")


class Written:
    """An endpoint's reply as an episode takes it: letters for ids, no log-probs."""

    def __init__(self, reply: ChatReply, family: ModelFamily) -> None:
        self.text, self.stopped, self.prompt_length = reply.text, reply.finished, reply.prompt_tokens
        self.token_ids = tuple(map(ord, reply.text + (family.turn_end if reply.finished else "")))
        self.logprobs = (math.nan,) * len(self.token_ids)
        self.weight_version = self.cached_tokens = 0
        self.updates: tuple[tuple[int, int], ...] = ()


def greedy(config: TrainConfig) -> SamplingConfig:
    return replace(config.rollout.sampling, temperature=0.0)


async def start_player(
    config: TrainConfig, endpoint: EndpointConfig | None, family: str
) -> LocalPlayer | EndpointPlayer:
    """The endpoint where there is one; else an engine in this process (20 to 60 s on a CPU). family: of the endpoint's
    model."""
    if endpoint is not None:
        return EndpointPlayer(config, endpoint, family_named(family))
    return await LocalPlayer.start(config, family_of(config.rollout.engine.model, config.episode.family))


async def endpoint_at(url: str, model: str, config: TrainConfig) -> EndpointConfig:
    """The endpoint with the limits of ``reward.verifier.endpoint`` and, where no model is named, the only one that it
    serves. Raises ConfigError."""
    usual = config.reward.verifier.endpoint
    if not model:
        try:
            async with httpx.AsyncClient(timeout=usual.timeout_s) as client:
                reply = await client.get(f"{url.rstrip('/')}/models")
                served = [str(one["id"]) for one in reply.raise_for_status().json()["data"]]
        except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
            raise ConfigError(f"{url} does not list its models ({error}); name one with --served-model") from error
        if len(served) != 1:
            raise ConfigError(f"{url} serves {', '.join(served) or 'nothing'}; name one with --served-model")
        model = served[0]
    try:
        return replace(usual, url=url, model=model)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def add_endpoint(parser: argparse.ArgumentParser) -> None:
    """The arguments that put an endpoint in the place of an engine."""
    parser.add_argument("--url", default="", help="ask an OpenAI-compatible endpoint instead: http://host:8000/v1")
    parser.add_argument("--served-model", default="", help="with --url: the model's name there (default: its only one)")
    parser.add_argument(
        "--family",
        default="qwen2_5_vl",
        help=f"with --url: how the model writes boxes and sizes images: {', '.join(FAMILIES)}, or package.module:Class "
        "(default: %(default)s)",
    )


def family_named(name: str) -> ModelFamily:
    """Raises ConfigError for a family that is not there."""
    if name in FAMILIES:
        return FAMILIES[name]()
    try:
        return imported(name, ModelFamily)()
    except ValueError as error:
        raise ConfigError(f"--family: known are {', '.join(FAMILIES)}, or a class of your own: {error}") from error


def _parts(before: str, after: str, view: View) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = [
        {"type": "text", "text": before},
        {"type": "image_url", "image_url": {"url": png_url(view)}},
        {"type": "text", "text": after},
    ]
    return [part for part in parts if part.get("text", "an image")]
