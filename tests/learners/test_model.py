"""Log-probs of the policy against transformers' own full-sequence logits, rows padded against rows end to end, and the
head's hand-written gradient against autograd's."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

from ergo_rl.episodes.types import Trajectory, View
from ergo_rl.learners import model as module
from ergo_rl.learners.batch import Batcher, MicroBatchPlan, Sample, expand
from ergo_rl.learners.config import Attention, Dtype, LearnerConfig, LossConfig, Packing
from ergo_rl.learners.learner import _reference
from ergo_rl.learners.model import LogProbHead, PolicyModel, UnsuitableTransformers, varlen_kwargs
from tests.factories import FAMILY, IDS, IMAGE_PAD, trajectory, view

BANNED = tuple(sorted(IDS[token] for token in FAMILY.vision_tokens))


@pytest.fixture(scope="module")
def policy(tiny: Path) -> PolicyModel:
    """Rows padded: the plain way, which packing is compared with."""
    return PolicyModel(LearnerConfig(model=str(tiny), packing=Packing.NONE))


@pytest.fixture(scope="module")
def batcher(tiny: Path, policy: PolicyModel) -> Batcher:
    from transformers import AutoImageProcessor

    return Batcher(FAMILY, AutoImageProcessor.from_pretrained(tiny), IMAGE_PAD, IDS["<|im_end|>"], 4096, Packing.NONE)


@pytest.fixture(scope="module")
def episodes() -> list[Trajectory]:
    """One and two turns, views of many shapes, lengths from 15 to 70 tokens."""
    return [
        trajectory(
            f"q{n}",
            n,
            replies=(3 + 2 * n, 9 - n) if n % 3 else (4 + n,),
            coarse=view(2 + n, 3, n),
            crop=view(5 - n % 4, 2 + n, n),
            seed=n,
        )
        for n in range(6)
    ]


def alone(batcher: Batcher, episode: Trajectory) -> MicroBatchPlan:
    return batcher.plan([Sample(episode, (1.0,))])


def reference(
    policy: PolicyModel, batcher: Batcher, episode: Trajectory, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-probs, entropy) of the sampled tokens from the full logits of an unpadded sequence, without our shift."""
    (batch,) = batcher.batches(alone(batcher, episode))
    output = policy.vlm.model(
        input_ids=batch.input_ids, mm_token_type_ids=batch.mm_token_type_ids,
        pixel_values=batch.pixel_values, image_grid_thw=batch.image_grid_thw,
    )  # fmt: skip
    logits = output.last_hidden_state[0] @ policy.vlm.lm_head.weight.T
    logits[:, list(BANNED)] = -math.inf
    choice = torch.distributions.Categorical(logits=logits / temperature)
    sampled = torch.nonzero(batch.loss_mask[0]).squeeze(-1)
    entropy = torch.stack([-sum(p * p.log() for p in row[row > 0]) for row in choice.probs[sampled - 1]])
    ids = batch.input_ids[0]
    logprobs = torch.stack([torch.log_softmax(logits[t - 1] / temperature, -1)[ids[t]] for t in sampled])
    return logprobs, entropy


@torch.no_grad()
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_equal_those_of_full_logits(
    policy: PolicyModel, batcher: Batcher, episodes: list[Trajectory], temperature: float
) -> None:
    for episode in episodes[:3]:
        (batch,) = batcher.batches(alone(batcher, episode))
        logprobs, entropy = policy(batch, temperature, BANNED)
        wanted, uncertainty = reference(policy, batcher, episode, temperature)
        torch.testing.assert_close(logprobs[batch.loss_mask], wanted, atol=1e-5, rtol=0)
        torch.testing.assert_close(entropy[batch.loss_mask], uncertainty, atol=1e-4, rtol=0)
        assert not logprobs[~batch.loss_mask].any() and not entropy[~batch.loss_mask].any()


@torch.no_grad()
def test_logprobs_are_the_same_with_and_without_padding(
    policy: PolicyModel, batcher: Batcher, episodes: list[Trajectory]
) -> None:
    plan = batcher.plan([Sample(episode, (1.0,)) for episode in episodes])
    (batch,) = batcher.batches(plan)
    assert (batch.attention_mask == 0).any()
    padded, _ = policy(batch, 1.0, BANNED)
    for place, member in enumerate(plan.bins[0]):
        (single,) = batcher.batches(alone(batcher, episodes[member]))
        logprobs, _ = policy(single, 1.0, BANNED)
        torch.testing.assert_close(padded[place][batch.loss_mask[place]], logprobs[single.loss_mask], atol=1e-5, rtol=0)


@torch.no_grad()
def test_logprobs_change_when_an_image_or_its_shape_changes(policy: PolicyModel, batcher: Batcher) -> None:
    """The fixture would hide mistakes if the model did not look: other pixels or another shape change log-probs."""
    changed = [
        trajectory(coarse=view(3, 2, 1), crop=view(2, 4, 2)),
        trajectory(coarse=view(3, 2, 5), crop=view(2, 4, 2)),
        trajectory(coarse=view(3, 2, 1), crop=view(2, 4, 5)),
        trajectory(coarse=view(2, 3, 1), crop=view(2, 4, 2)),
        trajectory(coarse=view(3, 2, 1), crop=view(4, 2, 2)),
    ]
    outcomes = []
    for episode in changed:
        (batch,) = batcher.batches(alone(batcher, episode))
        outcomes.append(policy(batch, 1.0, BANNED)[0][batch.loss_mask])
    for other in outcomes[1:]:
        assert (outcomes[0] - other).abs().max() > 1e-3


@torch.no_grad()
def test_positions_equal_mrope_by_hand(policy: PolicyModel, batcher: Batcher) -> None:
    """mRoPE by hand for a 3 x 2 and a 2 x 4 image: an image takes max(columns, rows) positions."""
    episode = trajectory(replies=(5, 7), coarse=view(3, 2), crop=view(2, 4))
    (batch,) = batcher.batches(alone(batcher, episode))
    seen: list[torch.Tensor] = []
    hook = policy.vlm.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
    )
    policy(batch, 1.0, BANNED)
    hook.remove()
    expected, _ = policy.vlm.model.get_rope_index(
        batch.input_ids, mm_token_type_ids=batch.mm_token_type_ids, image_grid_thw=batch.image_grid_thw
    )
    assert torch.equal(seen[0], expected)
    time, row, column = seen[0][:, 0].tolist()
    # 4 tokens, the image at 4 (2 rows x 3 columns, 3 positions long), 1 + 4 + 5 + 4 + 1 text tokens from 7, then
    # the crop at 22 (4 rows x 2 columns, 4 positions long), text from 26
    assert time == [*range(4), *[4] * 6, *range(7, 22), *[22] * 8, *range(26, 38)]
    assert row[4:10] == [4, 4, 4, 5, 5, 5] and column[4:10] == [4, 5, 6, 4, 5, 6]
    assert row[25:33] == [22, 22, 23, 23, 24, 24, 25, 25] and column[25:33] == [22, 23] * 4


@pytest.fixture(scope="module")
def packed(tiny: Path) -> PolicyModel:
    return PolicyModel(LearnerConfig(model=str(tiny), packing=Packing.SEQUENCES))


@torch.no_grad()
def test_positions_of_packed_rows_equal_those_alone(
    packed: PolicyModel, policy: PolicyModel, batcher: Batcher, episodes: list[Trajectory]
) -> None:
    """The rows of a padded batch end to end: each starts at 0 and has its own mRoPE; no padding in between."""

    def positions(network: PolicyModel, episodes: list[Trajectory]) -> torch.Tensor:
        (batch,) = batcher.batches(batcher.plan([Sample(episode, (1.0,)) for episode in episodes]))
        seen: list[torch.Tensor] = []
        hook = network.vlm.model.language_model.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
        )
        network(batch, 1.0, BANNED)
        hook.remove()
        return seen[0]

    plan = batcher.plan([Sample(episode, (1.0,)) for episode in episodes])
    wanted = torch.cat([positions(policy, [episodes[member]]) for member in plan.bins[0]], dim=-1)
    assert wanted.shape == (3, 1, plan.real_tokens)
    assert torch.equal(positions(packed, episodes), wanted)


def test_gradient_is_the_same_packed_and_padded(
    packed: PolicyModel, policy: PolicyModel, batcher: Batcher, episodes: list[Trajectory]
) -> None:
    (batch,) = batcher.batches(batcher.plan([Sample(episode, (1.0,)) for episode in episodes]))
    assert (batch.attention_mask == 0).any()
    outcomes = []
    for network in (policy, packed):
        network.zero_grad()
        logprobs, entropy = network(batch, 1.0, BANNED)
        (logprobs * torch.linspace(-1, 1, logprobs.numel()).view_as(logprobs)).sum().backward()
        gradient = torch.cat([parameter.grad.double().flatten() for _, parameter in network.vlm.named_parameters()])
        outcomes.append((logprobs.detach(), entropy.detach(), gradient))
    (logprobs, entropy, gradient), (packed_logprobs, packed_entropy, packed_gradient) = outcomes
    torch.testing.assert_close(packed_logprobs, logprobs, atol=1e-5, rtol=0)
    torch.testing.assert_close(packed_entropy, entropy, atol=1e-4, rtol=0)
    assert (packed_gradient - gradient).norm() <= 1e-5 * gradient.norm()


@torch.no_grad()
def test_packed_row_does_not_depend_on_another(
    packed: PolicyModel, batcher: Batcher, episodes: list[Trajectory]
) -> None:
    """Another first row changes nothing of the second, exactly: it is not in its sums at all."""

    def second(first: Trajectory) -> torch.Tensor:
        (batch,) = replace(batcher, packing=Packing.SEQUENCES).batches(
            replace(batcher, packing=Packing.SEQUENCES).plan([Sample(first, (1.0,)), Sample(episodes[1], (1.0,))])
        )
        return packed(batch, 1.0, BANNED)[0][1][batch.loss_mask[1]]

    assert torch.equal(
        second(episodes[4]),
        second(replace(episodes[4], sample=1, turns=episodes[4].turns[:1], views=episodes[4].views[:1])),
    )


def test_attention_is_told_the_bounds_of_the_rows() -> None:
    told = varlen_kwargs(torch.tensor([3, 5, 2]))
    assert told["cu_seq_lens_q"].tolist() == told["cu_seq_lens_k"].tolist() == [0, 3, 8, 10]
    assert told["cu_seq_lens_q"].dtype == torch.int32 and told["max_length_q"] == told["max_length_k"] == 5


def test_flash_attention_is_refused_when_not_installed(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: False)
    with pytest.raises(ValueError, match="needs a GPU and the package flash-attn"):
        PolicyModel(LearnerConfig(model=str(tiny), attention=Attention.FLASH, dtype=Dtype.BFLOAT16))


def test_shared_view_gives_the_same_gradient_as_copies(policy: PolicyModel, batcher: Batcher) -> None:
    """Three trajectories of one coarse view, as one view and as three equal ones: the same log-probs and gradients."""
    shared = view(3, 2)

    def outcome(coarse: list[View]) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
        episodes = [trajectory("q", n, coarse=coarse[n], crop=view(2, 4, n), seed=n) for n in range(3)]
        (batch,) = batcher.batches(batcher.plan([Sample(episode, (1.0,)) for episode in episodes]))
        policy.zero_grad()
        logprobs, _ = policy(batch, 1.0, BANNED)
        logprobs.sum().backward()
        gradients = {name: parameter.grad.clone() for name, parameter in policy.vlm.named_parameters()}
        return logprobs.detach(), gradients, len(batch.view_grids)

    logprobs, grads, views = outcome([shared] * 3)
    separate, wanted, copies = outcome([View(shared.box, shared.pixels.copy()) for _ in range(3)])
    assert (views, copies) == (4, 6)
    assert (logprobs - separate).abs().max() < 1e-6
    assert any("visual" in name for name in grads)
    for name, gradient in grads.items():
        assert (gradient - wanted[name]).norm() <= 1e-5 * wanted[name].norm() + 1e-9, name


def test_head_chunks_change_neither_logprobs_nor_gradients(
    policy: PolicyModel, batcher: Batcher, episodes: list[Trajectory], monkeypatch: pytest.MonkeyPatch
) -> None:
    (batch,) = batcher.batches(batcher.plan([Sample(episode, (1.0,)) for episode in episodes]))

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        policy.zero_grad()
        logprobs, _ = policy(batch, 1.0, BANNED)
        logprobs.sum().backward()
        return logprobs.detach(), policy.vlm.lm_head.weight.grad.clone()

    whole, gradient = run()
    monkeypatch.setattr(module, "CHUNK_LOGITS", 5 * policy.vlm.lm_head.out_features)
    chunked, chunked_gradient = run()
    torch.testing.assert_close(chunked, whole, atol=1e-6, rtol=0)
    torch.testing.assert_close(chunked_gradient, gradient, atol=1e-5, rtol=1e-5)


def test_batch_without_loss_has_zero_gradients_everywhere(policy: PolicyModel, batcher: Batcher) -> None:
    """ZeRO's ranks stay in step only if a batch without loss still reaches every parameter."""
    (batch,) = batcher.batches(alone(batcher, trajectory()))
    policy.zero_grad()
    logprobs, _ = policy(batch.without_loss(), 1.0, BANNED)
    logprobs.sum().backward()
    for name, parameter in policy.vlm.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    from tests.factories import tiny_model

    tied = PolicyModel(LearnerConfig(model=str(tiny_model(tmp_path, tied=True))))
    assert tied.vlm.lm_head.weight is tied.vlm.model.language_model.embed_tokens.weight
    assert "lm_head.weight" not in dict(tied.vlm.named_parameters())


def test_forward_without_encoded_images_when_the_model_is_loaded_then_it_is_refused(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers 5.17 has ``**kwargs`` in its place, which would swallow the images."""
    from transformers import Qwen2_5_VLModel

    def old(self: object, input_ids: object = None, **kwargs: object) -> None: ...

    monkeypatch.setattr(Qwen2_5_VLModel, "forward", old)
    wanted = rf"transformers {transformers.__version__}: .*old has no argument mm_encoder_outputs.*transformers>=5\.19"
    with pytest.raises(UnsuitableTransformers, match=wanted):
        PolicyModel(LearnerConfig(model=str(tiny)))


def test_frozen_vision_tower_is_not_trained(tiny: Path) -> None:
    frozen = PolicyModel(LearnerConfig(model=str(tiny), freeze_vision=True))
    trained = [name for name, parameter in frozen.vlm.named_parameters() if parameter.requires_grad]
    assert trained and not any(name.startswith("model.visual.") for name in trained)


def test_expanded_lengths_equal_the_processors(batcher: Batcher, episodes: list[Trajectory]) -> None:
    for episode in episodes:
        row = expand(Sample(episode, (1.0,)), FAMILY, IMAGE_PAD)
        (batch,) = batcher.batches(alone(batcher, episode))
        assert int(row.image_mask.sum()) == int(batch.image_grid_thw.prod(-1).sum()) // FAMILY.merge_size**2


def test_gradient_checkpointing_changes_no_gradient(
    tiny: Path, policy: PolicyModel, batcher: Batcher, episodes: list[Trajectory]
) -> None:
    (batch,) = batcher.batches(batcher.plan([Sample(episode, (1.0,)) for episode in episodes]))
    recomputing = PolicyModel(LearnerConfig(model=str(tiny), gradient_checkpointing=True))
    gradients = []
    for network in (policy.train(), recomputing.train()):
        network.zero_grad()
        network(batch, 1.0, BANNED)[0].sum().backward()
        gradients.append({name: parameter.grad for name, parameter in network.vlm.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-5)
    assert recomputing.vlm.is_gradient_checkpointing


# --- the head -----------------------------------------------------------------------------------------------------

HEAD_BANNED = (2, 5)


def plain(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    logits = (hidden @ weight.T).index_fill(-1, torch.tensor(HEAD_BANNED), -torch.inf) / temperature
    chosen = torch.log_softmax(logits, -1)[torch.arange(len(targets)), targets]
    return chosen, torch.distributions.Categorical(logits=logits).entropy()


@pytest.mark.parametrize("chunk", [1, 3, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_head_gradient_equals_autograds(chunk: int, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
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
            logprobs, entropy = LogProbHead.adopt(head)(hidden, targets, temperature, HEAD_BANNED)
            assert not entropy.requires_grad
        (logprobs * slopes).sum().backward()
        outcomes.append((logprobs.detach(), entropy.detach(), hidden.grad, head.weight.grad))
    for ours, theirs in zip(outcomes[1], outcomes[0], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_head_gives_zero_gradient_for_no_tokens() -> None:
    head = LogProbHead.adopt(torch.nn.Linear(4, 11, bias=False))
    hidden = torch.zeros(0, 4, requires_grad=True)
    logprobs, _ = head(hidden, torch.zeros(0, dtype=torch.int64), 1.0, HEAD_BANNED)
    logprobs.sum().backward()
    assert logprobs.shape == (0,) and head.weight.grad is not None and not head.weight.grad.any()


def test_frozen_head_passes_the_gradient_on() -> None:
    head = LogProbHead.adopt(torch.nn.Linear(4, 11, bias=False).requires_grad_(False))
    hidden = torch.ones(2, 4, requires_grad=True)
    head(hidden, torch.tensor([0, 1]), 1.0, HEAD_BANNED)[0].sum().backward()
    assert hidden.grad is not None and hidden.grad.any() and head.weight.grad is None


@torch.no_grad()
def test_reference_in_half_precision_is_the_policy_at_the_start(tiny: Path, batcher: Batcher) -> None:
    """The divergence is exactly 0 at step 0: rotary frequencies (buffers) stay in fp32, as DeepSpeed leaves them."""
    config = LearnerConfig(model=str(tiny), dtype=Dtype.BFLOAT16, loss=LossConfig(kl=0.01))
    frozen, trained = _reference(config, torch.device("cpu")), PolicyModel(config).eval()
    assert frozen is not None and {buffer.dtype for buffer in frozen.buffers() if buffer.is_floating_point()} == {
        torch.float32
    }
    for parameter in trained.parameters():  # what DeepSpeed does
        parameter.data = parameter.data.bfloat16()
    (batch,) = batcher.batches(alone(batcher, trajectory(replies=(200, 200))))
    assert torch.equal(trained(batch, 1.0, BANNED)[0], frozen(batch, 1.0, BANNED)[0])
