"""The Ray actor that plays episodes: one vLLM engine, many episodes in flight."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import io
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

from PIL import Image

from ergo_rl.actors.config import RolloutConfig, SamplingConfig
from ergo_rl.cluster.buckets import Bucket, Layout
from ergo_rl.cluster.engine import Completion, Engine, EngineRefused, Picture, Sampling
from ergo_rl.cluster.meeting import Meeting
from ergo_rl.episodes.coarse_to_fine import CoarseToFine
from ergo_rl.episodes.config import EpisodeConfig
from ergo_rl.episodes.families import family_of, load_tokenizer
from ergo_rl.episodes.images import UnreadableImage
from ergo_rl.episodes.prompts import ReservedText
from ergo_rl.episodes.types import Box, Outcome, Question, Trajectory, View


@dataclass(frozen=True, slots=True)
class TrajectoryFacts:
    """What the driver needs to know of a trajectory without ever holding its pixels.

    policy_versions: of the weights that sampled the first token of each turn; updates: how often they changed while a
    turn was being sampled; prompt_tokens: everything but the replies; engine_prompt_tokens, cached_tokens: of all
    turns' prompts together, as the engine saw them (turn 2 begins with turn 1), and how much of them its prefix cache
    held."""

    outcome: Outcome
    box_outcome: str
    crop: Box | None
    area_ratio: float | None
    prompt_tokens: int
    reply_tokens: tuple[int, ...]
    policy_versions: tuple[int, ...]
    engine_prompt_tokens: int = 0
    cached_tokens: int = 0
    updates: int = 0


@dataclass(frozen=True, slots=True)
class Played:
    """Facts of the G trajectories of one question, in the order of ``sample``; the trajectories themselves
    travel by reference. ``seconds``: from the first request to the last reply of all of them together."""

    question_id: str
    facts: tuple[TrajectoryFacts, ...]
    seconds: float = field(default=0.0, compare=False)


@dataclass(frozen=True, slots=True)
class Manner:
    """How a question is played in an evaluation. tokens: visual-token budget of the coarse view and, unless
    ``fine_tokens`` says another, of the crop; direct: one turn, the answer from the coarse view alone; its reply may be
    as long as turn 2's."""

    tokens: int
    direct: bool = False
    fine_tokens: int | None = None

    @classmethod
    def usual(cls, episode: EpisodeConfig) -> Manner:
        return cls(episode.coarse_tokens, fine_tokens=episode.fine_tokens)

    def episodes(self, usual: CoarseToFine) -> CoarseToFine:
        fine = self.tokens if self.fine_tokens is None else self.fine_tokens
        config = replace(usual.config, coarse_tokens=self.tokens, fine_tokens=fine)
        return CoarseToFine(usual.family, usual.tokenizer, config)


@dataclass(frozen=True, slots=True)
class Unplayable:
    """A question that cannot be played (unreadable image, reserved text, too long), and why."""

    question_id: str
    reason: str


class RolloutWorker:
    """One engine and the episodes that run on it. Made a Ray actor by ``RolloutPool``."""

    def __init__(self, config: RolloutConfig, episode: EpisodeConfig) -> None:
        self._config = config
        self._episode = episode
        # As many again as the engine decodes at once, so that it never runs dry; a question that waits for its turn is
        # not decoded yet, so memory does not grow with what is asked.
        self._places = Places(2 * config.engine.max_num_seqs)

    async def start(self) -> None:
        model = self._config.engine.model
        self._family, tokenizer = family_of(model, self._episode.family), load_tokenizer(model)
        self._episodes = CoarseToFine(self._family, tokenizer, self._episode)
        self._stop_ids = (tokenizer.convert_tokens_to_ids(self._family.turn_end),)
        self._banned_ids = self._family.banned_ids(tokenizer)
        self._engine = await Engine.start(self._config.engine)
        await self._warm_up()
        # What is there now stays: a collection that went through it (Ray asks for some) would hold up every episode for
        # half a second.
        gc.collect()
        gc.freeze()

    async def _warm_up(self) -> None:
        """Play a grey picture once, both turns. An engine's first episode takes ten times as long as the next (2.4 s
        and 0.2 s on a CPU), and would hold up a step of a run that this worker joins."""
        short = replace(self._config.sampling, coarse_max_tokens=4, fine_max_tokens=4)
        grey = Question("warm-up", _grey_png(), "What is here?", "nothing")
        await self.play(grey, range(self._config.group_size), 0, short, box=Box(100, 100, 300, 300))

    async def play(
        self,
        question: Question,
        samples: Sequence[int],
        seed: int,
        sampling: SamplingConfig | None = None,
        box: Box | None = None,
        manner: Manner | None = None,
    ) -> tuple[Played | Unplayable, tuple[Trajectory, ...]]:
        """Play one question ``len(samples)`` times at once. Turn 2 of a sample starts the moment its turn 1
        ends. Seeded per (seed, question, sample, turn): the same call on the same weights plays the same. ``box`` is
        used in place of the policy's own, ``manner`` in place of the episode that the worker was started for
        (evaluation). More than the engine could do soon wait for their turn. Raises EngineDied."""
        async with self._places.taken(len(samples)):
            return await self._play(question, samples, seed, sampling, box, manner)

    async def check(self) -> None:
        """Raises EngineDied when the engine is gone."""
        await self._engine.check()

    async def _play(
        self,
        question: Question,
        samples: Sequence[int],
        seed: int,
        sampling: SamplingConfig | None,
        box: Box | None,
        manner: Manner | None,
    ) -> tuple[Played | Unplayable, tuple[Trajectory, ...]]:
        sampling = sampling or self._config.sampling
        direct = manner is not None and manner.direct
        limits = (sampling.coarse_max_tokens, sampling.fine_max_tokens)
        if direct:
            limits = (sampling.fine_max_tokens,) * 2
        episodes = self._episodes if manner is None else manner.episodes(self._episodes)
        try:
            scene = await asyncio.to_thread(episodes.open_scene, question)
            coarse = await asyncio.to_thread(Picture.of, scene.coarse.pixels)

            async def picture_of(view: View) -> Picture:
                return coarse if view is scene.coarse else await asyncio.to_thread(Picture.of, view.pixels)

            async def one(sample: int) -> Trajectory:
                async def generate(token_ids: Sequence[int], views: Sequence[View], turn: int) -> Completion:
                    how = Sampling(
                        max_tokens=limits[turn],
                        temperature=sampling.temperature,
                        seed=stable_seed(seed, question.id, sample, turn),
                        stop_ids=self._stop_ids,
                        banned_ids=self._banned_ids,
                    )
                    return await self._engine.generate(token_ids, [await picture_of(view) for view in views], how)

                if direct:
                    return await episodes.answer_at_once(scene, sample, generate)
                return await episodes.play(scene, sample, generate, box)

            started = time.monotonic()
            trajectories = tuple(await asyncio.gather(*(one(sample) for sample in samples)))
            seconds = time.monotonic() - started
        except (UnreadableImage, ReservedText, EngineRefused) as error:
            return Unplayable(question.id, f"{type(error).__name__}: {error}"), ()
        return Played(question.id, tuple(map(facts_of, trajectories)), seconds), trajectories

    def close(self) -> None:
        self._engine.close()
        gc.unfreeze()  # libraries complain of what is never collected

    async def load_weights(self, version: int, *buckets: Bucket) -> float:
        """Take over the weights of ``version``; seconds it took (generation is paused for most of it)."""
        return await _timed(self._engine.load_weights(version, buckets))

    async def sleep(self) -> float:
        """Give the device's memory back until weights are loaded; seconds it took."""
        return await _timed(self._engine.sleep())

    async def enter_group(self, meeting: Meeting, first_rank: int) -> float:
        """Meet the other engines and the learner; seconds it took."""
        return await _timed(self._engine.enter_group(meeting, first_rank))

    async def receive_weights(self, version: int, generation: int, layouts: Sequence[Layout]) -> float:
        """Take over the weights of ``version`` as the group is sent them; seconds it took."""
        return await _timed(self._engine.receive_weights(version, generation, layouts))


async def _timed(work: Awaitable[None]) -> float:
    started = time.monotonic()
    await work
    return time.monotonic() - started


class Places:
    """So many places, taken in the order in which they are asked for; who asks for more than there are takes all."""

    def __init__(self, count: int) -> None:
        self._count = self._free = count
        self._turn, self._freed = asyncio.Lock(), asyncio.Event()

    @asynccontextmanager
    async def taken(self, count: int) -> AsyncIterator[None]:
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


def stable_seed(*parts: object) -> int:
    """63 bits, the same in every process and run (``hash`` is not)."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def facts_of(trajectory: Trajectory) -> TrajectoryFacts:
    turns = trajectory.turns
    return TrajectoryFacts(
        outcome=trajectory.outcome,
        box_outcome=trajectory.box_outcome,
        crop=None if trajectory.crop is None else trajectory.crop.box,
        area_ratio=trajectory.area_ratio,
        prompt_tokens=turns[-1].engine_prompt_length - sum(len(turn.completion_ids) for turn in turns[:-1]),
        reply_tokens=tuple(len(turn.completion_ids) for turn in turns),
        policy_versions=tuple(turn.policy_version for turn in turns),
        engine_prompt_tokens=sum(turn.engine_prompt_length for turn in turns),
        cached_tokens=sum(turn.engine_cached_tokens for turn in turns),
        updates=sum(len(turn.updates) for turn in turns),
    )


def without_image(question: Question) -> Question:
    """The question without its picture, for those who must not see it or need not carry it."""
    return replace(question, image=b"")
