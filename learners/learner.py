"""One DeepSpeed rank: gradients, optimiser steps, weights out. Knows nothing of Ray."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed
from torch import Tensor

from ergo_rl.cluster.compat import repair_torchvision
from ergo_rl.cluster.weight_buckets import Bucket, BucketSpec, pack
from ergo_rl.cluster.weight_sender import TensorSpec
from ergo_rl.episodes.families import family_of, load_tokenizer
from ergo_rl.episodes.types import FloatArray, Trajectory
from ergo_rl.learners import checkpoint, zero
from ergo_rl.learners.adapters import Weight, weights_of
from ergo_rl.learners.batch import Batcher, MicroBatch, Plan, Sample
from ergo_rl.learners.config import Dtype, LearnerConfig, LoraConfig
from ergo_rl.learners.losses import TokenBatch, policy_loss
from ergo_rl.learners.objectives import objective_named
from ergo_rl.learners.policy import Policy
from ergo_rl.learners.report import TURNS, TokenSums, UpdateReport


@dataclass(frozen=True, slots=True)
class StepSize:
    """Of one optimiser step over all ranks. passes: forward passes that every rank makes; tokens: in the loss;
    denominator: what the objective divides its sum by."""

    passes: int
    denominator: float
    tokens: int
    rows: int
    length_mismatches: int
    real_tokens: int
    passed_tokens: int


@dataclass(frozen=True, slots=True)
class Rank:
    """One place in a group of processes; ``address`` and ``port`` are where rank 0 listens."""

    rank: int
    world: int
    address: str
    port: int


class Learner:
    """One rank. All ranks call the same methods in the same order; ZeRO's collectives keep them in step."""

    def __init__(self, config: LearnerConfig, place: Rank) -> None:
        self.config, self.place = config, place
        self.step = 0
        torch.set_num_threads(config.threads)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        zero.join(place.rank, place.world, place.address, place.port, self.device, config.collective_timeout_s)
        family, tokenizer = family_of(config.model, config.family), load_tokenizer(config.model)
        self.banned_ids = family.banned_ids(tokenizer)
        self.batcher = Batcher(
            family=family,
            image_processor=_image_processor(config.model),
            image_pad=tokenizer.convert_tokens_to_ids(family.image_pad),
            pad=tokenizer.convert_tokens_to_ids(family.turn_end),
            token_budget=config.micro_batch_tokens,
            packing=config.packing,
        )
        self.policy = Policy(config)
        self.reference = _reference(config, self.device)
        self.engine = zero.engine_of(self.policy, config)

    def update(self, samples: Sequence[Sample]) -> UpdateReport:
        """One optimiser step on this rank's share. Raises ValueError when no rank has a token to learn from."""
        started = time.perf_counter()
        torch.manual_seed(self.step * self.place.world + self.place.rank)  # the step is the state of every draw
        step, sums = self.accumulate(self.batcher.plan(samples))
        lr = self.config.optimizer.learning_rate(self.step)
        grad_norm = self.apply(lr)
        means = sums.means(with_kl=self.reference is not None)
        assert means is not None, "accumulate found tokens"
        if self.device.type == "cuda" and self.config.resources.gpus < 1:
            torch.cuda.empty_cache()  # an engine on the same GPU needs what this step's activations took
        return UpdateReport(
            loss=sums.total("loss") / step.denominator,
            grad_norm=grad_norm,
            lr=lr,
            trajectories=step.rows,
            length_mismatches=step.length_mismatches,
            micro_batches=step.passes,
            padding=1 - step.real_tokens / step.passed_tokens,
            seconds=time.perf_counter() - started,
            means=means,
            turns=tuple(sums.means(turn, with_kl=self.reference is not None) for turn in range(1, TURNS + 1)),
        )

    def accumulate(self, plan: Plan) -> tuple[StepSize, TokenSums]:
        """Leaves the gradient of the step's loss in the engine, whatever the micro-batches and ranks.

        DeepSpeed averages gradients over ranks and would divide by its accumulation steps; we want the sum over
        both, divided by the objective's denominator of the whole step. So the loss is multiplied by the ranks, and
        ``scale_wrt_gas=False`` keeps the second division out."""
        step = self._agree(plan)
        if step.tokens == 0:
            raise ValueError(
                "no token to learn from: nothing is scored, or all of it was truncated and loss.mask_truncated is set "
                f"({step.length_mismatches} length mismatches)"
            )
        sums = TokenSums.zero(self.device)
        self.engine.train()
        for index, batch in enumerate(self.batcher.batches(plan, step.passes)):
            batch = batch.to(self.device)
            self.engine.set_gradient_accumulation_boundary(index == step.passes - 1)
            loss, new = policy_loss(self._pass(batch), self.config.loss)
            self.engine.backward(loss * (self.place.world / step.denominator), scale_wrt_gas=False)
            sums = sums.plus(new)
        return step, self._combined(sums)

    def apply(self, lr: float) -> float:
        """The optimiser step; returns the gradient's norm before clipping."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        self.engine.step()
        self.step += 1
        return float(self.engine.get_global_grad_norm())

    @torch.no_grad()
    def logprobs(self, trajectories: Sequence[Trajectory]) -> list[FloatArray]:
        """For each trajectory float32[sampled tokens], in order: comparable with
        ``trajectory.logprobs[trajectory.loss_mask]``. Every rank must be given the same trajectories."""
        plan = self.batcher.plan_all(trajectories)
        self.engine.eval()
        found: dict[int, FloatArray] = {}
        for members, batch in zip(plan.bins, self.batcher.batches(plan), strict=True):
            batch = batch.to(self.device)
            logprobs, _ = self.engine(batch, self.config.temperature, self.banned_ids)
            for member, values, mask in zip(members, logprobs, batch.loss_mask, strict=True):
                found[member] = values[mask].cpu().numpy()
        return [found[member] for member in range(len(trajectories))]

    def buckets(self) -> Iterator[list[tuple[str, Tensor]]]:
        """The weights as (name, CPU tensor in the compute precision), in lists of about ``bucket_bytes``, adapters
        merged. Every rank must run through it; parameters are whole only for the time of their own bucket."""
        for members in self._whole():
            yield [(weight.name, weight.value()) for weight in members]

    def weights(self) -> Iterator[Bucket]:
        """The same without a copy where that can be: each bucket must have been taken before the next is asked for
        (under ZeRO-3 its parameters are whole only until then)."""
        for members in self._whole():
            yield pack((weight.name, weight.value(copy=False)) for weight in members)

    def bucket_specs(self) -> list[BucketSpec]:
        """What ``weights`` yields, without gathering anything. Needs no other rank."""
        return [BucketSpec.of(map(_described, members)) for members in self._buckets_of_weights()]

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight as a copy on the device, gathered bucket by bucket: vLLM packs several before it sends them.
        Every rank must run through it."""
        for members in self._whole():
            for weight in members:
                yield weight.name, weight.value(device=self.device)

    def tensor_specs(self) -> list[TensorSpec]:
        """What ``named_weights`` yields, in its order. Needs no other rank."""
        return [TensorSpec(*_described(weight)) for members in self._buckets_of_weights() for weight in members]

    def _whole(self) -> Iterator[list[Weight]]:
        """Every weight once, in lists of about ``bucket_bytes``, whole until the next list is asked for."""
        for members in self._buckets_of_weights():
            parts = [parameter for weight in members for parameter in weight.parameters]
            with zero.gathered(parts, self.config.zero_stage):
                yield members

    def _buckets_of_weights(self) -> Iterator[list[Weight]]:
        return _in_buckets(weights_of(self.policy.vlm), self.config.bucket_bytes)

    def export(self, path: Path) -> None:
        """A Hugging Face folder that ``from_pretrained`` and ``vllm serve`` load. Every rank must call it."""
        weights = {name: tensor for bucket in self.buckets() for name, tensor in bucket}
        if self.place.rank == 0:
            checkpoint.export(self.policy.vlm, weights, self.config.model, path)

    def state(self) -> Iterator[bytes]:
        """All that the optimiser knows, as safetensors files for ``restore``: whole tensors, whatever the ranks. Every
        rank must run through it."""
        counters = torch.tensor([self.step, checkpoint.counted(self.engine)])
        # three fp32 tensors for a weight of two bytes at least
        for members in _in_buckets(self._trained(), self.config.bucket_bytes // 6):
            parts = [(weight.name, weight.base) for weight in members]
            yield safetensors.torch.save(
                {checkpoint.COUNTERS: counters, **dict(checkpoint.full_state(self.engine, parts))}
            )

    def restore(self, files: Iterable[bytes]) -> int:
        """Take up what ``state`` gave, on any number of ranks; returns the step that comes next. Every rank must call
        it. Raises ValueError where it is of another model."""
        missing = {weight.name: weight.base for weight in self._trained()}
        for file in files:
            tensors = safetensors.torch.load(file)
            self.step, updates = tensors.pop(checkpoint.COUNTERS).tolist()
            names = [name for name in tensors if "/" not in name]
            if unknown := [name for name in names if name not in missing]:
                raise ValueError(f"the state has weights that the model does not train: {unknown[:3]}")
            members = [(name, missing.pop(name)) for name in names]
            checkpoint.take_up(self.engine, members, tensors, updates, self.place.rank)
        if missing:
            raise ValueError(f"the state lacks {len(missing)} weights that the model trains: {sorted(missing)[:3]}")
        return self.step

    def _trained(self) -> list[Weight]:
        """By their own names: adapters too, which ``weights_of`` merges into their layers."""
        return [Weight(name, each) for name, each in self.policy.vlm.named_parameters() if each.requires_grad]

    def close(self) -> None:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    def _pass(self, batch: MicroBatch) -> TokenBatch:
        reference = None
        if self.reference is not None:
            with torch.no_grad():
                reference, _ = self.reference(batch, self.config.temperature, self.banned_ids)
        logprobs, entropy = self.engine(batch, self.config.temperature, self.banned_ids)
        return TokenBatch(
            logprobs, entropy, batch.rollout_logprobs, batch.advantages, batch.loss_mask, batch.turns, reference
        )

    def _agree(self, plan: Plan) -> StepSize:
        lengths, passes = plan.lengths, torch.tensor(len(plan.bins), device=self.device)
        denominator = objective_named(self.config.loss.objective).denominator(lengths)
        counts = [sum(lengths), sum(map(bool, lengths)), plan.length_mismatches, plan.real_tokens, plan.passed_tokens]
        totals = torch.tensor([denominator, *counts], dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(passes, torch.distributed.ReduceOp.MAX)
        torch.distributed.all_reduce(totals)
        denominator, *counts = totals.tolist()
        return StepSize(int(passes), denominator, *map(int, counts))

    def _combined(self, sums: TokenSums) -> TokenSums:
        """Over all ranks; in place."""
        torch.distributed.all_reduce(sums.sums)
        torch.distributed.all_reduce(sums.histogram)
        torch.distributed.all_reduce(sums.largest, torch.distributed.ReduceOp.MAX)
        return sums


def _image_processor(model: str) -> Any:
    repair_torchvision()
    from transformers import AutoImageProcessor

    return AutoImageProcessor.from_pretrained(model)


def _reference(config: LearnerConfig, device: torch.device) -> Policy | None:
    """The policy as the run began, frozen, where the loss asks for it. Whole on every rank, under ZeRO-3, too: it costs
    its weights in the precision of the passes and no state, and needs no collective."""
    if not config.loss.kl:
        return None
    dtype = torch.bfloat16 if config.dtype is Dtype.BFLOAT16 else torch.float32
    return Policy(replace(config, lora=LoraConfig())).requires_grad_(False).eval().to(device, dtype)


def _described(weight: Weight) -> tuple[str, torch.dtype, tuple[int, ...]]:
    return weight.name, weight.base.dtype, weight.shape


def _in_buckets(weights: Iterable[Weight], bucket_bytes: int) -> Iterator[list[Weight]]:
    """Consecutive weights of at most ``bucket_bytes`` together; a larger one alone."""
    bucket: list[Weight] = []
    size = 0
    for weight in weights:
        if bucket and size + weight.bytes > bucket_bytes:
            yield bucket
            bucket, size = [], 0
        bucket.append(weight)
        size += weight.bytes
    yield bucket
