"""Estimate roughly where the time of a step goes; the assumptions are the constants here."""

from __future__ import annotations

from dataclasses import dataclass

from ergo_rl.jobs.config import TrainConfig
from ergo_rl.jobs.memory_model import TEXT_TOKENS, trained
from ergo_rl.jobs.model_shapes import ModelSpec
from ergo_rl.learners.config import Dtype
from ergo_rl.rewards.config import Backend

REPLY_SHARE = 0.5
"""Length of a reply as a share of its limit."""
MFU = 0.35
"""Share of the peak arithmetic that a learner's passes reach."""
PREFILL_MFU = 0.4
DECODE_SHARE = 0.6
"""Share of the memory bandwidth that decoding reaches."""
PUBLISH_BYTES_S = 2e9
"""Weights from the object store into one engine, bytes per second."""


@dataclass(frozen=True, slots=True)
class ThroughputEstimate:
    """Seconds of each phase of one step."""

    rollout: float
    reward: float
    learn: float
    publish: float
    overlapped: bool
    """Whether rollouts continue while the learner learns."""

    @property
    def step(self) -> float:
        sampling = max(self.rollout, self.reward)  # a group is scored while others are sampled
        return (max(sampling, self.learn) if self.overlapped else sampling + self.learn) + self.publish


def estimate_throughput(config: TrainConfig, policy: ModelSpec, verifier: ModelSpec | None) -> ThroughputEstimate:
    """verifier: None where it is behind a URL; its time is not known and taken as 0."""
    hardware, rollout, episode = config.hardware, config.rollout, config.episode
    flops, bandwidth = hardware.gpu_tflops * 1e12, hardware.gpu_bandwidth_tb_s * 1e12
    trajectories = config.groups_per_step * rollout.group_size
    replies = REPLY_SHARE * (rollout.sampling.coarse_max_tokens + rollout.sampling.fine_max_tokens)
    views = episode.coarse_tokens + episode.fine_tokens
    tokens = views + TEXT_TOKENS + replies
    width = 2 if config.learner.dtype is Dtype.BFLOAT16 else 4

    sampling = _engine_s(policy, tokens - replies, replies, trajectories, rollout.engine.max_num_seqs,
                        rollout.engine.tensor_parallel_size, rollout.size.most, flops, bandwidth)  # fmt: skip
    scoring = 0.0
    if verifier is not None and config.reward.verifier.backend is Backend.ENGINE:
        settings = config.reward.verifier
        scoring = _engine_s(verifier, episode.fine_tokens + TEXT_TOKENS, REPLY_SHARE * settings.max_tokens,
                            trajectories, settings.engine.max_num_seqs, settings.engine.tensor_parallel_size,
                            config.reward.workers, flops, bandwidth)  # fmt: skip
    again = 2 if config.learner.gradient_checkpointing else 0
    text = policy.parameters - policy.vision
    backward = 4 if trained(policy, config.learner) > text else 0
    seeing = views * policy.patches_per_token * policy.vision * (2 + backward + (again if backward else 0))
    work = trajectories * (tokens * text * (6 + again) + seeing)
    learning = work / (config.learner.ranks * flops * MFU)
    publishing = width * policy.parameters / PUBLISH_BYTES_S
    return ThroughputEstimate(sampling, scoring, learning, publishing, config.max_staleness > 0)


def _engine_s(
    shape: ModelSpec, prompt: float, reply: float, requests: int, at_once: int, ways: int, engines: int,
    flops: float, bandwidth: float,
) -> float:  # fmt: skip
    """Seconds of one engine. Prefill is bound by arithmetic; each decoded token of a batch reads all weights once."""
    mine = requests / engines
    prefill = mine * prompt * 2 * shape.parameters / (ways * flops * PREFILL_MFU)
    batches = -(-mine // at_once)
    decode = batches * reply * 2 * shape.parameters / (ways * bandwidth * DECODE_SHARE)
    return prefill + decode
