"""Main memory of a run on large images: of every process, over the steps; and what an image and a trajectory cost.

    python -m benchmarks.host_memory                    # 100 steps, five minutes on two cores
    python -m benchmarks.host_memory --steps 20 --figure build/host_memory.png

The run is ``ergo-rl train`` on the panels recipe with tiny models and real sizes of everything else: 3840 x 2160 and
7680 x 4320 JPEGs, views of ``--tokens`` visual tokens, so that rollout workers, object store and learner carry what
they would carry for a large model. Memory is the kernel's proportional set size (PSS): what processes share, the object
store above all, counts once.

``rise`` is the slope of a straight line through the second half of the steps, with its 95 % interval, when caches have
filled: MiB for each 100 steps. Target: less than 2 % of all the memory. ``in_flight`` is what 1,000 trajectories that
wait or are being played add, from the sizes of their parts; a rollout worker decodes only as many images as give twice
the sequences that its engine decodes at once.
"""

from __future__ import annotations

import argparse
import io
import math
import pickle
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.lives import Life, descendants, lines_of, living
from benchmarks.reporting import parser_of, report, spread
from ergo_rl.episodes import images
from ergo_rl.episodes.families import family_of
from ergo_rl.episodes.types import Box, BoxOutcome, Finish, Outcome, Question, Trajectory, Turn, View
from ergo_rl.jobs.config import load_config
from ergo_rl.questions.dataset import write_questions

SIZES = {"4K": (3840, 2160), "8K": (7680, 4320)}
MIB = 2**20
TARGET = 0.02
ROLES = {
    "RolloutWorker": "rollout worker", "RewardWorker": "reward worker", "LearnerRank": "learner",
    "EngineCore": "engines", "spawn_main": "engines", "raylet/raylet": "raylet, with the object store",
}  # fmt: skip
"""Part of a command -> whose it is; the driver is the process itself, the rest is Ray's."""
Sample = dict[str, float]
"""MiB by role."""


# --- pictures --------------------------------------------------------------------------------------------------------


def picture(seed: int, width: int, height: int) -> bytes:
    """A JPEG of soft shapes and a little grain, which has about the bytes of a photograph of this size."""
    draw = np.random.default_rng(seed)
    shapes = Image.fromarray(draw.integers(0, 256, (height // 60, width // 60, 3), dtype=np.uint8))
    pixels = np.asarray(shapes.resize((width, height), Image.Resampling.BICUBIC))
    grain = np.tile(draw.integers(0, 12, (256, 256, 1), dtype=np.uint8), (height // 256 + 1, width // 256 + 1, 1))
    buffer = io.BytesIO()
    Image.fromarray((pixels // 2 + grain[:height, :width] + 60).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def questions(count: int) -> Iterator[Question]:
    """``count`` questions, 4K and 8K in turn, each with a picture of its own."""
    for number in range(count):
        width, height = list(SIZES.values())[number % len(SIZES)]
        target = (Box(width // 4, height // 4, width // 2, height // 2),)
        yield Question(
            f"picture-{number}", picture(number, width, height), "Which mark is on the red panel?", "ring", (), target
        )


# --- what one image and one trajectory cost --------------------------------------------------------------------------


def costs(model: str, tokens: int, group: int, reply: int, repeats: int) -> dict[str, Any]:
    """Seconds and bytes by size of the image; ``trajectory`` is as Ray stores it, the coarse view once per group."""
    family, found = family_of(model), dict[str, Any]()
    for name, (width, height) in SIZES.items():
        seconds: dict[str, list[float]] = defaultdict(list)
        encoded = picture(0, width, height)
        half = Box(width // 8, height // 8, width // 2, height // 2)
        for _ in range(repeats):
            pixels = timed(seconds["decode_s"], images.decode, encoded)
            coarse = timed(seconds["coarse_view_s"], images.view, pixels, images.full_box(pixels), family, tokens)
            fine = timed(seconds["crop_view_s"], images.view, pixels, half, family, tokens)
        turns = tuple(turn(reply) for _ in range(2))
        crops = [View(fine.box, fine.pixels.copy()) for _ in range(group)]
        played = [
            Trajectory(name, sample, (coarse, crop), turns, Outcome.ANSWERED, BoxOutcome.OK)
            for sample, crop in enumerate(crops)
        ]
        found[name] = {kind: spread(values) for kind, values in seconds.items()} | {
            "image_bytes": len(encoded),
            "decoded_bytes": pixels.nbytes,
            "trajectory_bytes": len(pickle.dumps(tuple(played), protocol=5)) / group,
        }
    return found


def timed(seconds: list[float], work: Any, *arguments: Any) -> Any:
    started = time.perf_counter()
    done = work(*arguments)
    seconds.append(time.perf_counter() - started)
    return done


def turn(reply: int) -> Turn:
    ids = np.zeros(reply, np.int32)
    return Turn(ids, ids, np.zeros(reply, np.float32), "x" * reply, Finish.STOP, 64 + reply, 0)


def in_flight(cost: Mapping[str, Any], group: int, sequences: int, trajectories: int = 1000) -> dict[str, float]:
    """GiB for so many trajectories of one size of image: stored ones, the encoded images of their questions, and the
    decoded images of one worker, of which it holds no more however many wait."""
    open_images = min(math.ceil(trajectories / group), math.ceil(2 * sequences / group))
    parts = {
        "stored_gib": trajectories * cost["trajectory_bytes"],
        "encoded_gib": trajectories / group * cost["image_bytes"],
        "decoded_a_worker_gib": open_images * cost["decoded_bytes"],
    }
    return {name: size / 2**30 for name, size in parts.items()}


# --- memory over time ------------------------------------------------------------------------------------------------


def role_of(command: str) -> str:
    return next((role for part, role in ROLES.items() if part in command), "other processes of Ray")


def memory(root: int) -> Sample:
    """PSS of all processes of a run, MiB by role."""
    found: Sample = defaultdict(float)
    for pid, role in [(root, "driver"), *((pid, role_of(command)) for pid, command in descendants(root))]:
        with suppress(OSError, ValueError):  # it has ended
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
            found[role] += int(rollup.partition("\nPss:")[2].split()[0]) / 1024
    return dict(found)


def watch(life: Life, steps: int, every_s: float, timeout_s: float) -> list[tuple[int, Sample]]:
    """(steps done, memory), until all steps are done. Raises LifeFailed."""
    seen: list[tuple[int, Sample]] = []
    started = time.monotonic()
    while (done := len(life.steps())) < steps:
        if life.process.poll() is not None or time.monotonic() - started > timeout_s:
            life.fail(f"the run did not reach step {steps}: {done}")
        if done:
            seen.append((done, memory(life.process.pid)))
        time.sleep(every_s)
    return seen


def rise(points: Sequence[tuple[int, float]]) -> dict[str, float]:
    """Slope of the straight line through (step, MiB), per 100 steps, with its 95 % interval. Neighbouring samples are
    alike, so samples of one step count as one."""
    by_step: dict[int, list[float]] = defaultdict(list)
    for step, value in points:
        by_step[step].append(value)
    x, y = list(by_step), [statistics.fmean(values) for values in by_step.values()]
    slope, start = statistics.linear_regression(x, y)
    errors = [value - (start + slope * step) for step, value in zip(x, y, strict=True)]
    spread_x = sum((step - statistics.fmean(x)) ** 2 for step in x)
    half = 1.96 * math.sqrt(sum(error**2 for error in errors) / max(1, len(x) - 2) / spread_x)
    return {"per_100_steps": 100 * slope, "low": 100 * (slope - half), "high": 100 * (slope + half)}


def figures(seen: Sequence[tuple[int, Sample]]) -> dict[str, Any]:
    """By role and for all together: MiB at first, at last and at most, and the rise over the second half."""
    roles = sorted({role for _, sample in seen for role in sample})
    lines = {role: [(step, sample.get(role, 0.0)) for step, sample in seen] for role in roles}
    lines["all"] = [(step, sum(sample.values())) for step, sample in seen]
    late = seen[len(seen) // 2][0]
    return {
        role: {
            "first": points[0][1], "last": points[-1][1], "most": max(value for _, value in points),
            "rise": rise([(step, value) for step, value in points if step >= late]),
        }
        for role, points in lines.items()
    }  # fmt: skip


def plot(seen: Sequence[tuple[int, Sample]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    roles = sorted({role for _, sample in seen for role in sample}, key=lambda role: seen[-1][1].get(role, 0.0))
    values = [[sample.get(role, 0.0) / 1024 for _, sample in seen] for role in reversed(roles)]
    axes.stackplot([step for step, _ in seen], values, labels=list(reversed(roles)), alpha=0.85)
    axes.set(xlabel="step", ylabel="GiB (PSS)", xlim=(1, None))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


# --- the run ---------------------------------------------------------------------------------------------------------


def overrides(folder: Path, arguments: argparse.Namespace) -> list[str]:
    longest = 2 * arguments.tokens + 512
    engine = {"max_model_len": longest, "extra.mm_processor_cache_gb": arguments.cache_gib}
    settings: dict[str, Any] = {
        "name": "run", "runs_dir": folder, "questions.paths": f"[{folder / 'questions.parquet'}]",
        "embedded.panels": "null", "evaluation.paths": "[]", "samples_every": 0, "total_steps": arguments.steps + 1,
        "groups_per_step": arguments.groups, "rollout.group_size": arguments.group, "weight_check.every": 100_000,
        "checkpoint.every": 0, "episode.coarse_tokens": arguments.tokens, "episode.fine_tokens": arguments.tokens,
        "episode.on_bad_box": "WHOLE_IMAGE", "rollout.sampling.coarse_max_tokens": arguments.reply,
        "rollout.sampling.fine_max_tokens": arguments.reply, "cluster.object_store_gib": 1.0,
    }  # fmt: skip
    for key, value in engine.items():
        settings[f"rollout.engine.{key}"] = settings[f"reward.verifier.engine.{key}"] = value
    return [f"{key}={value}" for key, value in settings.items()]


def main() -> int:
    parser = parser_of(__doc__, "host_memory")
    parser.add_argument("--steps", type=int, default=100, help="default %(default)s")
    parser.add_argument("--groups", type=int, default=2, help="questions of a step; default %(default)s")
    parser.add_argument("--group", type=int, default=4, help="trajectories of a question; default %(default)s")
    parser.add_argument("--tokens", type=int, default=256, help="visual tokens of a view; default %(default)s")
    parser.add_argument("--reply", type=int, default=24, help="tokens of a turn, at most; default %(default)s")
    parser.add_argument("--pictures", type=int, default=24, help="different ones; default %(default)s")
    parser.add_argument(
        "--cache-gib", type=float, default=0.25,
        help="vLLM's cache of processed images (mm_processor_cache_gb; its own default is 4), which fills and then "
        "stays; default %(default)s",
    )  # fmt: skip
    parser.add_argument("--every", type=float, default=1.0, help="seconds between two samples; default %(default)s")
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds; default %(default)s")
    parser.add_argument("--figure", type=Path, help="also draw memory over steps")
    arguments = parser.parse_args()
    config = load_config(Path("configs/panels.yaml"))
    cost = costs(config.rollout.engine.model, arguments.tokens, arguments.group, arguments.reply, repeats=3)
    with tempfile.TemporaryDirectory(prefix="ergo-rl-host-memory-") as name:
        folder = Path(name)
        write_questions(folder / "questions.parquet", questions(arguments.pictures), rows_per_group=1)
        with living(overrides(folder, arguments), folder / "log") as life:
            seen = watch(life, arguments.steps, arguments.every, arguments.timeout)
            steps = lines_of(life.run / "metrics.jsonl")
    by_role = figures(seen)
    if arguments.figure:
        plot(seen, arguments.figure)
    sequences = config.rollout.engine.max_num_seqs
    flights = {name: in_flight(one, arguments.group, sequences) for name, one in cost.items()}
    found = {
        "mib": by_role, "costs": cost, "in_flight_1000": flights, "steps": len(steps),
        "step_s": spread([step["time/step_s"] for step in steps]),
        "trajectories": sum(step["rollout/trajectories"] for step in steps),
        "over_steps": [{"step": step, **sample} for step, sample in seen],
    }  # fmt: skip
    whole, largest = by_role["all"], flights["8K"]
    slope = whole["rise"]
    line = (
        f"{whole['last'] / 1024:.2f} GiB after {len(steps)} steps with {' and '.join(SIZES)} images; over the second "
        f"half {slope['per_100_steps']:+.0f} MiB per 100 steps ({slope['low']:+.0f} to {slope['high']:+.0f}; target "
        f"below {TARGET:.0%}); 1,000 trajectories of 8K images: {largest['stored_gib']:.2f} GiB stored, "
        f"{largest['encoded_gib']:.2f} of images, {largest['decoded_a_worker_gib']:.2f} decoded in each rollout worker"
    )
    return report(arguments, found, slope["per_100_steps"] < TARGET * whole["last"], line)


if __name__ == "__main__":
    raise SystemExit(main())
