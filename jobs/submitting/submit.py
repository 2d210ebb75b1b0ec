"""``ergo-rl submit``: a run as a Ray job over HTTP; its logs, status and end; the same for KubeRay and Slurm as text.

A job's run goes on where the last one of its name stopped, because ``ergo-rl train`` does (``resume: auto``): so the
run's folder must outlive the job. Ray keeps what a job is sent, environment variables too, in a table that everybody
who reaches the cluster can read; so no secret is ever sent (``jobs.submitting.manifests`` says how clusters get them).
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import re
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ergo_rl.jobs.commands import add_recipe, recipe_of
from ergo_rl.jobs.config import ConfigError, TrainConfig, load_config
from ergo_rl.jobs.submitting.manifests import SAVE_S, Extras, kuberay, slurm
from ergo_rl.rewards.config import Backend

ROOT = Path(__file__).resolve().parents[2]
EXCLUDES = [
    "/.git", "/.venv", "/.gpu", "/runs", "/data", "/build", "/dist", "/docs", "/tests", "/benchmarks", "/models/.*",
    "__pycache__", ".*_cache", ".hypothesis", "*.egg-info", "*.parquet", ".env", ".env.*",
]  # fmt: skip
"""What stays here when the working directory travels (Ray leaves out what .gitignore names, too)."""
HEAD = {"node:__internal_head__": 0.001}
"""Ray's name for the head: the driver lands there, and needs no GPU and hardly any CPU."""
RUN = "ergo_rl_run"
"""In a job's metadata: the name of its run."""
_SECRET = re.compile(r"key|token|secret|passw|credential", re.IGNORECASE)


class SubmitError(RuntimeError):
    """The job cannot be submitted, followed or stopped; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Job:
    """What is submitted. recipe: relative to ``working_dir``; requirements: installed on each node first;
    environment: plain settings, never secrets."""

    config: TrainConfig
    recipe: Path
    overrides: tuple[str, ...]
    working_dir: Path
    requirements: Path | None = None
    environment: tuple[tuple[str, str], ...] = ()

    @property
    def entrypoint(self) -> str:
        return shlex.join(["python", "-m", "ergo_rl.jobs", "train", self.recipe.as_posix(), *self.overrides])

    def runtime_env(self) -> dict[str, Any]:
        variables = {"RAY_JOB_STOP_WAIT_TIME_S": str(SAVE_S), "PYTHONUNBUFFERED": "1", **dict(self.environment)}
        found: dict[str, Any] = {"working_dir": str(self.working_dir), "excludes": EXCLUDES, "env_vars": variables}
        if self.requirements is not None:
            lines = [line.partition("#")[0].strip() for line in self.requirements.read_text().splitlines()]
            found["pip"] = {"packages": [line for line in lines if line], "pip_check": False}
        return found


def make_job(
    recipe: Path, overrides: Sequence[str], working_dir: Path, requirements: Path | None, environment: Sequence[str]
) -> Job:
    """Raises ConfigError for a recipe that is wrong, or that could not work as a job."""
    config = load_config(recipe, overrides)
    home = working_dir.resolve()
    if not recipe.resolve().is_relative_to(home):
        raise ConfigError(f"{recipe} is not below {home}, which is what the job gets: copy it there, or --working-dir")
    if not (home / "jobs" / "train.py").is_file():
        raise ConfigError(f"{home} is no checkout of ergo-rl: --working-dir names one")
    pairs = [one.partition("=") for one in environment]
    for name, equals, _ in pairs:
        if not equals or not name:
            raise ConfigError(f"--env {name}: write NAME=VALUE")
        if _SECRET.search(name):
            raise ConfigError(
                f"--env {name} looks like a secret. Ray shows a job's environment to whoever reaches the cluster; "
                "set it where the nodes are started instead (docs/cluster.md)"
            )
    check_paths(config)
    relative = recipe.resolve().relative_to(home)
    return Job(config, relative, tuple(overrides), home, requirements, tuple((name, value) for name, _, value in pairs))


def check_paths(config: TrainConfig) -> None:
    """A job's working directory is a copy that ends with it: what stays, and what is large, must be elsewhere."""
    if not Path(config.runs_dir).is_absolute() and not config.checkpoint.url:
        raise ConfigError(
            f"runs_dir is {config.runs_dir!r}: relative to a copy of the working directory that is thrown away with "
            "the job. Give runs_dir=/a/disk/that/stays, or checkpoint.url=s3://... (or any fsspec URL)"
        )
    made = config.embedded.panels
    for key, paths in (("questions.paths", config.questions.paths), ("evaluation.paths", config.evaluation.paths)):
        for path in paths:
            if not Path(path).is_absolute() and not (made and Path(path).is_relative_to(made)):
                raise ConfigError(
                    f"{key}: {path!r} does not travel with the job; give its absolute path on the cluster"
                )


def needed_secrets(config: TrainConfig) -> list[str]:
    """Variables that the run reads keys from."""
    verifier = config.reward.verifier
    name = verifier.endpoint.api_key_env if verifier.backend is Backend.ENDPOINT else ""
    return [name] if name else []


# --- over HTTP -------------------------------------------------------------------------------------------------------


class Jobs:
    """The jobs of one cluster, by the names of their runs: submissions NAME-1, NAME-2, ..."""

    def __init__(self, address: str) -> None:
        from ray.job_submission import JobSubmissionClient

        try:
            self._client: Any = JobSubmissionClient(address)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise SubmitError(
                f"no job server answers at {address}: {str(error).splitlines()[0]}. It is the dashboard's address, "
                "http://HEAD:8265; a cluster with a token needs RAY_AUTH_MODE=token and the token in this environment"
            ) from error
        self.address = address

    def submissions(self, name: str) -> list[Any]:
        """Of this run, in the order of their beginnings."""
        mine = [one for one in self._client.list_jobs() if (one.metadata or {}).get(RUN) == name]
        return sorted(mine, key=lambda one: one.start_time or 0)

    def last(self, name: str) -> Any:
        """Raises SubmitError where there is none."""
        if not (found := self.submissions(name)):
            raise SubmitError(f"{self.address} knows no job of a run {name!r}")
        return found[-1]

    def submit(self, job: Job, resources: dict[str, float], cpus: float) -> str:
        """Returns the submission's id. Raises SubmitError while a job of this name is going on."""
        earlier = self.submissions(job.config.name)
        if earlier and not (one := earlier[-1]).status.is_terminal():
            how = "--logs follows it, --stop ends it; or give another name"
            raise SubmitError(f"{one.submission_id} is {one.status.value.lower()}: {how}")
        taken = {one.submission_id for one in self._client.list_jobs()}
        free = (f"{job.config.name}-{number}" for number in itertools.count(len(earlier) + 1))
        submission: str = self._client.submit_job(
            entrypoint=job.entrypoint,
            submission_id=next(one for one in free if one not in taken),
            runtime_env=job.runtime_env(),
            metadata={RUN: job.config.name},
            entrypoint_num_cpus=cpus,
            entrypoint_resources=resources,
        )
        return submission

    async def follow(self, submission: str) -> None:
        """Print the job's output until it ends; a connection that breaks is made again, and nothing printed twice."""
        printed = 0
        while True:
            seen = 0
            try:
                async for text in self._client.tail_job_logs(submission):
                    seen += len(text)
                    if seen > printed:
                        print(text[-(seen - printed) :], end="", flush=True)
                        printed = seen
            except RuntimeError as error:
                print(f"ergo-rl submit: {error}; following again", file=sys.stderr)
            if self._client.get_job_status(submission).is_terminal():
                return
            await asyncio.sleep(1)

    def status(self, submission: str) -> Any:
        return self._client.get_job_info(submission)

    def stop(self, submission: str) -> None:
        """And wait until it has saved and ended."""
        self._client.stop_job(submission)
        deadline = time.monotonic() + SAVE_S + 30
        while not self._client.get_job_status(submission).is_terminal():
            if time.monotonic() > deadline:
                raise SubmitError(f"{submission} has not ended within {SAVE_S + 30} s")
            time.sleep(0.5)


def _report(info: Any) -> int:
    print(f"{info.submission_id}: {info.status.value}{f' ({info.message})' if info.message else ''}")
    return 0 if info.status.value == "SUCCEEDED" else 1


def _submit(options: argparse.Namespace, job: Job) -> int:
    jobs = Jobs(options.address)
    for name in needed_secrets(job.config):
        print(f"The run reads a key from {name}: the nodes of the cluster must have it in their environment.")
    resources = {name: float(amount) for name, _, amount in (one.partition("=") for one in options.driver_on)} or HEAD
    submission = jobs.submit(job, resources, options.driver_cpus)
    where = f"--address {options.address}"
    print(f"Submitted {submission}. ergo-rl submit {where} --logs|--status|--stop {job.config.name}", flush=True)
    if options.detach:
        return 0
    return _follow(jobs, submission)


def _follow(jobs: Jobs, submission: str) -> int:
    try:
        asyncio.run(jobs.follow(submission))
    except KeyboardInterrupt:
        print(f"\nNot following any more; {submission} goes on.", file=sys.stderr)
        return 130
    return _report(jobs.status(submission))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="ergo-rl submit",
        description="Run a recipe as a job of a Ray cluster, over HTTP: this checkout travels with it, its logs are "
        "followed. Submitting the same name again goes on where the last job stopped.",
        epilog="example: ergo-rl submit configs/ergo-7b.yaml runs_dir=/shared/runs --address http://head:8265",
    )
    add_recipe(parser)
    parser.add_argument("--address", default="http://127.0.0.1:8265", help="the job server (default: %(default)s)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--logs", metavar="NAME", help="follow the last job of this run")
    what.add_argument("--status", metavar="NAME", help="print how the last job of this run stands")
    what.add_argument("--stop", metavar="NAME", help="stop the last job of this run: it finishes its step and saves")
    what.add_argument("--dry-run", choices=["kuberay", "slurm"], help="print a RayJob or a Slurm script instead")
    parser.add_argument("--detach", action="store_true", help="do not follow the logs")
    parser.add_argument("--working-dir", type=Path, default=ROOT, help="what travels (default: this checkout)")
    parser.add_argument("--requirements", type=Path, help="packages to install first (constraints/gpu.txt)")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="a setting; never a secret")
    parser.add_argument(
        "--driver-on", action="append", default=[], metavar="RESOURCE=AMOUNT",
        help="custom resource of the node that the driver should land on (default: the head)",
    )  # fmt: skip
    parser.add_argument(
        "--driver-cpus", type=float, default=0, help="CPUs reserved for the driver (default: %(default)s)"
    )
    parser.add_argument("--image", default="ergo-rl:latest", help="kuberay: image with this repository at /ergo-rl")
    parser.add_argument("--claim", default="", metavar="PVC", help="kuberay: volume claim that is mounted at runs_dir")
    parser.add_argument(
        "--secret", action="append", default=[], metavar="NAME",
        help="dry runs: variable that the cluster's processes get, from a Kubernetes secret or from your shell",
    )  # fmt: skip
    parser.add_argument("--time", default="24:00:00", help="slurm: time limit (default: %(default)s)")
    options = parser.parse_intermixed_args(argv)
    try:
        if name := options.logs or options.status or options.stop:
            jobs = Jobs(options.address)
            submission = jobs.last(name).submission_id
            if options.logs:
                return _follow(jobs, submission)
            if options.stop:
                jobs.stop(submission)
            _report(jobs.status(submission))
            return 0
        job = make_job(*recipe_of(options), options.working_dir, options.requirements, options.env)
        if options.dry_run is None:
            return _submit(options, job)
        secrets = tuple(dict.fromkeys([*needed_secrets(job.config), *options.secret]))
        extras = Extras(options.image, options.claim, secrets, options.time, str(job.working_dir), job.environment)
        text = {"kuberay": kuberay, "slurm": slurm}[options.dry_run](job.config, job.entrypoint, extras)
        print(text, end="")
    except (ConfigError, SubmitError, OSError, ValueError) as error:
        print(f"ergo-rl submit: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
