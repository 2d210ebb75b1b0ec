"""The batches that tiny models are pretrained on: panels scenes as lessons for ``learners.supervised``.

Batch number ``step`` depends on (seed, step) alone. Scenes are rendered in one worker process, so that training waits
for nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ergo_rl.episodes.families import ModelFamily
from ergo_rl.episodes.prompts import fill
from ergo_rl.episodes.types import Box, Question, View
from ergo_rl.examples.panels.lessons import (
    EDGE_BIN,
    Pointing,
    TokenLabels,
    coarse_view,
    crop_to_read,
    crop_view,
    edge_bins,
    legible,
    look_reply,
    point,
    read_reply,
    token_labels,
    verify_reply,
)
from ergo_rl.examples.panels.scenes import COLOURS, MARKS, PROMPTS, Panel, PanelsConfig, Split, ask, scene
from ergo_rl.examples.panels.supervised import DenseBatch, ReplyBatch, Row, pack

EDGE_BINS = 168 // EDGE_BIN
TEXTS = tuple(
    text
    for colour in COLOURS
    for mark in MARKS
    for text in (
        f"<|im_start|>user\n{ask(colour)}<|im_end|>\n<|im_start|>assistant\n<think>{colour} panel, row 1 column 2",
        f"<|im_start|>system\n<|im_end|>\n<think>a {mark}</think><answer>{mark}</answer><zoom>[1,2,3,4]</zoom>",
    )
)
"""What the tokenizer is trained on."""


class ByStep(Dataset[Any]):
    """Item number ``step`` is the batch of that step."""

    def __init__(self, make: Callable[[int], Any], steps: int) -> None:
        self.make, self.steps = make, steps

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Any:
        return self.make(step)


def stream(make: Callable[[int], Any], first: int, steps: int) -> Iterable[Any]:
    """Batches from step ``first`` on, made in one worker process."""
    return DataLoader(
        ByStep(make, steps), sampler=range(first, steps), batch_size=None, num_workers=1, prefetch_factor=4
    )


@dataclass(frozen=True)
class TowerLessons:
    """Dense batches: ``scenes`` coarse views and ``crops`` crops of each."""

    family: ModelFamily
    image_processor: Any
    seed: int
    scenes: int = 12
    crops: int = 4

    def __call__(self, step: int) -> DenseBatch:
        views: list[View] = []
        labels: list[TokenLabels] = []
        for place in range(self.scenes):
            drawn = scene(PanelsConfig(), self.seed, Split.PRETRAIN, step * self.scenes + place)
            rng = np.random.default_rng([self.seed, step, place])
            whole = coarse_view(drawn, self.family)
            crops = [
                crop_view(
                    drawn, crop_to_read(drawn, drawn.panels[int(rng.integers(len(drawn.panels)))], rng), self.family
                )
                for _ in range(self.crops)
            ]
            views += [whole, *crops]
            labels.append(token_labels(drawn, whole, self.family))
            labels += [token_labels(drawn, crop, self.family).without_edges() for crop in crops]
        pixels, grids = self.family.image_inputs(self.image_processor, views)
        colour, mark, edges, border = (
            torch.from_numpy(np.concatenate([getattr(label, name) for label in labels]))
            for name in ("colour", "mark", "edges", "border")
        )
        return DenseBatch(pixels, grids, colour, mark, edges, border)


@dataclass(frozen=True, slots=True, eq=False)
class Crop:
    """A crop of a lesson in reading. ``asked``: place of the panel that the question is about."""

    asked: int
    box: Box
    legible: bool
    grid: tuple[int, int, int]
    features: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """A scene without its pixels, as the frozen tower sees it: ``coarse`` float16[36, width]."""

    panels: tuple[Panel, ...]
    crops: tuple[Crop, ...]
    coarse: Tensor | None = None


@dataclass(frozen=True)
class AlbumPages:
    """Page number n: ``scenes`` scenes with ``crops`` crops each, ready for the tower. The first eighth of all pages
    has one panel to a scene, the second eighth two, the others four: a gentle start."""

    family: ModelFamily
    image_processor: Any
    seed: int
    pages: int
    scenes: int = 8
    crops: int = 2

    def __call__(self, page: int) -> tuple[list[Seen], Tensor, Tensor]:
        panels = 1 if page < self.pages // 8 else 2 if page < self.pages // 4 else 4
        seen: list[Seen] = []
        views: list[View] = []
        for place in range(self.scenes):
            drawn = scene(PanelsConfig(panels=panels), self.seed, Split.ALBUM, page * self.scenes + place)
            rng = np.random.default_rng([self.seed, page, place])
            views.append(coarse_view(drawn, self.family))
            crops: list[Crop] = []
            for _ in range(self.crops):
                asked = int(rng.integers(panels))
                target = drawn.panels[asked]
                view = crop_view(drawn, crop_to_read(drawn, target, rng), self.family)
                assert target.mark_box is not None
                views.append(view)
                crops.append(Crop(asked, view.box, legible(view, target.mark_box), grid(self.family, view)))
            seen.append(Seen(drawn.panels, tuple(crops)))
        pixels, grids = self.family.image_inputs(self.image_processor, views)
        return seen, pixels, grids


@torch.no_grad()
def fill_album(visual: Any, pages: AlbumPages, report: Callable[[int], None]) -> list[Seen]:
    """Every scene of every page with the tower's features, in memory (25 KB a scene)."""
    album: list[Seen] = []
    merged = pages.family.merge_size**2
    for number, (seen, pixels, grids) in enumerate(stream(pages, 0, pages.pages)):
        features = visual(pixels, grid_thw=grids).pooler_output.half()
        parts = iter(torch.split(features, (grids.prod(-1) // merged).tolist()))
        for one in seen:
            coarse = next(parts).clone()
            crops = tuple(replace(crop, features=next(parts).clone()) for crop in one.crops)
            album.append(replace(one, coarse=coarse, crops=crops))
        report(number + 1)
    return album


@dataclass(frozen=True)
class ReplyLessons:
    """Batches of conversations from an album. A policy batch has ``looks`` lessons in pointing (turn 1) and ``reads``
    in reading (turn 2, after a turn 1 that is shown but not taught); a reward batch has ``verifies``."""

    album: Sequence[Seen]
    tokenizer: Any
    family: ModelFamily
    seed: int
    steps: int
    pointing: Pointing
    looks: int = 0
    reads: int = 0
    verifies: int = 0

    def __call__(self, step: int) -> ReplyBatch:
        rng = np.random.default_rng([self.seed, step])
        # the easy eighths come first: one panel until a tenth of the steps, two until a fifth, then everything
        share = 0.125 if step < 0.1 * self.steps else 0.25 if step < 0.2 * self.steps else 1.0
        rows = [
            lesson(self.album[int(rng.integers(int(share * len(self.album))))], rng)
            for lesson, count in ((self.look, self.looks), (self.read, self.reads), (self.verify, self.verifies))
            for _ in range(count)
        ]
        ids = self.tokenizer.convert_tokens_to_ids
        return pack(rows, ids(self.family.image_pad), ids("<|endoftext|>"))

    def look(self, seen: Seen, rng: np.random.Generator) -> Row:
        panel = seen.panels[int(rng.integers(len(seen.panels)))]
        prompt, reply = self._turn_1(panel, point(panel.box, self.pointing, _COARSE.box.width, rng))
        row = self._row([(prompt, False), (reply, True)], [seen.coarse], [grid(self.family, _COARSE)])
        (colour,) = self.tokenizer.encode(f" {panel.colour}", add_special_tokens=False)
        return replace(row, word=row.ids.index(colour), edges=edge_bins(panel.box, _COARSE))

    def read(self, seen: Seen, rng: np.random.Generator) -> Row:
        crop = seen.crops[int(rng.integers(len(seen.crops)))]
        panel = seen.panels[crop.asked]
        prompt, reply = self._turn_1(panel, crop.box)
        fine = self.family.next_prompt(fill(PROMPTS.fine, _question(panel), self.family))
        parts = [
            (prompt + reply, False),
            (fine, False),
            (read_reply(self._answer(crop, panel, rng), self.family), True),
        ]
        return self._row(parts, [seen.coarse, crop.features], [grid(self.family, _COARSE), crop.grid])

    def verify(self, seen: Seen, rng: np.random.Generator) -> Row:
        crop = seen.crops[int(rng.integers(len(seen.crops)))]
        panel = seen.panels[crop.asked]
        prompt = self.family.first_prompt(PROMPTS.system, fill(PROMPTS.verify, _question(panel), self.family))
        reply = verify_reply(self._answer(crop, panel, rng), self.family)
        return self._row([(prompt, False), (reply, True)], [crop.features], [crop.grid])

    def _turn_1(self, panel: Panel, box: Box) -> tuple[str, str]:
        prompt = self.family.first_prompt(PROMPTS.system, fill(PROMPTS.coarse, _question(panel), self.family))
        return prompt, look_reply(panel, _COARSE, box, self.family)

    @staticmethod
    def _answer(crop: Crop, panel: Panel, rng: np.random.Generator) -> str:
        return panel.mark if crop.legible else MARKS[int(rng.integers(len(MARKS)))]

    def _row(
        self, parts: list[tuple[str, bool]], features: list[Tensor | None], grids: list[tuple[int, int, int]]
    ) -> Row:
        ids: list[int] = []
        taught: list[bool] = []
        for text, learn in parts:  # encoded one by one, as an episode does
            tokens = self.tokenizer.encode(text, add_special_tokens=False)
            ids += tokens
            taught += [learn] * len(tokens)
        return Row(ids, taught, [feature.float() for feature in features if feature is not None], grids)


def grid(family: ModelFamily, view: View) -> tuple[int, int, int]:
    """Time, height and width in patches."""
    return 1, view.height // family.patch_size, view.width // family.patch_size


def _question(panel: Panel) -> Question:
    return Question(id="", image=b"", text=ask(panel.colour), answer=panel.mark)


_SIDE = PanelsConfig().side
_COARSE = View(Box(0, 0, _SIDE, _SIDE), np.zeros((168, 168, 3), np.uint8))
"""The size of every coarse view; its pixels are in the album's features."""
