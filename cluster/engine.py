"""vLLM's ``AsyncLLM`` behind one method: token ids and images in, sampled ids and their log-probs out.

Below both the rollout workers and the reward actors, because both host the same engine. Knows nothing of
episodes. Runs on vLLM 0.26 (GPU) and 0.32 (CPU).
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import os
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ergo_rl.cluster.buckets import Bucket, Layout
from ergo_rl.cluster.config import EngineConfig
from ergo_rl.cluster.meeting import Meeting
from ergo_rl.cluster.pool import WorkerDied
from ergo_rl.cluster.shared_memory import SharedFile, SharedFiles

if TYPE_CHECKING:
    from PIL.Image import Image

_LAST_WORDS_S = 5.0
_ATTEMPTS = 4
"""vLLM ends a request with "error", or with an EngineGenerateError ("recoverable"), where another attempt may do: so
when its two caches of processed images have drifted apart, because a request was cancelled on its way between them, or
while that is mended; the next attempt sends the image again."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """One request's sampling. ``banned_ids`` get probability 0 and the log-probs are those of the
    distribution that was sampled from (after the ban and the temperature)."""

    max_tokens: int
    temperature: float = 1.0
    seed: int | None = None
    stop_ids: tuple[int, ...] = ()
    banned_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Completion:
    """token_ids: as sampled, the stop token included; logprobs: of those tokens, in nats; prompt_length: in
    tokens, as the engine saw the prompt (placeholders expanded); weight_version: of the weights that
    sampled the first token; updates: (t, version) where tokens from t on were sampled by later weights; stopped: False
    where the length limit cut the reply; cached_tokens: how much of the prompt came from the prefix cache."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    stopped: bool
    prompt_length: int
    weight_version: int
    cached_tokens: int
    updates: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Picture:
    """Made once for all requests that show it. name: of its content, by which vLLM's caches know it, so that they need
    not read all of it for each request."""

    image: Image
    name: str

    @classmethod
    def of(cls, pixels: NDArray[np.uint8]) -> Picture:
        """pixels: uint8[h, w, 3]."""
        from PIL.Image import fromarray

        digest = hashlib.blake2b(np.ascontiguousarray(pixels).data, digest_size=16)
        digest.update(str(pixels.shape).encode())
        return cls(fromarray(pixels), digest.hexdigest())


class EngineRefused(ValueError):
    """The engine will not take this request (too long, malformed). The message says why."""


class EngineDied(WorkerDied):
    """vLLM's core or a worker process of it is gone; this engine will answer nothing any more."""


class Engine:
    """One vLLM engine in this process (its core and workers are child processes).

    Not thread-safe: one asyncio loop owns it."""

    def __init__(self, llm: Any, config: EngineConfig) -> None:
        self._llm = llm
        self.config = config
        self.weight_version = 0
        self._loading = asyncio.Lock()
        self._asleep = False
        self._files = SharedFiles()
        self._ids = itertools.count()

    @classmethod
    async def start(cls, config: EngineConfig) -> Engine:
        """Start vLLM (20 to 40 s on a CPU). Environment variables are set here because vLLM's child
        processes read them; an engine owns its process (a Ray actor), so nobody else is affected."""
        _prepare_environment(config)
        from ergo_rl.cluster.compat import repair_torchvision

        repair_torchvision()
        from vllm import AsyncEngineArgs
        from vllm.config import WeightTransferConfig
        from vllm.platforms import current_platform
        from vllm.v1.engine.async_llm import AsyncLLM

        from ergo_rl.cluster.weight_receiver import BACKEND, WORKER_EXTENSION

        args = AsyncEngineArgs(
            **{
                "model": config.model,
                "dtype": config.dtype,
                "max_model_len": config.max_model_len,
                "max_num_seqs": config.max_num_seqs,
                "gpu_memory_utilization": config.gpu_memory_utilization,
                "tensor_parallel_size": config.tensor_parallel_size,
                "enforce_eager": config.enforce_eager,
                "enable_sleep_mode": config.sleep and current_platform.is_sleep_mode_available(),
                "enable_prefix_caching": config.prefix_caching,
                "trust_remote_code": config.trust_remote_code,
                "limit_mm_per_prompt": {"image": 2, "video": 0},
                # Of the distribution that was sampled from, not of the raw logits (TRL #4159).
                "logprobs_mode": "processed_logprobs",
                "generation_config": "vllm",  # no sampling defaults from the model's folder
                "weight_transfer_config": WeightTransferConfig(backend=BACKEND),
                "worker_extension_cls": WORKER_EXTENSION,
                "disable_log_stats": True,
                **config.extra,
            }
        )
        llm = await asyncio.wait_for(asyncio.to_thread(AsyncLLM.from_engine_args, args), config.start_deadline_s)
        if _stamps_tokens():
            await llm.update_weight_version("0")  # of the model's folder, until something is published
        return cls(llm, config)

    async def generate(self, token_ids: Sequence[int], pictures: Sequence[Picture], sampling: Sampling) -> Completion:
        """Sample one reply. ``token_ids``: ONE placeholder per picture (vLLM expands it; already expanded ids
        would be expanded again, without any error).

        Raises EngineRefused when vLLM rejects the request, EngineDied when the engine is gone."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine.exceptions import EngineGenerateError

        params = SamplingParams(
            skip_clone=True,  # nobody else has it
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            seed=sampling.seed,
            stop_token_ids=list(sampling.stop_ids),
            # vLLM clamps a bias to -100: e^-100 of the probability, nothing in float32.
            logit_bias=dict.fromkeys(sampling.banned_ids, -100.0) or None,
            logprobs=0,
            # Per token this process makes no text, dictionary or object: with short replies it would keep the core
            # waiting. The text is made at the end.
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        prompt: Any = {"prompt_token_ids": list(token_ids)}
        if pictures:
            prompt["multi_modal_data"] = {"image": [picture.image for picture in pictures]}
            prompt["multi_modal_uuids"] = {"image": [picture.name for picture in pictures]}
        version, final = self.weight_version, None
        for left in reversed(range(_ATTEMPTS)):
            try:
                with _engine_died():
                    async for output in self._llm.generate(
                        prompt, params, request_id=f"{next(self._ids)}-{uuid.uuid4().hex[:8]}"
                    ):
                        final = output
            except _refusals() as error:
                raise EngineRefused(str(error)) from error
            except EngineGenerateError:
                if not left:
                    raise
                continue
            if final is None or final.outputs[0].finish_reason != "error":
                break
        if final is None or final.outputs[0].finish_reason not in ("stop", "length"):
            raise RuntimeError(f"vLLM ended a request without a reply: {final}")
        reply = final.outputs[0]
        if spans := getattr(reply, "weight_versions", None):
            version = int(spans[0].version)
        stopped = reply.finish_reason == "stop"
        return Completion(
            token_ids=tuple(reply.token_ids),
            logprobs=_sampled(reply.token_ids, reply.logprobs),
            text=self._text(reply.token_ids[: -1 if stopped else None]),
            stopped=stopped,
            prompt_length=len(final.prompt_token_ids),
            weight_version=version,
            cached_tokens=final.num_cached_tokens or 0,
            updates=tuple((span.start, int(span.version)) for span in (spans or ())[1:]),
        )

    def _text(self, token_ids: Sequence[int]) -> str:
        """As vLLM makes it: without special tokens, and without a character at the end that is not complete."""
        tokenizer = self._llm.get_tokenizer()
        text: str = tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text.rstrip("\ufffd")

    async def load_weights(self, version: int, buckets: Sequence[Bucket]) -> None:
        """Replace the weights by ``buckets`` (names as in a checkpoint). The first one is laid out before generation
        stops, each other one while the one before it is loaded. Raises EngineDied."""
        async with self._loading, self._written(buckets) as arrivals:
            await self._replace_weights(version, arrivals)

    async def enter_group(self, meeting: Meeting, first_rank: int) -> None:
        """Have every worker process meet the learner and others, as ranks from ``first_rank``. Raises EngineDied."""
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        async with self._loading, self._watched():
            await self._llm.init_weight_transfer_engine(
                WeightTransferInitRequest(init_info={"meeting": asdict(meeting), "first_rank": first_rank})
            )

    async def receive_weights(self, version: int, generation: int, layouts: Sequence[Layout]) -> None:
        """Replace the weights by what the group ``generation`` is sent next, in these buckets. Raises EngineDied, and
        whatever made the broadcast fail."""

        async def arrivals() -> AsyncIterator[dict[str, Any]]:
            for layout in layouts:
                yield {"generation": generation, "layout": asdict(layout)}

        async with self._loading:
            await self._replace_weights(version, arrivals())

    async def sleep(self) -> None:
        """Give the device's memory back until weights are loaded. What is asked meanwhile waits; what runs goes on
        afterwards. Raises EngineDied."""
        async with self._loading, self._watched():
            await self._llm.sleep(level=1, mode="keep")
            self._asleep = True

    @asynccontextmanager
    async def _written(self, buckets: Sequence[Bucket]) -> AsyncIterator[AsyncIterator[dict[str, Any]]]:
        """The buckets as files in shared memory, the first one written when the block begins, each other one while the
        one before it is loaded."""
        tasks: list[asyncio.Task[SharedFile]] = []

        def begin() -> None:
            if len(tasks) < len(buckets):
                tasks.append(asyncio.create_task(asyncio.to_thread(self._files.lend, buckets[len(tasks)].parts)))

        async def arrivals() -> AsyncIterator[dict[str, Any]]:
            for place, bucket in enumerate(buckets):
                file = await tasks[place]
                begin()
                yield {"path": str(file.path), "layout": asdict(bucket.layout)}
                self._files.give_back(file)

        begin()
        await asyncio.gather(*tasks)
        try:
            yield arrivals()
        finally:
            for written in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(written, SharedFile):
                    self._files.give_back(written)

    async def _replace_weights(self, version: int, arrivals: AsyncIterator[dict[str, Any]]) -> None:
        """Through vLLM's weight transfer life cycle; then clear every cache that depends on weights.

        Running requests are kept: what they have sampled stays, its keys and values are computed anew, and they go on
        with the new weights; vLLM says from which token on (``Completion.updates``). A vLLM that cannot say it (0.26)
        ends what runs first instead, so that no reply mixes weights without being stamped so. Where it fails the engine
        stays paused until it is given weights again: what it holds is half of two versions."""
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        llm = self._llm
        async with self._watched():
            if self._asleep:  # paused until the KV cache is back, too, which is not in the way while weights load
                await llm.wake_up(tags=["weights"])
            else:
                await llm.pause_generation(mode="keep" if _stamps_tokens() else "wait", clear_cache=False)
            await llm.start_weight_update()
            async for arrival in arrivals:
                await llm.update_weights(WeightTransferUpdateRequest(update_info=arrival))
            # vLLM 0.26 takes no version here.
            await llm.finish_weight_update(**({"weight_version": str(version)} if _stamps_tokens() else {}))
            await self.clear_caches()
            if self._asleep:
                await llm.wake_up(tags=["kv_cache"])
                self._asleep = False
            else:
                await llm.resume_generation()
        self.weight_version = version

    async def clear_caches(self) -> None:
        """Of what the weights have computed, while generation is paused. The prefix cache does nothing while blocks are
        in use unless running requests are reset (vLLM #12284, #28827); the vision-encoder cache is keyed by the image
        alone (vLLM #44910). The cache of processed images stays: it holds pixels, and clearing its two ends while
        requests are on their way between them would make the core ask for an image that nobody sends (vLLM #42995)."""
        if not await self._llm.reset_prefix_cache(reset_running_requests=True):
            raise RuntimeError("vLLM did not clear its prefix cache: replies would mix old and new weights")
        await self._llm.reset_encoder_cache()

    @asynccontextmanager
    async def _watched(self) -> AsyncIterator[None]:
        """Raises EngineDied for whatever a core says that is about to end: it may take back what it was asked to do
        ("Call to pause_scheduler method failed: cancelled") before its death is known."""
        with _engine_died():
            try:
                yield
            except Exception as error:
                ends = time.monotonic() + _LAST_WORDS_S
                while not self._llm.errored and time.monotonic() < ends:
                    await asyncio.sleep(0.1)
                if self._llm.errored:
                    raise EngineDied(str(error)) from error
                raise

    async def check(self) -> None:
        """Raises EngineDied when the engine is gone."""
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            await self._llm.check_health()
        except EngineDeadError as error:
            raise EngineDied(str(error)) from error

    def close(self) -> None:
        self._llm.shutdown()
        # Its __del__ shuts it down again, and complains where the interpreter has no modules any more.
        self._llm.shutdown = lambda: None
        self._files.close()


@contextmanager
def _engine_died() -> Iterator[None]:
    from vllm.v1.engine.exceptions import EngineDeadError

    try:
        yield
    except EngineDeadError as error:
        raise EngineDied(str(error)) from error


def _sampled(token_ids: Sequence[int], logprobs: Any) -> tuple[float, ...]:
    """Nats of each token, out of vLLM's flat log-probs, which may have others at a position, too."""
    if len(logprobs) != len(token_ids) or [logprobs.token_ids[at] for at in logprobs.start_indices] != token_ids:
        raise RuntimeError("vLLM's log-probs are not those of the tokens that it sampled")
    return tuple(logprobs.logprobs[at] for at in logprobs.start_indices)


def _stamps_tokens() -> bool:
    """Whether this vLLM says which weights sampled which token (0.32 does, 0.26 does not)."""
    from vllm.outputs import CompletionOutput

    return "weight_versions" in {field.name for field in fields(CompletionOutput)}


def _refusals() -> tuple[type[Exception], ...]:
    """What vLLM raises for a request it rejects: ValueError (0.26), its own client errors (0.32). A dead engine is
    neither."""
    from vllm import exceptions

    client_error = getattr(exceptions, "VLLMClientError", None)
    return (ValueError, client_error) if client_error else (ValueError,)


def _prepare_environment(config: EngineConfig) -> None:
    defaults = {
        "VLLM_CPU_KVCACHE_SPACE": str(config.kv_cache_gib),
        # Several roles share the cores: threads are bounded, not pinned (vLLM would pin to all cores).
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(config.threads),
        # AsyncLLM has a core process in any case; with this the worker of a CPU engine runs inside it: one process,
        # 0.6 GB and 7 s less.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    os.environ.update(defaults)
