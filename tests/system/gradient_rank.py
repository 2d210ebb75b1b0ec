"""One process of ``test_gradients``: ``python -m tests.system.gradient_rank MODEL RANK WORLD PORT OUT BUDGET STAGE...``

Writes, for each ZeRO stage: the gradient of a first step, its norm as the optimiser saw it, the weights after it, the
gradient of a second step, and that of another objective with a divergence from the weights at the start. All stages run
in one process, because most of its time is importing."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch

from episodes.types import Trajectory
from learners.batch import Sample
from learners.config import LearnerConfig, LossConfig, ObjectiveName, OptimizerConfig
from learners.learner import Learner, Rank
from tests.factories import trajectory, view

ADVANTAGES = (1.5, -0.5, 0.25, -1.0, 0.0, 2.0, -0.75, math.nan, 0.5, -1.5)
OTHER = LossConfig(objective=ObjectiveName.GRPO, kl=0.1)
FIRST_RANK = 3
"""Of two ranks the first takes so many trajectories, the second the others: their micro-batches differ in number."""


def samples() -> list[Sample]:
    """Of one and two turns, each with its advantage; 15 to 80 tokens, images of many shapes; one is not scored."""

    def one(n: int) -> Trajectory:
        replies = (4 + 3 * n,) if n in (1, 4, 8) else (3 + 2 * n, 12 - n)
        return trajectory(f"q{n}", n, replies=replies, coarse=view(2 + n % 4, 3, n), crop=view(4, 2 + n % 3, n), seed=n)

    played = [one(n) for n in range(len(ADVANTAGES))]
    return [
        Sample(path, (advantage, -0.5 * advantage)[: len(path.turns)])
        for path, advantage in zip(played, ADVANTAGES, strict=True)
    ]


def gradients(learner: Learner) -> dict[str, torch.Tensor]:
    from deepspeed.utils import safe_get_full_grad

    return {name: safe_get_full_grad(parameter).clone() for name, parameter in learner.policy.named_weights()}


def run(model: str, place: Rank, stage: int, budget: int) -> dict[str, object]:
    config = LearnerConfig(
        model=model, ranks=place.world, zero_stage=stage, stage3_persistence_threshold=0, micro_batch_tokens=budget,
        optimizer=OptimizerConfig(lr=1e-3, max_grad_norm=1e-2), bucket_bytes=100_000, loss=OTHER,
    )  # fmt: skip
    learner = Learner(config, place)
    learner.config.loss = LossConfig()
    mine = samples()
    if place.world == 2:
        mine = mine[FIRST_RANK:] if place.rank else mine[:FIRST_RANK]
    found: dict[str, object] = {}
    plan = learner.batcher.plan(mine)
    step, sums = learner.accumulate(plan)
    found["own_passes"], found["passes"], found["tokens"] = len(plan.bins), step.passes, step.tokens
    found["loss"], found["masked"] = sums.total("loss") / step.denominator, step.tokens - sums.total("kept")
    found["first"] = gradients(learner)
    found["norm"] = learner.apply(lr=1e-3)
    found["weights"] = {name: tensor for bucket in learner.buckets() for name, tensor in bucket}
    learner.accumulate(plan)
    found["second"] = gradients(learner)
    learner.apply(lr=0.0)  # forgets that gradient, changes no weight
    learner.config.loss = OTHER
    step, sums = learner.accumulate(plan)
    found["other_loss"], found["rows"] = sums.total("loss") / step.denominator, step.rows
    found["other"] = gradients(learner)
    return found


def main() -> None:
    model, rank, world, port, out, budget, *stages = sys.argv[1:]
    place = Rank(int(rank), int(world), "127.0.0.1", int(port))
    found = {int(stage): run(model, place, int(stage), int(budget)) for stage in stages}
    torch.save(found, Path(out) / f"world{world}-rank{rank}.pt")


if __name__ == "__main__":
    main()
