"""The job script that ``ergo-rl submit --dry-run`` prints, under a real Slurm, with a light driver that obeys signals
as a run does. KubeRay's line of shell is in ``test_cluster``, beside a real job server."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from ergo_rl.jobs.config import load_config
from ergo_rl.jobs.submission import ManifestOptions
from ergo_rl.jobs.submission import slurm as slurm_script
from tests.conftest import ROOT
from tests.system.background import Background
from tests.system.slurm import NoSlurm, slurm

pytestmark = pytest.mark.system
PANELS = ROOT / "configs" / "panels.yaml"
ENVIRONMENT = ("RAY_AUTH_MODE", "PLAIN", "KEY")
RAY = f"""#!{sys.executable}
# In the place of Ray: says what environment its step has, and lives until it is killed; TERM ends it.
import os, sys, time
from pathlib import Path
if sys.argv[1] == "start":
    token = Path(os.environ["RAY_AUTH_TOKEN_PATH"]).read_text()
    Path("step").write_text(" ".join([*(os.environ.get(name, "UNSET") for name in {ENVIRONMENT}), str(len(token))]))
    while True:
        Path("beat").write_text("")
        time.sleep(0.2)
sys.exit(not Path("step").exists())
"""
DRIVER = """
import asyncio, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from ergo_rl.jobs.console_display import ConsoleDisplay
from ergo_rl.jobs.shutdown import GracefulShutdown, Stopped
async def main():
    with ConsoleDisplay("x", 1, Path()) as console, GracefulShutdown.on_signals(console) as shutdown:
        Path("up").write_text("")
        try:
            await shutdown.run_or_stop(asyncio.sleep(float(sys.argv[1])))
        except Stopped as stopped:
            await asyncio.sleep(2.5)
            beat = time.time() - Path("beat").stat().st_mtime
            Path("saved").write_text("with Ray" if beat < 1 else f"Ray is gone for {beat} s")
            sys.exit(stopped.exit_status)
asyncio.run(main())
"""


@dataclass
class Jobs:
    """Job scripts in a Slurm."""

    folder: Path
    environment: dict[str, str]

    def call(self, *command: str) -> str:
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=30
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def submit(self, name: str, seconds: float, limit: str) -> tuple[str, Path]:
        """Returns the job's number and its folder."""
        home = self.folder / name
        home.mkdir()
        (home / "driver.py").write_text(DRIVER)
        options = ManifestOptions(secrets=("KEY",), time=limit, checkout=str(home), environment=(("PLAIN", "b"),))
        config = load_config(PANELS, [f"name={name}", f"runs_dir={home}"])
        hardware = config.hardware
        hardware.nodes, hardware.gpus_per_node, hardware.cpus_per_node, hardware.memory_gib_per_node = 1, 0, 2, 1
        (home / "job.sh").write_text(slurm_script(config, f"python driver.py {seconds} {ROOT}", options))
        number = self.call("sbatch", "--parsable", f"--output={home}/out", str(home / "job.sh")).strip()
        return number, home

    def state(self, number: str) -> dict[str, str]:
        words = self.call("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.partition("=")[::2] for word in words)

    def wait(self, number: str, home: Path, happened: Callable[[dict[str, str]], bool], timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not happened(state := self.state(number)):
            if time.monotonic() > deadline:
                pytest.fail(f"{state}\n{(home / 'out').read_text() if (home / 'out').exists() else 'no output'}")
            time.sleep(0.2)


def story(folder: Path) -> None:
    """Jobs that end, are cancelled, and reach their limit, in one Slurm. Raises NoSlurm where there is none."""
    (folder / "tools").mkdir()
    (folder / "tools" / "ray").write_text(RAY)
    (folder / "tools" / "ray").chmod(0o755)
    with slurm(folder / "slurm") as environment:
        path = f"{folder / 'tools'}:{Path(sys.executable).parent}:{environment['PATH']}"
        jobs = Jobs(folder, {**environment, "PATH": path, "KEY": "sk-secret", "PYTHONPATH": str(ROOT)})
        ends_completed_and_ray_has_token_and_settings(jobs)
        scancel_saves_with_ray_alive_and_the_job_is_gone(jobs)
        limit_saves_and_the_job_is_queued_again(jobs)


def test_slurm_jobs_end_are_cancelled_and_come_back_at_their_limit(background: Background) -> None:
    try:
        background.result(__name__)
    except NoSlurm as reason:
        pytest.skip(f"no Slurm: {reason}")


def ends_completed_and_ray_has_token_and_settings(jobs: Jobs) -> None:
    number, home = jobs.submit("whole", 1, "1:00:00")
    jobs.wait(number, home, lambda job: job["JobState"] == "COMPLETED", 30)
    assert (home / "step").read_text() == "token b sk-secret 64", "they reach srun's step, in spite of --export"
    assert not list((home / "runs").iterdir()), "the token is gone"


def scancel_saves_with_ray_alive_and_the_job_is_gone(jobs: Jobs) -> None:
    number, home = jobs.submit("cancelled", 600, "1:00:00")
    jobs.wait(number, home, lambda _: (home / "up").exists(), 30)
    jobs.call("scancel", number)
    jobs.wait(number, home, lambda job: job["JobState"] == "CANCELLED" and (home / "saved").exists(), 20)
    assert (home / "saved").read_text() == "with Ray"
    deadline = time.monotonic() + 10
    while jobs.call("squeue", "--noheader", f"--jobs={number}").strip() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert jobs.state(number)["Restarts"] == "0" and not jobs.call("squeue", "--noheader").strip()


def limit_saves_and_the_job_is_queued_again(jobs: Jobs) -> None:
    """Once it is up its limit is made ten minutes: the time before the limit at which Slurm warns."""
    number, home = jobs.submit("limited", 600, "1:00:00")
    jobs.wait(number, home, lambda _: (home / "up").exists(), 30)
    jobs.call("scontrol", "update", f"jobid={number}", "timelimit=10:00")
    jobs.wait(number, home, lambda job: (job["Restarts"], job["JobState"]) == ("1", "PENDING"), 60)
    assert (home / "saved").read_text() == "with Ray"
    jobs.call("scancel", number)
