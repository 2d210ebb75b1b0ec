"""The episode: two turns, one trajectory. ``generate`` is passed in, so this module knows no engine."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ergo_rl.episodes import images
from ergo_rl.episodes.config import BoxNotation, EpisodeConfig, OnBadBox
from ergo_rl.episodes.families import ModelFamily, Tokenizer
from ergo_rl.episodes.prompts import fill, parse_answer, parse_box, parse_zoom
from ergo_rl.episodes.types import (
    Box,
    BoxOutcome,
    Completion,
    Finish,
    Outcome,
    Pixels,
    Question,
    Trajectory,
    Turn,
    View,
)
from ergo_rl.errors import ErgoError

Generate = Callable[[Sequence[int], Sequence[View], int], Awaitable[Completion]]
"""Called with (token ids of the whole conversation so far, one placeholder per image; its views; turn 0 or 1). Raises
TurnRefused."""


class TurnRefused(ErgoError, ValueError):
    """``generate`` cannot reply to this prompt, most often because it is longer than the model's context."""


@dataclass(frozen=True, slots=True)
class PreparedQuestion:
    """What all samples of a question share: decoded and encoded once, never copied per sample."""

    question: Question
    pixels: Pixels
    coarse: View
    coarse_prompt: tuple[int, ...]
    """Token ids of turn 1's whole prompt, one placeholder for the coarse view."""
    fine_prompt: tuple[int, ...]
    """Token ids of what turn 2 adds, one placeholder for the crop."""


class CoarseToFine:
    """Runs two-turn episodes: coarse view -> box -> crop at original resolution -> answer.

    Example::

        episodes = CoarseToFine(family, tokenizer, EpisodeConfig())
        prepared = await asyncio.to_thread(episodes.prepare, question)
        trajectories = [await episodes.run(prepared, sample, generate) for sample in range(8)]
    """

    def __init__(self, family: ModelFamily, tokenizer: Tokenizer, config: EpisodeConfig) -> None:
        self.family, self.tokenizer, self.config = family, tokenizer, config

    def prepare(self, question: Question) -> PreparedQuestion:
        """Decode a question's image and encode its prompts (CPU work: call it in a thread).

        Raises UnreadableImage or ReservedText where no episode can be run on the question."""
        config = self.config
        pixels = images.decode(question.image, config.max_image_pixels)
        try:
            coarse = images.view(pixels, images.full_box(pixels), self.family, config.coarse_tokens)
        except ValueError as error:  # too thin for the family
            raise images.UnreadableImage(str(error)) from error
        first = self.family.first_prompt(config.prompts.system, fill(config.prompts.coarse, question, self.family))
        return PreparedQuestion(question, pixels, coarse, self._encode(first), self._fine_prompt(question))

    async def run(
        self, prepared: PreparedQuestion, sample: int, generate: Generate, box: Box | None = None
    ) -> Trajectory:
        """Run one episode: turn 1 sees the coarse view and names a box, turn 2 sees that crop and answers.

        ``box`` replaces the policy's box (baselines of an evaluation). The first turn of such a trajectory was not
        sampled: its log-probs are NaN, so that no loss can be computed from it.

        A turn 2 that is refused ends the episode as truncated: what turn 1 wrote left no room for it. Raises
        TurnRefused where turn 1 is, and UnreadableImage for a ``box`` that no crop can show."""
        coarse, question_id = prepared.coarse, prepared.question.id
        reply: Completion = await generate(prepared.coarse_prompt, [coarse], 0)
        if box is not None:
            reply = self._force_box(reply, box, coarse)
        first = _turn(prepared.coarse_prompt, reply)
        if not reply.stopped:
            return Trajectory(question_id, sample, (coarse,), (first,), Outcome.TRUNCATED, BoxOutcome.NO_TAG)

        named, box_outcome = read_box(reply.text, coarse, self.family, self.config.box_notation)
        box = box or named
        if box is None and self.config.on_bad_box is OnBadBox.WHOLE_IMAGE:
            box = coarse.box
        if box is None:
            return Trajectory(question_id, sample, (coarse,), (first,), Outcome.BAD_BOX, box_outcome)

        crop = await asyncio.to_thread(self.crop, prepared, box)
        # The sampled ids, not the text encoded again: the engine's prefix cache and the learner see the same tokens.
        conversation = (*prepared.coarse_prompt, *reply.token_ids, *prepared.fine_prompt)
        try:
            reply = await generate(conversation, [coarse, crop], 1)
        except TurnRefused:  # costs this sample alone, not its group
            return Trajectory(question_id, sample, (coarse,), (first,), Outcome.TRUNCATED, box_outcome)
        second = _turn(prepared.fine_prompt, reply)
        outcome = Outcome.ANSWERED if reply.stopped else Outcome.TRUNCATED
        return Trajectory(question_id, sample, (coarse, crop), (first, second), outcome, box_outcome)

    async def replay(
        self, prepared: PreparedQuestion, played: Trajectory, views: Sequence[View], generate: Generate
    ) -> str | None:
        """Play turn 2 again, behind turn 1 as it was ``played``, with ``views`` in place of those that the policy
        looked at; without any, turn 2 comes as text alone. Returns the answer that ``answer_of`` gives of an episode:
        None where there is none, or where the reply was cut off or refused."""
        fine = prepared.fine_prompt if views else self._fine_prompt(prepared.question, image=False)
        conversation = (*prepared.coarse_prompt, *played.turns[0].completion_ids.tolist(), *fine)
        try:
            reply = await generate(conversation, [prepared.coarse, *views], 1)
        except TurnRefused:
            return None
        return parse_answer(reply.text) if reply.stopped else None

    def crop(self, prepared: PreparedQuestion, box: Box) -> View:
        """Cut ``box`` out of the original. Raises UnreadableImage for a box that cannot be shown; the policy's own was
        checked when it was read."""
        try:
            return images.view(prepared.pixels, box, self.family, self.config.fine_tokens)
        except ValueError as error:
            raise images.UnreadableImage(f"the box {box} cannot be shown: {error}") from error

    async def run_single_turn(self, prepared: PreparedQuestion, sample: int, generate: Generate) -> Trajectory:
        """Run a baseline: the answer from the coarse view alone, in one turn, by the template ``direct``.

        Raises ReservedText, ValueError as ``prepare`` does."""
        prompts = self.config.prompts
        words = fill(prompts.direct, prepared.question, self.family)
        prompt = self._encode(self.family.first_prompt(prompts.system, words))
        reply = await generate(prompt, [prepared.coarse], 0)
        outcome = Outcome.ANSWERED if reply.stopped else Outcome.TRUNCATED
        turns = (_turn(prompt, reply),)
        return Trajectory(prepared.question.id, sample, (prepared.coarse,), turns, outcome, BoxOutcome.NO_TAG)

    def _force_box(self, reply: Completion, box: Box, coarse: View) -> Completion:
        corners = ", ".join(map(str, self.family.write_corners(box, coarse)))
        thought = reply.text.partition("<zoom>")[0]
        text = f"{thought}<zoom>[{corners}]</zoom>"
        ids = self._encode(text + self.family.turn_end)
        return ForcedCompletion(ids, text, reply.prompt_length, reply.weight_version, reply.cached_tokens)

    def _fine_prompt(self, question: Question, image: bool = True) -> tuple[int, ...]:
        words = fill(self.config.prompts.fine, question, self.family)
        # No word of the question can be the placeholder: ``fill`` refuses special tokens.
        shown = words if image else words.replace(self.family.image_placeholder, "")
        return self._encode(self.family.next_prompt(shown))

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special_tokens=False))


def read_box(
    reply: str, coarse: View, family: ModelFamily, notation: BoxNotation = BoxNotation.ZOOM
) -> tuple[Box | None, BoxOutcome]:
    """Read a reply's box, in original pixels: the only path from text to a box.

    Never raises; the box is None exactly where the outcome is a refusal."""
    corners = parse_zoom(reply) if notation is BoxNotation.ZOOM else parse_box(reply)
    if isinstance(corners, BoxOutcome):
        return None, corners
    return images.locate(corners, coarse, family)


@dataclass(frozen=True, slots=True)
class ForcedCompletion:
    """A ``Completion`` that was written, not sampled: it has no log-probs to learn from."""

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
