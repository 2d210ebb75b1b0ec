"""What a run costs: how large a model is, the bytes that each role needs, roughly how long a step takes.

Sizes come from a model's config alone: no weights are read or allocated. Estimates are labelled as such; their
assumptions are the constants here. Symbols: P parameters, T trained parameters, N ranks, b bytes of a number in the
passes (2 in bfloat16, else 4).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from pathlib import Path
from typing import Any

from ergo_rl.cluster.compat import repair_torchvision
from ergo_rl.cluster.config import EngineConfig, Transport
from ergo_rl.episodes.config import EpisodeConfig
from ergo_rl.episodes.families import UnknownFamily, family_of, family_of_type
from ergo_rl.jobs.config import ConfigError, TrainConfig
from ergo_rl.learners.config import Dtype, LearnerConfig
from ergo_rl.learners.model import CHUNK_LOGITS
from ergo_rl.model_names import pretrained, split_revision
from ergo_rl.rewards.config import Backend

KNOWN = Path(__file__).with_name("model_shapes.json")
"""Sizes from the configs of known hub models, so that a plan needs no network."""


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Parameters and widths of a model; the widths are those of its config."""

    parameters: int
    """All of them, tied ones counted once."""
    vision: int
    """Parameters of the vision tower."""
    linear: tuple[tuple[str, int, int], ...]
    """(last part of the name, inputs, outputs) of each linear layer in the language model's blocks."""
    layers: int
    hidden: int
    intermediate: int
    kv_width: int
    kv_heads: int
    vocabulary: int
    vision_layers: int
    vision_hidden: int
    vision_intermediate: int
    patches_per_token: int
    largest: int
    """Numbers in the largest tensor: embeddings or head."""
    quantised: int = 0
    """Parameters that are stored with fewer bits than the engine computes with."""
    quantised_bytes: float = 0.0
    """Of these, with their scales and zero points."""
    how_quantised: str = ""
    """``awq``, ``gptq``, ``fp8``, ``compressed-tensors``; empty for a plain model."""

    def weight_bytes(self, width: int) -> float:
        """Bytes of all weights in an engine whose numbers have ``width`` bytes."""
        return width * (self.parameters - self.quantised) + self.quantised_bytes

    def adapters(self, rank: int, targets: list[str]) -> int:
        """Parameters of LoRA adapters of this rank."""
        return sum(rank * (inputs + outputs) for name, inputs, outputs in self.linear if name in targets)


@lru_cache
def model_spec(model: str, own_family: str = "") -> ModelSpec:
    """The size of a local folder, of a name in ``model_shapes.json``, or of a hub name.

    own_family: ``package.module:Class`` of the user's. Raises ConfigError where the config cannot be loaded, and
    UnknownFamily, in the words of a training run, for a model that none would train."""
    repair_torchvision()
    import torch
    from transformers import AutoModelForImageTextToText

    config = _config_of(model, own_family)
    with torch.device("meta"):
        vlm: Any = AutoModelForImageTextToText.from_config(config)
    text, vision = config.text_config, config.vision_config
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    linear = {name: module.weight.shape for name, module in vlm.named_modules() if isinstance(module, torch.nn.Linear)}
    method, quantised, quantised_bytes = _quantised(model, linear, getattr(config, "quantization_config", None) or {})
    return ModelSpec(
        parameters=sum(parameter.numel() for parameter in vlm.parameters()),
        vision=sum(parameter.numel() for parameter in vlm.model.visual.parameters()),
        linear=tuple(
            (name.rpartition(".")[2], inputs, outputs)
            for name, (outputs, inputs) in linear.items()
            if name.startswith("model.language_model.")
        ),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=text.intermediate_size,
        kv_width=text.num_key_value_heads * head,
        kv_heads=text.num_key_value_heads,
        vocabulary=text.vocab_size,
        vision_layers=vision.depth,
        vision_hidden=vision.hidden_size,
        vision_intermediate=vision.intermediate_size,
        patches_per_token=vision.spatial_merge_size**2,
        largest=max(parameter.numel() for parameter in vlm.parameters()),
        quantised=quantised,
        quantised_bytes=quantised_bytes,
        how_quantised=method,
    )


def _config_of(model: str, own_family: str) -> Any:
    from transformers import AutoConfig

    known = json.loads(KNOWN.read_text())
    try:
        if (name := split_revision(model)[0]) not in known:
            family_of(model, own_family)
            return AutoConfig.from_pretrained(**pretrained(model))
        cells = known[name]
        cells = known.get(cells.get("like"), {}) | {key: value for key, value in cells.items() if key != "like"}
        family_of_type(model, cells["model_type"], own_family)
        return AutoConfig.for_model(**cells)
    except UnknownFamily:
        raise
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"the size of {model} is not known: {str(error).splitlines()[0]}; give a local folder, or one of "
            f"{', '.join(sorted(known))}"
        ) from error


def _quantised(model: str, linear: Mapping[str, Sequence[int]], settings: Any) -> tuple[str, int, float]:
    """(method, parameters, bytes) of the layers that an engine has quantised.

    linear: (outputs, inputs) by name. Raises ConfigError where the settings cannot be read."""
    try:
        shapes = [shape for name, shape in linear.items() if _is_quantised(name, settings)]
        size = sum(_quantised_bytes(outputs, inputs, settings) for outputs, inputs in shapes)
        return str(settings.get("quant_method", "")), sum(map(math.prod, shapes)), size
    except (AttributeError, LookupError, TypeError, ValueError, re.error) as error:
        raise ConfigError(
            f"quantization_config of {model} cannot be read ({type(error).__name__}: {error}); the plan knows the "
            "layouts of AWQ, GPTQ, FP8 and compressed-tensors"
        ) from error


def _is_quantised(name: str, settings: Mapping[str, Any]) -> bool:
    """Whether vLLM's engine has this linear layer quantised: never the head, and not what the settings leave out.

    Methods that are not known count as not quantised, so the plan is too cautious for them."""
    if settings.get("quant_method") not in ("awq", "gptq", "fp8", "compressed-tensors") or name == "lm_head":
        return False
    if settings["quant_method"] in ("awq", "gptq") and not name.startswith("model.language_model."):
        return False  # their calibration is of text; vLLM builds the tower without them
    left_out = [*_listed(settings, "modules_to_not_convert"), *_listed(settings, "ignored_layers")]
    left_out += _listed(settings, "ignore")
    return not any(_matches(name, each) for each in left_out)


def _listed(settings: Mapping[str, Any], key: str) -> list[str]:
    return list(settings.get(key) or ())


def _matches(name: str, pattern: str) -> bool:
    """Whether a pattern of a quantised model's config means this module: a part of its path, or ``re:`` and a regular
    expression. Checkpoints of before transformers 4.52 have ``visual.`` for ``model.visual.`` and ``model.`` for
    ``model.language_model.``."""
    names = (name, name.removeprefix("model."), name.replace("model.language_model.", "model.", 1))
    if pattern.startswith("re:"):
        return any(re.match(pattern[3:], each) for each in names)
    return any(f".{pattern}." in f".{each}." for each in names)


_BITS = ("bits", "w_bit", "num_bits")
"""What AWQ and GPTQ, the older AWQ, and compressed-tensors call the number of bits."""


def _quantised_bytes(outputs: int, inputs: int, settings: Mapping[str, Any]) -> float:
    """Bytes of one quantised layer: its numbers, and a scale of 2 bytes and a zero point for each group of inputs."""
    method, weights = settings["quant_method"], settings
    if method == "compressed-tensors":
        weights, *_ = (group["weights"] for group in settings["config_groups"].values())
    bits, *_ = [8] if method == "fp8" else [int(weights[name]) for name in _BITS if weights.get(name)]
    group = weights.get("group_size") or weights.get("q_group_size") or -1
    groups = outputs * (math.ceil(inputs / group) if group > 0 else 1)
    # GPTQ's format always has zero points; compressed-tensors has them where it is not symmetric.
    has_zeros = method == "gptq" or (method == "awq" and settings.get("zero_point", True))
    has_zeros = has_zeros or (method == "compressed-tensors" and not weights.get("symmetric", True))
    return outputs * inputs * bits / 8 + groups * (2 + (bits / 8 if has_zeros else 0))


GIB = 2**30
REDUCE_BUCKET = 500_000_000
"""Numbers in the bucket in which DeepSpeed reduces gradients (its default)."""
MAX_LIVE = 1_000_000_000
"""Parameters that ZeRO-3 keeps gathered at once (its default)."""
RUNTIME = 2 * GIB
"""Allowance for one process on a GPU: CUDA context, NCCL, memory that the allocator cannot use."""
CPU_PROCESSES = 3 * GIB
"""Resident size of an engine's processes on a CPU without weights and cache (measured: 0.7 + 0.6 + 1.7 GB)."""
ENGINE_BATCH = 2048
"""``max_num_batched_tokens`` of an engine whose recipe says nothing: vLLM's default for engines inside a program, also
on large GPUs."""
IMAGE_CACHE = 4.0
"""``mm_processor_cache_gb`` of an engine whose recipe says nothing: vLLM's default."""
PACKED_BUFFER = 1 << 29
"""Bytes of a buffer of vLLM's transfer engines (``BUFFER_BYTES`` of cluster/weight_sender.py, which loads Ray)."""
TEXT_TOKENS = 256
"""Allowance for the text of a question and its prompts, both turns."""


class When(Enum):
    """When an item of memory is there."""

    START = "at the start, before everything else"
    ALWAYS = "always"
    WORKING = "while its role works"
    PUBLISHING = "while weights are published"


@dataclass(frozen=True, slots=True)
class MemoryItem:
    name: str
    bytes: float
    how: str
    """Where the bytes come from: a formula, a measurement or an allowance."""
    when: When = When.ALWAYS


def total(parts: Sequence[MemoryItem]) -> float:
    """The most bytes that exist at once."""
    held = {when: sum(part.bytes for part in parts if part.when is when) for when in When}
    return max(held[When.START], held[When.ALWAYS] + max(held[When.WORKING], held[When.PUBLISHING]))


def at_rest(parts: Sequence[MemoryItem]) -> float:
    """Bytes on the device while another role works there: an engine sleeps, a learner rests or publishes to it."""
    return sum(part.bytes for part in parts if part.when in (When.ALWAYS, When.PUBLISHING))


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
        parts.append(MemoryItem("gathered weights", live, "b x min(P, 1e9), what ZeRO-3 gathers at once", When.WORKING))
    state = 12 * grads / ranks
    if not (learner.offload_optimizer and on_gpu):
        parts.append(MemoryItem("optimiser", state, "12 T / N: fp32 master weights and both moments of Adam"))
    parts.append(MemoryItem("gradient bucket", width * min(REDUCE_BUCKET, grads), "b x min(T, 5e8), being reduced"))
    if learner.loss.kl:
        parts.append(MemoryItem("reference policy", width * shape.parameters, "b P, whole on every rank"))
    parts += _activations(shape, config, width)
    logits = 3 * 4 * CHUNK_LOGITS + width * shape.vocabulary * shape.hidden
    parts.append(MemoryItem("logits", logits, "3 chunks of 64 MiB, and the gradient of the head: b V H", When.WORKING))
    parts += _published(shape, config, width, on_gpu)
    parts.append(MemoryItem("runtime", RUNTIME if on_gpu else GIB / 2, "allowance"))
    begin = width * every + (RUNTIME if on_gpu else 0)
    parts.append(MemoryItem("at the start", begin, "b P: the whole model, before it is sharded", When.START))
    return parts


def _gradients(learner: LearnerConfig, grads: int, width: int) -> MemoryItem:
    if learner.zero_stage > 1:
        return MemoryItem("gradients", 4 * grads / learner.ranks, "4 T / N: summed in fp32")
    if width == 4:
        return MemoryItem("gradients", 4 * grads, "4 T")
    return MemoryItem("gradients", 6 * grads, "2 T of a pass, 4 T of their sum in fp32 (ZeRO-1 keeps both whole)")


def _published(shape: ModelSpec, config: TrainConfig, width: int, on_gpu: bool) -> list[MemoryItem]:
    """What a learner rank holds more while it publishes. Through the object store each weight is copied to Ray's memory
    as it is; under ZeRO-3 a bucket is whole on the device meanwhile."""
    learner, largest = config.learner, width * shape.largest
    transport = config.weights.for_roles(learner.resources, config.rollout.resources).transport
    bucket, buffer = max(learner.bucket_bytes, largest), max(PACKED_BUFFER, largest)
    items = []
    if learner.zero_stage == 3:
        items.append(("bucket to be published", bucket, "learner.bucket_bytes, or the largest tensor: gathered"))
    if transport is Transport.BROADCAST:  # of rank 0; the other ranks only gather
        items.append(("buffers of NCCL", 3 * buffer, "3 x 512 MiB, or the largest tensor: two packed, and the next"))
    elif transport is Transport.IPC and on_gpu:
        items.append(("buffer of CUDA IPC", buffer + largest, "512 MiB, or the largest tensor; and a copy of a tensor"))
    elif transport is Transport.IPC:
        items.append(("bucket in shared memory", bucket, "learner.bucket_bytes, or the largest tensor"))
    return [MemoryItem(name, size, how, When.PUBLISHING) for name, size, how in items]


def received(shape: ModelSpec, config: TrainConfig) -> MemoryItem | None:
    """What a rollout engine holds on a GPU beside its share, while it receives weights; vLLM does not count it."""
    transport = config.weights.for_roles(config.learner.resources, config.rollout.resources).transport
    buffers = {Transport.BROADCAST: 2, Transport.IPC: 1}.get(transport, 0)
    if not buffers:
        return None
    width = 2 if config.learner.dtype is Dtype.BFLOAT16 else 4
    size = buffers * max(PACKED_BUFFER, width * shape.largest)
    how = f"{buffers} x 512 MiB, or the largest tensor; beside its share"
    return MemoryItem("weights received", size, how, When.WORKING)


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
        MemoryItem("activations, text", width * tokens * text, f"{tokens:,} tokens, {how} (estimate)", When.WORKING),
        MemoryItem("activations, tower", width * patches * vision, f"{patches:,.0f} patches (estimate)", When.WORKING),
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
    parts.append(MemoryItem("at the start", 4 * shape.parameters, "4 P: the model is read in fp32", When.START))
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
    images: MemoryItem
    """Main memory of the views that vLLM keeps ready."""
    fixed_cache: bool = False
    """The recipe says how large the cache is (``kv_cache_memory_bytes``)."""


def engine_memory(shape: ModelSpec, engine: EngineConfig, tokens: int, gpu_memory: float | None) -> EngineMemory:
    """tokens: visual tokens of the largest view; gpu_memory: bytes of one GPU, None on a CPU."""
    ways = engine.tensor_parallel_size
    width = 4 if engine.dtype == "float32" else 2
    heads = max(1.0, shape.kv_heads / ways) / shape.kv_heads  # with fewer heads than GPUs, heads are replicated
    kv_width = 1 if str(engine.extra.get("kv_cache_dtype", "")).startswith("fp8") else width
    conversation = 2 * shape.layers * shape.kv_width * kv_width * heads * engine.max_model_len
    when = When.WORKING if engine.sleep else When.ALWAYS
    how = f"b P / {ways}, b = {width}"
    if shape.how_quantised:
        unknown = "" if shape.quantised else ", which the plan does not know: as if it were not"
        how = f"{how}; {shape.quantised / 1e9:.1f}e9 quantised by {shape.how_quantised}{unknown}"
    weights = MemoryItem("weights", shape.weight_bytes(width) / ways, how, when)
    how = f"2 x {shape.layers} layers x {shape.kv_width} x {kv_width} bytes a token"
    images = _image_cache(engine)
    if gpu_memory is None:
        cache = float(engine.kv_cache_gib * GIB)
        parts = [
            weights,
            MemoryItem("KV cache", cache, "kv_cache_gib"),
            images,
            MemoryItem("processes", CPU_PROCESSES, "measured"),
        ]
        return EngineMemory(float("inf"), tuple(parts), cache, cache / conversation, images)
    batch = engine_batch(engine)
    text = batch * (6 * shape.hidden + 3 * shape.intermediate / ways) * width
    vision = tokens * shape.patches_per_token * (6 * shape.vision_hidden + 3 * shape.vision_intermediate) * width
    logits = 2 * 4 * engine.max_num_seqs * shape.vocabulary
    work = MemoryItem("work", text + vision + logits, f"{batch:,} tokens, views of {tokens:,}, logits (estimate)", when)
    runtime = MemoryItem("runtime", RUNTIME, "allowance")
    limit = engine.gpu_memory_utilization * gpu_memory
    least = MemoryItem("KV cache, at least", conversation, f"{how}, {engine.max_model_len} tokens", when)
    beside = weights.bytes + work.bytes + runtime.bytes
    if (fixed := _extra(engine, "kv_cache_memory_bytes")) is not None:
        limit = beside + fixed  # vLLM then takes this for the cache, whatever the share of the GPU is
    cache = limit - beside
    return EngineMemory(limit, (weights, work, runtime, least), cache, cache / conversation, images, fixed is not None)


def _image_cache(engine: EngineConfig) -> MemoryItem:
    """What the core keeps of prepared views, until it is full. The front end keeps their names alone."""
    size = _extra(engine, "mm_processor_cache_gb")
    size = IMAGE_CACHE if size is None else size
    return MemoryItem("prepared views", size * GIB, "engine.extra.mm_processor_cache_gb (vLLM: 4)")


def engine_batch(engine: EngineConfig) -> int:
    """Tokens of the engine's largest batch: what the recipe says, or vLLM's default."""
    default = min(ENGINE_BATCH, engine.max_num_seqs * engine.max_model_len)
    return int(_extra(engine, "max_num_batched_tokens") or default)


def _extra(engine: EngineConfig, key: str) -> float | None:
    """A number that the recipe hands to vLLM as it is. Raises ConfigError where it is none."""
    value = engine.extra.get(key)
    try:
        return None if value is None else float(value)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"engine.extra.{key} is {str(value)[:100]!r}; it must be a number") from error


def largest_view(episode: EpisodeConfig) -> int:
    """Visual tokens of the larger view of an episode."""
    return max(episode.coarse_tokens, episode.fine_tokens)


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
                        rollout.engine.tensor_parallel_size, rollout.size.max, flops, bandwidth)  # fmt: skip
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
    decode = batches * reply * shape.weight_bytes(2) / (ways * bandwidth * DECODE_SHARE)
    return prefill + decode
