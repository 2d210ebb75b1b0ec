"""From log-probs to the loss of a micro-batch. Pure: tensors in, tensors out.

Normalisation, explained once. An optimiser step has one loss, ``sum(weight * token loss) / denominator``, over **all
sampled tokens of the step**: of every micro-batch of every rank. A mean per micro-batch, averaged, would weigh a token
by how many others happened to share its micro-batch (OpenRLHF ``utils/loss_utils.py`` has the algebra). So
``policy_loss`` returns a weighted **sum**, and the learner divides it once by a denominator that all ranks agreed on
before. Weights and denominator are the objective's (``learners.objectives``).

The behaviour policy is the engine that sampled: ratio = exp(learner - engine), with the engine's own log-probs and not
a recomputation, so that one forward pass serves and staleness is seen as it is. So the ratio *is* the importance weight
that truncated importance sampling (TIS; Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL
training") multiplies in where a recomputed old policy stands in the ratio: there is nothing left to multiply, and PPO's
clip bounds it on both sides but for large ratios with negative advantages (``dual_clip``). What is left to do is what
clipping does not see: a token on which learner and engine disagree by a factor of 8 is less often a lesson than a sign
that they did not compute the same thing (precision, a stale cache, other pixels). Such tokens leave the loss, on both
sides and whatever the advantage (masked importance sampling: IcePop, in Ring-1T, arXiv 2510.18855; TRL's and verl's
``mask`` modes; the bounds 1/8 and 8 are prime-rl's). They stay in the denominator, as in IcePop and TRL: the step gets
smaller, not the other tokens louder; ``masked_share`` says by how much.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ergo_rl.learners.config import LossConfig, MismatchLevel
from ergo_rl.learners.objectives import Sampled, objective_named, row_means
from ergo_rl.learners.report import TokenSums


@dataclass(frozen=True, slots=True, eq=False)
class TokenBatch:
    """B rows of S tokens; what is outside ``mask`` is never looked at.

    logprobs (the learner's, differentiable), entropy, rollout_logprobs (the engine's): float32[B, S] nats; advantages:
    float32[B, S]; mask: bool[B, S], sampled tokens; turns: int8[B, S], the turn of each of them, from 1;
    reference_logprobs: float32[B, S] nats of the policy at the start, or None."""

    logprobs: Tensor
    entropy: Tensor
    rollout_logprobs: Tensor
    advantages: Tensor
    mask: Tensor
    turns: Tensor
    reference_logprobs: Tensor | None = None


def policy_loss(batch: TokenBatch, config: LossConfig) -> tuple[Tensor, TokenSums]:
    """The weighted sum of the objective's loss over ``mask`` (float32, differentiable in ``logprobs``) and detached
    sums for the metrics."""
    mask, objective = batch.mask, objective_named(config.objective)
    rows = mask.nonzero()[:, 0]
    difference = (batch.logprobs.detach() - batch.rollout_logprobs)[mask]
    kept = agrees(difference, rows, config)
    tokens = Sampled(
        batch.logprobs[mask][kept], batch.rollout_logprobs[mask][kept], batch.advantages[mask][kept], rows[kept]
    )
    found = objective.surrogate(tokens, config)
    loss, kl = found.loss, torch.zeros_like(found.ratio)
    if batch.reference_logprobs is not None:
        penalty, kl = reverse_kl(tokens, batch.reference_logprobs[mask][kept])
        loss = loss + config.kl * penalty
    weighted = loss * objective.weight(mask.sum(1), config)[tokens.rows]

    def spread(values: Tensor) -> Tensor:
        """float64[N] over all sampled tokens, 0 where masked."""
        return torch.zeros_like(difference, dtype=torch.float64).masked_scatter(kept, values.detach().double())

    sums = TokenSums.of(
        batch.turns[mask],
        mismatch=difference.abs(),
        kept=kept,
        entropy=batch.entropy[mask],
        loss=spread(weighted),
        ratio=spread(found.ratio),
        ratio_squared=spread(found.ratio.double().square()),
        clipped=spread(found.clipped),
        kl=spread(kl),
    )
    return weighted.sum(), sums


def agrees(difference: Tensor, rows: Tensor, config: LossConfig) -> Tensor:
    """bool[N]: tokens whose ratio learner / engine (difference: its logarithm, float32[N]) is within the bounds, or
    whose trajectory's geometric mean is. NaN is kept: it has to be seen in the loss, not to vanish."""
    if config.mismatch_level is MismatchLevel.SEQUENCE:
        difference = row_means(difference, rows)[rows]
    low = math.log(config.mismatch_low) if config.mismatch_low else -math.inf
    return ~((difference < low) | (difference > math.log(config.mismatch_high)))


def reverse_kl(tokens: Sampled, reference_logprobs: Tensor) -> tuple[Tensor, Tensor]:
    """KL(learner || reference): (loss float32[N], its value float32[N], detached; nats).

    The loss is k2 = (log pi - log pi_ref)^2 / 2 times the detached importance weight. Its gradient,
    ratio * (log pi - log pi_ref) * grad log pi, has the divergence's gradient as its expectation; that of k1 has
    expectation 0 and that of k3 is biased (Liu et al., arXiv 2510.01555; the weight is their off-policy correction, and
    the same gradient as DeepSeek-V3.2's ratio * k3 with a differentiable ratio, arXiv 2512.02556). The value reported
    is ratio * k3: unbiased, never negative, of low variance (Schulman 2020, "Approximating KL divergence")."""
    gap = tokens.logprobs - reference_logprobs
    ratio = tokens.difference.detach().exp()
    with torch.no_grad():
        value = ratio * ((-gap).exp() - 1 + gap)
    return ratio * gap.square() / 2, value
