"""The language-model head, asked for log-probs of given tokens instead of logits over everything."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

CHUNK_LOGITS = 1 << 24
"""Logits held at once: 64 MiB in fp32 (a vocabulary of 150k gives 110 tokens a chunk)."""


class LogProbHead(nn.Linear):
    """One call per pass whatever the number of tokens, so that ranks which share the weights (ZeRO-3) gather it equally
    often; inside, logits exist for one chunk at a time and are made a second time in the backward pass."""

    @classmethod
    def adopt(cls, head: nn.Linear) -> LogProbHead:
        """Takes over the parameter itself, so tied embeddings stay tied."""
        if head.bias is not None:
            raise ValueError("language-model heads with a bias are not supported")
        adopted = cls(1, 1, bias=False, device="meta")
        adopted.in_features, adopted.out_features, adopted.weight = head.in_features, head.out_features, head.weight
        return adopted

    def forward(  # type: ignore[override]
        self, hidden: Tensor, targets: Tensor, temperature: float, banned_ids: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """hidden [N, H], targets int64[N] -> (log-probs float32[N], entropy float32[N] without a gradient; nats).

        Of the distribution that was sampled: bans at minus infinity, logits divided by the temperature, then
        the softmax, as vLLM's ``processed_logprobs``."""
        banned = torch.tensor(list(banned_ids), dtype=torch.int64, device=hidden.device)
        logprobs, entropy = _LogProbs.apply(hidden, self.weight, targets, banned, temperature)
        return logprobs, entropy


class _LogProbs(torch.autograd.Function):
    """The gradient is written out, for the sake of the weight's: left to autograd every chunk would make one of its
    own, as large as the head itself, before they are added up."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, banned: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(hidden, weight, targets, banned)
        ctx.temperature = temperature
        logprobs = hidden.new_empty(len(hidden), dtype=torch.float32)
        entropy = torch.empty_like(logprobs)
        for rows in _chunks(len(hidden), len(weight)):
            every = _log_softmax(hidden[rows], weight, banned, temperature)
            logprobs[rows] = every.gather(-1, targets[rows, None]).squeeze(-1)
            entropy[rows] = -every.exp().mul_(every).nan_to_num_(0.0).sum(-1)  # 0 x -inf counts as 0
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        """d log p[target] / d logits = (one-hot of the target - p) / temperature."""
        hidden, weight, targets, banned = ctx.saved_tensors
        slope = slopes[0] / ctx.temperature
        to_hidden = torch.empty_like(hidden)
        to_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for rows in _chunks(len(hidden), len(weight)):
            logits = _log_softmax(hidden[rows], weight, banned, ctx.temperature).exp_().neg_()
            logits.scatter_add_(-1, targets[rows, None], torch.ones_like(slope[rows, None]))
            logits = logits.mul_(slope[rows, None]).index_fill_(-1, banned, 0.0).to(hidden.dtype)
            to_hidden[rows] = logits @ weight
            if to_weight is not None:
                to_weight.addmm_(logits.T, hidden[rows])
        return to_hidden, to_weight, None, None, None


def _log_softmax(hidden: Tensor, weight: Tensor, banned: Tensor, temperature: float) -> Tensor:
    """float32[n, V]; two of them exist for a moment."""
    logits = (hidden @ weight.T).float().index_fill_(-1, banned, -torch.inf).div_(temperature)
    return torch.log_softmax(logits, dim=-1)


def _chunks(tokens: int, vocabulary: int) -> Iterator[slice]:
    size = max(1, CHUNK_LOGITS // vocabulary)
    for start in range(0, tokens, size):
        yield slice(start, start + size)
