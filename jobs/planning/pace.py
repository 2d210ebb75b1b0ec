"""Where the time of a step goes: a rough estimate, with its assumptions."""

from __future__ import annotations

from dataclasses import dataclass

from ergo_rl.jobs.config import TrainConfig
from ergo_rl.jobs.planning.memory import TEXT_TOKENS, trained
from ergo_rl.jobs.planning.shapes import Shape
from ergo_rl.learners.config import Dtype
from ergo_rl.rewards.config import Backend

REPLY_SHARE = 0.5
"""Replies are taken to be half as long as their limits."""
MFU = 0.35
"""Share of the peak that a learner's passes reach."""
PREFILL_MFU = 0.4
DECODE_SHARE = 0.6
"""Share of the memory bandwidth that decoding reaches."""
PUBLISH_BYTES_S = 2e9
"""Weights through the object store into one engine, bytes a second."""


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds of one step; overlapped: rollouts go on while the learner learns."""

    rollout: float
    reward: float
    learn: float
    publish: float
    overlapped: bool

    @property
    def step(self) -> float:
        playing = max(self.rollout, self.reward)  # a group is scored while others are played
        return (max(playing, self.learn) if self.overlapped else playing + self.learn) + self.publish


def pace(config: TrainConfig, policy: Shape, judge: Shape | None) -> Pace:
    """judge: the reward model in the job, None behind a URL (its time is not ours to know, and taken as 0)."""
    hardware, rollout, episode = config.hardware, config.rollout, config.episode
    flops, bandwidth = hardware.gpu_tflops * 1e12, hardware.gpu_bandwidth_tb_s * 1e12
    played = config.groups_per_step * rollout.group_size
    replies = REPLY_SHARE * (rollout.sampling.coarse_max_tokens + rollout.sampling.fine_max_tokens)
    views = episode.coarse_tokens + episode.fine_tokens
    tokens = views + TEXT_TOKENS + replies
    width = 2 if config.learner.dtype is Dtype.BFLOAT16 else 4

    playing = _engine_s(policy, tokens - replies, replies, played, rollout.engine.max_num_seqs,
                        rollout.engine.tensor_parallel_size, rollout.size.max, flops, bandwidth)  # fmt: skip
    judging = 0.0
    if judge is not None and config.reward.verifier.backend is Backend.ENGINE:
        verifier = config.reward.verifier
        judging = _engine_s(judge, episode.fine_tokens + TEXT_TOKENS, REPLY_SHARE * verifier.max_tokens, played,
                            verifier.engine.max_num_seqs, verifier.engine.tensor_parallel_size,
                            config.reward.workers, flops, bandwidth)  # fmt: skip
    again = 2 if config.learner.gradient_checkpointing else 0
    text = policy.parameters - policy.vision
    backward = 4 if trained(policy, config.learner) > text else 0
    seeing = views * policy.patches_per_token * policy.vision * (2 + backward + (again if backward else 0))
    work = played * (tokens * text * (6 + again) + seeing)
    learning = work / (config.learner.ranks * flops * MFU)
    publishing = width * policy.parameters / PUBLISH_BYTES_S
    return Pace(playing, judging, learning, publishing, config.max_staleness > 0)


def _engine_s(
    shape: Shape, prompt: float, reply: float, requests: int, at_once: int, ways: int, engines: int,
    flops: float, bandwidth: float,
) -> float:  # fmt: skip
    """Prompts are bound by arithmetic; each decoded token of a batch reads all weights once."""
    mine = requests / engines
    prefill = mine * prompt * 2 * shape.parameters / (ways * flops * PREFILL_MFU)
    batches = -(-mine // at_once)
    decode = batches * reply * 2 * shape.parameters / (ways * bandwidth * DECODE_SHARE)
    return prefill + decode
