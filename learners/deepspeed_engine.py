"""DeepSpeed: process group, engine, and parameters made whole."""

from __future__ import annotations

import datetime
import os
import socket
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed
from torch._C._distributed_c10d import TCPStore

from ergo_rl.cluster.compat import bind_collectives_localhost
from ergo_rl.learners.config import Dtype, LearnerConfig


def init_process_group(rank: int, world: int, address: str, port: int, device: torch.device, timeout_s: int) -> None:
    """Join the process group that rank 0 opens at ``address:port``: NCCL on GPUs, gloo on CPUs.

    A process that is in a group already stays in it."""
    if torch.distributed.is_initialized():
        return
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # read when deepspeed is imported
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": "0",
        "MASTER_ADDR": address, "MASTER_PORT": str(port),
    }  # fmt: skip
    if address == "127.0.0.1":  # all ranks are on this machine
        bind_collectives_localhost()
    import deepspeed

    # DeepSpeed compiles a shared-memory all-reduce for CPUs at its first start: half a minute, a compiler, and
    # ranks that must share a machine. gloo does without.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend, timeout = "nccl" if device.type == "cuda" else "gloo", datetime.timedelta(seconds=timeout_s)
    store = _store(rank, world, address, port, timeout)
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    deepspeed.init_distributed(dist_backend=backend, timeout=timeout, verbose=False)  # takes over the group above


def _store(rank: int, world: int, address: str, port: int, timeout: datetime.timedelta) -> TCPStore:
    """Return the store through which ranks find each other.

    torch's own would listen on every interface; this one listens on ``address`` alone."""
    if rank:
        return TCPStore(address, port, world, timeout=timeout)
    listener = socket.create_server((address, port))
    return TCPStore(address, port, world, True, timeout, master_listen_fd=listener.detach())


def init_engine(model: torch.nn.Module, config: LearnerConfig) -> Any:
    """Return the DeepSpeed engine of ``model`` under ZeRO. Parameters that need no gradient get no optimiser state."""
    import deepspeed

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, settings = _optimizer(trained, config), deepspeed_config(config)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, dist_init_required=False, config=settings)
    return engine


def deepspeed_config(config: LearnerConfig) -> dict[str, Any]:
    """Return DeepSpeed's configuration. Master weights and optimiser state are fp32 whatever the passes are."""
    zero: dict[str, Any] = {
        "stage": config.zero_stage,
        "stage3_param_persistence_threshold": config.stage3_persistence_threshold,
    }
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": 1,  # of no effect: micro-batches are made by token budget
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.optimizer.max_grad_norm,
        "bf16": {"enabled": config.dtype is Dtype.BFLOAT16},
        # Else gradients of bf16 passes are added up in bf16, which loses what a late micro-batch adds.
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def _optimizer(parameters: Sequence[torch.nn.Parameter], config: LearnerConfig) -> torch.optim.Optimizer:
    kind: Any = torch.optim.AdamW
    if config.offload_optimizer and torch.cuda.is_available():
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        kind = DeepSpeedCPUAdam
    return kind(
        list(parameters),
        lr=config.optimizer.lr,
        betas=(config.optimizer.beta1, config.optimizer.beta2),
        weight_decay=config.optimizer.weight_decay,
    )


def gather_params(parameters: Sequence[torch.nn.Parameter], zero_stage: int) -> Any:
    """Return a context in which ``parameters`` are whole on every rank. All ranks must enter it together."""
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(parameters), enabled=zero_stage == 3)
