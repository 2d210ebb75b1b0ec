"""What a recipe is meant to run on. ``ergo-rl plan`` and ``ergo-rl submit`` read it; training does not."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class HardwareConfig:
    """For ``ergo-rl plan`` (does it fit?) and ``ergo-rl submit --dry-run`` (what to ask for). Training itself takes
    what the cluster has."""

    nodes: int = 1
    gpus_per_node: int = 0
    """0: everything runs on CPUs."""
    gpu_memory_gib: float = 80.0
    """Of one GPU."""
    gpu_tflops: float = 989.0
    """Dense bfloat16 peak of one GPU (an H100's), for the estimate of time."""
    gpu_bandwidth_tb_s: float = 3.35
    """Memory bandwidth of one GPU, terabytes a second (an H100's)."""
    cpus_per_node: int = 2
    memory_gib_per_node: float = 16.0
    """Main memory."""

    def __post_init__(self) -> None:
        sizes = (self.gpu_memory_gib, self.gpu_tflops, self.gpu_bandwidth_tb_s, self.memory_gib_per_node)
        if self.nodes < 1 or self.gpus_per_node < 0 or self.cpus_per_node < 1 or min(sizes) <= 0:
            raise ValueError("hardware: nodes, cpus_per_node and sizes must be above 0, gpus_per_node 0 or more")
