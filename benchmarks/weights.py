"""Seconds and bytes per second of a publish through the object store, beside a memcpy of the same bytes.

    python -m benchmarks.weights                  # a few minutes on two cores; --transport-only: a minute, no engines

For each size a random Qwen2.5-VL of about so many MB (float32), a learner of one rank that holds it, and a vLLM engine
that plays it. A publish is

    gather    learner's parameters -> object store; the learner stands still for so long
    deliver   object store -> a file in shared memory that vLLM's worker maps; generation goes on
    load      vLLM's own life cycle: layer by layer out of the file, packed as its CPU kernels want them; caches cleared

Compared with a copy of the same bytes from one warm array into another (``memcpy``) and into fresh memory
(``memcpy_fresh``: every page has to be given by the kernel, which is what every receiver pays), all taking turns.
Target: gather + deliver, which is what the transport does, at most 3 x memcpy into fresh memory, for each size of at
least 100 MB. What vLLM takes after that is shown beside it.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray

from actors.rollout_pool import RolloutPool
from actors.rollout_worker import RolloutConfig
from benchmarks.reporting import parser_of, report, spread
from cluster.buckets import Bucket, SharedFile
from cluster.engine import EngineConfig
from cluster.placement import Cluster, ClusterConfig
from cluster.weights import WeightChannel
from episodes.coarse_to_fine import EpisodeConfig
from learners.config import LearnerConfig
from learners.learner_group import LearnerGroup

TARGET, LEAST_MB = 3.0, 100
TOKENIZER = "models/panels-policy"


class Landing:
    """Where weights arrive: as a rollout worker, up to the file that vLLM maps."""

    async def land(self, *buckets: Bucket) -> float:
        """Seconds."""
        started = time.perf_counter()
        files = [SharedFile(bucket) for bucket in buckets]
        seconds = time.perf_counter() - started
        for file in files:
            file.close()
        return seconds


def model_of(megabytes: int, folder: Path) -> Path:
    """A random model of about so many MB in float32, with the tokenizer of the panels policy."""
    from transformers import AutoTokenizer

    from learners.tiny import TinyConfig, make_model, make_processor, save_folder

    tokenizer: Any = AutoTokenizer.from_pretrained(TOKENIZER)
    layers = 8
    hidden = 128 * max(1, round((megabytes * 1e6 / 4 / layers / 15) ** 0.5 / 128))  # a layer: 3 h^2 + 3 h (4 h)
    shape = TinyConfig(hidden=hidden, layers=layers, heads=max(4, hidden // 64), intermediate=4 * hidden)
    save_folder(make_model(tokenizer, shape, seed=0), make_processor(tokenizer), folder / f"{megabytes}mb")
    return folder / f"{megabytes}mb"


def memcpy(size: int, repeats: int) -> tuple[list[float], list[float]]:
    """Seconds to copy so many bytes: into warm memory, and into fresh memory."""
    source, target = np.ones(size, np.uint8), np.zeros(size, np.uint8)
    warm, fresh = [], []
    for _ in range(repeats):
        started = time.perf_counter()
        np.copyto(target, source)
        warm.append(time.perf_counter() - started)
        started = time.perf_counter()
        source.copy()
        fresh.append(time.perf_counter() - started)
    return warm, fresh


async def measure(cluster: Cluster, model: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything of one size; what is compared takes turns."""
    learners = await LearnerGroup.launch(cluster, LearnerConfig(model=str(model), threads=1))
    landing = ray.remote(Landing).options(num_cpus=0).remote()
    rollouts = None
    if not arguments.transport_only:
        engine = EngineConfig(model=str(model), dtype="float32", max_model_len=512, max_num_seqs=8)
        rollouts = RolloutPool.launch(cluster, RolloutConfig(engine=engine), EpisodeConfig())
        await rollouts.ready(arguments.deadline)
    times: dict[str, list[float]] = {}

    def note(**seconds: float) -> None:
        for name, value in seconds.items():
            times.setdefault(name, []).append(value)

    size = await _bytes(await learners.weights())
    for version in range(1, arguments.repeats + 1):
        warm, fresh = await asyncio.to_thread(memcpy, size, 3)
        note(memcpy=min(warm), memcpy_fresh=min(fresh))
        started = time.perf_counter()
        buckets = await learners.weights()
        gathered = time.perf_counter()
        await landing.land.remote(*buckets)
        note(gather=gathered - started, deliver=time.perf_counter() - gathered)
        del buckets
        if rollouts is not None:
            done = await WeightChannel(learners, rollouts).publish(version)
            assert done.load_s is not None, "waited for"
            note(publish=done.gather_s + done.load_s)
    await learners.close()
    cluster.give_back("learner")
    if rollouts is not None:
        await rollouts.close()
    ray.kill(landing)
    return figures(size, times)


def figures(size: int, times: dict[str, list[float]]) -> dict[str, Any]:
    """times: seconds of each repetition, by name; ratios are of medians."""
    middle = {name: spread(values)["median"] for name, values in times.items()}
    transport = middle["gather"] + middle["deliver"]
    found: dict[str, Any] = {
        "bytes": size,
        "seconds": {name: spread(values) for name, values in times.items()},
        "learner_stall_s": middle["gather"],
        "transport_gb_per_s": size / transport / 1e9,
        "transport/memcpy": transport / middle["memcpy"],
        "transport/memcpy_fresh": transport / middle["memcpy_fresh"],
    }
    if "publish" in middle:
        found |= {
            "publish_gb_per_s": size / middle["publish"] / 1e9,
            "publish/memcpy_fresh": middle["publish"] / middle["memcpy_fresh"],
        }
    return found


def verdict(by_size: dict[str, dict[str, Any]]) -> tuple[bool, str]:
    large = {name: one for name, one in by_size.items() if one["bytes"] >= LEAST_MB * 1e6}
    good = bool(large) and all(one["transport/memcpy_fresh"] <= TARGET for one in large.values())
    parts = [
        f"{name}: {one['transport_gb_per_s']:.2f} GB/s, {one['transport/memcpy_fresh']:.1f} x memcpy into fresh memory "
        f"({one['transport/memcpy']:.1f} x warm)"
        + (f", {one['publish/memcpy_fresh']:.1f} x with vLLM's loading" if "publish/memcpy_fresh" in one else "")
        for name, one in by_size.items()
    ]
    return good, f"object store: {'; '.join(parts)}; target {TARGET:.0f} x"


async def _bytes(buckets: Sequence[ray.ObjectRef]) -> int:
    return sum([part.nbytes for bucket in buckets for part in await bucket])


def main() -> int:
    parser = parser_of(__doc__, "weights")
    parser.add_argument("--megabytes", type=int, nargs="+", default=[5, 100, 200, 400], help="default 5 100 200 400")
    parser.add_argument("--repeats", type=int, default=5, help="default 5")
    parser.add_argument("--transport-only", action="store_true", help="no engines: up to the file that vLLM maps")
    parser.add_argument("--deadline", type=float, default=600.0, help="for the start of an engine, s; default 600")
    arguments = parser.parse_args()
    found = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        Cluster.connect(ClusterConfig(object_store_gib=2.0)) as cluster,
        asyncio.Runner() as runner,
    ):
        for megabytes in arguments.megabytes:
            model = model_of(megabytes, Path(folder))
            found[f"{megabytes} MB"] = runner.run(measure(cluster, model, arguments))
    good, line = verdict(found)
    return report(arguments, {"transport": "object store", "sizes": found}, good, line)


if __name__ == "__main__":
    raise SystemExit(main())
