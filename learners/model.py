"""The network being trained, and the log-probs of its tokens: the only place that shifts tokens.

Rows of a micro-batch go through the language model padded, or end to end in one sequence without padding
(``learner.packing``), and the vision tower has its images, and windows of them, end to end in any case. Attention must
keep them apart. There are three ways to the same numbers, none with a mask of tokens x tokens: on a GPU in half
precision torch's varlen kernel, one call a layer, told the bounds; elsewhere torch's plain attention, one call for all
sequences of equal length (of a tower's windows there are nine lengths at most); or, with
``learner.attention=flash_attention_2``, the package flash-attn."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ergo_rl.cluster.compat import repair_torchvision
from ergo_rl.errors import ErgoError
from ergo_rl.learners.batch import MicroBatch
from ergo_rl.learners.config import Attention, LearnerConfig, Packing
from ergo_rl.learners.lora import add_adapters
from ergo_rl.model_names import pretrained

SDPA_VARLEN, TOWER_VARLEN = "sdpa_varlen", "varlen_flash"
"""The names under which ``sdpa_varlen`` is registered with transformers, for the language model and the vision tower.
With "flash" in the name a tower hands over all its sequences and their bounds; else it makes a call for each."""

CHUNK_LOGITS = 1 << 24
"""Logits held at once: 64 MiB in fp32 (a vocabulary of 150k gives 110 tokens a chunk)."""

ENCODED_IMAGES = "mm_encoder_outputs"
"""The argument of a model's forward pass that takes the vision tower's output."""


class UnsuitableTransformers(ErgoError, ValueError):
    """The installed transformers cannot do what the learner needs of it."""


class PolicyModel(nn.Module):
    """A vision-language model that returns the log-probs of a micro-batch's sampled tokens."""

    def __init__(self, config: LearnerConfig) -> None:
        super().__init__()
        repair_torchvision()
        from transformers import AutoModelForImageTextToText

        self.vlm: Any = AutoModelForImageTextToText.from_pretrained(
            **pretrained(config.model), dtype=torch.float32, attn_implementation=attn_implementation(config)
        )
        require_encoded_images(self.vlm.model.forward)
        self.packing = config.packing
        set_tower_attention(self.vlm, config)
        self.vlm.lm_head = LogProbHead.adopt(self.vlm.lm_head)
        if config.freeze_vision:
            self.vlm.model.visual.requires_grad_(False)
        if config.lora.rank:
            add_adapters(self.vlm, config.lora)
        if config.gradient_checkpointing:
            self.vlm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def forward(self, batch: MicroBatch, temperature: float, banned_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return (log-probs, entropy), float32[B, S] in nats: entry t describes token t; 0 outside the loss mask."""
        states = self._packed(batch) if self.packing is Packing.SEQUENCES else self._padded(batch)
        logprobs, entropy = self.vlm.lm_head(states, batch.input_ids[batch.loss_mask], temperature, banned_ids)
        empty = torch.zeros(batch.loss_mask.shape, dtype=torch.float32, device=states.device)
        return empty.masked_scatter(batch.loss_mask, logprobs), empty.masked_scatter(batch.loss_mask, entropy)

    def _padded(self, batch: MicroBatch) -> Tensor:
        """Return [sampled tokens, H]: for each the state of the token before it, which predicts it."""
        states = self.vlm.model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            mm_token_type_ids=batch.mm_token_type_ids,
            **{ENCODED_IMAGES: {"image": self._encode_images(batch)}},
            image_grid_thw=batch.image_grid_thw,
            use_cache=False,
        ).last_hidden_state
        return states[_previous(batch.loss_mask)]

    def _packed(self, batch: MicroBatch) -> Tensor:
        """Return the same with the rows end to end in one sequence; every row keeps the positions it has alone."""
        real = batch.attention_mask.bool()
        positions, _ = self.vlm.model.get_rope_index(
            batch.input_ids,
            mm_token_type_ids=batch.mm_token_type_ids,
            image_grid_thw=batch.image_grid_thw,
            attention_mask=batch.attention_mask,
        )
        states = self.vlm.model(
            input_ids=batch.input_ids[real][None],
            position_ids=positions[:, None, real],
            **{ENCODED_IMAGES: {"image": self._encode_images(batch)}},
            use_cache=False,
            **varlen_kwargs(real.sum(1)),
        ).last_hidden_state
        return states[0, _previous(batch.loss_mask)[real]]

    def _encode_images(self, batch: MicroBatch) -> Any:
        """Return the vision tower's output for every image in row order; a view that rows share is encoded once.

        Qwen3-VL's tower also has features for the first layers of the language part (DeepStack, arXiv 2406.04334)."""
        order = batch.view_index.tolist()
        output = self.vlm.model.get_image_features(batch.pixel_values, batch.view_grids, return_dict=True)
        output.pooler_output = tuple(output.pooler_output[view] for view in order)
        if "deepstack_features" in output:
            output.deepstack_features = [tuple(layer[view] for view in order) for layer in output.deepstack_features]
        return output


def require_encoded_images(forward: Callable[..., Any]) -> None:
    """Raise UnsuitableTransformers unless ``forward`` names ENCODED_IMAGES: ``**kwargs`` would swallow it, and the
    policy would be trained blind, with log-probs some nats away from the engines'."""
    if ENCODED_IMAGES in inspect.signature(forward).parameters:
        return
    import transformers

    raise UnsuitableTransformers(
        f"transformers {transformers.__version__}: {getattr(forward, '__qualname__', forward)} has no argument "
        f"{ENCODED_IMAGES}, so the learner could not give it images; install transformers 5.19 or newer "
        "(pip install 'transformers>=5.19')"
    )


def _previous(mask: Tensor) -> Tensor:
    """Return bool[B, S]: the token before each token of ``mask``, whose first column is empty."""
    return nn.functional.pad(mask[:, 1:], (0, 1))


# --- attention ----------------------------------------------------------------------------------------------------


def attn_implementation(config: LearnerConfig) -> dict[str, str]:
    """Return ``attn_implementation`` of ``from_pretrained``, part by part: the vision tower packs its images itself.

    Raises ValueError where FlashAttention is asked for and not installed."""
    if config.attention is Attention.FLASH:
        from transformers.utils import is_flash_attn_2_available

        if not is_flash_attn_2_available():
            raise ValueError(
                "learner.attention=flash_attention_2 needs a GPU and the package flash-attn, which is not here; "
                "learner.attention=sdpa does without"
            )
    language = config.attention.value
    if config.packing is Packing.SEQUENCES and config.attention is Attention.SDPA:
        from transformers import AttentionInterface

        AttentionInterface.register(SDPA_VARLEN, sdpa_varlen)
        language = SDPA_VARLEN
    return {"": config.attention.value, "vision_config": config.attention.value, "text_config": language}


def set_tower_attention(vlm: Any, config: LearnerConfig) -> None:
    """Have the vision tower of a loaded model call ``sdpa_varlen`` once a layer.

    After loading, because by ``attn_implementation`` transformers would look for a package of that name."""
    tower = vlm.model.visual
    if config.attention is Attention.SDPA and tower._supports_flash_attn:
        from transformers import AttentionInterface

        AttentionInterface.register(TOWER_VARLEN, sdpa_varlen)
        tower.config._attn_implementation = TOWER_VARLEN


def varlen_kwargs(lengths: Tensor) -> dict[str, Any]:
    """Return the model's keyword arguments that tell attention the bounds of the rows; lengths: int64[B]."""
    starts = nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    longest = int(lengths.max())
    return {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": longest, "max_length_k": longest}


def sdpa_varlen(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    is_causal: bool = True,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Compute attention within each of the sequences that follow one another.

    query: [1, heads, tokens, width]; key and value: [1, key heads, tokens, width]; cu_seq_lens_q: int32[sequences + 1],
    where each begins, and the number of tokens. Returns [1, tokens, heads, width], and None for the attention weights.
    Raises ValueError for a sliding window."""
    if sliding_window is not None:
        raise ValueError("learner.packing=sequences does not know sliding windows; set learner.packing=none")
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if dropout or not has_varlen_kernel(query):
        call = partial(sdpa_attention_forward, module, scaling=scaling, dropout=dropout, is_causal=is_causal)
        return _by_length(call, (query, key, value), cu_seq_lens_q.diff().tolist())[None], None
    from torch.nn.attention.varlen import varlen_attn  # with the first use: it is new in torch 2.10

    tensors = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    bounds = (cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q)
    window, grouped = (-1, 0 if is_causal else -1), query.shape[1] != key.shape[1]
    kernel: Callable[..., Any] = varlen_attn
    return kernel(*tensors, *bounds, scale=scaling, window_size=window, enable_gqa=grouped)[None], None


def has_varlen_kernel(query: Tensor) -> bool:
    """Tell whether torch has a varlen kernel for such a tensor: FlashAttention 2, on Ampere and later."""
    fits = query.dtype in (torch.bfloat16, torch.float16) and query.shape[-1] % 8 == 0 and query.shape[-1] <= 256
    return fits and query.is_cuda and torch.cuda.get_device_capability(query.device) >= (8, 0)


def _by_length(call: Callable[..., Any], tensors: Sequence[Tensor], lengths: Sequence[int]) -> Tensor:
    """Return [tokens, heads, width] by one call for all sequences of a length.

    On a CPU it is, to the bit, what a call for each sequence gives."""
    sequences = [tensor[0].split(list(lengths), dim=1) for tensor in tensors]
    outputs: dict[int, Tensor] = {}
    for length in set(lengths):
        members = [member for member, its in enumerate(lengths) if its == length]
        stacked = (torch.stack([parts[member] for member in members]) for parts in sequences)
        output, _ = call(*stacked, attention_mask=None)
        outputs |= zip(members, output.unbind(), strict=True)
    return torch.cat([outputs[member] for member in range(len(lengths))])


# --- head ---------------------------------------------------------------------------------------------------------


class LogProbHead(nn.Linear):
    """The language-model head, asked for log-probs of given tokens instead of logits over everything.

    Logits exist for one chunk of tokens at a time, and are computed again in the backward pass. The chunks are inside
    the module, so that it is called once a pass whatever the number of tokens: ranks that share the weights (ZeRO-3)
    then gather them equally often."""

    @classmethod
    def adopt(cls, head: nn.Linear) -> LogProbHead:
        """Make one of ``head``, with the parameter itself, so that tied embeddings stay tied."""
        if head.bias is not None:
            raise ValueError("language-model heads with a bias are not supported")
        adopted = cls(1, 1, bias=False, device="meta")
        adopted.in_features, adopted.out_features, adopted.weight = head.in_features, head.out_features, head.weight
        return adopted

    def forward(  # type: ignore[override]
        self, hidden: Tensor, targets: Tensor, temperature: float, banned_ids: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Map hidden [N, H], targets int64[N] to (log-probs float32[N], entropy float32[N] without a gradient; nats).

        They are of the distribution that was sampled: banned ids at minus infinity, logits divided by the temperature,
        then the softmax, as vLLM's ``processed_logprobs``."""
        banned = torch.tensor(list(banned_ids), dtype=torch.int64, device=hidden.device)
        logprobs, entropy = _LogProbs.apply(hidden, self.weight, targets, banned, temperature)
        return logprobs, entropy


class _LogProbs(torch.autograd.Function):
    """Log-probs with the gradient written out.

    Left to autograd, every chunk would make a weight gradient of its own, as large as the head itself, before they are
    added up."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, banned: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(hidden, weight, targets, banned)
        ctx.temperature = temperature
        logprobs = hidden.new_empty(len(hidden), dtype=torch.float32)
        entropy = torch.empty_like(logprobs)
        for rows in _chunks(len(hidden), len(weight)):
            table = _log_softmax(hidden[rows], weight, banned, temperature)
            logprobs[rows] = table.gather(-1, targets[rows, None]).squeeze(-1)
            entropy[rows] = -table.exp().mul_(table).nan_to_num_(0.0).sum(-1)  # 0 x -inf counts as 0
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        """d log p[target] / d logits = (one-hot of the target - p) / temperature."""
        hidden, weight, targets, banned = ctx.saved_tensors
        slope = gradients[0] / ctx.temperature
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
    """Return float32[n, V]; two such tensors exist for a moment."""
    logits = (hidden @ weight.T).float().index_fill_(-1, banned, -torch.inf).div_(temperature)
    return torch.log_softmax(logits, dim=-1)


def _chunks(tokens: int, vocabulary: int) -> Iterator[slice]:
    size = max(1, CHUNK_LOGITS // vocabulary)
    for start in range(0, tokens, size):
        yield slice(start, start + size)
