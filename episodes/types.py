"""The shared vocabulary: what travels between the packages.

Frozen, slotted dataclasses whose constructors check lengths. Per-token arrays have length S and entry t
describes token t. Boxes are half-open rectangles in pixels of the *original* image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int32]
FloatArray = NDArray[np.float32]
BoolArray = NDArray[np.bool_]
Pixels = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Box:
    """Half-open rectangle ``[x1, x2) x [y1, y2)`` in original pixels; never empty, never negative."""

    x1: int
    y1: int
    x2: int
    y2: int

    def __post_init__(self) -> None:
        if not (0 <= self.x1 < self.x2 and 0 <= self.y1 < self.y2):
            raise ValueError(
                f"not a box: ({self.x1}, {self.y1}, {self.x2}, {self.y2}); need 0 <= x1 < x2 and 0 <= y1 < y2"
            )

    @property
    def width(self) -> int:
        return self.x2 - self.x1

    @property
    def height(self) -> int:
        return self.y2 - self.y1

    @property
    def area(self) -> int:
        return self.width * self.height

    def contains(self, other: Box) -> bool:
        return self.x1 <= other.x1 and self.y1 <= other.y1 and other.x2 <= self.x2 and other.y2 <= self.y2


@dataclass(frozen=True, slots=True)
class Question:
    """One row of a data set: an image, what is asked about it, and the answer."""

    id: str
    image: bytes | Path
    """Encoded bytes or a path, at original resolution."""
    text: str
    answer: str
    """The letter of an option where there are options."""
    options: tuple[str, ...] = ()
    """Texts without their letters; empty for an open question."""
    boxes: tuple[Box, ...] = ()
    """Where the answer is, in original pixels. Used for evaluation only, never for a reward."""
    source: str = ""
    """The data set or category that metrics and reports name."""


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """What a model sees of ``box``: ``pixels`` uint8[height, width, 3] (RGB), sized so that no processor's
    own resize changes anything."""

    box: Box
    pixels: Pixels

    def __post_init__(self) -> None:
        if self.pixels.dtype != np.uint8 or self.pixels.ndim != 3 or self.pixels.shape[2] != 3:
            raise ValueError(f"view pixels must be uint8[h, w, 3], got {self.pixels.dtype}{list(self.pixels.shape)}")

    @property
    def width(self) -> int:
        return int(self.pixels.shape[1])

    @property
    def height(self) -> int:
        return int(self.pixels.shape[0])


class Finish(StrEnum):
    STOP = "stop"
    LENGTH = "length"


class Completion(Protocol):
    """What a ``generate`` function returns for one request (implemented by ``cluster.engine.Completion``)."""

    @property
    def token_ids(self) -> Sequence[int]: ...
    @property
    def logprobs(self) -> Sequence[float]: ...
    @property
    def text(self) -> str: ...
    @property
    def stopped(self) -> bool: ...
    @property
    def prompt_length(self) -> int: ...
    @property
    def weight_version(self) -> int: ...
    @property
    def updates(self) -> Sequence[tuple[int, int]]: ...
    @property
    def cached_tokens(self) -> int: ...


@dataclass(frozen=True, slots=True, eq=False)
class Turn:
    """One reply of the policy."""

    prompt_ids: IntArray
    """int32[P], only what is new in this turn, one placeholder per image."""
    completion_ids: IntArray
    """int32[T], exactly as sampled (the end-of-turn token included when it was sampled)."""
    logprobs: FloatArray
    """float32[T], of the sampled tokens under the sampling distribution of the weights that sampled them (nats)."""
    text: str
    """The completion decoded, without special tokens."""
    finish: Finish
    engine_prompt_length: int
    """Length of the *whole* prompt of this turn as the engine saw it, placeholders expanded."""
    policy_version: int
    """Version of the weights that sampled this turn, or its first tokens where ``updates`` arrived meanwhile."""
    engine_cached_tokens: int = 0
    """How many tokens of the whole prompt the engine had in its prefix cache."""
    updates: tuple[tuple[int, int], ...] = ()
    """(t, version), in order: the tokens from t on were sampled by weights of that version."""

    def __post_init__(self) -> None:
        if len(self.completion_ids) != len(self.logprobs):
            raise ValueError(f"{len(self.completion_ids)} completion ids but {len(self.logprobs)} logprobs")
        places, versions = [0, *(at for at, _ in self.updates), len(self.completion_ids)], self.versions
        if self.updates and not (_ascending(places) and _ascending(versions)):
            raise ValueError(
                f"{len(self.completion_ids)} tokens sampled by version {self.policy_version}, updates (token, version) "
                f"{self.updates}: both must ascend, and each version must have sampled a token"
            )

    @property
    def versions(self) -> tuple[int, ...]:
        """Versions of all weights that sampled a part of this turn, oldest first."""
        return (self.policy_version, *(version for _, version in self.updates))


def _ascending(values: Sequence[int]) -> bool:
    return all(before < after for before, after in pairwise(values))


class Outcome(StrEnum):
    """How an episode ended."""

    ANSWERED = "answered"
    """Turn 2 came to its end, whether or not an answer can be parsed from it."""
    BAD_BOX = "bad_box"
    """Turn 1 named no usable box."""
    TRUNCATED = "truncated"
    """A turn reached the limit on its length, or left no room for the next."""


class BoxOutcome(StrEnum):
    """What became of the box in a reply. The first three gave a box, the others did not."""

    OK = "ok"
    REORDERED = "reordered"
    CLAMPED = "clamped"
    NO_TAG = "no_tag"
    SEVERAL = "several"
    MALFORMED = "malformed"
    NOT_FINITE = "not_finite"
    EMPTY = "empty"
    OUTSIDE = "outside"
    SLIVER = "sliver"
    SHARES = "shares"

    @property
    def usable(self) -> bool:
        return self in (BoxOutcome.OK, BoxOutcome.REORDERED, BoxOutcome.CLAMPED)


@dataclass(frozen=True, slots=True, eq=False)
class Trajectory:
    """One two-turn attempt at a question."""

    question_id: str
    sample: int
    """Which of the question's samples this is, from 0."""
    views: tuple[View, ...]
    """(coarse,) or (coarse, crop)."""
    turns: tuple[Turn, ...]
    """One for each view."""
    outcome: Outcome
    box_outcome: str
    """What became of turn 1's box: a ``BoxOutcome``."""

    def __post_init__(self) -> None:
        if not 1 <= len(self.turns) <= 2 or len(self.views) != len(self.turns):
            raise ValueError(
                f"{len(self.turns)} turns with {len(self.views)} views; need as many views as turns, 1 or 2"
            )

    @property
    def crop(self) -> View | None:
        return self.views[1] if len(self.views) == 2 else None

    @property
    def original(self) -> Box:
        """The whole original image (the coarse view always shows all of it)."""
        return self.views[0].box

    @property
    def area_ratio(self) -> float | None:
        """area(crop) / area(original), or None when no crop was made."""
        return None if self.crop is None else self.crop.box.area / self.original.area

    @property
    def token_ids(self) -> IntArray:
        """int32[S], one placeholder per image."""
        return np.concatenate([part for turn in self.turns for part in (turn.prompt_ids, turn.completion_ids)])

    @property
    def loss_mask(self) -> BoolArray:
        """bool[S], True exactly where the policy sampled the token."""
        return np.concatenate(
            [
                np.full(len(ids), sampled)
                for turn in self.turns
                for ids, sampled in ((turn.prompt_ids, False), (turn.completion_ids, True))
            ]
        )

    @property
    def logprobs(self) -> FloatArray:
        """float32[S], 0 where the loss mask is False."""
        return np.concatenate(
            [part for turn in self.turns for part in (np.zeros(len(turn.prompt_ids), np.float32), turn.logprobs)]
        )


@dataclass(frozen=True, slots=True)
class Score:
    """What a trajectory earned."""

    total: float
    """The weighted sum of the parts."""
    parts: Mapping[str, float] = field(default_factory=dict)
    """Each part of the reward before its weight, by name."""
    turns: tuple[float, float] = (0.0, 0.0)
    """What each of the two turns earned, weighted (for credit by turn)."""


@dataclass(frozen=True, slots=True)
class Unscored:
    """The trajectory could not be scored, and why. It leaves both the loss and its group's baseline."""

    reason: str
    kind: str = "unavailable"
    """unavailable: the verifier could not be asked, which may pass. Otherwise it was asked, and asking again would not
    help: cut, empty, thoughts (a reply without an answer), filtered, refused."""

    @property
    def may_pass(self) -> bool:
        """Scoring again later may succeed: an outage."""
        return self.kind == "unavailable"


Verdict = Score | Unscored
