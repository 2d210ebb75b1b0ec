"""vLLM's ``AsyncLLM`` behind one method: token ids and images in, sampled ids and their log-probs out.

Rollout workers and reward actors host the same engine; it knows nothing of episodes.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import os
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ergo_rl.cluster.config import EngineConfig
from ergo_rl.cluster.weight_buckets import Bucket, SharedFile, SharedFiles, memory_domain
from ergo_rl.cluster.worker_pool import WorkerDied
from ergo_rl.model_names import engine_arguments

if TYPE_CHECKING:
    from PIL.Image import Image

CRASH_GRACE_S = 5.0
"""How long to wait after an error for vLLM to say that its core has died."""

_ATTEMPTS = 4
"""Tries per request when vLLM ends it with "error" or raises EngineGenerateError ("recoverable"): its two caches of
processed images can disagree after a cancelled request; the retry sends the image again."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to sample one reply. Log-probs are those of the distribution that is sampled from, after ban and
    temperature."""

    max_tokens: int
    temperature: float = 1.0
    seed: int | None = None
    stop_ids: tuple[int, ...] = ()
    banned_ids: tuple[int, ...] = ()
    """Tokens that get probability 0."""


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled reply."""

    token_ids: tuple[int, ...]
    """As sampled, the stop token included."""
    logprobs: tuple[float, ...]
    """Of those tokens, in nats."""
    text: str
    stopped: bool
    """False if the length limit cut the reply."""
    prompt_length: int
    """Tokens as the engine saw the prompt (placeholders expanded)."""
    weight_version: int
    """Of the weights that sampled the first token."""
    cached_tokens: int
    """How many tokens of the prompt came from the prefix cache."""
    updates: tuple[tuple[int, int], ...] = ()
    """(t, version) where tokens from t on were sampled by later weights."""


@dataclass(frozen=True, slots=True)
class EngineImage:
    """An image for one or many requests."""

    image: Image
    name: str
    """Hash of the content, by which vLLM's caches know it without reading all of it for every request."""

    @classmethod
    def of(cls, pixels: NDArray[np.uint8]) -> EngineImage:
        """pixels: uint8[h, w, 3]."""
        from PIL.Image import fromarray

        digest = hashlib.blake2b(np.ascontiguousarray(pixels).data, digest_size=16)
        digest.update(str(pixels.shape).encode())
        return cls(fromarray(pixels), digest.hexdigest())


class EngineRefused(ValueError):
    """vLLM rejects this request (too long, malformed). The message says why."""


class EngineDied(WorkerDied):
    """vLLM's core or one of its worker processes is gone; this engine will not answer again."""


class WrongTransfer(RuntimeError):
    """A call of a weight transfer that is over."""


class Engine:
    """One vLLM engine in this process (its core and workers are child processes).

    Not thread-safe: one asyncio loop owns it."""

    def __init__(self, llm: Any, config: EngineConfig) -> None:
        self._llm = llm
        self.config = config
        self.weight_version = 0
        self._loading = asyncio.Lock()
        self._asleep = False
        self._transfer = ""
        """Id of the direct transfer that is under way."""
        self._updating = False
        """An update was started and has not finished."""
        self._files = SharedFiles()
        self._ids = itertools.count()

    @classmethod
    async def start(cls, config: EngineConfig) -> Engine:
        """Start vLLM (20 to 40 s on a CPU). Sets environment variables, because vLLM's child processes read them; an
        engine owns its process (a Ray actor), so nothing else is affected."""
        _prepare_environment(config)
        from ergo_rl.cluster.compat import bind_collectives_localhost, repair_torchvision

        if config.on_one_machine:
            bind_collectives_localhost()

        repair_torchvision()
        from vllm import AsyncEngineArgs
        from vllm.config import WeightTransferConfig
        from vllm.platforms import current_platform
        from vllm.v1.engine.async_llm import AsyncLLM

        from ergo_rl.cluster.vllm_worker import BACKEND, WORKER_EXTENSION

        args = AsyncEngineArgs(
            **{
                **engine_arguments(config.model),
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
        await llm.update_weight_version("0")  # of the model's folder, until something is published
        return cls(llm, config)

    async def generate(self, token_ids: Sequence[int], images: Sequence[EngineImage], sampling: Sampling) -> Completion:
        """Sample one reply. ``token_ids``: ONE placeholder per image (vLLM expands it; ids that are already expanded
        would be expanded again, without any error).

        Raises EngineRefused when vLLM rejects the request, EngineDied when the engine is gone."""
        from vllm import SamplingParams
        from vllm.exceptions import VLLMClientError
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine.exceptions import EngineGenerateError

        params = SamplingParams(
            skip_clone=True,  # it is used for this request only
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            seed=sampling.seed,
            stop_token_ids=list(sampling.stop_ids),
            # vLLM clamps a bias to -100: e^-100 of the probability, nothing in float32.
            logit_bias=dict.fromkeys(sampling.banned_ids, -100.0) or None,
            logprobs=0,
            # Make no text, dictionary or object per token: with short replies the core would wait for this process. The
            # text is made at the end.
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        prompt: Any = {"prompt_token_ids": list(token_ids)}
        if images:
            prompt["multi_modal_data"] = {"image": [image.image for image in images]}
            prompt["multi_modal_uuids"] = {"image": [image.name for image in images]}
        final = None
        for left in reversed(range(_ATTEMPTS)):
            try:
                with _engine_died():
                    async for output in self._llm.generate(
                        prompt, params, request_id=f"{next(self._ids)}-{uuid.uuid4().hex[:8]}"
                    ):
                        final = output
            except (ValueError, VLLMClientError) as error:
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
        spans = reply.weight_versions
        if not spans:
            raise RuntimeError("vLLM did not say which weights sampled a reply")
        stopped = reply.finish_reason == "stop"
        return Completion(
            token_ids=tuple(reply.token_ids),
            logprobs=_sampled(reply.token_ids, reply.logprobs),
            text=self._text(reply.token_ids[: -1 if stopped else None]),
            stopped=stopped,
            prompt_length=len(final.prompt_token_ids),
            weight_version=int(spans[0].version),
            cached_tokens=final.num_cached_tokens or 0,
            updates=tuple((span.start, int(span.version)) for span in spans[1:]),
        )

    def _text(self, token_ids: Sequence[int]) -> str:
        """Decode as vLLM does: without special tokens, and without an incomplete character at the end."""
        tokenizer = self._llm.get_tokenizer()
        text: str = tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text.rstrip("\ufffd")

    async def load_weights(self, version: int, buckets: Sequence[Bucket]) -> None:
        """Replace the weights by ``buckets`` (names as in a checkpoint). The first one is written to shared memory
        before generation stops, every other one while the one before it is loaded. Raises EngineDied."""
        async with self._loading, self._written(buckets) as updates, self._watched():
            await self._start_update()
            async for update in updates:
                await self._update(update)
            await self._finish_update(version)

    # A direct transfer (``cluster.weight_sender``). Between its calls generation stays paused; what was started last
    # is what counts, so a call that arrives late, from a transfer that was given up, is refused. All raise EngineDied.

    async def init_weight_transfer(self, transport: str, info: dict[str, Any], timeout_s: float) -> None:
        """Connect every worker process to the learner. info: of vLLM's own engine for this transport."""
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        if transport == "shared_memory":
            return
        init = {"transport": transport, "payload": info, "timeout_s": timeout_s}
        async with self._loading, self._watched():
            await self._llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info=init))

    async def start_weight_update(self, transfer: str) -> None:
        """Pause generation and prepare for new weights. transfer: an id that the calls below repeat."""
        async with self._loading, self._watched():
            await self._start_update()
            self._transfer = transfer

    async def update_weights(self, transfer: str, update: dict[str, Any]) -> None:
        """Load a part of the weights. Raises WrongTransfer, and LookupError if no learner rank shares the memory of
        this engine."""
        payload = update["payload"]
        async with self._loading:
            self._check(transfer)
            part = {"payload": payload}
            if update["transport"] == "shared_memory":
                if (domain := memory_domain()) not in payload["paths"]:
                    raise LookupError(
                        f"no learner rank shares the memory of {domain}, where an engine is; ranks are on "
                        f"{', '.join(payload['paths'])}"
                    )
                part = {"path": payload["paths"][domain], "spec": payload["spec"]}
            async with self._watched():
                await self._update(part)

    async def finish_weight_update(self, transfer: str, version: int) -> None:
        """Resume generation with the new weights. Raises WrongTransfer."""
        async with self._loading:
            self._check(transfer)
            async with self._watched():
                await self._finish_update(version)

    async def sleep(self) -> None:
        """Give the device's memory back until weights are loaded. Requests wait meanwhile, running ones continue
        afterwards. Raises EngineDied."""
        async with self._loading, self._watched():
            await self._llm.sleep(level=1, mode="keep")
            self._asleep = True

    @asynccontextmanager
    async def _written(self, buckets: Sequence[Bucket]) -> AsyncIterator[AsyncIterator[dict[str, Any]]]:
        """Write the buckets to shared memory: the first one before the block begins, every other one while the one
        before it is loaded."""
        tasks: list[asyncio.Task[SharedFile]] = []

        def begin() -> None:
            if len(tasks) < len(buckets):
                tasks.append(asyncio.create_task(asyncio.to_thread(self._files.acquire, buckets[len(tasks)].parts)))

        async def updates() -> AsyncIterator[dict[str, Any]]:
            for index, bucket in enumerate(buckets):
                file = await tasks[index]
                begin()
                yield {"path": str(file.path), "spec": asdict(bucket.spec)}
                self._files.release(file)

        begin()
        await asyncio.gather(*tasks)
        try:
            yield updates()
        finally:
            for written in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(written, SharedFile):
                    self._files.release(written)

    # vLLM's life cycle of a weight update. Running requests are kept: what they have sampled stays, its keys and values
    # are computed anew, and they continue with the new weights; vLLM says from which token on (``Completion.updates``).
    # After a failure the engine stays paused until it gets weights again: it holds parts of two versions.

    async def _start_update(self) -> None:
        self._transfer = ""
        if self._asleep:  # paused until the KV cache is back, too, which is not in the way while weights load
            await self._llm.wake_up(tags=["weights"])
        else:
            await self._llm.pause_generation(mode="keep", clear_cache=False)
        if self._updating:
            # The last update broke off. vLLM refuses another one until it is finished, unless that failed by itself.
            with suppress(Exception):
                await self._llm.finish_weight_update()
        self._updating = True
        await self._llm.start_weight_update()

    async def _update(self, update: dict[str, Any]) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        await self._llm.update_weights(WeightTransferUpdateRequest(update_info=update))

    async def _finish_update(self, version: int) -> None:
        self._transfer = ""
        await self._llm.finish_weight_update(weight_version=str(version))
        await self.clear_caches()
        if self._asleep:
            await self._llm.wake_up(tags=["kv_cache"])
            self._asleep = False
        else:
            await self._llm.resume_generation()
        self.weight_version, self._updating = version, False

    def _check(self, transfer: str) -> None:
        if transfer != self._transfer:
            raise WrongTransfer("a part of a weight transfer that was given up")

    async def clear_caches(self) -> None:
        """Clear every cache of what the weights have computed, while generation is paused. The prefix cache is not
        cleared while blocks are in use unless running requests are reset (vLLM #12284, #28827); the vision-encoder
        cache is keyed by the image alone (vLLM #44910). The cache of processed images stays: it holds pixels, and
        clearing its two ends while requests are on their way between them would make the core ask for an image that
        nobody sends (vLLM #42995)."""
        if not await self._llm.reset_prefix_cache(reset_running_requests=True):
            raise RuntimeError("vLLM did not clear its prefix cache: replies would mix old and new weights")
        await self._llm.reset_encoder_cache()

    @asynccontextmanager
    async def _watched(self) -> AsyncIterator[None]:
        """Raise EngineDied for any error of a core that is dying: calls may fail ("Call to pause_scheduler method
        failed: cancelled") before its death is known."""
        with _engine_died():
            try:
                yield
            except Exception as error:
                deadline = time.monotonic() + CRASH_GRACE_S
                while not self._llm.errored and time.monotonic() < deadline:
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
        # Its __del__ shuts it down again, and complains when the interpreter has already dropped its modules.
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
    """Pick the log-prob of each token, in nats, out of vLLM's flat log-probs, which may hold others as well."""
    if len(logprobs) != len(token_ids) or [logprobs.token_ids[at] for at in logprobs.start_indices] != token_ids:
        raise RuntimeError("vLLM's log-probs are not those of the tokens that it sampled")
    return tuple(logprobs.logprobs[at] for at in logprobs.start_indices)


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
