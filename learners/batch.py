"""Trajectories -> micro-batches: expand placeholders once, add pixels, pad on the right (``Policy`` takes the padding
out again where rows go end to end).

A trajectory holds one placeholder per image, as it was sent to the engine, which expanded it. Here it is
expanded for the learner, the only other place; the lengths of both are compared for every trajectory
(OpenRLHF #1220 and TRL #6294 expanded twice, without an error).
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ergo_rl.episodes.families import ModelFamily
from ergo_rl.episodes.types import BoolArray, FloatArray, Trajectory, View
from ergo_rl.learners.config import Packing

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """A trajectory and the advantage of each of its turns, or one for all of it; NaN leaves the loss."""

    trajectory: Trajectory
    advantages: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.advantages) not in (1, len(self.trajectory.turns)):
            raise ValueError(f"{len(self.advantages)} advantages for {len(self.trajectory.turns)} turns")


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """A trajectory of S tokens as the model sees it, every placeholder expanded.

    token_ids int64[S]; image_mask, loss_mask bool[S]; rollout_logprobs, advantages float32[S] and turns int8[S] (1, 2),
    0 outside the loss mask; scored: False leaves the loss; prompt_lengths: of the whole prompt of each turn."""

    views: tuple[View, ...]
    token_ids: NDArray[np.int64]
    image_mask: BoolArray
    loss_mask: BoolArray
    rollout_logprobs: FloatArray
    advantages: FloatArray
    turns: NDArray[np.int8]
    scored: bool
    prompt_lengths: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatch:
    """B right-padded rows of S tokens. Images come in row order, the coarse view of a row before its crop; a view that
    several rows show (the coarse view of a group) is there once.

    input_ids int64[B, S]; attention_mask, mm_token_type_ids int64[B, S] (1 over image tokens: transformers
    computes mRoPE from it, from all grids and from the full ids); pixel_values float[patches, channels] and
    view_grids int64[views, 3] of the distinct views; shown int64[images], which of them each image is; loss_mask
    bool[B, S]; rollout_logprobs, advantages float32[B, S]; turns int8[B, S]."""

    input_ids: Tensor
    attention_mask: Tensor
    mm_token_type_ids: Tensor
    pixel_values: Tensor
    view_grids: Tensor
    shown: Tensor
    loss_mask: Tensor
    rollout_logprobs: Tensor
    advantages: Tensor
    turns: Tensor

    def __post_init__(self) -> None:
        shape = self.input_ids.shape
        for name in ("attention_mask", "mm_token_type_ids", "loss_mask", "rollout_logprobs", "advantages", "turns"):
            if getattr(self, name).shape != shape:
                raise ValueError(f"{name} is {list(getattr(self, name).shape)}, input_ids {list(shape)}")
        if (patches := int(self.view_grids.prod(-1).sum())) != len(self.pixel_values):
            raise ValueError(f"{len(self.pixel_values)} patches, but the grids say {patches}")
        if self.loss_mask[:, 0].any():
            raise ValueError("the first token of a row cannot be predicted; a prompt is empty")

    @property
    def image_grid_thw(self) -> Tensor:
        """int64[images, 3]: time, height, width in patches."""
        return self.view_grids[self.shown]

    def silent(self) -> MicroBatch:
        """The same batch with no token in the loss: gradient exactly 0."""
        return replace(self, loss_mask=torch.zeros_like(self.loss_mask))

    def to(self, device: torch.device) -> MicroBatch:
        return MicroBatch(*(getattr(self, field.name).to(device) for field in fields(self)))


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """Which rows share a micro-batch: ``bins`` of indices into ``rows``; ``packing``: how they go through the model."""

    rows: tuple[Row, ...]
    bins: tuple[tuple[int, ...], ...]
    length_mismatches: int
    packing: Packing

    @property
    def lengths(self) -> list[int]:
        """Sampled tokens of each row."""
        return [int(row.loss_mask.sum()) for row in self.rows]

    @property
    def real_tokens(self) -> int:
        return sum(len(row) for row in self.rows)

    @property
    def passed_tokens(self) -> int:
        """Through the model, padding included."""
        if self.packing is Packing.SEQUENCES:
            return self.real_tokens
        return sum(len(members) * max(len(self.rows[member]) for member in members) for members in self.bins)


@dataclass(frozen=True, slots=True, eq=False)
class Batcher:
    """Makes micro-batches for one model family.

    image_processor: the model's own Hugging Face image processor. image_pad, pad: token ids. token_budget:
    tokens of a micro-batch with its padding, if it has any; a longer row gets one of its own."""

    family: ModelFamily
    image_processor: Any
    image_pad: int
    pad: int
    token_budget: int
    packing: Packing = Packing.SEQUENCES

    def plan(self, samples: Sequence[Sample]) -> Plan:
        """Expand, compare lengths with the engine's, drop what is not in the loss, share out.

        A trajectory whose length differs is left out with a warning: its log-probs would belong to other
        tokens. Where nothing is left one silent row stays, because ranks that share parameters must run
        the same number of passes."""
        rows = [expand(sample, self.family, self.image_pad) for sample in samples]
        wrong = [differs(row, sample.trajectory) for row, sample in zip(rows, samples, strict=True)]
        scored = [row for row, bad in zip(rows, wrong, strict=True) if row.scored and not bad]
        kept = scored or [silenced(rows[0])]
        return self._planned(kept, sum(wrong))

    def plan_all(self, trajectories: Sequence[Trajectory]) -> Plan:
        """Every trajectory, for a forward pass only; row i of the plan is trajectory i."""
        return self._planned([expand(Sample(one, (0.0,)), self.family, self.image_pad) for one in trajectories], 0)

    def _planned(self, rows: Sequence[Row], length_mismatches: int) -> Plan:
        share_out = end_to_end if self.packing is Packing.SEQUENCES else side_by_side
        bins = share_out([len(row) for row in rows], self.token_budget)
        return Plan(tuple(rows), bins, length_mismatches, self.packing)

    def batches(self, plan: Plan, count: int | None = None) -> Iterator[MicroBatch]:
        """The micro-batches of a plan, then silent ones up to ``count``. Made lazily; each distinct view is
        processed once, however many rows show it, and its pixels are dropped after the last of them."""
        features = _ViewFeatures(self.family, self.image_processor, (view for row in plan.rows for view in row.views))
        for members in plan.bins:
            batch = self._collate([plan.rows[member] for member in members], features)
            yield batch
        for _ in range((count or 0) - len(plan.bins)):
            yield batch.silent()

    def _collate(self, rows: Sequence[Row], features: _ViewFeatures) -> MicroBatch:
        images = [view for row in rows for view in row.views]
        places: dict[int, int] = {}
        shown = [places.setdefault(id(view), len(places)) for view in images]
        distinct = {id(view): features.take(view) for view in images}
        return MicroBatch(
            input_ids=_right_padded([row.token_ids for row in rows], self.pad),
            attention_mask=_right_padded([np.ones(len(row), np.int64) for row in rows], 0),
            mm_token_type_ids=_right_padded([row.image_mask.astype(np.int64) for row in rows], 0),
            pixel_values=torch.cat([pixels for pixels, _ in distinct.values()]),
            view_grids=torch.cat([grid for _, grid in distinct.values()]),
            shown=torch.tensor(shown),
            loss_mask=_right_padded([row.loss_mask for row in rows], False),
            rollout_logprobs=_right_padded([row.rollout_logprobs for row in rows], 0.0),
            advantages=_right_padded([row.advantages for row in rows], 0.0),
            turns=_right_padded([row.turns for row in rows], 0),
        )


def expand(sample: Sample, family: ModelFamily, image_pad: int) -> Row:
    """Raises ValueError when placeholders and views do not match, or when a placeholder was sampled."""
    trajectory = sample.trajectory
    ids, sampled = trajectory.token_ids, trajectory.loss_mask
    placeholders = ids == image_pad
    if placeholders.sum() != len(trajectory.views) or (placeholders & sampled).any():
        raise ValueError(
            f"question {trajectory.question_id!r}, sample {trajectory.sample}: {int(placeholders.sum())} image "
            f"placeholders ({int((placeholders & sampled).sum())} of them sampled) for {len(trajectory.views)} views"
        )
    widths = np.ones(len(ids), np.int64)
    widths[placeholders] = [family.visual_tokens(view) for view in trajectory.views]
    advantages, turns = np.zeros(len(ids), np.float32), np.zeros(len(ids), np.int8)
    prompts, start = [], 0
    for number, turn in enumerate(trajectory.turns):
        start += len(turn.prompt_ids)
        prompts.append(int(widths[:start].sum()))
        stop = start + len(turn.completion_ids)
        advantages[start:stop] = sample.advantages[min(number, len(sample.advantages) - 1)]
        turns[start:stop] = number + 1
        start = stop
    return Row(
        views=trajectory.views,
        token_ids=np.repeat(ids.astype(np.int64), widths),
        image_mask=np.repeat(placeholders, widths),
        loss_mask=np.repeat(sampled, widths),
        rollout_logprobs=np.repeat(trajectory.logprobs, widths),
        advantages=np.repeat(advantages, widths),
        turns=np.repeat(turns, widths),
        scored=not any(map(math.isnan, sample.advantages)),
        prompt_lengths=tuple(prompts),
    )


def differs(row: Row, trajectory: Trajectory) -> bool:
    """Whether the engine saw prompts of another length than the learner; logged."""
    engine = tuple(turn.engine_prompt_length for turn in trajectory.turns)
    if engine == row.prompt_lengths:
        return False
    log.warning(
        "question %r, sample %d: the engine's prompts have lengths %s, the learner's %s; left out of the loss",
        trajectory.question_id, trajectory.sample, engine, row.prompt_lengths,
    )  # fmt: skip
    return True


def silenced(row: Row) -> Row:
    return replace(row, loss_mask=np.zeros_like(row.loss_mask))


def side_by_side(lengths: Sequence[int], token_budget: int) -> tuple[tuple[int, ...], ...]:
    """For rows that are padded to the longest: longest first, as many as fit, ``members x longest <= token_budget``.
    Neighbours in length share a batch, so little is padded; every index appears once."""
    bins: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if bins and (len(bins[-1]) + 1) * lengths[bins[-1][0]] <= token_budget:
            bins[-1].append(index)
        else:
            bins.append([index])
    return tuple(tuple(members) for members in bins)


def end_to_end(lengths: Sequence[int], token_budget: int) -> tuple[tuple[int, ...], ...]:
    """For rows without padding: in their order, as many as fit. A group stays together, so that its coarse view goes
    through the vision tower about once; every index appears once."""
    bins: list[list[int]] = []
    used = 0
    for index, length in enumerate(lengths):
        if bins and used + length <= token_budget:
            bins[-1].append(index)
            used += length
        else:
            bins.append([index])
            used = length
    return tuple(tuple(members) for members in bins)


class _ViewFeatures:
    """(pixel_values, image_grid_thw) of views; the coarse view that a group shares is made once."""

    def __init__(self, family: ModelFamily, image_processor: Any, views: Iterable[View]) -> None:
        self._family, self._image_processor = family, image_processor
        self._uses = Counter(id(view) for view in views)
        self._made: dict[int, tuple[Tensor, Tensor]] = {}

    def take(self, view: View) -> tuple[Tensor, Tensor]:
        key = id(view)
        if key not in self._made:
            self._made[key] = self._family.image_inputs(self._image_processor, [view])
        self._uses[key] -= 1
        return self._made[key] if self._uses[key] else self._made.pop(key)


def _right_padded(rows: Sequence[NDArray[Any]], fill: float) -> Tensor:
    """[B, longest row]"""
    padded = np.full((len(rows), max(len(row) for row in rows)), fill, rows[0].dtype)
    for place, row in enumerate(rows):
        padded[place, : len(row)] = row
    return torch.from_numpy(padded)
