"""One rank of the learner: gradients, optimiser steps, weights out. Knows nothing of Ray."""

from __future__ import annotations

import shutil
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
from ergo_rl.cluster.devices import require_gpu
from ergo_rl.cluster.weight_buckets import Bucket, BucketSpec, pack
from ergo_rl.cluster.weight_sender import TensorSpec
from ergo_rl.episodes.families import family_of, load_tokenizer
from ergo_rl.episodes.types import FloatArray, Trajectory
from ergo_rl.learners import checkpoint, deepspeed_engine
from ergo_rl.learners.batch import Batcher, MicroBatch, MicroBatchPlan, Sample
from ergo_rl.learners.config import Dtype, LearnerConfig, LoraConfig
from ergo_rl.learners.failures import SaveFailed, UpdatesSkipped
from ergo_rl.learners.lora import Weight, named_weights
from ergo_rl.learners.losses import TokenBatch, objective_named, policy_loss
from ergo_rl.learners.metrics import TURNS, TokenSums, UpdateReport
from ergo_rl.learners.model import PolicyModel
from ergo_rl.model_names import pretrained

SKIPPED_IN_A_ROW = 3
"""Updates without a step, one after the other, that are an error."""


@dataclass(frozen=True, slots=True)
class StepSize:
    """Of one optimiser step over all ranks."""

    passes: int
    """Forward passes that every rank makes."""
    denominator: float
    """What the objective divides the sum of its losses by."""
    tokens: int
    """In the loss."""
    rows: int
    """Trajectories in the loss."""
    length_mismatches: int
    not_finite: int
    real_tokens: int
    """Of all rows, without padding."""
    passed_tokens: int
    """Through the model, padding included."""


@dataclass(frozen=True, slots=True)
class Rank:
    """A place in the process group of the learner."""

    rank: int
    world: int
    """Number of ranks."""
    address: str
    """Where rank 0 listens."""
    port: int


class Learner:
    """One rank. All ranks call the same methods in the same order; ZeRO's collectives keep them in step."""

    def __init__(self, config: LearnerConfig, rank: Rank) -> None:
        self.config, self.rank, self.world = config, rank.rank, rank.world
        self.step = 0
        self._skipped = 0
        torch.set_num_threads(config.threads)
        require_gpu(config.resources.gpus, "learner.resources.gpus")
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        deepspeed_engine.init_process_group(
            rank.rank, rank.world, rank.address, rank.port, self.device, config.collective_timeout_s
        )
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
        self.policy = PolicyModel(config)
        self.reference = _reference(config, self.device)
        self.engine = deepspeed_engine.init_engine(self.policy, config)

    # --- updates ---

    def update(self, samples: Sequence[Sample]) -> UpdateReport:
        """Make one optimiser step; ``samples`` are this rank's part of it.

        Raises ValueError when no rank has a token to learn from; UpdatesSkipped where this is the last of
        SKIPPED_IN_A_ROW updates whose gradient was not finite."""
        started = time.perf_counter()
        torch.manual_seed(self.step * self.world + self.rank)  # so that resuming needs no state of random generators
        step, sums = self.accumulate(self.batcher.plan(samples))
        lr = self.config.optimizer.learning_rate(self.step)
        before = self.step
        grad_norm = self.apply(lr)
        self._skipped = self._skipped + 1 if self.step == before else 0
        if self._skipped >= SKIPPED_IN_A_ROW:
            raise UpdatesSkipped(
                f"{self._skipped} updates in a row had a gradient that was NaN or infinite, so the weights are those "
                f"after {self.step} steps; the policy's log-probs overflow: resume with a lower learner.optimizer.lr"
            )
        means = sums.means(with_kl=self.reference is not None)
        assert means is not None, "accumulate raises where no token was sampled"
        if self.device.type == "cuda" and self.config.resources.gpus < 1:
            torch.cuda.empty_cache()  # an engine on the same GPU needs what this step's activations took
        return UpdateReport(
            loss=sums.total("loss") / step.denominator,
            grad_norm=grad_norm,
            lr=lr,
            trajectories=step.rows,
            length_mismatches=step.length_mismatches,
            not_finite=step.not_finite,
            skipped=self._skipped > 0,
            micro_batches=step.passes,
            padding=1 - step.real_tokens / step.passed_tokens,
            seconds=time.perf_counter() - started,
            means=means,
            turns=tuple(sums.means(turn, with_kl=self.reference is not None) for turn in range(1, TURNS + 1)),
        )

    def accumulate(self, plan: MicroBatchPlan) -> tuple[StepSize, TokenSums]:
        """Leave the gradient of the step's loss in the engine, the same for any micro-batches and ranks.

        DeepSpeed averages gradients over ranks and would divide by its accumulation steps; we want the sum over
        both, divided by the objective's denominator of the whole step. So the loss is multiplied by the ranks, and
        ``scale_wrt_gas=False`` keeps the second division out."""
        step = self._step_size(plan)
        if step.tokens == 0:
            raise ValueError(
                "no token to learn from: nothing is scored, or all of it was truncated and loss.mask_truncated is set "
                f"({step.length_mismatches} length mismatches, {step.not_finite} not finite)"
            )
        sums = TokenSums.zero(self.device)
        self.engine.train()
        for index, batch in enumerate(self.batcher.batches(plan, step.passes)):
            batch = batch.to(self.device)
            self.engine.set_gradient_accumulation_boundary(index == step.passes - 1)
            loss, new = policy_loss(self._forward(batch), self.config.loss)
            self.engine.backward(loss * (self.world / step.denominator), scale_wrt_gas=False)
            sums = sums.plus(new)
        return step, self._all_reduce(sums)

    def apply(self, lr: float) -> float:
        """Make the optimiser step; return the gradient's norm before clipping.

        DeepSpeed makes none where the gradient of any rank is NaN or infinite; then ``step`` does not move."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        self.engine.step()
        self.step += self.engine.was_step_applied()
        return float(self.engine.get_global_grad_norm())

    @torch.no_grad()
    def logprobs(self, trajectories: Sequence[Trajectory]) -> list[FloatArray]:
        """Return for each trajectory float32[sampled tokens], nats, under the current weights.

        Comparable with ``trajectory.logprobs[trajectory.loss_mask]``. Every rank must get the same trajectories."""
        plan = self.batcher.plan_all(trajectories)
        self.engine.eval()
        by_row: dict[int, FloatArray] = {}
        for members, batch in zip(plan.bins, self.batcher.batches(plan), strict=True):
            batch = batch.to(self.device)
            logprobs, _ = self.engine(batch, self.config.temperature, self.banned_ids)
            for member, values, mask in zip(members, logprobs, batch.loss_mask, strict=True):
                by_row[member] = values[mask].cpu().numpy()
        return [by_row[member] for member in range(len(trajectories))]

    def _forward(self, batch: MicroBatch) -> TokenBatch:
        reference = None
        if self.reference is not None:
            with torch.no_grad():
                reference, _ = self.reference(batch, self.config.temperature, self.banned_ids)
        logprobs, entropy = self.engine(batch, self.config.temperature, self.banned_ids)
        return TokenBatch(
            logprobs, entropy, batch.rollout_logprobs, batch.advantages, batch.loss_mask, batch.turns, reference
        )

    def _step_size(self, plan: MicroBatchPlan) -> StepSize:
        """Add up the sizes of all ranks' plans; ranks with fewer micro-batches repeat one without loss."""
        lengths, passes = plan.lengths, torch.tensor(len(plan.bins), device=self.device)
        denominator = objective_named(self.config.loss.objective).denominator(lengths)
        counts = [
            sum(lengths), sum(map(bool, lengths)), plan.length_mismatches, plan.not_finite, plan.real_tokens,
            plan.passed_tokens,
        ]  # fmt: skip
        totals = torch.tensor([denominator, *counts], dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(passes, torch.distributed.ReduceOp.MAX)
        torch.distributed.all_reduce(totals)
        denominator, *counts = totals.tolist()
        return StepSize(int(passes), denominator, *map(int, counts))

    def _all_reduce(self, sums: TokenSums) -> TokenSums:
        """Combine the sums of all ranks, in place."""
        torch.distributed.all_reduce(sums.sums)
        torch.distributed.all_reduce(sums.histogram)
        torch.distributed.all_reduce(sums.largest, torch.distributed.ReduceOp.MAX)
        return sums

    # --- weights out ---

    def buckets(self) -> Iterator[list[tuple[str, Tensor]]]:
        """Yield the weights as copies (name, CPU tensor in the compute precision), adapters merged, in lists of about
        ``bucket_bytes``. Every rank must run through it; parameters are whole only for the time of their own bucket."""
        for members in self._gathered_buckets():
            yield [(weight.name, weight.value()) for weight in members]

    def weights(self) -> Iterator[Bucket]:
        """Yield the same as ``buckets``, without a copy where that is possible.

        A bucket must be used before the next is made: under ZeRO-3 its parameters are whole only until then."""
        for members in self._gathered_buckets():
            yield pack((weight.name, weight.value(copy=False)) for weight in members)

    def bucket_specs(self) -> list[BucketSpec]:
        """Return the layout of every bucket that ``weights`` yields, without gathering. Needs no other rank."""
        return [BucketSpec.of(map(_described, members)) for members in self._buckets_of_weights()]

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every weight as a copy on the device, gathered bucket by bucket.

        A copy, because vLLM packs several before it sends them. Every rank must run through it."""
        for members in self._gathered_buckets():
            for weight in members:
                yield weight.name, weight.value(device=self.device)

    def tensor_specs(self) -> list[TensorSpec]:
        """Return what ``named_weights`` yields, in its order, without gathering. Needs no other rank."""
        return [TensorSpec(*_described(weight)) for members in self._buckets_of_weights() for weight in members]

    def export(self, path: Path) -> None:
        """Write a Hugging Face folder that ``from_pretrained`` and ``vllm serve`` load. Every rank must call it.

        It is written aside and moved. Raises SaveFailed, with nothing left behind, where it cannot be written."""
        weights = {name: tensor for bucket in self.buckets() for name, tensor in bucket}
        if self.rank:
            return
        aside = path.with_name(f".{path.name}.partial")
        try:
            checkpoint.export(self.policy.vlm, weights, self.config.model, aside)
            _move_files(aside, path)
        except (OSError, safetensors.SafetensorError) as error:
            raise SaveFailed(f"{path} could not be written: {error}") from error
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def _gathered_buckets(self) -> Iterator[list[Weight]]:
        """Yield every weight once, in lists of about ``bucket_bytes``, whole until the next list is asked for."""
        for members in self._buckets_of_weights():
            parts = [parameter for weight in members for parameter in weight.parameters]
            with deepspeed_engine.gather_params(parts, self.config.zero_stage):
                yield members

    def _buckets_of_weights(self) -> Iterator[list[Weight]]:
        return _in_buckets(named_weights(self.policy.vlm), self.config.bucket_bytes)

    # --- state, for checkpoints ---

    def state(self) -> Iterator[bytes]:
        """Yield the optimiser's state as safetensors files for ``restore``: whole tensors, for any number of ranks.

        Every rank must run through it."""
        counters = torch.tensor([self.step, checkpoint.optimizer_step_count(self.engine)])
        # three fp32 tensors for a weight of two bytes at least
        for members in _in_buckets(self._trained(), self.config.bucket_bytes // 6):
            parts = [(weight.name, weight.base) for weight in members]
            tensors = dict(checkpoint.optimizer_state(self.engine, parts))
            yield safetensors.torch.save({checkpoint.COUNTERS: counters, **tensors})

    def restore(self, files: Iterable[bytes]) -> int:
        """Load what ``state`` yielded, on any number of ranks; return the next step. Every rank must call it.

        Raises ValueError where the state is of another model."""
        missing = {weight.name: weight.base for weight in self._trained()}
        for file in files:
            tensors = safetensors.torch.load(file)
            self.step, updates = tensors.pop(checkpoint.COUNTERS).tolist()
            names = [name for name in tensors if "/" not in name]
            if unknown := [name for name in names if name not in missing]:
                raise ValueError(f"the state has weights that the model does not train: {unknown[:3]}")
            members = [(name, missing.pop(name)) for name in names]
            checkpoint.load_optimizer_state(self.engine, members, tensors, updates, self.rank)
        if missing:
            raise ValueError(f"the state lacks {len(missing)} weights that the model trains: {sorted(missing)[:3]}")
        return self.step

    def close(self) -> None:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    def _trained(self) -> list[Weight]:
        """Return the trained parameters by their own names: adapters are listed, which ``named_weights`` merges."""
        parameters = self.policy.vlm.named_parameters()
        return [Weight(name, parameter) for name, parameter in parameters if parameter.requires_grad]


def _move_files(source: Path, target: Path) -> None:
    """Move the files of a folder to one that may be there and have others."""
    if not target.exists():
        source.rename(target)
        return
    for file in source.iterdir():
        file.replace(target / file.name)


def _image_processor(model: str) -> Any:
    repair_torchvision()
    from transformers import AutoImageProcessor

    return AutoImageProcessor.from_pretrained(**pretrained(model))


def _reference(config: LearnerConfig, device: torch.device) -> PolicyModel | None:
    """Return the policy as the run began, frozen, where the loss asks for it.

    It is whole on every rank, under ZeRO-3 too: it costs its weights in the precision of the passes and no state, and
    needs no collective."""
    if not config.loss.kl:
        return None
    policy = PolicyModel(replace(config, lora=LoraConfig())).requires_grad_(False).eval()
    if config.dtype is Dtype.BFLOAT16:
        # Parameters alone, as DeepSpeed does: with rounded rotary frequencies (buffers) it would be another network,
        # and the divergence not 0 at the start.
        for parameter in policy.parameters():
            parameter.data = parameter.data.bfloat16()
    return policy.to(device)


def _described(weight: Weight) -> tuple[str, torch.dtype, tuple[int, ...]]:
    return weight.name, weight.base.dtype, weight.shape


def _in_buckets(weights: Iterable[Weight], bucket_bytes: int) -> Iterator[list[Weight]]:
    """Yield consecutive weights of at most ``bucket_bytes`` together; a larger one alone."""
    bucket: list[Weight] = []
    size = 0
    for weight in weights:
        if bucket and size + weight.bytes > bucket_bytes:
            yield bucket
            bucket, size = [], 0
        bucket.append(weight)
        size += weight.bytes
    yield bucket
