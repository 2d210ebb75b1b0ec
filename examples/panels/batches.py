"""The batches that tiny models are pretrained on: panels scenes with targets, for ``supervised``.

Batch number ``step`` depends on (seed, step) alone. Scenes are drawn in a worker process, so that training does not
wait for them.
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
from ergo_rl.examples.panels.scenes import COLOURS, MARKS, PROMPTS, Panel, PanelsConfig, Split, ask, scene
from ergo_rl.examples.panels.supervised import Conversation, DenseBatch, ReplyBatch, collate
from ergo_rl.examples.panels.targets import (
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
    """Yield batches from step ``first`` on, made in one worker process."""
    return DataLoader(
        ByStep(make, steps), sampler=range(first, steps), batch_size=None, num_workers=1, prefetch_factor=4
    )


@dataclass(frozen=True)
class TowerTask:
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
class CropFeatures:
    """A crop to read from, as the frozen tower sees it."""

    asked: int
    """Index of the panel that the question is about."""
    box: Box
    legible: bool
    grid: tuple[int, int, int]
    """Time, height and width in patches."""
    features: Tensor | None = None
    """float16[visual tokens, width]; None before the tower has seen it."""


@dataclass(frozen=True, slots=True, eq=False)
class SceneFeatures:
    """A scene without its pixels, as the frozen tower sees it."""

    panels: tuple[Panel, ...]
    crops: tuple[CropFeatures, ...]
    coarse: Tensor | None = None
    """float16[36, width]; None before the tower has seen it."""


@dataclass(frozen=True)
class SceneBatches:
    """Batch n of ``count``: ``scenes`` scenes with ``crops`` crops each, ready for the tower.

    In the first eighth of all batches a scene has one panel, in the second eighth two, then four: a gentle start."""

    family: ModelFamily
    image_processor: Any
    seed: int
    count: int
    scenes: int = 8
    crops: int = 2

    def __call__(self, batch: int) -> tuple[list[SceneFeatures], Tensor, Tensor]:
        """Return (scenes without features, pixel values, grids of all views)."""
        panels = 1 if batch < self.count // 8 else 2 if batch < self.count // 4 else 4
        scenes: list[SceneFeatures] = []
        views: list[View] = []
        for place in range(self.scenes):
            drawn = scene(PanelsConfig(panels=panels), self.seed, Split.LANGUAGE, batch * self.scenes + place)
            rng = np.random.default_rng([self.seed, batch, place])
            views.append(coarse_view(drawn, self.family))
            crops: list[CropFeatures] = []
            for _ in range(self.crops):
                asked = int(rng.integers(panels))
                target = drawn.panels[asked]
                view = crop_view(drawn, crop_to_read(drawn, target, rng), self.family)
                assert target.mark_box is not None
                views.append(view)
                crops.append(CropFeatures(asked, view.box, legible(view, target.mark_box), grid(self.family, view)))
            scenes.append(SceneFeatures(drawn.panels, tuple(crops)))
        pixels, grids = self.family.image_inputs(self.image_processor, views)
        return scenes, pixels, grids


@torch.no_grad()
def compute_features(visual: Any, batches: SceneBatches, report: Callable[[int], None]) -> list[SceneFeatures]:
    """Run the tower once over every scene of every batch; keep its features in memory (25 KB a scene)."""
    scenes: list[SceneFeatures] = []
    merged = batches.family.merge_size**2
    for number, (drawn, pixels, grids) in enumerate(stream(batches, 0, batches.count)):
        features = visual(pixels, grid_thw=grids).pooler_output.half()
        parts = iter(torch.split(features, (grids.prod(-1) // merged).tolist()))
        for bare in drawn:
            coarse = next(parts).clone()
            crops = tuple(replace(crop, features=next(parts).clone()) for crop in bare.crops)
            scenes.append(replace(bare, coarse=coarse, crops=crops))
        report(number + 1)
    return scenes


@dataclass(frozen=True)
class ReplyTask:
    """Batches of conversations about scenes.

    A policy batch has ``looks`` conversations that teach to point (turn 1) and ``reads`` that teach to read (turn 2,
    after a turn 1 that is shown but not taught); a reward batch has ``verifies`` that teach to read from a crop
    alone."""

    scenes: Sequence[SceneFeatures]
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
        # The easy eighths come first: one panel until a tenth of the steps, two until a fifth, then everything.
        share = 0.125 if step < 0.1 * self.steps else 0.25 if step < 0.2 * self.steps else 1.0
        rows = [
            make(self.scenes[int(rng.integers(int(share * len(self.scenes))))], rng)
            for make, count in ((self.look, self.looks), (self.read, self.reads), (self.verify, self.verifies))
            for _ in range(count)
        ]
        ids = self.tokenizer.convert_tokens_to_ids
        return collate(rows, ids(self.family.image_pad), ids("<|endoftext|>"))

    def look(self, scene_features: SceneFeatures, rng: np.random.Generator) -> Conversation:
        panel = scene_features.panels[int(rng.integers(len(scene_features.panels)))]
        prompt, reply = self._turn_1(panel, point(panel.box, self.pointing, _COARSE.box.width, rng))
        conversation = self._conversation(
            [(prompt, False), (reply, True)], [scene_features.coarse], [grid(self.family, _COARSE)]
        )
        (colour,) = self.tokenizer.encode(f" {panel.colour}", add_special_tokens=False)
        return replace(conversation, word=conversation.ids.index(colour), edges=edge_bins(panel.box, _COARSE))

    def read(self, scene_features: SceneFeatures, rng: np.random.Generator) -> Conversation:
        crop = scene_features.crops[int(rng.integers(len(scene_features.crops)))]
        panel = scene_features.panels[crop.asked]
        prompt, reply = self._turn_1(panel, crop.box)
        fine = self.family.next_prompt(fill(PROMPTS.fine, _question(panel), self.family))
        parts = [
            (prompt + reply, False),
            (fine, False),
            (read_reply(self._answer(crop, panel, rng), self.family), True),
        ]
        return self._conversation(
            parts, [scene_features.coarse, crop.features], [grid(self.family, _COARSE), crop.grid]
        )

    def verify(self, scene_features: SceneFeatures, rng: np.random.Generator) -> Conversation:
        crop = scene_features.crops[int(rng.integers(len(scene_features.crops)))]
        panel = scene_features.panels[crop.asked]
        prompt = self.family.first_prompt(PROMPTS.system, fill(PROMPTS.verify, _question(panel), self.family))
        reply = verify_reply(self._answer(crop, panel, rng), self.family)
        return self._conversation([(prompt, False), (reply, True)], [crop.features], [crop.grid])

    def _turn_1(self, panel: Panel, box: Box) -> tuple[str, str]:
        prompt = self.family.first_prompt(PROMPTS.system, fill(PROMPTS.coarse, _question(panel), self.family))
        return prompt, look_reply(panel, _COARSE, box, self.family)

    @staticmethod
    def _answer(crop: CropFeatures, panel: Panel, rng: np.random.Generator) -> str:
        return panel.mark if crop.legible else MARKS[int(rng.integers(len(MARKS)))]

    def _conversation(
        self, parts: list[tuple[str, bool]], features: list[Tensor | None], grids: list[tuple[int, int, int]]
    ) -> Conversation:
        ids: list[int] = []
        taught: list[bool] = []
        for text, learn in parts:  # encoded part by part, as an episode does
            tokens = self.tokenizer.encode(text, add_special_tokens=False)
            ids += tokens
            taught += [learn] * len(tokens)
        return Conversation(ids, taught, [feature.float() for feature in features if feature is not None], grids)


def grid(family: ModelFamily, view: View) -> tuple[int, int, int]:
    """Return time, height and width of a view in patches."""
    return 1, view.height // family.patch_size, view.width // family.patch_size


def _question(panel: Panel) -> Question:
    return Question(id="", image=b"", text=ask(panel.colour), answer=panel.mark)


_SIDE = PanelsConfig().side
_COARSE = View(Box(0, 0, _SIDE, _SIDE), np.zeros((168, 168, 3), np.uint8))
"""The size of every coarse view; features stand for its pixels."""
