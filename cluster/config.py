"""Configuration of the machines: engines, resources, weight transfer, Ray. Imports neither Ray nor vLLM."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Annotated, Any

from annotated_types import Ge, Le

from ergo_rl.config_fields import MAY_CHANGE, ConfigSection

_MAX_WORKERS = 10_000


@dataclass
class Resources(ConfigSection):
    """What each actor of a role asks Ray for. Fractions of a core are fine: threads are bounded per role."""

    cpus: Annotated[float, Ge(0)] = 0.25
    """CPU cores."""
    gpus: Annotated[float, Ge(0)] = 0.0
    """GPUs; a fraction shares one with other actors."""


@dataclass(frozen=True, slots=True)
class Size:
    """How many workers a pool may have; a fixed number where min and max are equal."""

    min: int
    max: int

    @classmethod
    def read(cls, value: Any, key: str) -> Size:
        """Read a whole number or ``{min: 1, max: 4}`` from a configuration. Raises ValueError naming ``key``."""
        bounds = value if isinstance(value, dict) else {"min": value, "max": value}
        whole = all(isinstance(number, int) and not isinstance(number, bool) for number in bounds.values())
        if set(bounds) != {"min", "max"} or not whole or not 1 <= bounds["min"] <= bounds["max"] <= _MAX_WORKERS:
            raise ValueError(
                f"{key} is {str(value)[:100]}; it takes a whole number from 1, or {{min: 1, max: 4}} with min up to max"
            )
        return cls(bounds["min"], bounds["max"])


@dataclass
class EngineConfig(ConfigSection):
    """A vLLM engine."""

    model: str = ""
    """Local folder or hub name. Of the rollout engine: empty for the value of the key ``model``."""
    dtype: str = "auto"
    """auto | float32 | bfloat16 | float16."""
    max_model_len: Annotated[int, Ge(1)] = 4096
    """Longest conversation in tokens, visual tokens included. Longer prompts are refused, never cut."""
    max_num_seqs: Annotated[int, Ge(1), MAY_CHANGE] = 64
    """Sequences that the engine decodes at once."""
    threads: Annotated[int, Ge(1), MAY_CHANGE] = 1
    """CPU threads of the engine's compute."""
    kv_cache_gib: Annotated[int, Ge(1), MAY_CHANGE] = 1
    """KV cache on a CPU, in whole GiB (vLLM's VLLM_CPU_KVCACHE_SPACE)."""
    gpu_memory_utilization: Annotated[float, Ge(0.01), Le(1), MAY_CHANGE] = 0.85
    """Fraction of a GPU's memory that the engine may use."""
    tensor_parallel_size: Annotated[int, Ge(1), MAY_CHANGE] = 1
    """GPUs that share each layer of the model."""
    enforce_eager: Annotated[bool, MAY_CHANGE] = True
    """Capture no CUDA graphs: quicker start, slower decoding. Set to false for long runs on GPUs."""
    prefix_caching: bool = True
    """Let turn 2 reuse the prompt and reply of turn 1."""
    start_deadline_s: Annotated[float, Ge(1), MAY_CHANGE] = 600.0
    """An engine that is not up after this many seconds counts as failed."""
    sleep: bool = False
    """Free the GPU's memory between a step's last reply and the next weights (vLLM's sleep level 1: weights move to
    main memory, the KV cache is dropped), for a learner on the same GPU. On a CPU the engine only pauses."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Further vLLM engine arguments, passed on unchanged."""

    @property
    def processes(self) -> int:
        """Worker processes that hold weights."""
        return self.tensor_parallel_size * int(self.extra.get("pipeline_parallel_size", 1))

    @property
    def on_one_machine(self) -> bool:
        """Whether they are all where the engine is started, as they are unless vLLM is told otherwise."""
        return self.extra.get("distributed_executor_backend") != "ray" and int(self.extra.get("nnodes", 1)) == 1


class Transport(StrEnum):
    """How weights travel from the learner to the engines."""

    AUTO = "auto"
    OBJECT_STORE = "object_store"
    BROADCAST = "broadcast"
    IPC = "ipc"


@dataclass
class WeightsConfig(ConfigSection):
    """How weights travel from the learner to the engines."""

    transport: Transport = Transport.AUTO
    """object_store: every engine pulls the weights by itself | broadcast: vLLM's NCCL engine, to all of them at once
    (not yet run by this project; GPUs only) | ipc: on one machine, vLLM's CUDA IPC engine where roles share GPUs (not
    yet run by this project), shared memory where they have none; what these two cannot deliver goes through the object
    store | auto: broadcast where the learner's ranks and the rollout workers have GPUs of their own, ipc where they
    share GPUs, else object_store."""
    timeout_s: Annotated[float, Ge(1)] = 120.0
    """With broadcast or ipc: how long the learner waits for one answer of an engine, seconds; a broadcast is one answer
    as a whole."""

    def for_roles(self, *roles: Resources) -> WeightsConfig:
        """Decide ``auto`` for actors with these resources. A share of a GPU does not count as a GPU of one's own: NCCL
        takes no two ranks on one GPU, and CUDA IPC does not leave it.

        Raises ValueError for a transport that cannot connect such roles."""
        own = all(role.gpus >= 1 for role in roles)
        shared = all(0 < role.gpus < 1 for role in roles)
        without = all(role.gpus == 0 for role in roles)
        shares = ", ".join(f"{role.gpus:g}" for role in roles)
        if self.transport is Transport.BROADCAST and not own:
            raise ValueError(
                "weights.transport=broadcast needs learner.resources.gpus and rollout.resources.gpus both at least 1 "
                f"(NCCL, a GPU for every process), got {shares}; set weights.transport=object_store"
            )
        if self.transport is Transport.IPC and not (shared or without):
            raise ValueError(
                "weights.transport=ipc needs learner.resources.gpus and rollout.resources.gpus both 0 (shared memory) "
                f"or both between 0 and 1 (CUDA IPC on the GPU that they share), got {shares}; set "
                "weights.transport=object_store"
            )
        if self.transport is not Transport.AUTO:
            return self
        return replace(
            self, transport=Transport.BROADCAST if own else Transport.IPC if shared else Transport.OBJECT_STORE
        )


@dataclass
class ClusterConfig(ConfigSection):
    """The Ray cluster that a run joins or starts."""

    address: str | None = None
    """Ray address to join (``auto``, ``host:port``). null: start Ray on this machine, or join the cluster of a
    submitted job."""
    namespace: str = "ergo-rl"
    """Ray namespace of the run's actors."""
    local_only: bool = True
    """A Ray that is started here listens on 127.0.0.1 only, because anyone who reaches its ports can run code. false:
    it listens on every interface, so that other machines can join."""
    object_store_gib: Annotated[float, Ge(0.1)] = 2.0
    """Size of the object store of a Ray that is started here."""
    metrics_port: Annotated[int, Ge(0)] = 0
    """Port of the metrics (Prometheus) of a Ray that is started here; 0: any free port."""
    wait_s: Annotated[float, Ge(0)] = 300.0
    """Seconds to wait for resources; then the run ends with an error that has the numbers."""
    log_to_driver: bool = False
    """Print the output of workers among our own (Ray's log files have it in any case)."""
