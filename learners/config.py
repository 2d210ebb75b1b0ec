"""Configuration of the learner. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated

from annotated_types import Ge, Gt, Le, Lt

from ergo_rl.cluster.config import Resources
from ergo_rl.config_fields import MAY_BE_INFINITE, MAY_CHANGE, Because, ConfigSection
from ergo_rl.episodes.plugins import is_import_path

_AROUND_ONE = Because("a ratio of 1 (learner and engine agree) must lie between mismatch_low and mismatch_high")


class Dtype(StrEnum):
    """Precision of forward and backward passes."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class Attention(StrEnum):
    """SDPA is torch's own and runs everywhere; FLASH needs a GPU, bfloat16 and the package flash-attn."""

    SDPA = "sdpa"
    FLASH = "flash_attention_2"


class Packing(StrEnum):
    """How the rows of a micro-batch go through the language model. NONE: beside each other, padded to the longest.
    SEQUENCES: end to end without padding, each with its own positions and seeing itself alone."""

    NONE = "none"
    SEQUENCES = "sequences"


class Schedule(StrEnum):
    """The learning rate after the warm-up."""

    CONSTANT = "constant"
    LINEAR = "linear"
    COSINE = "cosine"


class ObjectiveName(StrEnum):
    """What is minimised and how it is averaged; the classes are in ``learners.losses``, formulas and sources in
    docs/objectives.md."""

    DAPO = "dapo"
    GRPO = "grpo"
    DR_GRPO = "dr_grpo"
    GSPO = "gspo"
    CISPO = "cispo"


class MismatchLevel(StrEnum):
    """What leaves the loss where learner and engine disagree too much: the token, or its whole trajectory by the
    geometric mean over its tokens."""

    TOKEN = "token"
    SEQUENCE = "sequence"


@dataclass
class LossConfig(ConfigSection):
    """What is minimised (docs/objectives.md)."""

    objective: str = ObjectiveName.DAPO.value
    """dapo (clip per token, mean over all tokens) | grpo | dr_grpo | gspo | cispo | ``package.module:Class`` of your
    own (docs/extending.md)."""
    clip_low: Annotated[float, Ge(0), Le(1)] = 0.2
    """The probability ratio is clipped below at 1 - clip_low (cispo: not at all)."""
    clip_high: Annotated[float, Ge(0), MAY_BE_INFINITE] = 0.2
    """The probability ratio is clipped above at 1 + clip_high."""
    dual_clip: Annotated[float | None, Gt(1)] = None
    """Largest ratio that counts where the advantage is negative, above 1 (3 in arXiv 1912.09729); null: no limit."""
    longest_reply: Annotated[int, Ge(1)] = 1024
    """The constant of dr_grpo, in tokens: the most that a trajectory can sample, both turns together. In a recipe
    that does not give it: the sum of its two reply limits (``rollout.sampling``)."""
    mismatch_low: Annotated[float, Ge(0), Lt(1), _AROUND_ONE] = 0.125
    """A token whose ratio learner / engine is below this leaves the loss; 0 turns the bound off."""
    mismatch_high: Annotated[float, Gt(1), MAY_BE_INFINITE, _AROUND_ONE] = 8.0
    """A token whose ratio learner / engine is above this leaves the loss; .inf turns the bound off."""
    mismatch_level: MismatchLevel = MismatchLevel.TOKEN
    """What leaves the loss by mismatch_low and mismatch_high. token: the token; sequence: its whole trajectory, by the
    geometric mean of the ratios of its tokens."""
    kl: Annotated[float, Ge(0)] = 0.0
    """Coefficient of the KL divergence from the policy at the start, nats; above 0 every rank holds a frozen copy."""
    mask_truncated: bool = False
    """Trajectories with a reply that was cut at its length limit leave the loss; they stay in their group's
    baseline."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_import_path(self.objective):
            self.objective = self.objective.lower()
            if self.objective not in (names := [name.value for name in ObjectiveName]):
                raise ValueError(
                    f"learner.loss.objective: there is no {self.objective!r}; known: {', '.join(names)}, or "
                    "package.module:Class of your own"
                )
        if self.dual_clip is not None and self.objective == ObjectiveName.CISPO:
            raise ValueError(f"learner.loss.dual_clip is {self.dual_clip}; cispo has its own cap, so it must be null")


class Credit(StrEnum):
    """TRAJECTORY: one advantage for all tokens, from the total reward. TURN: one for each turn, from what that turn
    earned (region and box terms: turn 1; accuracy: turn 2; format: each its own), relative to the same turn of the
    group."""

    TRAJECTORY = "trajectory"
    TURN = "turn"


class Normalisation(StrEnum):
    """STD: divided by the group's standard deviation (GRPO). NONE: reward minus mean (Dr. GRPO, arXiv 2503.20783: the
    division makes questions that are nearly always or nearly never solved weigh more)."""

    STD = "std"
    NONE = "none"


class Terms(StrEnum):
    """SUM_THEN_NORMALISE: the weighted reward terms are summed, the sum is normalised (GRPO). NORMALISE_THEN_SUM: each
    term is normalised within the group, then they are weighted and summed, and the sums divided by their standard
    deviation over the whole step (GDPO, arXiv 2601.05242), so that unlike terms with equal sums stay apart."""

    SUM_THEN_NORMALISE = "sum_then_normalise"
    NORMALISE_THEN_SUM = "normalise_then_sum"


@dataclass
class AdvantageConfig(ConfigSection):
    """How rewards become advantages."""

    credit: Credit = Credit.TRAJECTORY
    """trajectory: one advantage for all tokens, from the total reward; turn: one for each turn, from what that turn
    earned."""
    normalisation: Normalisation = Normalisation.STD
    """std: divide by the group's standard deviation (GRPO); none: only subtract the mean (Dr. GRPO)."""
    terms: Terms = Terms.SUM_THEN_NORMALISE
    """sum_then_normalise (GRPO) | normalise_then_sum (GDPO; with credit trajectory and normalisation std)."""
    epsilon: float = 1e-4
    """Added to the standard deviation; reward units (TRL and verl use 1e-4 and 1e-6)."""
    tolerance: float = 1e-6
    """Rewards of a group that differ by no more than this are equal: all advantages are exactly 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        plain = self.credit is Credit.TRAJECTORY and self.normalisation is Normalisation.STD
        if self.terms is Terms.NORMALISE_THEN_SUM and not plain:
            raise ValueError("advantages.terms=normalise_then_sum needs credit=trajectory and normalisation=std")


@dataclass
class OptimizerConfig(ConfigSection):
    """AdamW, and the learning rate over the run."""

    lr: Annotated[float, Ge(0)] = 1e-6
    """Peak learning rate."""
    beta1: Annotated[float, Ge(0), Le(0.999999)] = 0.9
    """Decay rate of the first moment."""
    beta2: Annotated[float, Ge(0), Le(0.9999999)] = 0.999
    """Decay rate of the second moment."""
    weight_decay: Annotated[float, Ge(0)] = 0.0
    """Decoupled weight decay, on every trained parameter."""
    max_grad_norm: Annotated[float, Ge(0)] = 1.0
    """The gradient of a step is scaled down to this norm; 0 turns it off."""
    schedule: Schedule = Schedule.CONSTANT
    """After the warm-up the learning rate stays (constant), or falls to 0 at ``total_steps`` (linear, cosine)."""
    warmup_steps: Annotated[int, Ge(0)] = 0
    """Steps over which the learning rate rises linearly to ``lr``."""
    total_steps: Annotated[int | None, Ge(1), MAY_CHANGE] = None
    """Steps after which the linear and cosine schedules have reached 0; null: those of the run (``total_steps``). Fewer
    than the run has are refused."""

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of optimiser step 0, 1, 2, ...

        Raises ValueError where the schedule falls and it is not set when."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        if self.schedule is Schedule.CONSTANT:
            return self.lr
        if self.total_steps is None:
            raise ValueError(f"learner.optimizer.schedule={self.schedule} needs learner.optimizer.total_steps")
        left = max(0.0, 1 - (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps))
        return self.lr * (left if self.schedule is Schedule.LINEAR else (1 - math.cos(math.pi * left)) / 2)


@dataclass
class LoraConfig(ConfigSection):
    """Adapters beside frozen layers of the language model; needs the package peft (``pip install 'ergo-rl[lora]'``)."""

    rank: Annotated[int, Ge(0)] = 0
    """Width of the adapters; 0: none, and every weight is trained. Above 0 only the adapters are trained."""
    alpha: Annotated[int, Gt(0)] = 32
    """An adapter's product is scaled by alpha / rank."""
    targets: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    """Linear layers of the language model's blocks that get an adapter."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.targets:
            raise ValueError("learner.lora.targets is empty; name at least one linear layer")


@dataclass
class LearnerConfig(ConfigSection):
    """The policy's optimiser step, on one or more ranks."""

    model: str = "models/panels-policy"
    """Filled from the key ``model``."""
    family: str = ""
    """Filled from the key ``family``."""
    dtype: Dtype = Dtype.FLOAT32
    """Precision of the passes; the optimiser's master weights are fp32 in any case."""
    freeze_vision: bool = False
    """Do not train the vision tower."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    attention: Attention = Attention.SDPA
    """sdpa: torch's own, runs everywhere; flash_attention_2: needs a GPU, bfloat16 and the package flash-attn."""
    packing: Packing = Packing.SEQUENCES
    """sequences: the rows of a micro-batch end to end, without padding; none: side by side, padded to the longest."""
    gradient_checkpointing: Annotated[bool, MAY_CHANGE] = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    temperature: Annotated[float, Gt(0)] = 1.0
    """Filled from the key ``temperature``: the log-probs of the loss are those of the distribution that was sampled
    from."""
    loss: LossConfig = field(default_factory=LossConfig)
    advantages: AdvantageConfig = field(default_factory=AdvantageConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    ranks: Annotated[int, Ge(1), MAY_CHANGE] = 1
    """Processes that share a step's trajectories; on GPUs one per device."""
    resources: Annotated[Resources, MAY_CHANGE] = field(default_factory=Resources)
    """Per rank."""
    threads: Annotated[int, Ge(1), MAY_CHANGE] = 1
    """CPU threads of a rank."""
    zero_stage: Annotated[int, MAY_CHANGE] = 2
    """DeepSpeed ZeRO: 1 shards the optimiser's state, 2 the gradients too, 3 the parameters too."""
    stage3_persistence_threshold: Annotated[int, Ge(0), MAY_CHANGE] = 100_000
    """ZeRO-3 keeps parameters with fewer elements than this whole on every rank."""
    offload_optimizer: bool = False
    """Keep master weights and the optimiser's state in main memory and step there: 12 bytes a parameter less on the
    GPUs together, slower steps. DeepSpeed compiles its CPUAdam at the first start (a minute, ninja, a C++ compiler).
    Without a GPU all of it is in main memory in any case."""
    micro_batch_tokens: Annotated[int, Ge(1), MAY_CHANGE] = 8192
    """Tokens of a forward pass, images and padding included. The vision tower then sees at most four times as many
    patches (2 x 2 to a token). A longer trajectory gets a pass of its own."""
    bucket_bytes: Annotated[int, Ge(1), MAY_CHANGE] = 256 << 20
    """Size of the buckets in which weights are published, bytes."""
    collective_timeout_s: Annotated[int, Ge(1), MAY_CHANGE] = 1800
    """A rank that waits longer than this for another rank fails, seconds."""
    hang_timeout_s: Annotated[float, Ge(1), MAY_CHANGE] = 120.0
    """A rank whose process answers nothing for this long in a call counts as dead, seconds: it is stopped, or its
    machine is gone. Work that takes long is not meant: another thread answers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.zero_stage not in (1, 2, 3):
            raise ValueError(f"zero_stage is {self.zero_stage}; known: 1, 2, 3")
        if self.attention is Attention.FLASH and self.dtype is not Dtype.BFLOAT16:
            raise ValueError("attention=flash_attention_2 needs dtype=bfloat16")
