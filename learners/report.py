"""What an update says of itself: sums over tokens, which micro-batches and ranks add up, and the means they give."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

TURNS = 2
"""Most turns of a trajectory."""
QUANTITIES = ("tokens", "loss", "kept", "ratio", "ratio_squared", "clipped", "mismatch", "entropy", "kl")
LEAST, MOST, PER_DECADE = 1e-8, 1e2, 20
"""The histogram of mismatches: from 1e-8 to 100 nats, 20 bins a decade, so a percentile is at most 12.2 % too high."""
BINS = round(math.log10(MOST / LEAST) * PER_DECADE) + 1


@dataclass(frozen=True, slots=True)
class TokenMeans:
    """Over the sampled tokens of a turn, or of all turns.

    ratio: importance weight learner / engine before clipping, mean over the tokens kept; ess: effective sample size of
    these weights (Kish: (sum w)^2 / sum w^2) as a share of the tokens, 1 where all weigh the same; clip_share: tokens
    on which the clip acted; masked_share: tokens that left the loss because learner and engine disagree too much;
    mismatch: |learner - engine| log-prob, nats (with stale trajectories the policy's own change is in it); kl: from the
    policy at the start, nats, None where it is not asked for."""

    tokens: int
    entropy: float
    ratio: float
    ess: float
    clip_share: float
    masked_share: float
    mismatch_mean: float
    mismatch_p99: float
    mismatch_max: float
    kl: float | None

    def metrics(self, prefix: str) -> dict[str, float]:
        return {f"{prefix}{name}": float(value) for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, slots=True, eq=False)
class TokenSums:
    """By turn, so that micro-batches and ranks can be added up.

    sums: float64[TURNS, QUANTITIES]; histogram: float64[TURNS, BINS], tokens by mismatch; largest: float64[TURNS], the
    greatest mismatch, which ranks combine by its maximum."""

    sums: Tensor
    histogram: Tensor
    largest: Tensor

    @classmethod
    def zero(cls, device: torch.device) -> TokenSums:
        shapes = ((TURNS, len(QUANTITIES)), (TURNS, BINS), (TURNS,))
        return cls(*(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes))

    @classmethod
    def of(cls, turns: Tensor, mismatch: Tensor, **others: Tensor) -> TokenSums:
        """turns: int[N], from 1; mismatch and every other of QUANTITIES but ``tokens``: number[N]."""
        columns = {"tokens": torch.ones_like(mismatch), "mismatch": mismatch, **others}
        table = torch.stack([columns[name].double() for name in QUANTITIES], dim=1)
        decades = (mismatch.double().nan_to_num(nan=MOST).clamp(LEAST, MOST) / LEAST).log10()
        places = decades.mul(PER_DECADE).ceil().long().clamp(max=BINS - 1)
        empty, turn = cls.zero(mismatch.device), turns.long() - 1
        return cls(
            sums=empty.sums.index_add(0, turn, table),
            histogram=torch.bincount(turn * BINS + places, minlength=TURNS * BINS).double().view(TURNS, BINS),
            largest=empty.largest.scatter_reduce(0, turn, mismatch.double(), "amax"),
        )

    def plus(self, other: TokenSums) -> TokenSums:
        return TokenSums(
            self.sums + other.sums, self.histogram + other.histogram, torch.maximum(self.largest, other.largest)
        )

    def total(self, quantity: str) -> float:
        """Over all turns."""
        return float(self.sums[:, QUANTITIES.index(quantity)].sum())

    def means(self, turn: int | None = None, *, with_kl: bool = False) -> TokenMeans | None:
        """Of turn 1, 2, ... or of all; None where no token was sampled."""
        chosen = slice(None) if turn is None else slice(turn - 1, turn)
        one = dict(zip(QUANTITIES, self.sums[chosen].sum(0).tolist(), strict=True))
        if not (tokens := one["tokens"]):
            return None
        largest = float(self.largest[chosen].max())
        return TokenMeans(
            tokens=int(tokens),
            entropy=one["entropy"] / tokens,
            ratio=one["ratio"] / max(one["kept"], 1),
            ess=one["ratio"] ** 2 / (tokens * one["ratio_squared"]) if one["ratio_squared"] else 0.0,
            clip_share=one["clipped"] / tokens,
            masked_share=1 - one["kept"] / tokens,
            mismatch_mean=one["mismatch"] / tokens,
            mismatch_p99=min(percentile(self.histogram[chosen].sum(0), 0.99), largest),
            mismatch_max=largest,
            kl=one["kl"] / max(one["kept"], 1) if with_kl else None,
        )


def percentile(histogram: Tensor, share: float) -> float:
    """The upper edge of the first bin up to which ``share`` of the tokens lie."""
    reached = histogram.cumsum(0) >= share * histogram.sum()
    return LEAST * 10 ** (int(reached.long().argmax()) / PER_DECADE)


@dataclass(frozen=True, slots=True)
class UpdateReport:
    """Of one optimiser step over all ranks.

    loss: as the objective normalises it; trajectories: in the loss; length_mismatches: trajectories left out because a
    prompt had another length in the engine; padding: share of the tokens passed through the model that were padding;
    turns: of turn 1, 2, ..., None where none was played."""

    loss: float
    grad_norm: float
    lr: float
    trajectories: int
    length_mismatches: int
    micro_batches: int
    padding: float
    seconds: float
    means: TokenMeans
    turns: tuple[TokenMeans | None, ...]

    def metrics(self) -> dict[str, float]:
        """``learner/entropy`` and so on over all tokens, ``learner/turn1_entropy`` over those of a turn."""
        plain = ("loss", "grad_norm", "lr", "trajectories", "length_mismatches", "micro_batches", "padding", "seconds")
        metrics = {f"learner/{name}": float(getattr(self, name)) for name in plain}
        metrics |= self.means.metrics("learner/")
        for number, turn in enumerate(self.turns, 1):
            metrics |= turn.metrics(f"learner/turn{number}_") if turn else {}
        return metrics
