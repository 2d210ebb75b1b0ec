"""Weights as a Hugging Face folder, and the optimiser's state for resuming, whole and by parameter.

DeepSpeed's own checkpoints are pickles of each rank's part: they are loaded with code execution allowed
(``torch.load(weights_only=False)`` in 0.19) and fit the same number of ranks and the same stage only. So the state
leaves as the weights do: for each trained parameter its fp32 master and both moments of Adam, whole, as safetensors.
Any number of ranks and any ZeRO stage can load it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ergo_rl.learners.config import Dtype, LearnerConfig
from ergo_rl.model_names import pretrained

MOMENTS = ("exp_avg", "exp_avg_sq")
COUNTERS = "counters"
"""Name of an int64[2] in every file of a state: updates of the run, and updates that the optimiser counts."""


def export(vlm: Any, weights: Mapping[str, Tensor], source: str, path: Path) -> None:
    """Write weights, by module names, as ``save_pretrained`` does, and beside them the processor of ``source``."""
    from transformers import AutoProcessor

    vlm.save_pretrained(path, state_dict=dict(weights))
    AutoProcessor.from_pretrained(**pretrained(source)).save_pretrained(path)


def export_state(config: LearnerConfig, files: Iterable[Path], path: Path) -> None:
    """Write the weights of a saved state (``optimizer_state``, in safetensors files) as ``export`` does.

    Adapters are merged. Runs in this process, on the CPU, without DeepSpeed. Raises ValueError where the state is of
    another model."""
    from safetensors.torch import load_file

    from ergo_rl.learners.lora import named_weights
    from ergo_rl.learners.model import PolicyModel

    policy = PolicyModel(config)
    missing = {name: parameter for name, parameter in policy.vlm.named_parameters() if parameter.requires_grad}
    for file in files:
        for name, value in load_file(file).items():
            if name == COUNTERS or "/" in name:
                continue
            if name not in missing:
                raise ValueError(f"{file} has the weight {name}, which {config.model} does not train")
            missing.pop(name).data.copy_(value)
    if missing:
        raise ValueError(f"the state lacks {len(missing)} weights that the model trains: {sorted(missing)[:3]}")
    if config.dtype is Dtype.BFLOAT16:
        policy.to(torch.bfloat16)
    export(policy.vlm, {weight.name: weight.value() for weight in named_weights(policy.vlm)}, config.model, path)


def optimizer_state(engine: Any, weights: Iterable[tuple[str, nn.Parameter]]) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, whole fp32 tensor on the CPU) of each trained parameter's master weight and moments.

    ``NAME`` is the master; ``NAME/exp_avg`` and ``NAME/exp_avg_sq`` are there after the first update. Every rank must
    run through it."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    moments = MOMENTS if engine.optimizer.optimizer.state else ()
    for name, parameter in weights:
        yield name, safe_get_full_fp32_param(parameter).cpu()
        for moment in moments:
            yield f"{name}/{moment}", safe_get_full_optimizer_state(parameter, moment).cpu()


def optimizer_step_count(engine: Any) -> int:
    """Return the updates that the optimiser itself counts (for Adam's bias correction)."""
    states = list(engine.optimizer.optimizer.state.values())
    return int(states[0]["step"]) if states else 0


def load_optimizer_state(
    engine: Any, weights: Sequence[tuple[str, nn.Parameter]], state: Mapping[str, Tensor], updates: int, rank: int
) -> None:
    """Put a part of ``optimizer_state`` in place: master weights, moments, and the weights of the passes.

    Every rank must call it with the same part. updates: the ``optimizer_step_count`` of the state; 0 leaves the moments
    alone. Raises ValueError for a parameter of another shape, KeyError for one whose moments are not in this part."""
    optimizer = engine.optimizer
    sharded = hasattr(optimizer, "fp32_partitioned_groups_flat")  # ZeRO-3
    if updates:
        _prepare_moments(optimizer, updates, sharded)
    for name, parameter in weights:
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        keys = {None: name} | ({moment: f"{name}/{moment}" for moment in MOMENTS} if updates else {})
        for moment, key in keys.items():
            value = state[key].to(engine.device)
            if tuple(value.shape) != shape:
                raise ValueError(f"{key} is {tuple(value.shape)} in the checkpoint, {shape} in the model")
            (_set_sharded if sharded else _set_whole)(parameter, value, moment, rank)
    parameters = [parameter for _, parameter in weights]
    with _gathered(parameters, sharded), torch.no_grad():
        for name, parameter in weights:
            parameter.data.copy_(state[name].to(engine.device))


def _prepare_moments(optimizer: Any, updates: int, sharded: bool) -> None:
    """Make the state that Adam itself makes in its first step: a fresh engine has none that could be set."""
    flats = optimizer.fp32_partitioned_groups_flat if sharded else optimizer.single_partition_of_fp32_groups
    for flat in flats:
        if flat not in optimizer.optimizer.state:
            moments = {moment: torch.zeros_like(flat) for moment in MOMENTS}
            optimizer.optimizer.state[flat] = moments
        optimizer.optimizer.state[flat]["step"] = torch.tensor(float(updates))
    if not sharded:
        optimizer._lazy_init_hp_params_optimizer_state()  # DeepSpeed links them after the first step


def _set_whole(parameter: nn.Parameter, value: Tensor, moment: str | None, rank: int) -> None:
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    if moment is None:
        safe_set_full_fp32_param(parameter, value)
    else:
        safe_set_full_optimizer_state(parameter, value, moment)


def _set_sharded(parameter: Any, value: Tensor, moment: str | None, rank: int) -> None:
    """Set this rank's piece of a parameter.

    Not by ``safe_set_full_...``: that fails where a parameter does not divide by the ranks, because the last piece is
    padded (DeepSpeed 0.19)."""
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    size = parameter.ds_tensor.numel()
    piece = torch.zeros(size, dtype=value.dtype, device=value.device)
    mine = value.flatten()[rank * size : (rank + 1) * size]
    piece[: len(mine)] = mine
    if moment is None:
        safe_set_local_fp32_param(parameter, piece)
    else:
        safe_set_local_optimizer_state(parameter, piece, moment)


def _gathered(parameters: list[nn.Parameter], sharded: bool) -> Any:
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0, enabled=sharded)
