"""Supervised learning for small models from scratch: dense labels for the vision tower, then replies.

A tiny model learns nothing about places from the language-model loss alone. So the vision tower is first taught with a
label for every visual token; then it is frozen and the language part is taught replies, from the tower's features,
which are computed once. One thread and seeded batches: the same seed gives the same weights.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Batch = TypeVar("Batch")
ReportProgress = Callable[[int, Mapping[str, float]], None]


@dataclass
class TrainingSchedule:
    """AdamW with linear warm-up and linear decay to a tenth."""

    steps: int = 1000
    """Optimiser steps."""
    rate: float = 1e-3
    """Highest learning rate."""
    warmup: int = 50
    """Steps of linear warm-up."""
    weight_decay: float = 0.01
    """AdamW weight decay."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    save_every: int = 100
    """Steps between checkpoints."""

    def factor(self, step: int) -> float:
        return min(1.0, (step + 1) / self.warmup) * max(0.1, 1 - step / self.steps)


def fit(
    module: nn.Module,
    loss: Callable[[Batch], tuple[Tensor, Mapping[str, float]]],
    batches: Callable[[int], Iterable[Batch]],
    schedule: TrainingSchedule,
    checkpoint: Path,
    report: ReportProgress,
) -> float:
    """Train the parameters of ``module`` that require a gradient; return the seconds it took, over all resumes.

    ``batches(first)`` yields the batches from step ``first`` on. A checkpoint that is there is continued: the batches
    depend on the step alone, so the result is the same as without the interruption."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=schedule.rate, weight_decay=schedule.weight_decay)
    first, seconds = 0, 0.0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        module.load_state_dict(saved["module"])
        optimizer.load_state_dict(saved["optimizer"])
        first, seconds = saved["step"], saved["seconds"]
    started = time.monotonic() - seconds
    if first < schedule.steps:
        for step, batch in enumerate(batches(first), start=first):
            for group in optimizer.param_groups:
                group["lr"] = schedule.rate * schedule.factor(step)
            value, figures = loss(batch)
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            torch.nn.utils.clip_grad_norm_(parameters, schedule.clip)
            optimizer.step()
            report(step + 1, {"loss": value.item(), **figures})
            if (step + 1) % schedule.save_every == 0 or step + 1 == schedule.steps:
                seconds = time.monotonic() - started
                _save(checkpoint, module, optimizer, step + 1, seconds)
            if step + 1 == schedule.steps:
                break
    return seconds


def is_finished(checkpoint: Path, schedule: TrainingSchedule) -> bool:
    """Return whether ``fit`` has done all steps of this checkpoint."""
    return checkpoint.exists() and torch.load(checkpoint, weights_only=True)["step"] >= schedule.steps


def _save(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer, step: int, seconds: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".new")
    state = {"module": module.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "seconds": seconds}
    torch.save(state, fresh)
    os.replace(fresh, path)


@dataclass(frozen=True, slots=True, eq=False)
class DenseBatch:
    """``pixel_values`` float[patches, channels], ``grids`` int64[images, 3]; labels per visual token, all images in a
    row: ``colour`` int64[N], ``mark`` int64[N] (the last class: a mark that the view cuts), ``edges`` int64[N, 4] (-100
    where there is none), ``border`` bool[N, 4]."""

    pixel_values: Tensor
    grids: Tensor
    colour: Tensor
    mark: Tensor
    edges: Tensor
    border: Tensor


class DenseTower(nn.Module):
    """A vision tower with linear heads on its visual tokens; the heads are thrown away afterwards."""

    def __init__(self, visual: nn.Module, width: int, colours: int, marks: int, bins: int) -> None:
        super().__init__()
        self.visual, self.bins, self.cut = visual, bins, 1 + marks
        self.colour, self.mark, self.edges = (nn.Linear(width, n) for n in (1 + colours, 2 + marks, 4 * bins))
        self.border = nn.Linear(width, 4)

    def loss(self, batch: DenseBatch) -> tuple[Tensor, Mapping[str, float]]:
        """Return the sum of four cross-entropies (nats), and the accuracies."""
        features = self.visual(batch.pixel_values, grid_thw=batch.grids).pooler_output
        colour, mark = self.colour(features), self.mark(features)
        edges = self.edges(features).view(-1, self.bins)
        rare = torch.ones(mark.shape[-1])
        rare[0] = 0.2  # most visual tokens hold no mark
        labels = batch.edges.flatten()
        value = (
            F.cross_entropy(colour, batch.colour)
            + F.cross_entropy(mark, batch.mark, weight=rare)
            + 0.5 * F.cross_entropy(edges, labels, ignore_index=-100)
            + F.binary_cross_entropy_with_logits(self.border(features), batch.border.float())
        )
        none, cut, known = batch.mark == 0, batch.mark == self.cut, labels >= 0
        whole = ~none & ~cut
        return value, {
            "colour": _accuracy(colour, batch.colour),
            "mark": _accuracy(mark[whole], batch.mark[whole]),
            "cut": _accuracy(mark[cut], batch.mark[cut]),
            "no_mark": _accuracy(mark[none], batch.mark[none]),
            "edge": _accuracy(edges[known], labels[known], within=1),
        }


def _accuracy(logits: Tensor, labels: Tensor, within: int = 0) -> float:
    return ((logits.argmax(-1) - labels).abs() <= within).float().mean().item()


@dataclass(frozen=True, slots=True, eq=False)
class Conversation:
    """A conversation and which part of it is taught."""

    ids: Sequence[int]
    """Token ids with one placeholder per image."""
    taught: Sequence[bool]
    """Which of ``ids`` are in the loss."""
    features: Sequence[Tensor]
    """Of each image, float[visual tokens, width]."""
    grids: Sequence[tuple[int, int, int]]
    """Of each image, (time, height, width) in patches."""
    word: int | None = None
    """Index in ``ids`` of the word that names what is asked about (see ``GroundedModel``)."""
    edges: tuple[int, int, int, int] = (-100, -100, -100, -100)
    """Bins of the box of what is asked about."""


@dataclass(frozen=True, slots=True, eq=False)
class ReplyBatch:
    """Rows with placeholders expanded, padded on the right. ``input_ids``, ``attention_mask``, ``token_types`` (1 on
    visual tokens) and ``labels`` (-100 where not taught) int64[B, S]; ``features`` one tensor per image; ``words``
    int64[W, 2] (row, place) of the words that name the things asked about, ``edges`` int64[W, 4] their boxes' bins."""

    input_ids: Tensor
    attention_mask: Tensor
    token_types: Tensor
    labels: Tensor
    grids: Tensor
    features: tuple[Tensor, ...]
    words: Tensor
    edges: Tensor


def collate(rows: Sequence[Conversation], image_id: int, pad_id: int) -> ReplyBatch:
    """Expand placeholders to visual tokens and pad on the right."""
    expanded = [_expand(row, image_id) for row in rows]
    length = max(len(ids) for ids, _ in expanded)
    input_ids = torch.full((len(rows), length), pad_id)
    labels, mask = torch.full_like(input_ids, -100), torch.zeros_like(input_ids)
    grounded = [number for number, row in enumerate(rows) if row.word is not None]
    for number, (ids, taught) in enumerate(expanded):
        row = torch.tensor(ids)
        input_ids[number, : len(ids)] = row
        mask[number, : len(ids)] = 1
        labels[number, : len(ids)] = torch.where(torch.tensor(taught), row, -100)
    return ReplyBatch(
        input_ids,
        mask,
        (input_ids == image_id).long(),
        labels,
        torch.tensor([grid for row in rows for grid in row.grids]),
        tuple(feature for row in rows for feature in row.features),
        torch.tensor([[number, _shifted(rows[number], image_id)] for number in grounded]).view(-1, 2),
        torch.tensor([rows[number].edges for number in grounded]).view(-1, 4),
    )


def _shifted(row: Conversation, image_id: int) -> int:
    """Return where ``row.word`` is once the placeholders before it are expanded."""
    before = list(row.ids[: row.word])
    images = before.count(image_id)
    return len(before) + sum(len(feature) - 1 for feature in row.features[:images])


def _expand(row: Conversation, image_id: int) -> tuple[list[int], list[bool]]:
    ids: list[int] = []
    taught: list[bool] = []
    images = iter(row.features)
    for token, learn in zip(row.ids, row.taught, strict=True):
        repeat = len(next(images)) if token == image_id else 1
        ids += [token] * repeat
        taught += [learn] * repeat
    return ids, taught


class GroundedModel(nn.Module):
    """A Qwen2.5-VL whose tower's output is given, and a linear head (thrown away afterwards) on the first layer: there
    the word that names a thing has to know where that thing is. From the replies alone a small model finds this link
    between word and place only after a plateau of many hundred steps."""

    def __init__(self, model: Any, width: int, bins: int) -> None:
        super().__init__()
        self.model, self.bins = model, bins
        self.edges = nn.Linear(width, 4 * bins)

    def loss(self, batch: ReplyBatch) -> tuple[Tensor, Mapping[str, float]]:
        """Return the mean cross-entropy (nats) over the taught tokens plus half the grounding's, and accuracies."""
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        features: Any = batch.features
        output = self.model.model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            image_grid_thw=batch.grids,
            mm_token_type_ids=batch.token_types,
            mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=features)},
            use_cache=False,
            output_hidden_states=True,
        )
        next_token = batch.labels[:, 1:]
        taught = next_token >= 0
        logits = self.model.lm_head(output.last_hidden_state[:, :-1][taught])  # only where there is something to learn
        value = F.cross_entropy(logits, next_token[taught])
        figures = {"accuracy": _accuracy(logits, next_token[taught])}
        if len(batch.words):
            words = output.hidden_states[1][batch.words[:, 0], batch.words[:, 1]]
            edges = self.edges(words).view(-1, self.bins)
            value = value + 0.5 * F.cross_entropy(edges, batch.edges.flatten())
            figures["grounded"] = _accuracy(edges, batch.edges.flatten(), within=1)
        return value, figures
