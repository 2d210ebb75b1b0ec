"""Weights as a Hugging Face folder, and the optimiser's state for going on, whole and by parameter.

DeepSpeed's own checkpoints are pickles of each rank's part: they are loaded with code execution allowed
(``torch.load(weights_only=False)`` in 0.19) and fit the same number of ranks and the same stage only. So the state
leaves as the weights do: for each trained parameter its fp32 master and both moments of Adam, whole, as safetensors.
Any number of ranks and any ZeRO stage can take it up.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ergo_rl.learners.config import Dtype, LearnerConfig

MOMENTS = ("exp_avg", "exp_avg_sq")
COUNTERS = "counters"
"""int64[2]: the updates of the run, the updates that the optimiser counts."""


def export(vlm: Any, weights: Mapping[str, Tensor], source: str, path: Path) -> None:
    """Weights by module names -> a folder with the names ``save_pretrained`` writes, and the processor of
    ``source``."""
    from transformers import AutoProcessor

    vlm.save_pretrained(path, state_dict=dict(weights))
    AutoProcessor.from_pretrained(source).save_pretrained(path)


def export_state(config: LearnerConfig, files: Iterable[Path], path: Path) -> None:
    """The weights of a saved state (``full_state``, in safetensors files) as ``export`` writes them, adapters merged:
    in this process, on the CPU, without DeepSpeed.

    Raises ValueError where the state is of another model."""
    from safetensors.torch import load_file

    from ergo_rl.learners.adapters import weights_of
    from ergo_rl.learners.policy import Policy

    policy = Policy(config)
    missing = {name: each for name, each in policy.vlm.named_parameters() if each.requires_grad}
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
    export(policy.vlm, {weight.name: weight.value() for weight in weights_of(policy.vlm)}, config.model, path)


def full_state(engine: Any, weights: Iterable[tuple[str, nn.Parameter]]) -> Iterator[tuple[str, Tensor]]:
    """(name, whole fp32 tensor on the CPU) of each trained parameter's master, ``NAME`` itself, and of its moments,
    ``NAME/exp_avg`` and ``NAME/exp_avg_sq`` (not before the first update). Every rank must run through it."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    moments = MOMENTS if engine.optimizer.optimizer.state else ()
    for name, parameter in weights:
        yield name, safe_get_full_fp32_param(parameter).cpu()
        for moment in moments:
            yield f"{name}/{moment}", safe_get_full_optimizer_state(parameter, moment).cpu()


def counted(engine: Any) -> int:
    """The updates that the optimiser itself counts (for Adam's bias correction)."""
    states = list(engine.optimizer.optimizer.state.values())
    return int(states[0]["step"]) if states else 0


def take_up(
    engine: Any, weights: Sequence[tuple[str, nn.Parameter]], state: Mapping[str, Tensor], updates: int, rank: int
) -> None:
    """Put a part of ``full_state`` in place: masters, moments and the weights of the passes. Every rank must call it
    with the same part. updates: as ``counted`` said; 0 leaves the moments alone.

    Raises ValueError for a parameter of another shape, KeyError for one whose moments are not in this part."""
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
    """Adam makes its state in the first step; a fresh engine has none that could be set."""
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
    """This rank's piece. Not by ``safe_set_full_...``: it fails where a parameter does not divide by the ranks, because
    the last piece is padded (DeepSpeed 0.19)."""
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
