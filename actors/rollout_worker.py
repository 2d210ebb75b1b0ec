"""The Ray actor that runs episodes: one vLLM engine, many episodes in flight."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import io
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from PIL import Image

from ergo_rl.actors.config import RolloutConfig, SamplingConfig
from ergo_rl.cluster.devices import require_gpu
from ergo_rl.cluster.engine import Completion, Engine, EngineImage, EngineRefused, Sampling
from ergo_rl.cluster.weight_buckets import Bucket
from ergo_rl.episodes.config import EpisodeConfig
from ergo_rl.episodes.episode import CoarseToFine, Generate, PreparedQuestion, TurnRefused
from ergo_rl.episodes.families import family_of, load_tokenizer
from ergo_rl.episodes.images import UnreadableImage
from ergo_rl.episodes.probe import Replacement, Replay, replay_each
from ergo_rl.episodes.prompts import ReservedText, answer_of
from ergo_rl.episodes.prompts import too_long as too_long
from ergo_rl.episodes.types import Box, Outcome, Question, Trajectory, View


@dataclass(frozen=True, slots=True)
class TrajectorySummary:
    """What the driver needs to know of a trajectory without ever holding its pixels."""

    outcome: Outcome
    box_outcome: str
    crop: Box | None
    area_ratio: float | None
    prompt_tokens: int
    """Everything but the replies."""
    reply_tokens: tuple[int, ...]
    """Of each turn."""
    policy_versions: tuple[int, ...]
    """Of the weights that sampled the first token of each turn."""
    engine_prompt_tokens: int = 0
    """Of all turns' prompts together, as the engine saw them (turn 2 begins with turn 1)."""
    cached_tokens: int = 0
    """How many of those its prefix cache held."""
    updates: int = 0
    """How often the weights changed while a turn was being sampled."""
    answer: str | None = None
    """Text of the last ``<answer>`` of an answered episode."""
    visual_tokens: int = 0
    """Of all views together, as the engine counted them."""


@dataclass(frozen=True, slots=True)
class GroupResult:
    """Summaries of the trajectories of one question, in the order of ``sample``; the trajectories themselves travel by
    reference."""

    question_id: str
    summaries: tuple[TrajectorySummary, ...]
    seconds: float = field(default=0.0, compare=False)
    """From the first request of all of them to the last reply."""


@dataclass(frozen=True, slots=True)
class EvalMode:
    """How an evaluation asks a question."""

    tokens: int
    """Visual-token budget of the coarse view and, without ``fine_tokens``, of the crop."""
    direct: bool = False
    """One turn: the answer from the coarse view alone, in a reply that may be as long as turn 2's."""
    fine_tokens: int | None = None

    @classmethod
    def usual(cls, episode: EpisodeConfig) -> EvalMode:
        return cls(episode.coarse_tokens, fine_tokens=episode.fine_tokens)

    def episodes(self, usual: CoarseToFine) -> CoarseToFine:
        fine = self.tokens if self.fine_tokens is None else self.fine_tokens
        config = replace(usual.config, coarse_tokens=self.tokens, fine_tokens=fine)
        return CoarseToFine(usual.family, usual.tokenizer, config)


@dataclass(frozen=True, slots=True)
class SkippedQuestion:
    """A question that no episode can use (unreadable image, reserved text, too long)."""

    question_id: str
    reason: str


class RolloutWorker:
    """One engine and the episodes that run on it. ``RolloutPool`` makes it a Ray actor."""

    def __init__(self, config: RolloutConfig, episode: EpisodeConfig) -> None:
        self._config = config
        self._episode = episode
        # Twice what the engine decodes at once, so that it never runs dry. Images of questions that wait behind are not
        # decoded yet, so memory does not grow with the number of calls.
        self._capacity = FairSemaphore(2 * config.engine.max_num_seqs)

    async def start(self) -> None:
        """Start the engine. Raises NoGPU where the recipe promises a GPU and there is none."""
        require_gpu(self._config.resources.gpus, "rollout.resources.gpus")
        model = self._config.engine.model
        self._family, tokenizer = family_of(model, self._episode.family), load_tokenizer(model)
        self._episodes = CoarseToFine(self._family, tokenizer, self._episode)
        self._stop_ids = (tokenizer.convert_tokens_to_ids(self._family.turn_end),)
        self._banned_ids = self._family.banned_ids(tokenizer)
        self._family.reserve(tokenizer)
        self._engine = await Engine.start(self._config.engine)
        await self._warm_up()
        # Keep what exists now out of garbage collection: Ray asks for collections, and going through all of it would
        # stop every episode for half a second.
        gc.collect()
        gc.freeze()

    async def _warm_up(self) -> None:
        """Run both turns once on a grey image. An engine's first episode takes ten times as long as the next (2.4 s
        and 0.2 s on a CPU), and would delay a step of a run that this worker joins."""
        short = replace(self._config.sampling, coarse_max_tokens=4, fine_max_tokens=4)
        grey = Question("warm-up", _grey_png(), "What is here?", "nothing")
        await self.rollout(grey, range(self._config.group_size), 0, short, box=Box(100, 100, 300, 300))

    async def rollout(
        self,
        question: Question,
        samples: Sequence[int],
        seed: int,
        sampling: SamplingConfig | None = None,
        box: Box | None = None,
        mode: EvalMode | None = None,
    ) -> tuple[GroupResult | SkippedQuestion, tuple[Trajectory, ...]]:
        """Run ``len(samples)`` episodes of one question at once. Turn 2 of a sample starts the moment its turn 1 ends.
        Calls beyond the capacity of the engine wait.

        seed: the same (seed, question, sample, turn) on the same weights samples the same; box: replaces the policy's
        own; mode: replaces the episode that the worker was started for (evaluation).

        Raises EngineDied."""
        async with self._capacity.acquire(len(samples)):
            return await self._rollout(question, samples, seed, sampling, box, mode)

    async def check(self) -> None:
        """Raises EngineDied when the engine is gone."""
        await self._engine.check()

    async def _rollout(
        self,
        question: Question,
        samples: Sequence[int],
        seed: int,
        sampling: SamplingConfig | None,
        box: Box | None,
        mode: EvalMode | None,
    ) -> tuple[GroupResult | SkippedQuestion, tuple[Trajectory, ...]]:
        sampling = sampling or self._config.sampling
        direct = mode is not None and mode.direct
        limits = (sampling.coarse_max_tokens, sampling.fine_max_tokens)
        if direct:
            limits = (sampling.fine_max_tokens,) * 2
        episodes = self._episodes if mode is None else mode.episodes(self._episodes)
        prepared = await self._prepare(episodes, question)
        if isinstance(prepared, SkippedQuestion):
            return prepared, ()
        scene, coarse = prepared
        try:

            async def episode(sample: int) -> Trajectory:
                generate = self._generate(scene, coarse, sampling, limits, (seed, question.id, sample))
                if direct:
                    return await episodes.run_single_turn(scene, sample, generate)
                return await episodes.run(scene, sample, generate, box)

            started = time.monotonic()
            trajectories = tuple(await asyncio.gather(*(episode(sample) for sample in samples)))
            seconds = time.monotonic() - started
        except (UnreadableImage, ReservedText, TurnRefused) as error:
            return _skipped(question, error), ()
        return GroupResult(question.id, tuple(map(summarize, trajectories)), seconds), trajectories

    async def replay(
        self,
        question: Question,
        played: tuple[Trajectory, ...],
        other: tuple[Trajectory, ...] | None,
        target: Box | None,
        sampling: SamplingConfig,
    ) -> dict[Replacement, Replay] | SkippedQuestion:
        """Play turn 2 of the first trajectory again with its crop replaced (``episodes.probe.replay_each``).

        Raises EngineDied."""
        async with self._capacity.acquire(len(Replacement)):
            prepared = await self._prepare(self._episodes, question)
            if isinstance(prepared, SkippedQuestion):
                return prepared
            limits = (sampling.coarse_max_tokens, sampling.fine_max_tokens)
            generate = self._generate(*prepared, sampling, limits, (0, question.id, 0))
            donor = other[0] if other else None
            return await replay_each(self._episodes, prepared[0], played[0], donor, target, generate)

    async def _prepare(
        self, episodes: CoarseToFine, question: Question
    ) -> tuple[PreparedQuestion, EngineImage] | SkippedQuestion:
        if reason := too_long(question, self._config.engine.max_model_len):
            return SkippedQuestion(question.id, reason)
        try:
            scene = await asyncio.to_thread(episodes.prepare, question)
            return scene, await asyncio.to_thread(EngineImage.of, scene.coarse.pixels)
        except Exception as error:  # whatever a library raises on one image or text costs that question alone
            return _skipped(question, error)

    def _generate(
        self,
        scene: PreparedQuestion,
        coarse: EngineImage,
        sampling: SamplingConfig,
        limits: tuple[int, int],
        seed: tuple[object, ...],
    ) -> Generate:
        """Ask the engine, with ``limits`` on the tokens of turns 1 and 2 and the draws of (``seed``, turn)."""

        async def image_of(view: View) -> EngineImage:
            return coarse if view is scene.coarse else await asyncio.to_thread(EngineImage.of, view.pixels)

        async def generate(token_ids: Sequence[int], views: Sequence[View], turn: int) -> Completion:
            settings = Sampling(
                max_tokens=limits[turn],
                temperature=sampling.temperature,
                seed=derive_seed(*seed, turn),
                stop_ids=self._stop_ids,
                banned_ids=self._banned_ids,
            )
            pixels = [await image_of(view) for view in views]
            try:
                return await self._engine.generate(token_ids, pixels, settings)
            except EngineRefused as error:
                raise TurnRefused(str(error)) from error

        return generate

    def close(self) -> None:
        self._engine.close()
        gc.unfreeze()  # libraries complain about objects that are never collected

    async def load_weights(self, version: int, *buckets: Bucket) -> float:
        """Replace the weights; seconds it took (generation pauses for most of them)."""
        return await _timed(self._engine.load_weights(version, buckets))

    async def sleep(self) -> float:
        """Give the device's memory back until weights are loaded; seconds it took."""
        return await _timed(self._engine.sleep())

    # The engine's end of a direct transfer; the learner calls these (``cluster.weight_sender.EngineClient``).

    async def init_weight_transfer(self, transport: str, info: dict[str, Any], timeout_s: float) -> None:
        await self._engine.init_weight_transfer(transport, info, timeout_s)

    async def start_weight_update(self, transfer: str) -> None:
        self._transfer_began = time.monotonic()
        await self._engine.start_weight_update(transfer)

    async def update_weights(self, transfer: str, update: dict[str, Any]) -> None:
        await self._engine.update_weights(transfer, update)

    async def finish_weight_update(self, transfer: str, version: int) -> float:
        """Return the seconds since ``start_weight_update``."""
        await self._engine.finish_weight_update(transfer, version)
        return time.monotonic() - self._transfer_began


def _skipped(question: Question, error: Exception) -> SkippedQuestion:
    return SkippedQuestion(question.id, f"{type(error).__name__}: {error}")


async def _timed(work: Awaitable[None]) -> float:
    started = time.monotonic()
    await work
    return time.monotonic() - started


class FairSemaphore:
    """A semaphore whose callers take several places at once, in the order of their calls. A request for more than there
    are takes all of them."""

    def __init__(self, count: int) -> None:
        self._count = self._free = count
        self._turn, self._freed = asyncio.Lock(), asyncio.Event()

    @asynccontextmanager
    async def acquire(self, count: int) -> AsyncIterator[None]:
        count = min(count, self._count)
        async with self._turn:
            while self._free < count:
                self._freed.clear()
                await self._freed.wait()
            self._free -= count
        try:
            yield
        finally:
            self._free += count
            self._freed.set()


def _grey_png() -> bytes:
    with io.BytesIO() as file:
        Image.new("RGB", (400, 400), "grey").save(file, "PNG")
        return file.getvalue()


def derive_seed(*parts: object) -> int:
    """Hash ``parts`` to 63 bits, the same in every process and run (``hash`` is not)."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def summarize(trajectory: Trajectory) -> TrajectorySummary:
    turns = trajectory.turns
    prompt_tokens = turns[-1].engine_prompt_length - sum(len(turn.completion_ids) for turn in turns[:-1])
    return TrajectorySummary(
        outcome=trajectory.outcome,
        box_outcome=trajectory.box_outcome,
        crop=None if trajectory.crop is None else trajectory.crop.box,
        area_ratio=trajectory.area_ratio,
        prompt_tokens=prompt_tokens,
        reply_tokens=tuple(len(turn.completion_ids) for turn in turns),
        policy_versions=tuple(turn.policy_version for turn in turns),
        engine_prompt_tokens=sum(turn.engine_prompt_length for turn in turns),
        cached_tokens=sum(turn.engine_cached_tokens for turn in turns),
        updates=sum(len(turn.updates) for turn in turns),
        answer=answer_of(trajectory),
        # the engine puts a view's tokens in the place of one id
        visual_tokens=prompt_tokens - sum(len(turn.prompt_ids) for turn in turns) + len(trajectory.views),
    )


def without_image(question: Question) -> Question:
    """Leave the image out, for those who must not see it or need not carry it."""
    return replace(question, image=b"")
