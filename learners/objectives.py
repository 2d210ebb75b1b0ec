"""The objectives, one class each: what a sampled token's loss is, and how much each token counts.

The loss of an optimiser step is ``sum(weight * token loss) / sum(share)``: over all sampled tokens and all trajectories
of the step, of every micro-batch of every rank. Weight and share depend on lengths alone, so ranks agree on the
denominator before any forward pass (``Learner._agree``), and how rows were packed into micro-batches changes nothing.

A new one is a subclass of ``Objective``: a line in ``OBJECTIVES`` and a name in ``config.ObjectiveName``, or named as
``package.module:Class`` in a configuration (docs/extending.md)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ergo_rl.episodes.plugins import import_class, is_import_path
from ergo_rl.learners.config import LossConfig, ObjectiveName


@dataclass(frozen=True, slots=True, eq=False)
class Sampled:
    """N sampled tokens of a micro-batch.

    logprobs: float32[N], the learner's, differentiable; rollout_logprobs: float32[N], those of the engine that sampled
    (nats); advantages: float32[N]; rows: int64[N], ascending, the trajectory that each token belongs to."""

    logprobs: Tensor
    rollout_logprobs: Tensor
    advantages: Tensor
    rows: Tensor

    @property
    def difference(self) -> Tensor:
        """float32[N]: logarithm of the importance weight learner / engine."""
        return self.logprobs - self.rollout_logprobs


@dataclass(frozen=True, slots=True, eq=False)
class Surrogate:
    """loss: float32[N], differentiable, before any weight. ratio: float32[N], detached, the importance weight before
    clipping. clipped: bool[N], tokens on which the clip acted: it took their gradient (CISPO: made it smaller)."""

    loss: Tensor
    ratio: Tensor
    clipped: Tensor


class Objective(ABC):
    @abstractmethod
    def surrogate(self, tokens: Sampled, config: LossConfig) -> Surrogate:
        """The loss of each token."""

    @abstractmethod
    def weight(self, lengths: Tensor, config: LossConfig) -> Tensor:
        """float32[B]: what each token of a trajectory counts, by the number of its sampled tokens, int64[B]."""

    @abstractmethod
    def share(self, length: int) -> float:
        """What a trajectory of so many sampled tokens adds to the denominator."""

    def denominator(self, lengths: Iterable[int]) -> float:
        """Of trajectories with so many sampled tokens each; those without any are outside the loss."""
        return float(sum(self.share(length) for length in lengths if length))


class DAPO(Objective):
    """PPO's clip per token (Schulman et al. 2017, equation 7) with separate bounds, mean over all tokens of the step:
    every token counts the same, a long reply more than a short one (Yu et al., arXiv 2503.14476, equation 8)."""

    def log_ratio(self, tokens: Sampled) -> Tensor:
        return tokens.difference

    def surrogate(self, tokens: Sampled, config: LossConfig) -> Surrogate:
        advantages = tokens.advantages
        ratio = self.log_ratio(tokens).exp()
        clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
        gain = torch.minimum(ratio * advantages, clipped * advantages)
        acted = clipped * advantages < ratio * advantages
        if config.dual_clip is not None:
            beyond = (advantages < 0) & (ratio > config.dual_clip)
            gain = torch.where(beyond, config.dual_clip * advantages, gain)
            acted = acted | beyond
        return Surrogate(-gain, ratio.detach(), acted)

    def weight(self, lengths: Tensor, config: LossConfig) -> Tensor:
        return torch.ones_like(lengths, dtype=torch.float32)

    def share(self, length: int) -> float:
        return length


class GRPO(DAPO):
    """The same loss per token; the mean over each trajectory's tokens, then over trajectories (Shao et al., arXiv
    2402.03300, equation 3): every trajectory counts the same, a token of a long one less."""

    def weight(self, lengths: Tensor, config: LossConfig) -> Tensor:
        return 1 / lengths.clamp(min=1).float()

    def share(self, length: int) -> float:
        return 1.0


class DrGRPO(GRPO):
    """The same loss per token; its sum over trajectories x a constant length (Liu et al., arXiv 2503.20783, section
    3.2): no bias by length. The paper's other half is ``learner.advantages.normalisation: none``."""

    def weight(self, lengths: Tensor, config: LossConfig) -> Tensor:
        return torch.full_like(lengths, 1 / config.longest_reply, dtype=torch.float32)


class GSPO(GRPO):
    """The ratio of a whole trajectory, the geometric mean of its tokens' ratios, in place of each token's; mean over
    trajectories (Zheng et al., arXiv 2507.18071, equations 5 to 7).

    Written as the paper's GSPO-token (section 4.3): the same value and gradient where a trajectory has one advantage,
    and right where each turn has its own, which equation 5 would average away."""

    def log_ratio(self, tokens: Sampled) -> Tensor:
        whole = row_means(tokens.difference.detach(), tokens.rows)[tokens.rows]
        return whole + (tokens.logprobs - tokens.logprobs.detach())


class CISPO(DAPO):
    """REINFORCE with the importance weight as a detached, capped factor: no token loses its gradient; mean over all
    tokens of the step (MiniMax-M1, arXiv 2506.13585, equations 4 and 5). Only the cap 1 + clip_high is used, as there:
    the paper sets no lower bound."""

    def surrogate(self, tokens: Sampled, config: LossConfig) -> Surrogate:
        ratio = tokens.difference.detach().exp()
        cap = 1 + config.clip_high
        return Surrogate(-ratio.clamp(max=cap) * tokens.advantages * tokens.logprobs, ratio, ratio > cap)


OBJECTIVES: dict[str, Objective] = {
    ObjectiveName.DAPO: DAPO(),
    ObjectiveName.GRPO: GRPO(),
    ObjectiveName.DR_GRPO: DrGRPO(),
    ObjectiveName.GSPO: GSPO(),
    ObjectiveName.CISPO: CISPO(),
}


@cache
def objective_named(name: str) -> Objective:
    """One of OBJECTIVES, or the user's at ``package.module:Class``. Raises ValueError where that class is not there."""
    return import_class(name, Objective)() if is_import_path(name) else OBJECTIVES[name]


def row_means(values: Tensor, rows: Tensor) -> Tensor:
    """float32[B]: the mean of each row's values; ``rows`` says which row each of the N values belongs to."""
    count = int(rows.max()) + 1 if rows.numel() else 0
    sums = values.new_zeros(count).index_add(0, rows, values)
    return sums / torch.bincount(rows, minlength=count).clamp(min=1)
