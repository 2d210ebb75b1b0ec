"""Compute the bytes that each role needs on its device, item by item. Estimates are labelled as such.

Symbols: P parameters, T trained parameters, N ranks, b bytes of a number in the passes (2 in bfloat16, else 4).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ergo_rl.cluster.config import EngineConfig
from ergo_rl.episodes.config import EpisodeConfig
from ergo_rl.jobs.config import TrainConfig
from ergo_rl.jobs.model_shapes import ModelSpec
from ergo_rl.learners.config import Dtype, LearnerConfig
from ergo_rl.learners.model import CHUNK_LOGITS

GIB = 2**30
REDUCE_BUCKET = 500_000_000
"""Numbers in the bucket in which DeepSpeed reduces gradients (its default)."""
MAX_LIVE = 1_000_000_000
"""Parameters that ZeRO-3 keeps gathered at once (its default)."""
RUNTIME = 2 * GIB
"""Allowance for one process on a GPU: CUDA context, NCCL, memory that the allocator cannot use."""
CPU_PROCESSES = 3 * GIB
"""Resident size of an engine's processes on a CPU without weights and cache (measured: 0.7 + 0.6 + 1.7 GB)."""
ENGINE_BATCH = 8192
"""Tokens of the batch with which vLLM measures its working memory (its default on large GPUs)."""
TEXT_TOKENS = 256
"""Allowance for the text of a question and its prompts, both turns."""


@dataclass(frozen=True, slots=True)
class MemoryItem:
    name: str
    bytes: float
    how: str
    """Where the bytes come from: a formula, a measurement or an allowance."""
    held: bool = True
    """False for what exists only at the start, before everything else."""
    resting: bool = True
    """False for what is there only while its role works."""


def total(parts: Sequence[MemoryItem]) -> float:
    """The most bytes that exist at once: all that is held, or what the start needs."""
    return max(sum(part.bytes for part in parts if part.held), sum(part.bytes for part in parts if not part.held))


def at_rest(parts: Sequence[MemoryItem]) -> float:
    """Bytes that stay on the device while another role works there (sleeping engine, learner between steps)."""
    return sum(part.bytes for part in parts if part.held and part.resting)


def trajectory_tokens(config: TrainConfig) -> int:
    """Tokens of the longest trajectory, images included."""
    sampling, episode = config.rollout.sampling, config.episode
    views = episode.coarse_tokens + episode.fine_tokens
    return views + sampling.coarse_max_tokens + sampling.fine_max_tokens + TEXT_TOKENS


def trained(shape: ModelSpec, config: LearnerConfig) -> int:
    """Number of parameters that get a gradient."""
    if config.lora.rank:
        return shape.adapters(config.lora.rank, config.lora.targets)
    return shape.parameters - (shape.vision if config.freeze_vision else 0)


def learner_parts(shape: ModelSpec, config: TrainConfig, on_gpu: bool) -> list[MemoryItem]:
    """What one learner rank holds on its device (in main memory without a GPU)."""
    learner, ranks = config.learner, config.learner.ranks
    width = 2 if learner.dtype is Dtype.BFLOAT16 else 4
    adapters = shape.adapters(learner.lora.rank, learner.lora.targets) if learner.lora.rank else 0
    every, grads = shape.parameters + adapters, trained(shape, learner)
    sharded = learner.zero_stage == 3
    parts = [
        MemoryItem(
            "weights", width * every / (ranks if sharded else 1), f"b P{' / N' if sharded else ''}, b = {width}"
        ),
        _gradients(learner, grads, width),
    ]
    if sharded:
        live = width * min(MAX_LIVE, every)
        parts.append(
            MemoryItem("gathered weights", live, "b x min(P, 1e9), what ZeRO-3 gathers at once", resting=False)
        )
    state = 12 * grads / ranks
    if not (learner.offload_optimizer and on_gpu):
        parts.append(MemoryItem("optimiser", state, "12 T / N: fp32 master weights and both moments of Adam"))
    parts.append(MemoryItem("gradient bucket", width * min(REDUCE_BUCKET, grads), "b x min(T, 5e8), being reduced"))
    if learner.loss.kl:
        parts.append(MemoryItem("reference policy", width * shape.parameters, "b P, whole on every rank"))
    parts += _activations(shape, config, width)
    logits = 3 * 4 * CHUNK_LOGITS + width * shape.vocabulary * shape.hidden
    parts.append(MemoryItem("logits", logits, "3 chunks of 64 MiB, and the gradient of the head: b V H", resting=False))
    parts.append(MemoryItem("weights to be synced", learner.bucket_bytes, "one bucket of learner.bucket_bytes"))
    parts.append(MemoryItem("runtime", RUNTIME if on_gpu else GIB / 2, "allowance"))
    begin = width * every + (RUNTIME if on_gpu else 0)
    parts.append(MemoryItem("at the start", begin, "b P: the whole model, before it is sharded", held=False))
    return parts


def _gradients(learner: LearnerConfig, grads: int, width: int) -> MemoryItem:
    if learner.zero_stage > 1:
        return MemoryItem("gradients", 4 * grads / learner.ranks, "4 T / N: summed in fp32")
    if width == 4:
        return MemoryItem("gradients", 4 * grads, "4 T")
    return MemoryItem("gradients", 6 * grads, "2 T of a pass, 4 T of their sum in fp32 (ZeRO-1 keeps both whole)")


def _activations(shape: ModelSpec, config: TrainConfig, width: int) -> list[MemoryItem]:
    """An estimate of what the backward pass keeps.

    Per token and block of the language model 11 H + 3 KV + 4 I numbers (residual, two norms in fp32, queries,
    attention, MLP), per patch and block of the vision tower 14 H + 4 I; with checkpointing H per block, and one whole
    block. There is no matrix of tokens x tokens, because attention is fused."""
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
        MemoryItem("activations, text", width * tokens * text, f"{tokens:,} tokens, {how} (estimate)", resting=False),
        MemoryItem("activations, tower", width * patches * vision, f"{patches:,.0f} patches (estimate)", resting=False),
    ]


def learner_host_parts(shape: ModelSpec, config: TrainConfig) -> list[MemoryItem]:
    """What a learner rank on a GPU holds in main memory."""
    learner = config.learner
    parts = [MemoryItem("processes", 4 * GIB, "allowance: torch, DeepSpeed, pinned buffers, trajectories")]
    if learner.offload_optimizer:
        state = 16 * trained(shape, learner) / learner.ranks
        parts.append(
            MemoryItem("offloaded optimiser", state, "16 T / N: master weights, both moments, gradients, fp32")
        )
    parts.append(MemoryItem("at the start", 4 * shape.parameters, "4 P: the model is read in fp32", held=False))
    return parts


@dataclass(frozen=True, slots=True)
class EngineMemory:
    """Memory of an engine on each of its GPUs, or as a whole on a CPU."""

    limit: float
    """Bytes that the engine may take."""
    parts: tuple[MemoryItem, ...]
    """What it needs at least, with the KV cache of one conversation of ``max_model_len``."""
    cache: float
    """Bytes that are left for the KV cache."""
    conversations: float
    """Conversations of ``max_model_len`` that this cache holds."""


def engine_memory(shape: ModelSpec, engine: EngineConfig, tokens: int, gpu_memory: float | None) -> EngineMemory:
    """tokens: visual tokens of the largest view; gpu_memory: bytes of one GPU, None on a CPU."""
    ways = engine.tensor_parallel_size
    width = 4 if engine.dtype == "float32" else 2
    heads = max(1.0, shape.kv_heads / ways) / shape.kv_heads  # with fewer heads than GPUs, heads are replicated
    per_token = 2 * shape.layers * shape.kv_width * width * heads
    conversation = per_token * engine.max_model_len
    awake = not engine.sleep
    weights = MemoryItem("weights", width * shape.parameters / ways, f"b P / {ways}, b = {width}", resting=awake)
    how = f"2 x {shape.layers} layers x {shape.kv_width} x {width} bytes a token"
    if gpu_memory is None:
        cache = float(engine.kv_cache_gib * GIB)
        parts = [
            weights,
            MemoryItem("KV cache", cache, "kv_cache_gib"),
            MemoryItem("processes", CPU_PROCESSES, "measured"),
        ]
        return EngineMemory(float("inf"), tuple(parts), cache, cache / conversation)
    batch = max(ENGINE_BATCH, tokens)
    text = batch * (6 * shape.hidden + 3 * shape.intermediate / ways) * width
    vision = tokens * shape.patches_per_token * (6 * shape.vision_hidden + 3 * shape.vision_intermediate) * width
    logits = 2 * 4 * engine.max_num_seqs * shape.vocabulary
    work = MemoryItem(
        "work", text + vision + logits, f"{batch:,} tokens, views of {tokens:,}, logits (estimate)", resting=awake
    )
    runtime = MemoryItem("runtime", RUNTIME, "allowance")
    limit = engine.gpu_memory_utilization * gpu_memory
    least = MemoryItem("KV cache, at least", conversation, f"{how}, {engine.max_model_len} tokens", resting=awake)
    cache = limit - weights.bytes - work.bytes - runtime.bytes
    return EngineMemory(limit, (weights, work, runtime, least), cache, cache / conversation)


def largest_view(episode: EpisodeConfig) -> int:
    """Visual tokens of the larger view of an episode."""
    return max(episode.coarse_tokens, episode.fine_tokens)
