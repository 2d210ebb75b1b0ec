"""Trajectories -> micro-batches: expand image placeholders, add pixels, pad on the right.

A trajectory holds one placeholder per image, as it was sent to the engine, which expanded it to the image's visual
tokens. Here it is expanded for the learner, and nowhere else; both lengths are compared for every trajectory, because
expanding twice goes unnoticed otherwise (OpenRLHF #1220 and TRL #6294).

Padding is for tensors' sake only: with ``learner.packing: sequences`` the model takes it out again."""

from __future__ import annotations

import logging
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
from ergo_rl.learners.advantages import TurnAdvantages, is_scored
from ergo_rl.learners.config import Packing

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """A trajectory and its advantages."""

    trajectory: Trajectory
    advantages: TurnAdvantages

    def __post_init__(self) -> None:
        if len(self.advantages) not in (1, len(self.trajectory.turns)):
            raise ValueError(f"{len(self.advantages)} advantages for {len(self.trajectory.turns)} turns")


@dataclass(frozen=True, slots=True, eq=False)
class ModelInput:
    """A trajectory of S tokens as the model reads it, every placeholder expanded: one row of a micro-batch."""

    views: tuple[View, ...]
    token_ids: NDArray[np.int64]
    """int64[S]."""
    image_mask: BoolArray
    """bool[S]: visual tokens."""
    loss_mask: BoolArray
    """bool[S]: sampled tokens."""
    rollout_logprobs: FloatArray
    """float32[S], nats, of the engine that sampled; 0 outside the loss mask."""
    advantages: FloatArray
    """float32[S]; 0 outside the loss mask."""
    turns: NDArray[np.int8]
    """int8[S]: 1 or 2; 0 outside the loss mask."""
    scored: bool
    """False leaves the loss."""
    prompt_lengths: tuple[int, ...]
    """For each turn the length of its whole prompt."""

    def __len__(self) -> int:
        return len(self.token_ids)

    def without_loss(self) -> ModelInput:
        """Return the same row with no token in the loss."""
        return replace(self, loss_mask=np.zeros_like(self.loss_mask))


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatch:
    """B right-padded rows of S tokens.

    Images come in row order, the coarse view of a row before its crop. A view that several rows show (the coarse view
    of a group) is in ``pixel_values`` once."""

    input_ids: Tensor
    """int64[B, S]."""
    attention_mask: Tensor
    """int64[B, S]: 1 over tokens, 0 over padding."""
    mm_token_type_ids: Tensor
    """int64[B, S]: 1 over image tokens; transformers computes mRoPE from it, from all grids and from the full ids."""
    pixel_values: Tensor
    """float[patches, channels] of the distinct views."""
    view_grids: Tensor
    """int64[views, 3] of the distinct views: time, height, width in patches."""
    view_index: Tensor
    """int64[images]: for each image its place among the distinct views."""
    loss_mask: Tensor
    """bool[B, S]: sampled tokens."""
    rollout_logprobs: Tensor
    """float32[B, S], nats."""
    advantages: Tensor
    """float32[B, S]."""
    turns: Tensor
    """int8[B, S]: the turn of each sampled token, from 1."""

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
        return self.view_grids[self.view_index]

    def without_loss(self) -> MicroBatch:
        """Return the same batch with no token in the loss: its gradient is exactly 0."""
        return replace(self, loss_mask=torch.zeros_like(self.loss_mask))

    def to(self, device: torch.device) -> MicroBatch:
        return MicroBatch(*(getattr(self, field.name).to(device) for field in fields(self)))


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatchPlan:
    """Which rows share a micro-batch."""

    rows: tuple[ModelInput, ...]
    bins: tuple[tuple[int, ...], ...]
    """For each micro-batch the indices of its rows."""
    length_mismatches: int
    """Trajectories left out because the engine's prompts had another length."""
    not_finite: int
    """Trajectories left out because a log-prob of the engine, or an advantage, is NaN or infinite."""
    packing: Packing
    """How rows go through the model."""

    @property
    def lengths(self) -> list[int]:
        """Sampled tokens of each row."""
        return [int(row.loss_mask.sum()) for row in self.rows]

    @property
    def real_tokens(self) -> int:
        """Tokens of all rows, without padding."""
        return sum(len(row) for row in self.rows)

    @property
    def passed_tokens(self) -> int:
        """Tokens that pass through the model, padding included."""
        if self.packing is Packing.SEQUENCES:
            return self.real_tokens
        return sum(len(members) * max(len(self.rows[member]) for member in members) for members in self.bins)


@dataclass(frozen=True, slots=True, eq=False)
class Batcher:
    """Makes micro-batches for one model family.

    Example::

        plan = batcher.plan(samples)
        for batch in batcher.batches(plan):
            logprobs, entropy = policy(batch, temperature, banned_ids)
    """

    family: ModelFamily
    image_processor: Any
    """The model's own Hugging Face image processor."""
    image_pad: int
    """Token id of the placeholder."""
    pad: int
    """Token id for padding."""
    token_budget: int
    """Most tokens of a micro-batch, padding included; a longer row gets a micro-batch of its own."""
    packing: Packing = Packing.SEQUENCES

    def plan(self, samples: Sequence[Sample]) -> MicroBatchPlan:
        """Expand samples, drop those that are not in the loss, and divide the others among micro-batches.

        A trajectory whose length differs from the engine's is dropped with a warning: its log-probs would belong to
        other tokens. So is one with a log-prob or an advantage that is not finite: it would cost the whole step. Where
        nothing is left, one row without loss stays, because ranks that share parameters must run the same number of
        passes."""
        rows = [expand(sample, self.family, self.image_pad) for sample in samples]
        wrong = [length_mismatch(row, sample.trajectory) for row, sample in zip(rows, samples, strict=True)]
        scored = [
            (row, sample) for row, sample, bad in zip(rows, samples, wrong, strict=True) if row.scored and not bad
        ]
        finite = [row for row, sample in scored if is_finite(row, sample.trajectory)]
        kept = finite or [rows[0].without_loss()]
        return self._planned(kept, sum(wrong), len(scored) - len(finite))

    def plan_all(self, trajectories: Sequence[Trajectory]) -> MicroBatchPlan:
        """Plan a forward pass over every trajectory; row i of the plan is trajectory i."""
        samples = [Sample(trajectory, (0.0,)) for trajectory in trajectories]
        return self._planned([expand(sample, self.family, self.image_pad) for sample in samples], 0, 0)

    def _planned(self, rows: Sequence[ModelInput], length_mismatches: int, not_finite: int) -> MicroBatchPlan:
        make_bins = pack_bins if self.packing is Packing.SEQUENCES else pad_bins
        bins = make_bins([len(row) for row in rows], self.token_budget)
        return MicroBatchPlan(tuple(rows), bins, length_mismatches, not_finite, self.packing)

    def batches(self, plan: MicroBatchPlan, count: int | None = None) -> Iterator[MicroBatch]:
        """Yield the micro-batches of a plan, then repeat the last without loss up to ``count``.

        They are made lazily. Each distinct view is processed once, however many rows show it, and its pixels are
        dropped after the last of them."""
        features = _ViewFeatures(self.family, self.image_processor, (view for row in plan.rows for view in row.views))
        for members in plan.bins:
            batch = self._collate([plan.rows[member] for member in members], features)
            yield batch
        for _ in range((count or 0) - len(plan.bins)):
            yield batch.without_loss()

    def _collate(self, rows: Sequence[ModelInput], features: _ViewFeatures) -> MicroBatch:
        images = [view for row in rows for view in row.views]
        # By identity: the trajectories of a group share the object of their coarse view, and comparing pixels would
        # cost more than it saves. All views live as long as ``rows``, so no id is used twice.
        places: dict[int, int] = {}
        view_index = [places.setdefault(id(view), len(places)) for view in images]
        distinct = {id(view): features.take(view) for view in images}
        return MicroBatch(
            input_ids=_right_padded([row.token_ids for row in rows], self.pad),
            attention_mask=_right_padded([np.ones(len(row), np.int64) for row in rows], 0),
            mm_token_type_ids=_right_padded([row.image_mask.astype(np.int64) for row in rows], 0),
            pixel_values=torch.cat([pixels for pixels, _ in distinct.values()]),
            view_grids=torch.cat([grid for _, grid in distinct.values()]),
            view_index=torch.tensor(view_index),
            loss_mask=_right_padded([row.loss_mask for row in rows], False),
            rollout_logprobs=_right_padded([row.rollout_logprobs for row in rows], 0.0),
            advantages=_right_padded([row.advantages for row in rows], 0.0),
            turns=_right_padded([row.turns for row in rows], 0),
        )


def expand(sample: Sample, family: ModelFamily, image_pad: int) -> ModelInput:
    """Return the sample as a row, every placeholder repeated once per visual token of its view.

    Raises ValueError when placeholders and views do not match, or when a placeholder was sampled."""
    trajectory = sample.trajectory
    ids, sampled = trajectory.token_ids, trajectory.loss_mask
    placeholders = ids == image_pad
    if placeholders.sum() != len(trajectory.views) or (placeholders & sampled).any():
        raise ValueError(
            f"question {trajectory.question_id!r}, sample {trajectory.sample}: {int(placeholders.sum())} image "
            f"placeholders ({int((placeholders & sampled).sum())} of them sampled) for {len(trajectory.views)} views"
        )
    repeats = np.ones(len(ids), np.int64)
    repeats[placeholders] = [family.visual_tokens(view) for view in trajectory.views]
    advantages, turns = np.zeros(len(ids), np.float32), np.zeros(len(ids), np.int8)
    prompts, start = [], 0
    for number, turn in enumerate(trajectory.turns):
        start += len(turn.prompt_ids)
        prompts.append(int(repeats[:start].sum()))
        stop = start + len(turn.completion_ids)
        advantages[start:stop] = sample.advantages[min(number, len(sample.advantages) - 1)]
        turns[start:stop] = number + 1
        start = stop
    return ModelInput(
        views=trajectory.views,
        token_ids=np.repeat(ids.astype(np.int64), repeats),
        image_mask=np.repeat(placeholders, repeats),
        loss_mask=np.repeat(sampled, repeats),
        rollout_logprobs=np.repeat(trajectory.logprobs, repeats),
        advantages=np.repeat(advantages, repeats),
        turns=np.repeat(turns, repeats),
        scored=is_scored(sample.advantages),
        prompt_lengths=tuple(prompts),
    )


def length_mismatch(row: ModelInput, trajectory: Trajectory) -> bool:
    """Tell whether the engine saw prompts of another length than the learner, and log it."""
    engine = tuple(turn.engine_prompt_length for turn in trajectory.turns)
    if engine == row.prompt_lengths:
        return False
    log.warning(
        "question %r, sample %d: the engine's prompts have lengths %s, the learner's %s; left out of the loss",
        trajectory.question_id, trajectory.sample, engine, row.prompt_lengths,
    )  # fmt: skip
    return True


def is_finite(row: ModelInput, trajectory: Trajectory) -> bool:
    """Tell whether all log-probs of the engine and all advantages of a row are finite, and log where they are not."""
    if np.isfinite(row.rollout_logprobs).all() and np.isfinite(row.advantages).all():
        return True
    log.warning(
        "question %r, sample %d: a log-prob of the engine or an advantage is NaN or infinite; left out of the loss",
        trajectory.question_id, trajectory.sample,
    )  # fmt: skip
    return False


def pad_bins(lengths: Sequence[int], token_budget: int) -> tuple[tuple[int, ...], ...]:
    """Divide rows that are padded to the longest of their bin: ``members x longest <= token_budget``.

    Longest first, so that neighbours in length share a bin and little is padded. Every index appears once."""
    bins: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if bins and (len(bins[-1]) + 1) * lengths[bins[-1][0]] <= token_budget:
            bins[-1].append(index)
        else:
            bins.append([index])
    return tuple(tuple(members) for members in bins)


def pack_bins(lengths: Sequence[int], token_budget: int) -> tuple[tuple[int, ...], ...]:
    """Divide rows without padding, in their order, as many to a bin as fit into ``token_budget``.

    In order, because a group so stays together and its coarse view goes through the vision tower about once. Every
    index appears once."""
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
    """(pixel_values, image_grid_thw) of views, made at the first use of a view and kept until the last."""

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
    """Return [B, longest row]."""
    padded = np.full((len(rows), max(len(row) for row in rows)), fill, rows[0].dtype)
    for place, row in enumerate(rows):
        padded[place, : len(row)] = row
    return torch.from_numpy(padded)
