"""Metrics of an update: sums over tokens, added up over micro-batches and ranks, and the means that follow."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

TURNS = 2
"""Most turns of a trajectory."""
QUANTITIES = ("tokens", "loss", "kept", "ratio", "ratio_squared", "clipped", "mismatch", "entropy", "kl")
"""Columns of ``TokenSums.sums``."""
HISTOGRAM_MIN, HISTOGRAM_MAX, BINS_PER_DECADE = 1e-8, 1e2, 20
"""The histogram of mismatches, in nats. With 20 bins a decade a percentile is at most 12.2 % too high."""
BINS = round(math.log10(HISTOGRAM_MAX / HISTOGRAM_MIN) * BINS_PER_DECADE) + 1


@dataclass(frozen=True, slots=True)
class TokenMeans:
    """Means over the sampled tokens of a turn, or of all turns."""

    tokens: int
    entropy: float
    """Nats."""
    ratio: float
    """Importance weight learner / engine before clipping, over the tokens that stayed in the loss."""
    ess: float
    """Effective sample size of these weights (Kish: (sum w)^2 / sum w^2) as a share of the tokens; 1: all are equal."""
    clip_share: float
    """Share of the tokens on which the clip acted."""
    masked_share: float
    """Share of the tokens that left the loss because learner and engine disagree too much."""
    mismatch_mean: float
    """|learner - engine| log-prob, nats. With stale trajectories it includes the policy's own change."""
    mismatch_p99: float
    mismatch_max: float
    kl: float | None
    """From the policy at the start of the run, nats; None where the loss does not ask for it."""

    def metrics(self, prefix: str) -> dict[str, float]:
        return {f"{prefix}{name}": float(value) for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, slots=True, eq=False)
class TokenSums:
    """Sums over sampled tokens by turn. Those of micro-batches and ranks can be added up."""

    sums: Tensor
    """float64[TURNS, QUANTITIES]."""
    histogram: Tensor
    """float64[TURNS, BINS]: tokens by their mismatch."""
    largest: Tensor
    """float64[TURNS]: the largest mismatch, of which ranks take the maximum."""

    @classmethod
    def zero(cls, device: torch.device) -> TokenSums:
        shapes = ((TURNS, len(QUANTITIES)), (TURNS, BINS), (TURNS,))
        return cls(*(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes))

    @classmethod
    def of(cls, turns: Tensor, mismatch: Tensor, **others: Tensor) -> TokenSums:
        """Sum up N tokens. turns: int[N], from 1; mismatch and the rest of QUANTITIES but ``tokens``: number[N]."""
        columns = {"tokens": torch.ones_like(mismatch), "mismatch": mismatch, **others}
        table = torch.stack([columns[name].double() for name in QUANTITIES], dim=1)
        decades = (
            mismatch.double().nan_to_num(nan=HISTOGRAM_MAX).clamp(HISTOGRAM_MIN, HISTOGRAM_MAX) / HISTOGRAM_MIN
        ).log10()
        places = decades.mul(BINS_PER_DECADE).ceil().long().clamp(max=BINS - 1)
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
        """Return the sum of a quantity over all turns."""
        return float(self.sums[:, QUANTITIES.index(quantity)].sum())

    def means(self, turn: int | None = None, *, with_kl: bool = False) -> TokenMeans | None:
        """Return the means of turn 1, 2, ... or of all turns; None where no token was sampled."""
        chosen = slice(None) if turn is None else slice(turn - 1, turn)
        total = dict(zip(QUANTITIES, self.sums[chosen].sum(0).tolist(), strict=True))
        if not (tokens := total["tokens"]):
            return None
        largest = float(self.largest[chosen].max())
        return TokenMeans(
            tokens=int(tokens),
            entropy=total["entropy"] / tokens,
            ratio=total["ratio"] / max(total["kept"], 1),
            ess=total["ratio"] ** 2 / (tokens * total["ratio_squared"]) if total["ratio_squared"] else 0.0,
            clip_share=total["clipped"] / tokens,
            masked_share=1 - total["kept"] / tokens,
            mismatch_mean=total["mismatch"] / tokens,
            mismatch_p99=min(percentile(self.histogram[chosen].sum(0), 0.99), largest),
            mismatch_max=largest,
            kl=total["kl"] / max(total["kept"], 1) if with_kl else None,
        )


def percentile(histogram: Tensor, share: float) -> float:
    """Return the upper edge of the first bin up to which ``share`` of the tokens lie."""
    reached = histogram.cumsum(0) >= share * histogram.sum()
    return HISTOGRAM_MIN * 10 ** (int(reached.long().argmax()) / BINS_PER_DECADE)


@dataclass(frozen=True, slots=True)
class UpdateReport:
    """Of one optimiser step over all ranks."""

    loss: float
    """As the objective normalises it."""
    grad_norm: float
    """Before clipping."""
    lr: float
    trajectories: int
    """In the loss."""
    length_mismatches: int
    """Trajectories left out because a prompt had another length in the engine."""
    not_finite: int
    """Trajectories left out because a log-prob of the engine, or an advantage, was NaN or infinite."""
    skipped: bool
    """The gradient was NaN or infinite: the weights stay as they were, and the update counts as no step."""
    micro_batches: int
    """Of each rank."""
    padding: float
    """Share of the tokens passed through the model that were padding."""
    seconds: float
    means: TokenMeans
    """Over all sampled tokens."""
    turns: tuple[TokenMeans | None, ...]
    """Of turn 1, 2, ...; None where no trajectory reached it."""

    def metrics(self) -> dict[str, float]:
        """Return ``learner/entropy`` and so on over all tokens, ``learner/turn1_entropy`` over those of turn 1.

        Those of a skipped update that are not finite are left out: ``learner/skipped`` says it, and JSON has no NaN."""
        plain = (
            "loss", "grad_norm", "lr", "trajectories", "length_mismatches", "not_finite", "skipped", "micro_batches",
            "padding", "seconds",
        )  # fmt: skip
        metrics = {f"learner/{name}": float(getattr(self, name)) for name in plain}
        metrics |= self.means.metrics("learner/")
        for number, turn in enumerate(self.turns, 1):
            metrics |= turn.metrics(f"learner/turn{number}_") if turn else {}
        return {name: value for name, value in metrics.items() if math.isfinite(value)} if self.skipped else metrics
