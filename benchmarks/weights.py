"""Seconds and bytes per second of a publish, by each transport, beside a memcpy of the same bytes.

    python -m benchmarks.weights                  # a few minutes on two cores; --transport-only: a minute, no engines
    python -m benchmarks.weights --transport ipc               # shared memory

For each size a random Qwen2.5-VL of about so many MB (float32), a learner of one rank that holds it, and a vLLM engine
that plays it. A publish is

    gather    learner's parameters -> object store; the learner stands still for so long
    deliver   object store -> a file in shared memory that vLLM's worker maps; generation goes on
    load      vLLM's own life cycle: layer by layer out of the file, packed as its CPU kernels want them; caches cleared

or, with ``--transport ipc``,

    send      learner's parameters -> a file in shared memory that the receiving process maps. The learner stands still
              for so long. In a publish, vLLM loads each bucket before it receives the next

Compared with a copy of the same bytes from one warm array into another (``memcpy``), into fresh memory
(``memcpy_fresh``: in large pages, where the kernel gives them), into a new file in shared memory (``memcpy_shared``:
the kernel gives it page by page of 4 KB, as most are set up) and into one that was written before (``memcpy_again``),
all taking turns. Files are kept from publish to publish, so the first one costs more: it is shown apart (``first``).
Target: gather + deliver, or send, which is what the transport does, at most 3 x memcpy into fresh memory from the
second publish on, for each size of at least 100 MB. What vLLM takes after that is shown beside it.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import numpy as np
import ray

from benchmarks.reporting import parser_of, report, spread
from ergo_rl.actors.config import RolloutConfig
from ergo_rl.actors.rollout_pool import RolloutPool
from ergo_rl.cluster.config import ClusterConfig, EngineConfig, Transport, WeightsConfig
from ergo_rl.cluster.placement import Cluster
from ergo_rl.cluster.weight_buckets import Bucket, SharedFile, SharedFiles, map_file, memory_domain
from ergo_rl.cluster.weight_sync import WeightChannel
from ergo_rl.episodes.config import EpisodeConfig
from ergo_rl.learners.config import LearnerConfig
from ergo_rl.learners.learner_group import LearnerGroup

TARGET, LEAST_MB = 3.0, 100
TOKENIZER = "models/panels-policy"


class Landing:
    """Where weights arrive: in place of a rollout worker, up to the file that vLLM maps."""

    def __init__(self) -> None:
        self._files = SharedFiles()

    async def land(self, *buckets: Bucket) -> float:
        """Seconds."""
        started = time.perf_counter()
        files = [self._files.acquire(bucket.parts) for bucket in buckets]
        seconds = time.perf_counter() - started
        for file in files:
            self._files.release(file)
        return seconds

    async def init_weight_transfer(self, *_: Any) -> None:
        import torch  # noqa: F401  # a real worker has it, so the first transfer does not pay for it

    async def start_weight_update(self, transfer: str) -> None:
        pass

    async def update_weights(self, transfer: str, update: dict[str, Any]) -> None:
        payload = update["payload"]
        map_file(payload["paths"][memory_domain()], sum(payload["spec"]["sizes"]))

    async def finish_weight_update(self, transfer: str, version: int) -> float:
        return 0.0


def model_of(megabytes: int, folder: Path) -> Path:
    """A random model of about so many MB in float32, with the tokenizer of the panels policy."""
    from transformers import AutoTokenizer

    from ergo_rl.examples.panels.tiny_model import TinyConfig, make_model, make_processor, save_folder

    tokenizer: Any = AutoTokenizer.from_pretrained(TOKENIZER)
    layers = 8
    hidden = 128 * max(1, round((megabytes * 1e6 / 4 / layers / 15) ** 0.5 / 128))  # a layer: 3 h^2 + 3 h (4 h)
    shape = TinyConfig(hidden=hidden, layers=layers, heads=max(4, hidden // 64), intermediate=4 * hidden)
    save_folder(make_model(tokenizer, shape, seed=0), make_processor(tokenizer), folder / f"{megabytes}mb")
    return folder / f"{megabytes}mb"


def memcpy(size: int, repeats: int) -> dict[str, float]:
    """Seconds to copy so many bytes: into warm memory, into fresh memory, into a new file in shared memory, and into it
    once more; the quickest of ``repeats``."""
    source, target = np.ones(size, np.uint8), np.zeros(size, np.uint8)
    warm, fresh, shared, again = list[float](), list[float](), list[float](), list[float]()
    for _ in range(repeats):
        started = time.perf_counter()
        np.copyto(target, source)
        warm.append(time.perf_counter() - started)
        started = time.perf_counter()
        source.copy()
        fresh.append(time.perf_counter() - started)
        file = SharedFile()
        for times in (shared, again):
            started = time.perf_counter()
            file.write([source])
            times.append(time.perf_counter() - started)
        file.close()
    found = {"memcpy": warm, "memcpy_fresh": fresh, "memcpy_shared": shared, "memcpy_again": again}
    return {name: min(times) for name, times in found.items()}


class Times:
    """Seconds by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    def note(self, **seconds: float) -> None:
        for name, value in seconds.items():
            self.seconds.setdefault(name, []).append(value)

    async def of(self, name: str, work: Awaitable[Any]) -> Any:
        started = time.perf_counter()
        result = await work
        self.note(**{name: time.perf_counter() - started})
        return result


async def measure(cluster: Cluster, model: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything of one size; what is compared takes turns."""
    learners = await LearnerGroup.launch(cluster, LearnerConfig(model=str(model), threads=1))
    landing = ray.remote(Landing).options(num_cpus=0).remote()
    rollouts = None
    if not arguments.transport_only:
        engine = EngineConfig(model=str(model), dtype="float32", max_model_len=512, max_num_seqs=8)
        rollouts = RolloutPool.launch(cluster, RolloutConfig(engine=engine), EpisodeConfig())
        await rollouts.ready(arguments.deadline)
    times = Times()
    size = sum(spec.bytes for spec in await learners.bucket_specs())
    config = WeightsConfig(arguments.transport)
    direct = config.transport is not Transport.OBJECT_STORE
    if direct:
        await learners.connect(config.transport, [landing], 1, config.timeout_s)
    for repeat in range(1 + arguments.repeats):
        times.note(**await asyncio.to_thread(memcpy, size, 3))
        first = "" if repeat else "first_"
        if direct:
            await times.of(f"{first}send", learners.send_weights(repeat))
        else:
            buckets = await times.of(f"{first}gather", learners.weights())
            await times.of(f"{first}deliver", landing.land.remote(*buckets))
            del buckets
    if rollouts is not None:  # a learner has one connection at a time: after the others, not between them
        channel = WeightChannel(learners, rollouts, config)
        for version in range(1, arguments.repeats + 1):
            done = await times.of("publish", channel.publish(version))
            assert done.transport is config.transport, "it did not need the object store's help"
    await learners.close()
    cluster.release("learner")
    if rollouts is not None:
        await rollouts.close()
    ray.kill(landing)
    return figures(size, times.seconds)


def figures(size: int, times: dict[str, list[float]]) -> dict[str, Any]:
    """times: seconds of each repetition, by name; ratios are of medians."""
    middle = {name: spread(values)["median"] for name, values in times.items()}
    steps = ("send",) if "send" in middle else ("gather", "deliver")
    stall, transport = middle[steps[0]], sum(middle[step] for step in steps)
    first = sum(middle[f"first_{step}"] for step in steps)
    found: dict[str, Any] = {
        "bytes": size,
        "seconds": {name: spread(values) for name, values in times.items()},
        "learner_stall_s": stall,
        "transport_gb_per_s": size / transport / 1e9,
        "transport/memcpy": transport / middle["memcpy"],
        "transport/memcpy_fresh": transport / middle["memcpy_fresh"],
        "stall/memcpy_fresh": stall / middle["memcpy_fresh"],
        "transport/memcpy_shared": transport / middle["memcpy_shared"],
        "transport/memcpy_again": transport / middle["memcpy_again"],
        "first/memcpy_fresh": first / middle["memcpy_fresh"],
    }
    if "publish" in middle:
        found |= {
            "publish_gb_per_s": size / middle["publish"] / 1e9,
            "publish/memcpy_fresh": middle["publish"] / middle["memcpy_fresh"],
        }
    return found


def verdict(by_size: dict[str, dict[str, Any]], transport: str = "object store") -> tuple[bool, str]:
    large = {name: one for name, one in by_size.items() if one["bytes"] >= LEAST_MB * 1e6}
    good = bool(large) and all(one["transport/memcpy_fresh"] <= TARGET for one in large.values())
    parts = [
        f"{name}: {one['transport_gb_per_s']:.2f} GB/s, {one['transport/memcpy_fresh']:.1f} x memcpy into fresh memory "
        f"({one['transport/memcpy']:.1f} x warm; the first one {one['first/memcpy_fresh']:.1f} x; the learner stands "
        f"still for {one['stall/memcpy_fresh']:.1f} x)"
        + (f", {one['publish/memcpy_fresh']:.1f} x with vLLM's loading" if "publish/memcpy_fresh" in one else "")
        for name, one in by_size.items()
    ]
    return good, f"{transport}: {'; '.join(parts)}; target {TARGET:.0f} x"


def main() -> int:
    parser = parser_of(__doc__, "weights")
    parser.add_argument("--megabytes", type=int, nargs="+", default=[5, 100, 200, 400], help="default 5 100 200 400")
    parser.add_argument("--repeats", type=int, default=5, help="default 5")
    parser.add_argument("--transport-only", action="store_true", help="no engines: up to the file that vLLM maps")
    transports = [Transport.OBJECT_STORE.value, Transport.IPC.value]  # broadcast needs GPUs
    parser.add_argument("--transport", choices=transports, default=Transport.OBJECT_STORE.value)
    parser.add_argument("--deadline", type=float, default=600.0, help="for the start of an engine, s; default 600")
    arguments = parser.parse_args()
    arguments.transport = Transport(arguments.transport)
    name = arguments.transport.replace("_", " ")
    if arguments.transport is not Transport.OBJECT_STORE and arguments.out == parser.get_default("out"):
        arguments.out = arguments.out.with_stem(f"weights-{arguments.transport}")
    found = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        Cluster.connect(ClusterConfig(object_store_gib=2.0)) as cluster,
        asyncio.Runner() as runner,
    ):
        for megabytes in arguments.megabytes:
            model = model_of(megabytes, Path(folder))
            found[f"{megabytes} MB"] = runner.run(measure(cluster, model, arguments))
    good, line = verdict(found, name)
    return report(arguments, {"transport": name, "sizes": found}, good, line)


if __name__ == "__main__":
    raise SystemExit(main())
