"""Run single episodes on a policy: an engine in this process, the rollout workers of a job, or any OpenAI-compatible
endpoint. All clients run the same two-turn episode (``episodes.episode``), greedily.

Example::

    client = await EngineClient.start(config, family_of(config.rollout.engine.model, config.episode.family))
    result = await client.run_episode(question, EvalMode.usual(config.episode))
    await client.close()
"""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any, Protocol

import numpy as np

from ergo_rl.actors.config import SamplingConfig
from ergo_rl.actors.rollout_pool import Rollout, RolloutPool
from ergo_rl.actors.rollout_worker import EvalMode, GroupResult, RolloutWorker, SkippedQuestion, summarize
from ergo_rl.cluster.config import Resources
from ergo_rl.cluster.engine import EngineDied
from ergo_rl.episodes.episode import CoarseToFine, Generate, PreparedQuestion
from ergo_rl.episodes.families import FAMILIES, ModelFamily, family_of
from ergo_rl.episodes.images import UnreadableImage
from ergo_rl.episodes.plugins import import_class
from ergo_rl.episodes.probe import Replacement, Replay, replay_each
from ergo_rl.episodes.prompts import ReservedText, around_image, fill
from ergo_rl.episodes.types import Box, Question, Trajectory, View
from ergo_rl.errors import ErgoError
from ergo_rl.jobs.config import ConfigError, TrainConfig
from ergo_rl.rewards.config import EndpointConfig
from ergo_rl.rewards.endpoint import ChatEndpoint, ChatReply, VerifierUnavailable, png_url


@dataclass(frozen=True, slots=True)
class EpisodeResult:
    """One finished episode of one question."""

    trajectory: Trajectory
    seconds: float
    """From the first request to the last reply."""
    reply_tokens: int
    """Sampled tokens of all turns."""

    def visual_tokens(self, family: ModelFamily) -> tuple[int, ...]:
        """Visual tokens of the coarse view and, where there is one, of the crop."""
        return tuple(family.visual_tokens(view) for view in self.trajectory.views)


class EpisodeError(ErgoError):
    """The episode could not be run; the message says why."""

    def __init__(self, message: str, transient: bool = False) -> None:
        """transient: the engine or endpoint did not answer, so the same question may work later."""
        super().__init__(message)
        self.transient = transient


class PolicyClient(Protocol):
    @property
    def family(self) -> ModelFamily: ...

    async def run_episode(self, question: Question, manner: EvalMode, box: Box | None = None) -> EpisodeResult:
        """Run one greedy episode. box: of a baseline, in pixels of the original, in place of the policy's own.

        Raises EpisodeError."""
        ...

    async def close(self) -> None: ...


class EngineClient:
    """A vLLM engine in this process; no Ray."""

    def __init__(self, worker: RolloutWorker, family: ModelFamily, sampling: SamplingConfig) -> None:
        self._worker, self.family, self._sampling = worker, family, sampling

    @classmethod
    async def start(cls, config: TrainConfig, family: ModelFamily) -> EngineClient:
        """Load the model; takes 20 to 60 s on a CPU."""
        # Nothing is reserved for it: a model trained on GPUs answers on whatever this machine has.
        worker = RolloutWorker(replace(config.rollout, resources=Resources()), config.episode)
        await worker.start()
        return cls(worker, family, replace(config.rollout.sampling, temperature=0.0))

    async def run_episode(self, question: Question, manner: EvalMode, box: Box | None = None) -> EpisodeResult:
        try:
            played, trajectories = await self._worker.rollout(question, (0,), 0, self._sampling, box, manner)
        except EngineDied as error:
            raise EpisodeError(f"the engine has died: {error}", transient=True) from error
        if isinstance(played, SkippedQuestion):
            raise EpisodeError(played.reason)
        return EpisodeResult(trajectories[0], played.seconds, sum(played.summaries[0].reply_tokens))

    async def check(self) -> None:
        """Raises EngineDied when the engine is gone."""
        await self._worker.check()

    async def close(self) -> None:
        self._worker.close()


class PoolClient:
    """The rollout workers of a job."""

    def __init__(self, rollouts: RolloutPool, family: ModelFamily) -> None:
        self._rollouts, self.family = rollouts, family
        self._sampling = replace(rollouts.config.sampling, temperature=0.0)

    async def run_episode(self, question: Question, manner: EvalMode, box: Box | None = None) -> EpisodeResult:
        rollout = await self._rollouts.rollout(
            question, seed=0, samples=1, sampling=self._sampling, box=box, mode=manner
        )
        if isinstance(rollout, SkippedQuestion):
            raise EpisodeError(rollout.reason)
        (trajectory,) = await rollout.trajectories
        return EpisodeResult(trajectory, rollout.result.seconds, sum(rollout.result.summaries[0].reply_tokens))

    async def close(self) -> None:
        await self._rollouts.close()


class EndpointClient:
    """An OpenAI-compatible endpoint that takes images as data URLs, two of them in a conversation.

    The endpoint applies its own chat template, and its own default where the recipe has no system prompt."""

    def __init__(self, config: TrainConfig, endpoint: EndpointConfig, family: ModelFamily) -> None:
        self._chat, self._config, self._model, self.family = ChatEndpoint(endpoint), config, endpoint.model, family
        self._episodes = CoarseToFine(family, CodepointTokenizer(), config.episode)

    async def run_episode(self, question: Question, manner: EvalMode, box: Box | None = None) -> EpisodeResult:
        episodes, replies = manner.episodes(self._episodes), list[ChatReply]()
        scene = await self._prepare(episodes, question)
        generate = self._generate(scene, manner, replies)
        started = time.monotonic()
        try:
            if manner.direct:
                trajectory = await episodes.run_single_turn(scene, 0, generate)
            else:
                trajectory = await episodes.run(scene, 0, generate, box)
        except VerifierUnavailable as error:
            raise EpisodeError(str(error), transient=error.kind == "unavailable") from error
        return EpisodeResult(trajectory, time.monotonic() - started, sum(reply.reply_tokens for reply in replies))

    async def replay(
        self, question: Question, played: Trajectory, other: Trajectory | None, target: Box | None
    ) -> dict[Replacement, Replay]:
        """Play turn 2 of an episode again with its crop replaced (``episodes.probe.replay_each``). Raises
        EpisodeError."""
        scene = await self._prepare(self._episodes, question)
        usual = EvalMode.usual(self._config.episode)
        generate = self._generate(scene, usual, [], played.turns[0].text)
        return await replay_each(self._episodes, scene, played, other, target, generate, (VerifierUnavailable,))

    async def _prepare(self, episodes: CoarseToFine, question: Question) -> PreparedQuestion:
        try:
            scene = await asyncio.to_thread(episodes.prepare, question)
            fill(self._config.episode.prompts.direct, question, self.family)
        except (UnreadableImage, ReservedText, ValueError) as error:
            raise EpisodeError(f"{type(error).__name__}: {error}") from error
        return scene

    def _generate(
        self, scene: PreparedQuestion, manner: EvalMode, replies: list[ChatReply], look: str | None = None
    ) -> Generate:
        """Ask the endpoint; what it says is added to ``replies``. look: the reply of turn 1, where it is known."""
        prompts, sampling, question = self._config.episode.prompts, self._config.rollout.sampling, scene.question
        texts = [around_image(prompts.direct if manner.direct else prompts.coarse, question)]
        texts.append(around_image(prompts.fine, question))

        async def generate(prompt: Sequence[int], views: Sequence[View], turn: int) -> EndpointCompletion:
            messages: list[dict[str, Any]] = [{"role": "system", "content": prompts.system}] if prompts.system else []
            for number, view in zip_longest(range(turn + 1), views):  # turn 2 of a probe may come without a view
                messages.append({"role": "user", "content": await asyncio.to_thread(_content, *texts[number], view)})
                if number < turn:
                    # The reply of turn 1, which a baseline's box may have replaced, is only in the prompt of turn 2.
                    reply = prompt[len(scene.coarse_prompt) : -len(scene.fine_prompt)]
                    content = "".join(map(chr, reply)).removesuffix(self.family.turn_end) if look is None else look
                    messages.append({"role": "assistant", "content": content})
            limit = sampling.coarse_max_tokens if turn == 0 and not manner.direct else sampling.fine_max_tokens
            body = {"model": self._model, "messages": messages, "max_tokens": limit, "temperature": 0.0}
            replies.append(await self._chat.complete(body))
            return EndpointCompletion(replies[-1], self.family)

        return generate

    async def close(self) -> None:
        await self._chat.close()


class EndpointRollouts:
    """An endpoint in the place of rollout workers, for an evaluation on the recipe's own budgets."""

    def __init__(self, client: EndpointClient, config: TrainConfig, keep: Sequence[str]) -> None:
        """keep: ids of the questions whose crops are kept; of the others only the box, or memory would grow with the
        number of questions."""
        self._client, self._config, self._keep, self.config = client, config, frozenset(keep), config.rollout

    async def rollout(self, question: Question, *, box: Box | None = None, **_: Any) -> Rollout | SkippedQuestion:
        try:
            result = await self._client.run_episode(question, EvalMode.usual(self._config.episode), box)
        except EpisodeError as error:
            return SkippedQuestion(question.id, str(error))
        whole, keep = result.trajectory, question.id in self._keep
        views = tuple(view if keep and number else _without_pixels(view) for number, view in enumerate(whole.views))
        tokens = sum(result.visual_tokens(self._client.family))  # what an endpoint counts is not split up
        facts = replace(summarize(whole), visual_tokens=tokens)
        kept: Any = (replace(whole, views=views),)  # in this process, where a job has a reference
        return Rollout(GroupResult(question.id, (facts,), result.seconds), kept)

    async def replay(
        self, question: Question, played: Any, other: Any, target: Box | None
    ) -> dict[Replacement, Replay] | SkippedQuestion:
        try:
            return await self._client.replay(question, played[0], other and other[0], target)
        except EpisodeError as error:
            return SkippedQuestion(question.id, str(error))


def _without_pixels(view: View) -> View:
    return View(view.box, np.empty((0, 0, 3), np.uint8))


class CodepointTokenizer:
    """Use code points as token ids, for episodes over an endpoint whose own token ids are not known."""

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        return [ord(letter) for letter in text]

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = False) -> str:
        return "".join(map(chr, token_ids))

    def convert_tokens_to_ids(self, tokens: str) -> int:
        raise NotImplementedError("special tokens have no code point")


class EndpointCompletion:
    """An endpoint's reply in the form that an episode takes: code points for token ids, NaN for log-probs."""

    def __init__(self, reply: ChatReply, family: ModelFamily) -> None:
        self.text, self.stopped, self.prompt_length = reply.text, reply.finished, reply.prompt_tokens
        self.token_ids = tuple(map(ord, reply.text + (family.turn_end if reply.finished else "")))
        self.logprobs = (math.nan,) * len(self.token_ids)
        self.weight_version = self.cached_tokens = 0
        self.updates: tuple[tuple[int, int], ...] = ()


async def start_client(
    config: TrainConfig, endpoint: EndpointConfig | None, family: str
) -> EngineClient | EndpointClient:
    """A client of the endpoint where there is one; else an engine in this process (20 to 60 s on a CPU).

    family: of the endpoint's model. Raises ConfigError, UnknownFamily, OSError."""
    if endpoint is not None:
        return EndpointClient(config, endpoint, family_by_name(family))
    return await EngineClient.start(config, family_of(config.rollout.engine.model, config.episode.family))


async def endpoint_at(url: str, model: str, config: TrainConfig) -> EndpointConfig:
    """The endpoint at ``url`` with the limits of ``reward.verifier.endpoint``.

    model: its name there; empty: the only one that it serves. Raises ConfigError."""
    usual = config.reward.verifier.endpoint
    try:
        return replace(usual, url=url, model=model or await _only_model(url, usual))
    except ValueError as error:
        raise ConfigError(str(error)) from error


async def _only_model(url: str, usual: EndpointConfig) -> str:
    from openai import AsyncOpenAI, OpenAIError  # takes a second to import

    key = os.environ.get(usual.api_key_env, "") or "none"
    try:
        async with AsyncOpenAI(base_url=url, api_key=key, timeout=usual.timeout_s, max_retries=0) as client:
            served = [str(model.id) async for model in client.models.list()]
    except (OpenAIError, ValueError, AttributeError, TypeError) as error:
        raise ConfigError(f"{url} does not list its models ({error}); name one with --served-model") from error
    if len(served) != 1:
        raise ConfigError(f"{url} serves {', '.join(served) or 'nothing'}; name one with --served-model")
    return served[0]


def family_by_name(name: str) -> ModelFamily:
    """A built-in family, or ``package.module:Class``. Raises ConfigError for a family that does not exist."""
    if name in FAMILIES:
        return FAMILIES[name]()
    try:
        return import_class(name, ModelFamily)()
    except ValueError as error:
        raise ConfigError(f"--family: known are {', '.join(FAMILIES)}, or a class of your own: {error}") from error


def _content(before: str, after: str, view: View | None) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = [{"type": "text", "text": before}, {"type": "text", "text": after}]
    if view is not None:
        parts.insert(1, {"type": "image_url", "image_url": {"url": png_url(view)}})
    return [part for part in parts if part.get("text", "an image")]
