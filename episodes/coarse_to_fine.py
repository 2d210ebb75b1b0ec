"""The episode: two turns, one trajectory. ``generate`` is handed in, so this file knows no engine."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ergo_rl.episodes import images
from ergo_rl.episodes.config import EpisodeConfig, OnBadBox
from ergo_rl.episodes.families import ModelFamily, Tokenizer
from ergo_rl.episodes.parsing import BoxOutcome, parse_zoom
from ergo_rl.episodes.prompts import fill
from ergo_rl.episodes.types import Box, Completion, Finish, Outcome, Pixels, Question, Trajectory, Turn, View

Generate = Callable[[Sequence[int], Sequence[View], int], Awaitable[Completion]]
"""(token ids of the whole conversation so far with one placeholder per image, its views, turn 0 or 1)."""


@dataclass(frozen=True, slots=True)
class Scene:
    """What the G samples of one question share: decoded once, never copied per sample."""

    question: Question
    pixels: Pixels
    coarse: View
    coarse_prompt: tuple[int, ...]
    fine_prompt: tuple[int, ...]


class CoarseToFine:
    """The two turns as a story."""

    def __init__(self, family: ModelFamily, tokenizer: Tokenizer, config: EpisodeConfig) -> None:
        self.family, self.tokenizer, self.config = family, tokenizer, config

    def open_scene(self, question: Question) -> Scene:
        """Decode and prepare a question (CPU work: call it in a thread).

        Raises UnreadableImage, ReservedText: the question cannot be played."""
        config = self.config
        pixels = images.decode(question.image, config.max_image_pixels)
        try:
            coarse = images.view(pixels, images.whole(pixels), self.family, config.coarse_tokens)
        except ValueError as error:  # too thin for the family
            raise images.UnreadableImage(str(error)) from error
        first = self.family.first_prompt(config.prompts.system, fill(config.prompts.coarse, question, self.family))
        second = self.family.next_prompt(fill(config.prompts.fine, question, self.family))
        return Scene(question, pixels, coarse, self._encode(first), self._encode(second))

    async def play(self, scene: Scene, sample: int, generate: Generate, box: Box | None = None) -> Trajectory:
        """Look at the small copy, say where to look, read only that part, answer.

        ``box`` puts another box into the policy's mouth (baselines of an evaluation). Such a trajectory was not
        sampled: the log-probs of its first turn are NaN, so that nothing can be learnt from it."""
        coarse = scene.coarse
        reply: Completion = await generate(scene.coarse_prompt, [coarse], 0)
        if box is not None:
            reply = self._with_box(reply, box, coarse)
        look = _turn(scene.coarse_prompt, reply)
        if not reply.stopped:
            return Trajectory(scene.question.id, sample, (coarse,), (look,), Outcome.TRUNCATED, BoxOutcome.NO_TAG)

        named, box_outcome = read_box(reply.text, coarse, self.family)
        box = box or named
        if box is None and self.config.on_bad_box is OnBadBox.WHOLE_IMAGE:
            box = coarse.box
        if box is None:
            return Trajectory(scene.question.id, sample, (coarse,), (look,), Outcome.BAD_BOX, box_outcome)

        crop = await asyncio.to_thread(images.view, scene.pixels, box, self.family, self.config.fine_tokens)
        conversation = (*scene.coarse_prompt, *reply.token_ids, *scene.fine_prompt)
        reply = await generate(conversation, [coarse, crop], 1)
        read = _turn(scene.fine_prompt, reply)
        outcome = Outcome.ANSWERED if reply.stopped else Outcome.TRUNCATED
        return Trajectory(scene.question.id, sample, (coarse, crop), (look, read), outcome, box_outcome)

    async def answer_at_once(self, scene: Scene, sample: int, generate: Generate) -> Trajectory:
        """A baseline: the answer from the coarse view alone, in one turn, by the template ``direct``.

        Raises ReservedText, ValueError as ``open_scene`` does."""
        prompts = self.config.prompts
        prompt = self._encode(
            self.family.first_prompt(prompts.system, fill(prompts.direct, scene.question, self.family))
        )
        reply = await generate(prompt, [scene.coarse], 0)
        outcome = Outcome.ANSWERED if reply.stopped else Outcome.TRUNCATED
        turns = (_turn(prompt, reply),)
        return Trajectory(scene.question.id, sample, (scene.coarse,), turns, outcome, BoxOutcome.NO_TAG)

    def _with_box(self, reply: Completion, box: Box, coarse: View) -> Completion:
        corners = ", ".join(map(str, self.family.write_corners(box, coarse)))
        thought = reply.text.partition("<zoom>")[0]
        text = f"{thought}<zoom>[{corners}]</zoom>"
        ids = self._encode(text + self.family.turn_end)
        return _Spoken(ids, text, reply.prompt_length, reply.weight_version, cached_tokens=reply.cached_tokens)

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special_tokens=False))


def read_box(reply: str, coarse: View, family: ModelFamily) -> tuple[Box | None, BoxOutcome]:
    """The one path from text to a box in original pixels. Never raises; None exactly where the outcome is
    a refusal."""
    corners = parse_zoom(reply)
    if isinstance(corners, BoxOutcome):
        return None, corners
    return images.locate(corners, coarse, family)


@dataclass(frozen=True, slots=True)
class _Spoken:
    """A reply that nobody sampled."""

    token_ids: tuple[int, ...]
    text: str
    prompt_length: int
    weight_version: int
    cached_tokens: int
    updates: tuple[tuple[int, int], ...] = ()
    stopped: bool = True

    @property
    def logprobs(self) -> tuple[float, ...]:
        return (math.nan,) * len(self.token_ids)


def _turn(prompt: Sequence[int], reply: Completion) -> Turn:
    return Turn(
        prompt_ids=np.asarray(prompt, np.int32),
        completion_ids=np.asarray(reply.token_ids, np.int32),
        logprobs=np.asarray(reply.logprobs, np.float32),
        text=reply.text,
        finish=Finish.STOP if reply.stopped else Finish.LENGTH,
        engine_prompt_length=reply.prompt_length,
        policy_version=reply.weight_version,
        engine_cached_tokens=reply.cached_tokens,
        updates=tuple(reply.updates),
    )
