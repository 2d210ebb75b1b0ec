"""One process of ``test_gradients``: ``python -m tests.system.gradient_rank MODEL RANK WORLD PORT OUT BUDGET RUN...``

A run is a ZeRO stage or one of ``OTHERS``; all share one process, because most of its time is importing. A stage gives
the gradient of a first step, its norm as the optimiser saw it, the weights after it, the gradient of a second step,
however it is split and laid out, and that of another objective with a divergence from the weights at the start."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ergo_rl.episodes.types import Trajectory
from ergo_rl.learners import deepspeed_engine
from ergo_rl.learners.batch import MicroBatch, MicroBatchPlan, Sample
from ergo_rl.learners.config import (
    Dtype,
    LearnerConfig,
    LoraConfig,
    LossConfig,
    ObjectiveName,
    OptimizerConfig,
    Packing,
)
from ergo_rl.learners.failures import UpdatesSkipped
from ergo_rl.learners.learner import Learner, Rank
from ergo_rl.learners.lora import named_weights
from ergo_rl.learners.losses import TokenBatch
from ergo_rl.learners.model import attn_implementation, set_tower_attention
from tests.factories import trajectory, view

ADVANTAGES = (1.5, -0.5, 0.25, -1.0, 0.0, 2.0, -0.75, math.nan, 0.5, -1.5)
OTHER = LossConfig(objective=ObjectiveName.GRPO, kl=0.1)
FIRST_RANK = 3
"""Of two ranks the first takes so many trajectories, the second the others: their micro-batches differ in number."""
SPLITS = (1, 2, 4, 8)
LORA = LoraConfig(rank=4, alpha=6)


def samples() -> list[Sample]:
    """Of one and two turns, each with its advantage; 15 to 80 tokens, images of many shapes; one is not scored."""

    def make(n: int) -> Trajectory:
        replies = (4 + 3 * n,) if n in (1, 4, 8) else (3 + 2 * n, 12 - n)
        return trajectory(f"q{n}", n, replies=replies, coarse=view(2 + n % 4, 3, n), crop=view(4, 2 + n % 3, n), seed=n)

    played = [make(n) for n in range(len(ADVANTAGES))]
    return [
        Sample(path, (advantage, -0.5 * advantage)[: len(path.turns)])
        for path, advantage in zip(played, ADVANTAGES, strict=True)
    ]


def share(place: Rank) -> list[Sample]:
    if place.world == 1:
        return samples()
    return samples()[FIRST_RANK:] if place.rank else samples()[:FIRST_RANK]


def gradients(learner: Learner) -> dict[str, torch.Tensor]:
    from deepspeed.utils import safe_get_full_grad

    parameters = learner.policy.vlm.named_parameters()
    return {name: safe_get_full_grad(parameter).clone() for name, parameter in parameters}


def masters(learner: Learner) -> dict[str, torch.Tensor]:
    from deepspeed.utils import safe_get_full_fp32_param

    parameters = learner.policy.vlm.named_parameters()
    return {name: safe_get_full_fp32_param(parameter).clone() for name, parameter in parameters}


def weights(learner: Learner) -> dict[str, torch.Tensor]:
    return {name: tensor for bucket in learner.buckets() for name, tensor in bucket}


def config_of(model: str, place: Rank, **changes: Any) -> LearnerConfig:
    plain = LearnerConfig(
        model=model, ranks=place.world, stage3_persistence_threshold=0, packing=Packing.NONE, bucket_bytes=100_000,
        optimizer=OptimizerConfig(lr=1e-3, max_grad_norm=1e-2),
    )  # fmt: skip
    return replace(plain, **changes)


def lay(learner: Learner, packing: Packing) -> None:
    """Rows end to end or side by side, from now on."""
    learner.policy.vlm.set_attn_implementation(attn_implementation(replace(learner.config, packing=packing)))
    set_tower_attention(learner.policy.vlm, learner.config)
    learner.policy.packing, learner.batcher = packing, replace(learner.batcher, packing=packing)


def split(plan: MicroBatchPlan, count: int, packing: Packing) -> MicroBatchPlan:
    """The same rows in so many micro-batches, or as many as there are rows."""
    pieces = np.array_split(np.arange(len(plan.rows)), min(count, len(plan.rows)))
    return replace(plan, bins=tuple(tuple(piece.tolist()) for piece in pieces), packing=packing)


def stage(model: str, place: Rank, budget: int, stage: int) -> dict[str, Any]:
    learner = Learner(config_of(model, place, zero_stage=stage, micro_batch_tokens=budget, loss=OTHER), place)
    learner.config.loss = LossConfig()
    results: dict[str, Any] = {}
    plan = learner.batcher.plan(share(place))
    step, sums = learner.accumulate(plan)
    results["own_passes"], results["passes"], results["tokens"] = len(plan.bins), step.passes, step.tokens
    results["loss"], results["masked"] = sums.total("loss") / step.denominator, step.tokens - sums.total("kept")
    results["first"] = gradients(learner)
    results["norm"] = learner.apply(lr=1e-3)
    results["weights"] = weights(learner)
    learner.accumulate(plan)
    results["second"] = gradients(learner)
    learner.apply(lr=0.0)  # forgets that gradient, changes no weight
    for packing in Packing:
        lay(learner, packing)
        for count in SPLITS:
            step, _ = learner.accumulate(split(plan, count, packing))
            results["split", packing.value, count] = step.passes, gradients(learner)
            learner.apply(lr=0.0)
    learner.config.loss = OTHER
    step, sums = learner.accumulate(plan)
    results["other_loss"], results["rows"] = sums.total("loss") / step.denominator, step.rows
    results["other"] = gradients(learner)
    learner.apply(lr=0.0)
    return results | {"skipped": skipped(learner, place)}


def skipped(learner: Learner, place: Rank) -> dict[str, Any]:
    """Updates whose gradient is NaN on the last rank alone, and the same gradient before and after one."""
    plan, forward = learner.batcher.plan(share(place)), learner._forward
    learner.accumulate(plan)
    results: dict[str, Any] = {"before": gradients(learner)}
    learner.apply(lr=0.0)
    start, kept = learner.step, weights(learner)

    def poisoned(batch: MicroBatch) -> TokenBatch:
        return replace(found := forward(batch), rollout_logprobs=found.rollout_logprobs * math.nan)

    def update(poison: bool) -> dict[str, float]:
        learner._forward = poisoned if poison and place.rank == place.world - 1 else forward  # type: ignore[method-assign]
        return learner.update(share(place)).metrics()

    results["metrics"], results["counted"] = update(poison=True), learner.step - start
    results["moved"] = max(float((kept[name] - value).abs().max()) for name, value in weights(learner).items())
    learner._forward = forward  # type: ignore[method-assign]
    learner.accumulate(plan)
    results["after"] = gradients(learner)
    learner.apply(lr=0.0)
    results["row"] = [update(poison)["learner/skipped"] for poison in (False, True, True, False, True, True)]
    try:
        update(poison=True)
    except UpdatesSkipped as error:
        results["raised"] = str(error)
    return results


def offloaded(model: str, place: Rank, budget: int) -> dict[str, Any]:
    """Master weights and optimiser state apart from the passes, ZeRO-2: where DeepSpeed lost all but the last
    micro-batch's gradient before PR #7981."""
    learner = Learner(config_of(model, place, offload_optimizer=True, micro_batch_tokens=budget), place)
    plan = learner.batcher.plan(share(place))
    results: dict[str, Any] = {"passes": learner.accumulate(plan)[0].passes, "first": gradients(learner)}
    results["norm"] = learner.apply(lr=1e-3)
    learner.accumulate(plan)
    return results | {"weights": weights(learner), "second": gradients(learner)}


def half(model: str, place: Rank, budget: int) -> dict[str, Any]:
    """bfloat16 passes, by ZeRO stage: a step of 1e-6, and the same gradient before and after a step of 0."""
    results: dict[str, Any] = {}
    for stage in (1, 2, 3):
        config = config_of(
            model, place, zero_stage=stage, dtype=Dtype.BFLOAT16, micro_batch_tokens=budget, loss=LossConfig(kl=0.1)
        )
        learner = Learner(config, place)
        plan = learner.batcher.plan(share(place))
        _, sums = learner.accumulate(plan)
        gradient = gradients(learner)
        learner.apply(lr=0.0)
        learner.accumulate(plan)
        again, before, seen = gradients(learner), masters(learner), weights(learner)
        learner.apply(lr=1e-6)
        results[str(stage)] = {
            "gradient": gradient, "again": again, "masters": (before, masters(learner)),
            "weights": (seen, weights(learner)), "kl": sums.total("kl"),
        }  # fmt: skip
    return results


def checkpointed(model: str, place: Rank, budget: int) -> dict[str, Any]:
    """Activations recomputed under ZeRO-3: parameters are gathered once more for each layer, on all ranks alike."""
    config = config_of(model, place, zero_stage=3, gradient_checkpointing=True, micro_batch_tokens=budget)
    learner = Learner(config, place)
    step, _ = learner.accumulate(learner.batcher.plan(share(place)))
    return {"passes": step.passes, "first": gradients(learner), "norm": learner.apply(lr=1e-3)}


def adapted(model: str, place: Rank, budget: int, out: Path) -> dict[str, Any]:
    """LoRA under ZeRO-3: two steps, what is published, what is exported, and the log-probs of both."""
    config = config_of(
        model, place, zero_stage=3, lora=LORA, micro_batch_tokens=budget, optimizer=OptimizerConfig(lr=1e-2)
    )
    learner = Learner(config, place)
    results: dict[str, Any] = {"base": weights(learner)}
    for _ in range(2):
        learner.update(share(place))
    results["published"] = weights(learner)
    results["adapters"] = {}
    for weight in named_weights(learner.policy.vlm):
        if weight.adapter is not None:
            down, up, scale = weight.adapter
            with deepspeed_engine.gather_params([down, up], 3):
                results["adapters"][weight.name] = down.detach().clone(), up.detach().clone(), scale
    scored = [sample.trajectory for sample in samples() if not math.isnan(sample.advantages[0])]
    results["logprobs"] = [torch.from_numpy(values) for values in learner.logprobs(scored)]
    learner.export(out / "adapted")
    return results


OTHERS: dict[str, Callable[[str, Rank, int, Path], dict[str, Any]]] = {
    "offloaded": lambda model, place, budget, out: offloaded(model, place, budget),
    "checkpointed": lambda model, place, budget, out: checkpointed(model, place, budget),
    "bfloat16": lambda model, place, budget, out: half(model, place, budget),
    "adapted": adapted,
}


def main() -> None:
    model, rank, world, port, folder, budget, *runs = sys.argv[1:]
    place, out = Rank(int(rank), int(world), "127.0.0.1", int(port)), Path(folder)
    results = {
        run: OTHERS[run](model, place, int(budget), out)
        if run in OTHERS
        else stage(model, place, int(budget), int(run))
        for run in runs
    }
    torch.save(results, out / f"world{world}-rank{rank}.pt")


if __name__ == "__main__":
    main()
