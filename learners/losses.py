"""From log-probs to the loss of a micro-batch: the objectives, and what is done with their token losses. Pure.

**Normalisation.** An optimiser step has one loss, ``sum(weight * token loss) / sum(denominator term)``, over all
sampled tokens and all trajectories of the step, of every micro-batch of every rank. A mean per micro-batch, averaged,
would weigh a token by how many others happened to share its micro-batch (OpenRLHF ``utils/loss_utils.py`` has the
algebra). So ``policy_loss`` returns a weighted **sum**, and the learner divides it once. Weight and denominator term
are the objective's and depend on lengths alone: ranks agree on the denominator before any forward pass, and how rows
were packed into micro-batches changes nothing.

**Ratio.** The behaviour policy is the engine that sampled: ratio = exp(learner - engine), with the engine's own
log-probs and not a recomputation, so that one forward pass is enough and staleness is seen as it is. The ratio *is*
then the importance weight that truncated importance sampling (TIS; Yao et al. 2025, "Your efficient RL framework
secretly brings you off-policy RL training") multiplies in where a recomputed old policy stands in the ratio: nothing is
left to multiply, and PPO's clip bounds it on both sides but for large ratios with negative advantages (``dual_clip``).

**Mismatch.** Clipping does not see one thing: a token on which learner and engine disagree by a factor of 8 is less
often a lesson than a sign that they did not compute the same thing (precision, a stale cache, other pixels). Such
tokens leave the loss, on both sides and whatever the advantage (masked importance sampling: IcePop, in Ring-1T, arXiv
2510.18855; TRL's and verl's ``mask`` modes; the bounds 1/8 and 8 are prime-rl's). They stay in the denominator, as in
IcePop and TRL, so that the step gets smaller and the other tokens no louder; ``masked_share`` says by how much."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ergo_rl.episodes.plugins import import_class, is_import_path
from ergo_rl.learners.config import LossConfig, MismatchLevel, ObjectiveName
from ergo_rl.learners.metrics import TokenSums


@dataclass(frozen=True, slots=True, eq=False)
class TokenBatch:
    """B rows of S tokens. What is outside ``mask`` has no influence."""

    logprobs: Tensor
    """float32[B, S], nats, the learner's, differentiable."""
    entropy: Tensor
    """float32[B, S], nats."""
    rollout_logprobs: Tensor
    """float32[B, S], nats, of the engine that sampled."""
    advantages: Tensor
    """float32[B, S]."""
    mask: Tensor
    """bool[B, S]: sampled tokens."""
    turns: Tensor
    """int8[B, S]: the turn of each sampled token, from 1."""
    reference_logprobs: Tensor | None = None
    """float32[B, S], nats, of the policy at the start of the run; for the KL penalty."""


@dataclass(frozen=True, slots=True, eq=False)
class SampledTokens:
    """The N sampled tokens of a micro-batch that stay in the loss."""

    logprobs: Tensor
    """float32[N], nats, the learner's, differentiable."""
    rollout_logprobs: Tensor
    """float32[N], nats, of the engine that sampled."""
    advantages: Tensor
    """float32[N]."""
    rows: Tensor
    """int64[N], ascending: the trajectory that each token belongs to."""

    @property
    def difference(self) -> Tensor:
        """float32[N]: logarithm of the importance weight learner / engine."""
        return self.logprobs - self.rollout_logprobs


@dataclass(frozen=True, slots=True, eq=False)
class TokenLoss:
    loss: Tensor
    """float32[N], differentiable, before any weight."""
    ratio: Tensor
    """float32[N], detached: the importance weight before clipping."""
    clipped: Tensor
    """bool[N]: tokens on which the clip acted: it took their gradient (CISPO: made it smaller)."""


# --- objectives ---------------------------------------------------------------------------------------------------


class Objective(ABC):
    """What a sampled token's loss is, and how much each token counts.

    A new one is a subclass: a line in ``OBJECTIVES`` and a name in ``config.ObjectiveName``, or named as
    ``package.module:Class`` in a configuration (docs/extending.md)."""

    @abstractmethod
    def token_loss(self, tokens: SampledTokens, config: LossConfig) -> TokenLoss:
        """Return the loss of each token."""

    @abstractmethod
    def weight(self, lengths: Tensor, config: LossConfig) -> Tensor:
        """Return float32[B]: the weight of each token of a trajectory, by its number of sampled tokens, int64[B]."""

    @abstractmethod
    def denominator_term(self, length: int) -> float:
        """Return what a trajectory of ``length`` sampled tokens adds to the denominator."""

    def denominator(self, lengths: Iterable[int]) -> float:
        """Return the denominator of trajectories of these lengths; those without sampled tokens are not in the loss."""
        return float(sum(self.denominator_term(length) for length in lengths if length))


class DAPO(Objective):
    """PPO's clip per token (Schulman et al. 2017, equation 7) with separate bounds, mean over all tokens of the step.

    Every token counts the same, a long reply more than a short one (Yu et al., arXiv 2503.14476, equation 8)."""

    def log_ratio(self, tokens: SampledTokens) -> Tensor:
        return tokens.difference

    def token_loss(self, tokens: SampledTokens, config: LossConfig) -> TokenLoss:
        advantages = tokens.advantages
        ratio = self.log_ratio(tokens).exp()
        clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
        gain = torch.minimum(ratio * advantages, clipped * advantages)
        acted = clipped * advantages < ratio * advantages
        if config.dual_clip is not None:
            beyond = (advantages < 0) & (ratio > config.dual_clip)
            gain = torch.where(beyond, config.dual_clip * advantages, gain)
            acted = acted | beyond
        return TokenLoss(-gain, ratio.detach(), acted)

    def weight(self, lengths: Tensor, config: LossConfig) -> Tensor:
        return torch.ones_like(lengths, dtype=torch.float32)

    def denominator_term(self, length: int) -> float:
        return length


class GRPO(DAPO):
    """The same loss per token; the mean over each trajectory's tokens, then over trajectories.

    Every trajectory counts the same, a token of a long one less (Shao et al., arXiv 2402.03300, equation 3)."""

    def weight(self, lengths: Tensor, config: LossConfig) -> Tensor:
        return 1 / lengths.clamp(min=1).float()

    def denominator_term(self, length: int) -> float:
        return 1.0


class DrGRPO(GRPO):
    """The same loss per token; its sum over trajectories x a constant length, so without a bias by length.

    Liu et al., arXiv 2503.20783, section 3.2; the paper's other half is ``learner.advantages.normalisation: none``."""

    def weight(self, lengths: Tensor, config: LossConfig) -> Tensor:
        return torch.full_like(lengths, 1 / config.longest_reply, dtype=torch.float32)


class GSPO(GRPO):
    """The ratio of a whole trajectory, the geometric mean of its tokens' ratios, in place of each token's; mean over
    trajectories (Zheng et al., arXiv 2507.18071, equations 5 to 7).

    Written as the paper's GSPO-token (section 4.3): the same value and gradient where a trajectory has one advantage,
    and right where each turn has its own, which equation 5 would average away."""

    def log_ratio(self, tokens: SampledTokens) -> Tensor:
        whole = row_means(tokens.difference.detach(), tokens.rows)[tokens.rows]
        return whole + (tokens.logprobs - tokens.logprobs.detach())


class CISPO(DAPO):
    """REINFORCE with the importance weight as a detached, capped factor; mean over all tokens of the step.

    No token loses its gradient (MiniMax-M1, arXiv 2506.13585, equations 4 and 5). Only the cap 1 + clip_high is used,
    as there: the paper sets no lower bound."""

    def token_loss(self, tokens: SampledTokens, config: LossConfig) -> TokenLoss:
        ratio = tokens.difference.detach().exp()
        cap = 1 + config.clip_high
        return TokenLoss(-ratio.clamp(max=cap) * tokens.advantages * tokens.logprobs, ratio, ratio > cap)


OBJECTIVES: dict[str, Objective] = {
    ObjectiveName.DAPO: DAPO(),
    ObjectiveName.GRPO: GRPO(),
    ObjectiveName.DR_GRPO: DrGRPO(),
    ObjectiveName.GSPO: GSPO(),
    ObjectiveName.CISPO: CISPO(),
}


@cache
def objective_named(name: str) -> Objective:
    """Return one of OBJECTIVES, or the user's at ``package.module:Class``.

    Raises ValueError where that class is not there."""
    return import_class(name, Objective)() if is_import_path(name) else OBJECTIVES[name]


# --- the loss -----------------------------------------------------------------------------------------------------


def policy_loss(batch: TokenBatch, config: LossConfig) -> tuple[Tensor, TokenSums]:
    """Return the weighted sum of the objective's loss over ``mask``, and detached sums for the metrics.

    The first is float32, differentiable in ``logprobs``."""
    mask, objective = batch.mask, objective_named(config.objective)
    rows = mask.nonzero()[:, 0]
    difference = (batch.logprobs.detach() - batch.rollout_logprobs)[mask]
    kept = within_mismatch_bounds(difference, rows, config)
    tokens = SampledTokens(
        batch.logprobs[mask][kept], batch.rollout_logprobs[mask][kept], batch.advantages[mask][kept], rows[kept]
    )
    result = objective.token_loss(tokens, config)
    loss, kl = result.loss, torch.zeros_like(result.ratio)
    if batch.reference_logprobs is not None:
        penalty, kl = reverse_kl(tokens, batch.reference_logprobs[mask][kept])
        loss = loss + config.kl * penalty
    weighted = loss * objective.weight(mask.sum(1), config)[tokens.rows]

    def spread(values: Tensor) -> Tensor:
        """Return float64[N] over all sampled tokens, 0 where they left the loss."""
        return torch.zeros_like(difference, dtype=torch.float64).masked_scatter(kept, values.detach().double())

    sums = TokenSums.of(
        batch.turns[mask],
        mismatch=difference.abs(),
        kept=kept,
        entropy=batch.entropy[mask],
        loss=spread(weighted),
        ratio=spread(result.ratio),
        ratio_squared=spread(result.ratio.double().square()),
        clipped=spread(result.clipped),
        kl=spread(kl),
    )
    return weighted.sum(), sums


def within_mismatch_bounds(difference: Tensor, rows: Tensor, config: LossConfig) -> Tensor:
    """Return bool[N]: tokens that stay in the loss, because the ratio learner / engine is within the bounds.

    difference: float32[N], the logarithm of the ratio; at level ``sequence`` its mean over the trajectory is compared.
    NaN stays: it must show up in the loss instead of vanishing."""
    if config.mismatch_level is MismatchLevel.SEQUENCE:
        difference = row_means(difference, rows)[rows]
    low = math.log(config.mismatch_low) if config.mismatch_low else -math.inf
    return ~((difference < low) | (difference > math.log(config.mismatch_high)))


def reverse_kl(tokens: SampledTokens, reference_logprobs: Tensor) -> tuple[Tensor, Tensor]:
    """Return KL(learner || reference): (loss float32[N], its value float32[N], detached; nats).

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


def row_means(values: Tensor, rows: Tensor) -> Tensor:
    """Return float32[B]: the mean of each row's values; ``rows`` says which row each of the N values belongs to."""
    count = int(rows.max()) + 1 if rows.numel() else 0
    sums = values.new_zeros(count).index_add(0, rows, values)
    return sums / torch.bincount(rows, minlength=count).clamp(min=1)
