"""The clipped policy loss. Pure: tensors in, tensors out.

Normalisation, explained once. The loss of an optimiser step is the mean over **all sampled tokens of the
step**: of every micro-batch of every rank. A mean per micro-batch, averaged, would weigh a token by how
many others happened to share its micro-batch (OpenRLHF ``utils/loss_utils.py`` has the algebra). So the
functions here return **sums** over tokens, and the learner divides them once by the number of tokens of the
whole step.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from learners.config import LossConfig


@dataclass(frozen=True, slots=True, eq=False)
class TokenSums:
    """Sums over the tokens of a loss (float64 scalars), so that micro-batches and ranks can be added up.

    mismatch: |log-prob of the learner - log-prob of the engine that sampled the token|, nats."""

    tokens: Tensor
    loss: Tensor
    ratio: Tensor
    clipped: Tensor
    mismatch: Tensor
    mismatch_max: Tensor
    entropy: Tensor

    @classmethod
    def zero(cls, device: torch.device) -> TokenSums:
        return cls(*(torch.zeros((), dtype=torch.float64, device=device) for _ in fields(cls)))

    def plus(self, other: TokenSums) -> TokenSums:
        mine, theirs = self.stack(), other.stack()
        return TokenSums.unstack(torch.where(self.is_maximum(mine), torch.maximum(mine, theirs), mine + theirs))

    def stack(self) -> Tensor:
        """float64[fields], in the order of the fields."""
        return torch.stack([getattr(self, field.name) for field in fields(self)])

    @classmethod
    def unstack(cls, values: Tensor) -> TokenSums:
        return cls(*values.unbind())

    @classmethod
    def is_maximum(cls, like: Tensor) -> Tensor:
        """bool[fields]: True where ranks combine by their maximum, not by their sum."""
        return torch.tensor([field.name == "mismatch_max" for field in fields(cls)], device=like.device)


def policy_loss(
    logprobs: Tensor, entropy: Tensor, rollout_logprobs: Tensor, advantages: Tensor, mask: Tensor, config: LossConfig
) -> tuple[Tensor, TokenSums]:
    """PPO's clipped surrogate per token (Schulman et al. 2017, equation 7), summed over ``mask``.

    The behaviour policy is the engine that sampled: ratio = exp(logprobs - rollout_logprobs), its own
    log-probs and not a recomputation, so that one forward pass serves and staleness is seen as it is.

    logprobs, entropy, rollout_logprobs: float32[B, S] nats; advantages: float32[B, S]; mask: bool[B, S].
    Returns the summed loss (float32, differentiable in ``logprobs``) and detached sums for the metrics.
    ``clipped`` counts tokens whose gradient the clipping removed."""
    advantage = advantages[mask]
    difference = (logprobs - rollout_logprobs)[mask]
    ratio = difference.exp()
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    loss = -torch.minimum(ratio * advantage, clipped * advantage).sum()
    with torch.no_grad():
        gap = difference.abs().double()
        removed = clipped * advantage < ratio * advantage
        sums = TokenSums(
            tokens=mask.sum().double(),
            loss=loss.double(),
            ratio=ratio.double().sum(),
            clipped=removed.sum().double(),
            mismatch=gap.sum(),
            mismatch_max=gap.max() if gap.numel() else gap.sum(),
            entropy=entropy[mask].double().sum(),
        )
    return loss, sums
