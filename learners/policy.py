"""The network being trained, and the log-probs of its tokens: the only place that shifts tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ergo_rl.cluster.compat import repair_torchvision
from ergo_rl.learners import attention
from ergo_rl.learners.adapters import add_adapters, weights_of
from ergo_rl.learners.batch import MicroBatch
from ergo_rl.learners.config import LearnerConfig, Packing
from ergo_rl.learners.head import LogProbHead


class Policy(nn.Module):
    """A vision-language model that returns the log-probs of a micro-batch's sampled tokens."""

    def __init__(self, config: LearnerConfig) -> None:
        super().__init__()
        repair_torchvision()
        from transformers import AutoModelForImageTextToText

        self.vlm: Any = AutoModelForImageTextToText.from_pretrained(
            config.model, dtype=torch.float32, attn_implementation=attention.implementation(config)
        )
        self.attention, self.packing = config.attention, config.packing
        self.vlm.lm_head = LogProbHead.adopt(self.vlm.lm_head)
        if config.freeze_vision:
            self.vlm.model.visual.requires_grad_(False)
        if config.lora.rank:
            add_adapters(self.vlm, config.lora)
        if config.gradient_checkpointing:
            self.vlm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def forward(self, batch: MicroBatch, temperature: float, banned_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(log-probs, entropy), both float32[B, S] in nats: entry t describes token t; 0 outside the loss mask."""
        states = self._packed(batch) if self.packing is Packing.SEQUENCES else self._padded(batch)
        logprobs, entropy = self.vlm.lm_head(states, batch.input_ids[batch.loss_mask], temperature, banned_ids)
        empty = torch.zeros(batch.loss_mask.shape, dtype=torch.float32, device=states.device)
        return empty.masked_scatter(batch.loss_mask, logprobs), empty.masked_scatter(batch.loss_mask, entropy)

    def _padded(self, batch: MicroBatch) -> Tensor:
        """[sampled tokens, H]: for each the state after the token before it, which says what comes next."""
        states = self.vlm.model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            mm_token_type_ids=batch.mm_token_type_ids,
            mm_encoder_outputs={"image": self._see(batch)},
            image_grid_thw=batch.image_grid_thw,
            use_cache=False,
        ).last_hidden_state
        return states[_before(batch.loss_mask)]

    def _packed(self, batch: MicroBatch) -> Tensor:
        """The same with the rows end to end in one sequence, each with the positions it has by itself."""
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
            mm_encoder_outputs={"image": self._see(batch)},
            use_cache=False,
            **attention.boundaries(real.sum(1), self.attention),
        ).last_hidden_state
        return states[0, _before(batch.loss_mask)[real]]

    def _see(self, batch: MicroBatch) -> Any:
        """The vision tower's output for every image in row order; each distinct view goes through it once. Qwen3-VL's
        has features for the first layers of the language part besides (DeepStack, arXiv 2406.04334)."""
        shown = batch.shown.tolist()
        seen = self.vlm.model.get_image_features(batch.pixel_values, batch.view_grids, return_dict=True)
        seen.pooler_output = tuple(seen.pooler_output[view] for view in shown)
        if "deepstack_features" in seen:
            seen.deepstack_features = [tuple(layer[view] for view in shown) for layer in seen.deepstack_features]
        return seen

    def named_weights(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters by the model's own module names (``model.visual...``, ``model.language_model...``,
        ``lm_head.weight``; the last is absent where embeddings are tied), which vLLM's loaders accept; without
        adapters, which ``adapters.weights_of`` merges."""
        for weight in weights_of(self.vlm):
            yield weight.name, weight.base


def _before(mask: Tensor) -> Tensor:
    """bool[B, S]: the token before each one of ``mask``, whose first column is empty."""
    return nn.functional.pad(mask[:, 1:], (0, 1))
