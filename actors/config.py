"""Configuration of the rollout workers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from annotated_types import Ge

from ergo_rl.cluster.config import EngineConfig, Resources, Size
from ergo_rl.config_fields import MAY_CHANGE, Because, ConfigSection, Formerly


@dataclass
class SamplingConfig(ConfigSection):
    """How the policy is sampled. No top-p or top-k: the learner's distribution would differ from the sampled one."""

    temperature: Annotated[float, Ge(0)] = 1.0
    """Filled from the key ``temperature``. 0 is greedy (evaluation only)."""
    coarse_max_tokens: Annotated[int, Ge(1)] = 512
    """Longest reply of turn 1, in tokens."""
    fine_max_tokens: Annotated[int, Ge(1)] = 512
    """Longest reply of turn 2, in tokens."""


@dataclass
class RolloutConfig(ConfigSection):
    """The workers that run episodes with the policy."""

    workers: Annotated[Any, MAY_CHANGE] = 1
    """How many, or ``{min: 1, max: 4}``: the run then adds and removes workers by who waits for whom."""
    resources: Annotated[Resources, MAY_CHANGE] = field(default_factory=Resources)
    """Per worker."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    group_size: Annotated[int, Ge(2), Because("advantages are relative to the group")] = 8
    """Trajectories per question (GRPO's G)."""
    restarts: Annotated[int, Ge(0), MAY_CHANGE] = 3
    """Dead or hung workers that are replaced before the run gives up."""
    hang_timeout_s: Annotated[float, Ge(1), Formerly("stall_s"), MAY_CHANGE] = 900.0
    """A worker that has work and finishes none of it for this many seconds counts as dead."""
    backoff_s: Annotated[float, Ge(0), MAY_CHANGE] = 2.0
    """Wait before the second replacement in a row, in seconds; doubled each time, up to a minute."""

    def __post_init__(self) -> None:
        super().__post_init__()
        Size.read(self.workers, "rollout.workers")

    @property
    def size(self) -> Size:
        return Size.read(self.workers, "rollout.workers")
