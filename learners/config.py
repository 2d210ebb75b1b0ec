"""The learner's configuration. Light: importing it loads no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum

from ergo_rl.cluster.resources import Resources
from ergo_rl.episodes.plugins import is_import_path
from ergo_rl.learners.advantages import AdvantageConfig


class Dtype(StrEnum):
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
    """What leaves the loss where learner and engine disagree too much: the token, or its whole trajectory, judged by
    the geometric mean over its tokens."""

    TOKEN = "token"
    SEQUENCE = "sequence"


@dataclass
class LossConfig:
    objective: str = ObjectiveName.DAPO.value
    """dapo (clip per token, mean over all tokens) | grpo | dr_grpo | gspo | cispo | ``package.module:Class`` of your
    own (docs/extending.md)."""
    clip_low: float = 0.2
    """The probability ratio is clipped below at 1 - clip_low (cispo: not at all)."""
    clip_high: float = 0.2
    """The probability ratio is clipped above at 1 + clip_high."""
    dual_clip: float | None = None
    """Largest ratio that counts where the advantage is negative, above 1 (3 in arXiv 1912.09729); null: no limit."""
    longest_reply: int = 1024
    """The constant of dr_grpo, in tokens: the most that a trajectory can sample, both turns together."""
    mismatch_low: float = 0.125
    """A token whose ratio learner / engine is below this leaves the loss; 0 turns the bound off."""
    mismatch_high: float = 8.0
    """... or above this; .inf turns the bound off."""
    mismatch_level: MismatchLevel = MismatchLevel.TOKEN
    """token | sequence."""
    kl: float = 0.0
    """Coefficient of the KL divergence from the policy at the start, nats; above 0 every rank holds a frozen copy."""
    mask_truncated: bool = False
    """Trajectories that a reply's limit cut off leave the loss; they stay in their group's baseline."""

    def __post_init__(self) -> None:
        if not is_import_path(self.objective):
            self.objective = self.objective.lower()  # configs of earlier runs have DAPO
            if self.objective not in (names := [name.value for name in ObjectiveName]):
                raise ValueError(
                    f"learner.loss.objective: there is no {self.objective!r}; known: {', '.join(names)}, or "
                    "package.module:Class of your own"
                )
        if not 0 <= self.clip_low <= 1 or self.clip_high < 0:
            raise ValueError(f"clip_low is {self.clip_low}, clip_high {self.clip_high}; need 0..1 and at least 0")
        if self.dual_clip is not None and (self.dual_clip <= 1 or self.objective == ObjectiveName.CISPO):
            raise ValueError(f"dual_clip is {self.dual_clip}; it must be above 1, and cispo has its own cap")
        if not 0 <= self.mismatch_low < 1 < self.mismatch_high:
            raise ValueError(f"mismatch_low is {self.mismatch_low}, mismatch_high {self.mismatch_high}; 1 lies between")
        if self.longest_reply < 1 or self.kl < 0:
            raise ValueError(f"longest_reply is {self.longest_reply}, kl {self.kl}; need at least 1 and 0")


@dataclass
class OptimizerConfig:
    """AdamW, and the learning rate over the run."""

    lr: float = 1e-6
    """Peak learning rate."""
    beta1: float = 0.9
    """Decay rate of the first moment."""
    beta2: float = 0.999
    """Decay rate of the second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay, on every trained parameter."""
    max_grad_norm: float = 1.0
    """The gradient of a step is scaled down to this norm; 0 turns it off."""
    schedule: Schedule = Schedule.CONSTANT
    """After the warm-up the learning rate stays, or falls to 0 at ``total_steps``."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly to ``lr``."""
    total_steps: int = 1000
    """Steps of the whole run; used by the linear and cosine schedules."""

    def learning_rate(self, step: int) -> float:
        """Of optimiser step 0, 1, 2, ..."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        left = max(0.0, 1 - (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps))
        match self.schedule:
            case Schedule.CONSTANT:
                return self.lr
            case Schedule.LINEAR:
                return self.lr * left
            case Schedule.COSINE:
                return self.lr * (1 - math.cos(math.pi * left)) / 2


@dataclass
class LoraConfig:
    """Adapters beside frozen layers of the language model; needs the package peft (``pip install 'ergo-rl[lora]'``)."""

    rank: int = 0
    """Width of the adapters; 0: none, and every weight is trained. Above 0 nothing but the adapters is."""
    alpha: int = 32
    """An adapter's product counts alpha / rank times."""
    targets: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    """Linear layers of the language model's blocks that get one."""

    def __post_init__(self) -> None:
        if self.rank < 0 or self.alpha <= 0 or not self.targets:
            raise ValueError(f"lora: rank is {self.rank}, alpha {self.alpha}, targets {self.targets}")


@dataclass
class LearnerConfig:
    model: str = "models/panels-policy"
    """Local folder or hub name of a vision-language model of a known family."""
    family: str = ""
    """Must equal ``episode.family``."""
    dtype: Dtype = Dtype.FLOAT32
    """Precision of the passes; the optimiser's master weights are fp32 in any case."""
    freeze_vision: bool = False
    """Leave the vision tower as it is."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    attention: Attention = Attention.SDPA
    """sdpa | flash_attention_2."""
    packing: Packing = Packing.SEQUENCES
    """sequences | none (rows padded to the longest of their micro-batch)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    temperature: float = 1.0
    """Of sampling; the log-probs of the loss are of the same distribution. Must equal the rollouts'."""
    loss: LossConfig = field(default_factory=LossConfig)
    advantages: AdvantageConfig = field(default_factory=AdvantageConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    ranks: int = 1
    """Processes that share a step's trajectories; on GPUs one per device."""
    resources: Resources = field(default_factory=Resources)
    """Per rank."""
    threads: int = 1
    """CPU threads of a rank."""
    zero_stage: int = 2
    """DeepSpeed ZeRO: 1 shards the optimiser's state, 2 the gradients too, 3 the parameters too."""
    stage3_persistence_threshold: int = 100_000
    """ZeRO-3 keeps parameters with fewer elements than this whole on every rank."""
    offload_optimizer: bool = False
    """Keep master weights and the optimiser's state in main memory and step there: 12 bytes a parameter less on the
    GPUs together, slower steps. DeepSpeed compiles its CPUAdam at the first start (a minute, ninja, a C++ compiler).
    Without a GPU all of it is in main memory anyhow."""
    micro_batch_tokens: int = 8192
    """Tokens of one forward pass, images and padding included. The vision tower then sees at most four times as many
    patches (2 x 2 to a token). A longer trajectory gets a pass of its own."""
    bucket_bytes: int = 256 << 20
    """Size of the pieces in which weights leave, bytes."""
    collective_timeout_s: int = 1800
    """A rank that waits longer than this for another one fails, seconds."""

    def __post_init__(self) -> None:
        if self.zero_stage not in (1, 2, 3):
            raise ValueError(f"zero_stage is {self.zero_stage}; known: 1, 2, 3")
        if self.ranks < 1 or self.temperature <= 0:
            raise ValueError(f"need ranks >= 1 and temperature > 0, got {self.ranks} and {self.temperature}")
        if self.attention is Attention.FLASH and self.dtype is not Dtype.BFLOAT16:
            raise ValueError("attention=flash_attention_2 needs dtype=bfloat16")
