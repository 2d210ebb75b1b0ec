"""The head's hand-written gradient against autograd's, on full logits."""

import pytest
import torch

from ergo_rl.learners import head as module
from ergo_rl.learners.head import LogProbHead

BANNED = (2, 5)


def plain(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    logits = (hidden @ weight.T).index_fill(-1, torch.tensor(BANNED), -torch.inf) / temperature
    chosen = torch.log_softmax(logits, -1)[torch.arange(len(targets)), targets]
    return chosen, torch.distributions.Categorical(logits=logits).entropy()


@pytest.mark.parametrize("chunk", [1, 3, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_gradient_is_autograds(chunk: int, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_LOGITS", chunk * 11)
    generator = torch.Generator().manual_seed(0)
    values, slopes = torch.randn(7, 4, generator=generator), torch.randn(7, generator=generator)
    targets = torch.tensor([0, 1, 3, 4, 6, 10, 10])
    outcomes = []
    for way in (plain, None):
        head = torch.nn.Linear(4, 11, bias=False)
        head.weight.data = torch.linspace(-2, 2, 44).view(11, 4).sin()
        hidden = values.clone().requires_grad_()
        if way is not None:
            logprobs, entropy = way(hidden, head.weight, targets, temperature)
        else:
            logprobs, entropy = LogProbHead.adopt(head)(hidden, targets, temperature, BANNED)
            assert not entropy.requires_grad
        (logprobs * slopes).sum().backward()
        outcomes.append((logprobs.detach(), entropy.detach(), hidden.grad, head.weight.grad))
    for ours, theirs in zip(outcomes[1], outcomes[0], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_no_tokens_give_zeros() -> None:
    head = LogProbHead.adopt(torch.nn.Linear(4, 11, bias=False))
    hidden = torch.zeros(0, 4, requires_grad=True)
    logprobs, _ = head(hidden, torch.zeros(0, dtype=torch.int64), 1.0, BANNED)
    logprobs.sum().backward()
    assert logprobs.shape == (0,) and head.weight.grad is not None and not head.weight.grad.any()


def test_a_frozen_head_passes_the_gradient_on() -> None:
    head = LogProbHead.adopt(torch.nn.Linear(4, 11, bias=False).requires_grad_(False))
    hidden = torch.ones(2, 4, requires_grad=True)
    head(hidden, torch.tensor([0, 1]), 1.0, BANNED)[0].sum().backward()
    assert hidden.grad is not None and hidden.grad.any() and head.weight.grad is None
