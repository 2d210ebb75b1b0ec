"""Bytes that each role needs on its device, part by part. Arithmetic only; what is an estimate says so.

Written P: parameters, T: those that are trained, N: ranks, b: bytes of a number in the passes (2 in bfloat16, else 4).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ergo_rl.cluster.config import EngineConfig
from ergo_rl.episodes.config import EpisodeConfig
from ergo_rl.jobs.config import TrainConfig
from ergo_rl.jobs.planning.shapes import Shape
from ergo_rl.learners.config import Dtype, LearnerConfig
from ergo_rl.learners.head import CHUNK_LOGITS

GIB = 2**30
REDUCE_BUCKET = 500_000_000
"""Numbers in DeepSpeed's bucket of gradients on their way (its default)."""
MAX_LIVE = 1_000_000_000
"""Parameters that ZeRO-3 keeps whole at once (its default)."""
RUNTIME = 2 * GIB
"""CUDA context, NCCL and what the allocator cannot use, of one process on a GPU: an allowance."""
CPU_PROCESSES = 3 * GIB
"""Resident size of an engine's processes on a CPU without weights and cache (measured: 0.7 + 0.6 + 1.7 GB)."""
ENGINE_BATCH = 8192
"""Tokens that vLLM prefills at once and measures its working memory with (its default on large GPUs)."""
TEXT_TOKENS = 256
"""Allowance for the words of a question and its prompts, both turns."""


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes of one thing, and how they come about. held: False for what exists only at the start, before the rest;
    resting: False for what is there only while its role works."""

    name: str
    bytes: float
    how: str
    held: bool = True
    resting: bool = True


def total(parts: Sequence[Part]) -> float:
    """The most that exists at once: all that is held, or what the start needs."""
    return max(sum(part.bytes for part in parts if part.held), sum(part.bytes for part in parts if not part.held))


def at_rest(parts: Sequence[Part]) -> float:
    """What stays on the device while another role works there: of an engine that sleeps, of a learner between steps."""
    return sum(part.bytes for part in parts if part.held and part.resting)


def trajectory_tokens(config: TrainConfig) -> int:
    """Of the longest trajectory, pictures included."""
    sampling, episode = config.rollout.sampling, config.episode
    views = episode.coarse_tokens + episode.fine_tokens
    return views + sampling.coarse_max_tokens + sampling.fine_max_tokens + TEXT_TOKENS


def trained(shape: Shape, config: LearnerConfig) -> int:
    """Parameters that get a gradient."""
    if config.lora.rank:
        return shape.adapters(config.lora.rank, config.lora.targets)
    return shape.parameters - (shape.vision if config.freeze_vision else 0)


def learner_parts(shape: Shape, config: TrainConfig, on_gpu: bool) -> list[Part]:
    """Of one rank, on its device (main memory without a GPU)."""
    learner, ranks = config.learner, config.learner.ranks
    width = 2 if learner.dtype is Dtype.BFLOAT16 else 4
    adapters = shape.adapters(learner.lora.rank, learner.lora.targets) if learner.lora.rank else 0
    every, grads = shape.parameters + adapters, trained(shape, learner)
    sharded = learner.zero_stage == 3
    parts = [
        Part("weights", width * every / (ranks if sharded else 1), f"b P{' / N' if sharded else ''}, b = {width}"),
        _gradients(learner, grads, width),
    ]
    if sharded:
        live = width * min(MAX_LIVE, every)
        parts.append(Part("gathered weights", live, "b x min(P, 1e9), what ZeRO-3 has whole at once", resting=False))
    state = 12 * grads / ranks
    if not (learner.offload_optimizer and on_gpu):
        parts.append(Part("optimiser", state, "12 T / N: fp32 master weights and both moments of Adam"))
    parts.append(Part("gradient bucket", width * min(REDUCE_BUCKET, grads), "b x min(T, 5e8), on their way"))
    if learner.loss.kl:
        parts.append(Part("reference policy", width * shape.parameters, "b P, whole on every rank"))
    parts += _activations(shape, config, width)
    logits = 3 * 4 * CHUNK_LOGITS + width * shape.vocabulary * shape.hidden
    parts.append(Part("logits", logits, "3 chunks of 64 MiB, and the gradient of the head: b V H", resting=False))
    parts.append(Part("weights on their way", learner.bucket_bytes, "one bucket of learner.bucket_bytes"))
    parts.append(Part("runtime", RUNTIME if on_gpu else GIB / 2, "allowance"))
    begin = width * every + (RUNTIME if on_gpu else 0)
    parts.append(Part("at the start", begin, "b P: the whole model, before it is sharded", held=False))
    return parts


def _gradients(learner: LearnerConfig, grads: int, width: int) -> Part:
    if learner.zero_stage > 1:
        return Part("gradients", 4 * grads / learner.ranks, "4 T / N: summed in fp32")
    if width == 4:
        return Part("gradients", 4 * grads, "4 T")
    return Part("gradients", 6 * grads, "2 T of a pass, 4 T of their sum in fp32 (ZeRO-1 keeps both whole)")


def _activations(shape: Shape, config: TrainConfig, width: int) -> list[Part]:
    """An estimate of what the backward pass needs, per token and block of the language model 11 H + 3 KV + 4 I numbers
    (residual, two norms in fp32, queries, attention, MLP), per patch and block of the tower 14 H + 4 I; with
    checkpointing H per block, and one block whole. No matrix of tokens x tokens: attention is fused."""
    learner, episode = config.learner, config.episode
    longest = trajectory_tokens(config)
    tokens = max(learner.micro_batch_tokens, longest)
    block = 11 * shape.hidden + 3 * shape.kv_width + 4 * shape.intermediate
    share = (episode.coarse_tokens + episode.fine_tokens) / longest
    patches = tokens * share * shape.patches_per_token
    seen = 14 * shape.vision_hidden + 4 * shape.vision_intermediate
    if learner.gradient_checkpointing:
        text, vision = shape.layers * shape.hidden + block, shape.vision_layers * shape.vision_hidden + seen
    else:
        text, vision = shape.layers * block, shape.vision_layers * seen
    if learner.freeze_vision or learner.lora.rank:
        vision = seen
    how = "checkpointed" if learner.gradient_checkpointing else "all kept"
    return [
        Part("activations, text", width * tokens * text, f"{tokens:,} tokens, {how} (estimate)", resting=False),
        Part("activations, tower", width * patches * vision, f"{patches:,.0f} patches (estimate)", resting=False),
    ]


def learner_host_parts(shape: Shape, config: TrainConfig) -> list[Part]:
    """Main memory of one rank that computes on a GPU."""
    learner = config.learner
    parts = [Part("processes", 4 * GIB, "allowance: torch, DeepSpeed, pinned buffers, trajectories")]
    if learner.offload_optimizer:
        state = 16 * trained(shape, learner) / learner.ranks
        parts.append(Part("offloaded optimiser", state, "16 T / N: master weights, both moments, gradients, fp32"))
    parts.append(Part("at the start", 4 * shape.parameters, "4 P: the model is read in fp32", held=False))
    return parts


@dataclass(frozen=True, slots=True)
class EngineNeeds:
    """Per GPU (or of the whole engine on a CPU). limit: bytes that the engine may take; parts: what it needs at least,
    the KV cache of one conversation of ``max_model_len`` included; cache: what is left for the KV cache in bytes;
    conversations: of ``max_model_len`` that this cache holds."""

    limit: float
    parts: tuple[Part, ...]
    cache: float
    conversations: float


def engine_needs(shape: Shape, engine: EngineConfig, tokens: int, gpu_memory: float | None) -> EngineNeeds:
    """tokens: of the largest picture; gpu_memory: bytes of one GPU, None on a CPU."""
    ways = engine.tensor_parallel_size
    width = 4 if engine.dtype == "float32" else 2
    heads = max(1.0, shape.kv_heads / ways) / shape.kv_heads  # fewer heads than GPUs are kept more than once
    per_token = 2 * shape.layers * shape.kv_width * width * heads
    conversation = per_token * engine.max_model_len
    awake = not engine.sleep
    weights = Part("weights", width * shape.parameters / ways, f"b P / {ways}, b = {width}", resting=awake)
    how = f"2 x {shape.layers} layers x {shape.kv_width} x {width} bytes a token"
    if gpu_memory is None:
        cache = float(engine.kv_cache_gib * GIB)
        parts = [weights, Part("KV cache", cache, "kv_cache_gib"), Part("processes", CPU_PROCESSES, "measured")]
        return EngineNeeds(float("inf"), tuple(parts), cache, cache / conversation)
    batch = max(ENGINE_BATCH, tokens)
    text = batch * (6 * shape.hidden + 3 * shape.intermediate / ways) * width
    vision = tokens * shape.patches_per_token * (6 * shape.vision_hidden + 3 * shape.vision_intermediate) * width
    logits = 2 * 4 * engine.max_num_seqs * shape.vocabulary
    work = Part(
        "work", text + vision + logits, f"{batch:,} tokens, pictures of {tokens:,}, logits (estimate)", resting=awake
    )
    runtime = Part("runtime", RUNTIME, "allowance")
    limit = engine.gpu_memory_utilization * gpu_memory
    least = Part("KV cache, at least", conversation, f"{how}, {engine.max_model_len} tokens", resting=awake)
    cache = limit - weights.bytes - work.bytes - runtime.bytes
    return EngineNeeds(limit, (weights, work, runtime, least), cache, cache / conversation)


def largest_picture(episode: EpisodeConfig) -> int:
    return max(episode.coarse_tokens, episode.fine_tokens)
