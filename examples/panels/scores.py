"""What a pretrained tiny model can do, measured with plain ``transformers`` generation on held-out panels."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ergo_rl.episodes.config import EpisodeConfig
from ergo_rl.episodes.episode import CoarseToFine
from ergo_rl.episodes.families import ModelFamily, Tokenizer
from ergo_rl.episodes.prompts import fill, parse_answer
from ergo_rl.episodes.types import Box, Question, Trajectory, View
from ergo_rl.examples.panels.scenes import PROMPTS, VIEW_TOKENS, PanelScene, PanelsConfig, Split, ask, question, scene
from ergo_rl.examples.panels.targets import LEGIBLE_AREA, Pointing, crop_anywhere, crop_view, crop_with, point

ORIGINAL_AREA = 168 * 168 / 672**2
"""Crops of up to this share of the default scene are shown at original resolution, or enlarged."""
_TURNS = (
    re.compile(r"\s*<think>.+?</think>\s*<zoom>[^<>]+</zoom>\s*", re.DOTALL),
    re.compile(r"\s*<think>.+?</think>\s*<answer>[^<>]+</answer>\s*", re.DOTALL),
)


@dataclass(frozen=True, slots=True)
class PlainCompletion:
    """A ``Completion`` as far as an episode needs it; its log-probs are zeros."""

    token_ids: tuple[int, ...]
    text: str
    stopped: bool
    prompt_length: int
    logprobs: tuple[float, ...] = ()
    weight_version: int = 0
    updates: tuple[tuple[int, int], ...] = ()
    cached_tokens: int = 0


@dataclass
class PlainGenerate:
    """Batched ``model.generate``, usable as the ``generate`` of an episode: requests of concurrent episodes that wait
    at the same moment go through the model together."""

    model: Any
    tokenizer: Any
    family: ModelFamily
    image_processor: Any
    temperature: float = 0.0
    max_tokens: int = 48
    batch: int = 128
    _waiting: list[tuple[Sequence[int], Sequence[View], asyncio.Future[PlainCompletion]]] = field(default_factory=list)

    async def __call__(self, token_ids: Sequence[int], views: Sequence[View], turn: int) -> PlainCompletion:
        future: asyncio.Future[PlainCompletion] = asyncio.get_running_loop().create_future()
        self._waiting.append((token_ids, views, future))
        if len(self._waiting) == 1:
            asyncio.get_running_loop().call_later(0.05, self._flush)
        return await future

    def _flush(self) -> None:
        batch, self._waiting = self._waiting[: self.batch], self._waiting[self.batch :]
        replies = self.run([(token_ids, views) for token_ids, views, _ in batch])
        for (_, _, future), reply in zip(batch, replies, strict=True):
            future.set_result(reply)
        if self._waiting:
            asyncio.get_running_loop().call_later(0.05, self._flush)

    @torch.no_grad()
    def run(self, requests: Sequence[tuple[Sequence[int], Sequence[View]]]) -> list[PlainCompletion]:
        """Return a reply for each (token ids with one placeholder per image, views)."""
        ids = self.tokenizer.convert_tokens_to_ids
        image_id, stop = ids(self.family.image_pad), ids(self.family.turn_end)
        prompts = [self._expand(token_ids, views, image_id) for token_ids, views in requests]
        longest = max(map(len, prompts))
        input_ids = torch.tensor([[ids("<|endoftext|>")] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        pixels, grids = self.family.image_inputs(
            self.image_processor, [view for _, views in requests for view in views]
        )
        sampling: dict[str, Any] = {"do_sample": False}
        if self.temperature:
            sampling = {"do_sample": True, "temperature": self.temperature, "top_k": 0, "top_p": 1.0}
            sampling["suppress_tokens"] = list(self.family.banned_ids(self.tokenizer))
        output = self.model.generate(
            input_ids=input_ids,
            attention_mask=mask,
            mm_token_type_ids=(input_ids == image_id).long(),
            pixel_values=pixels,
            image_grid_thw=grids,
            max_new_tokens=self.max_tokens,
            **sampling,
        )
        replies = []
        for prompt, row in zip(prompts, output[:, longest:].tolist(), strict=True):
            stopped = stop in row
            tokens = row[: row.index(stop) + 1] if stopped else row
            text = self.tokenizer.decode(tokens, skip_special_tokens=True)
            replies.append(PlainCompletion(tuple(tokens), text, stopped, len(prompt), (0.0,) * len(tokens)))
        return replies

    def _expand(self, token_ids: Sequence[int], views: Sequence[View], image_id: int) -> list[int]:
        images = iter(views)
        return [
            token
            for given in token_ids
            for token in ([given] * self.family.visual_tokens(next(images)) if given == image_id else [given])
        ]


def run_all(generate: PlainGenerate, questions: Sequence[Question]) -> list[Trajectory]:
    """Run every question once through the real two-turn episode."""
    config = EpisodeConfig(coarse_tokens=VIEW_TOKENS, fine_tokens=VIEW_TOKENS, prompts=PROMPTS)
    episodes = CoarseToFine(generate.family, generate.tokenizer, config)

    async def gather() -> list[Trajectory]:
        return list(await asyncio.gather(*(episodes.run(episodes.prepare(asked), 0, generate) for asked in questions)))

    return asyncio.run(gather())


def policy_scores(
    model: Any, tokenizer: Tokenizer, family: ModelFamily, image_processor: Any, number: int
) -> dict[str, float]:
    """Measure a policy on ``number`` held-out questions, greedily, as shares: coverage (the crop contains the mark's
    box), legible coverage (and is at most 16.5 % of the scene), mean area ratio, accuracy, accuracy where the mark is
    legible or not covered; well-formed replies, greedy and at temperature 1."""
    questions = [question(PanelsConfig(), 0, Split.HELDOUT, index) for index in range(number)]
    generate = PlainGenerate(model, tokenizer, family, image_processor)
    trajectories = run_all(generate, questions)
    covered = np.array([_covers(trajectory, asked) for trajectory, asked in zip(trajectories, questions, strict=True)])
    answers = [_answer(trajectory) for trajectory in trajectories]
    right = np.array([answer == asked.answer for answer, asked in zip(answers, questions, strict=True)])
    ratios = np.array([trajectory.area_ratio for trajectory in trajectories], np.float64)  # None becomes NaN
    readable = covered & (ratios <= LEGIBLE_AREA)
    torch.manual_seed(0)
    generate.temperature = 1.0
    sampled = run_all(generate, questions)
    sampled_covered = [_covers(trajectory, asked) for trajectory, asked in zip(sampled, questions, strict=True)]
    return {
        "questions": number,
        "coverage": float(covered.mean()),
        "coverage_sampled": float(np.mean(sampled_covered)),
        "legible_coverage": float(readable.mean()),
        "area_ratio": float(np.nanmean(ratios)),
        "accuracy": float(right.mean()),
        "accuracy_where_legible": float(right[readable].mean()),
        "accuracy_where_not_covered": float(right[~covered].mean()),
        "well_formed": float(np.mean([_well_formed(trajectory) for trajectory in trajectories])),
        "well_formed_sampled": float(np.mean([_well_formed(trajectory) for trajectory in sampled])),
    }


def _covers(trajectory: Trajectory, asked: Question) -> bool:
    return trajectory.crop is not None and trajectory.crop.box.contains(asked.boxes[0])


def _answer(trajectory: Trajectory) -> str | None:
    return parse_answer(trajectory.turns[1].text) if len(trajectory.turns) == 2 else None


def _well_formed(trajectory: Trajectory) -> bool:
    return len(trajectory.turns) == 2 and all(
        form.fullmatch(turn.text) for form, turn in zip(_TURNS, trajectory.turns, strict=True)
    )


def reward_scores(
    model: Any, tokenizer: Tokenizer, family: ModelFamily, image_processor: Any, number: int
) -> dict[str, float]:
    """Measure a reward model's greedy accuracy on ``number`` held-out scenes (chance is 0.25) by what the crop shows.

    original_resolution: the mark, at original resolution or enlarged (up to 6 % of the scene); legible: the mark, up to
    16.5 %; other_panel, anywhere_else: nothing of it; cut: a part of it; missed: not all of it, in boxes as badly drawn
    as the pretrained policy's; too_large: all of it, in more than a quarter of the scene; whole_scene."""
    generate = PlainGenerate(model, tokenizer, family, image_processor, max_tokens=8)
    scores: dict[str, float] = {"questions": number}
    for name in (
        "original_resolution",
        "legible",
        "other_panel",
        "anywhere_else",
        "cut",
        "missed",
        "too_large",
        "whole_scene",
    ):
        right = []
        for start in range(0, number, generate.batch):
            requests, answers = [], []
            for index in range(start, min(start + generate.batch, number)):
                drawn = scene(PanelsConfig(), 0, Split.HELDOUT, index)
                view = crop_view(drawn, _crop(name, drawn, np.random.default_rng([1, index])), family)
                text = fill(PROMPTS.verify, Question("", b"", ask(drawn.target.colour), drawn.target.mark), family)
                requests.append(
                    (tokenizer.encode(family.first_prompt(PROMPTS.system, text), add_special_tokens=False), [view])
                )
                answers.append(drawn.target.mark)
            replies = generate.run(requests)
            right += [parse_answer(reply.text) == answer for reply, answer in zip(replies, answers, strict=True)]
        scores[name] = float(np.mean(right))
    return scores


def _crop(kind: str, drawn: PanelScene, rng: np.random.Generator) -> Box:
    """Draw a crop of a kind: again and again until as much of the mark is in it as the kind asks for."""
    mark, side = drawn.target.mark_box, drawn.pixels.shape[0]
    assert mark is not None
    others = [panel.mark_box for panel in drawn.panels if panel is not drawn.target and panel.mark_box is not None]

    def around(target: Box, smallest: float, largest: float) -> Box:
        return crop_with(target, side, smallest, largest, rng)

    kinds: dict[str, tuple[Callable[[], Box], Callable[[int], bool]]] = {
        "original_resolution": (lambda: around(mark, 0.0017, ORIGINAL_AREA), lambda shown: shown == mark.area),
        "legible": (lambda: around(mark, 0.0017, LEGIBLE_AREA), lambda shown: shown == mark.area),
        "too_large": (lambda: around(mark, 0.27, 0.9), lambda shown: shown == mark.area),
        "whole_scene": (lambda: Box(0, 0, side, side), lambda shown: shown == mark.area),
        "other_panel": (
            lambda: around(others[int(rng.integers(len(others)))], 0.0017, LEGIBLE_AREA),
            lambda shown: shown == 0,
        ),
        "anywhere_else": (lambda: crop_anywhere(side, rng), lambda shown: shown == 0),
        "cut": (lambda: crop_anywhere(side, rng), lambda shown: 0 < shown < mark.area),
        "missed": (lambda: point(drawn.target.box, Pointing(), side, rng), lambda shown: shown < mark.area),
    }
    draw, fits = kinds[kind]
    while True:
        box = draw()
        if fits(
            max(0, min(box.x2, mark.x2) - max(box.x1, mark.x1)) * max(0, min(box.y2, mark.y2) - max(box.y1, mark.y1))
        ):
            return box
