"""Numbers that a configuration cannot have. Pure."""

from __future__ import annotations

import math
from dataclasses import fields, is_dataclass
from typing import Any

LEAST: dict[str, float] = {
    "seed": 0, "groups_per_step": 1, "total_steps": 1, "max_staleness": 0, "start_deadline_s": 1, "samples_every": 0,
    "dynamic_sampling_most": 1,
    "recovery.learner_restarts": 0, "recovery.backoff_s": 0,
    "embedded.train": 1, "embedded.heldout": 1, "embedded.seed": 0,
    "questions.seed": 0, "questions.max_image_pixels": 1,
    "episode.coarse_tokens": 1, "episode.fine_tokens": 1, "episode.max_image_pixels": 1,
    "reward.number_tolerance": 0, "reward.gamma_margin": 0, "reward.outage_deadline_s": 0, "reward.workers": 1,
    "reward.verifier.max_tokens": 1, "reward.verifier.max_visual_tokens": 1,
    "reward.verifier.endpoint.timeout_s": 0.001, "reward.verifier.endpoint.retries": 0,
    "reward.verifier.endpoint.backoff_s": 0, "reward.verifier.endpoint.max_backoff_s": 0,
    "reward.verifier.endpoint.concurrency": 1,
    "rollout.sampling.coarse_max_tokens": 1, "rollout.sampling.fine_max_tokens": 1, "rollout.group_size": 2,
    "learner.optimizer.lr": 0, "learner.optimizer.beta1": 0, "learner.optimizer.beta2": 0,
    "learner.optimizer.weight_decay": 0, "learner.optimizer.max_grad_norm": 0, "learner.optimizer.warmup_steps": 0,
    "learner.optimizer.total_steps": 1, "learner.threads": 1, "learner.stage3_persistence_threshold": 0,
    "learner.micro_batch_tokens": 1, "learner.bucket_bytes": 1, "learner.collective_timeout_s": 1,
    "weights.timeout_s": 1, "proof.tolerance": 0, "proof.replies": 1,
    "evaluation.questions": 0, "evaluation.every": 0, "evaluation.in_flight": 1, "evaluation.oracle_margin": 0,
    "evaluation.random_area": 0,
    "cluster.object_store_gib": 0.1, "cluster.wait_s": 0, "cluster.metrics_port": 0,
    **{f"{role}.{key}": 0 for role in ("rollout", "reward") for key in ("restarts", "backoff_s")},
    **{f"{role}.stall_s": 1 for role in ("rollout", "reward")},
    **{f"{role}.resources.{key}": 0 for role in ("rollout", "reward", "learner") for key in ("cpus", "gpus")},
    **{
        f"{engine}.{key}": least
        for engine in ("rollout.engine", "reward.verifier.engine")
        for key, least in (("max_model_len", 1), ("max_num_seqs", 1), ("threads", 1), ("kv_cache_gib", 1),
                           ("gpu_memory_utilization", 0.01), ("tensor_parallel_size", 1), ("start_deadline_s", 1))
    },
}  # fmt: skip
MOST: dict[str, float] = {
    "learner.optimizer.beta1": 0.999999, "learner.optimizer.beta2": 0.9999999, "evaluation.random_area": 1,
    "rollout.engine.gpu_memory_utilization": 1, "reward.verifier.engine.gpu_memory_utilization": 1,
}  # fmt: skip
_MAY_BE_INFINITE = ("learner.loss.mismatch_high", "learner.loss.clip_high")


def out_of_range(config: Any) -> list[str]:
    """A sentence for each number of a configuration (a dataclass of dataclasses) that nothing can work with."""
    problems = []
    for key, value in numbers(config):
        least, most = LEAST.get(key, -math.inf), MOST.get(key, math.inf)
        if math.isnan(value) or (math.isinf(value) and key not in _MAY_BE_INFINITE):
            problems.append(f"{key} is {value}; it must be a finite number")
        elif not least <= value <= most:
            bounds = f"at least {least:g}" if value < least else f"at most {most:g}"
            problems.append(f"{key} is {value}; it must be {bounds}")
    return problems


def numbers(config: Any, prefix: str = "") -> list[tuple[str, float]]:
    """Key and value of every number, those in lists and dictionaries of numbers included (by their place or name)."""
    if isinstance(config, bool) or config is None:
        return []
    if isinstance(config, int | float):
        return [(prefix, config)]
    if is_dataclass(config):
        parts = [(one.name, getattr(config, one.name)) for one in fields(config)]
    elif isinstance(config, dict):
        parts = [(str(name), value) for name, value in config.items()]
    elif isinstance(config, list):
        parts = [(str(place), value) for place, value in enumerate(config)]
    else:
        return []
    return [one for name, value in parts for one in numbers(value, f"{prefix}.{name}" if prefix else name)]
