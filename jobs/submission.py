"""Submit a run as a Ray job over HTTP and follow it; or render it as a KubeRay ``RayJob`` or a Slurm script.

A job resumes where the last one of its name stopped, because ``ergo-rl train`` does (``resume: auto``): so the run's
folder must outlive the job. Secrets are named, never sent: Ray keeps what a job is sent, environment variables too, in
a table that everybody who reaches the cluster can read. Kubernetes puts secrets into the pods from a Secret, Slurm
takes them from the shell that calls sbatch.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

from ergo_rl.errors import ErgoError
from ergo_rl.jobs.config import ConfigError, TrainConfig, load_config
from ergo_rl.rewards.config import Backend

ROOT = Path(__file__).resolve().parents[1]
"""The checkout that this program runs from; inside site-packages where it was installed from a wheel."""
EXCLUDES = [
    "/.git", "/.venv", "/.gpu", "/runs", "/data", "/build", "/dist", "/docs", "/tests", "/benchmarks", "/models/.*",
    "__pycache__", ".*_cache", ".hypothesis", "*.egg-info", "*.parquet", ".env", ".env.*",
]  # fmt: skip
"""What of the working directory is not sent (Ray leaves out what .gitignore names, too)."""
HEAD = {"node:__internal_head__": 0.001}
"""Ray's resource for the head node: the driver runs there and needs no GPU and hardly any CPU."""
RUN = "ergo_rl_run"
"""Key in a job's metadata: the name of its run."""
SAVE_S = 600
"""A run that is told to stop finishes its step and saves: Slurm tells it this many seconds before the time limit, and
Ray waits as long (three seconds by default)."""
HOME = "/ergo-rl"
"""Working directory in the image of a pod."""
SECRET = "ergo-rl"
"""Name of the Kubernetes Secret that holds the variables."""
DRIVER_GIB = 8
"""Main memory of the head, which runs the driver and no worker."""
_SECRET_NAME = re.compile(r"key|token|secret|passw|credential", re.IGNORECASE)


class SubmitError(ErgoError, RuntimeError):
    """The job cannot be submitted, followed or stopped; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Job:
    """What is submitted."""

    config: TrainConfig
    recipe: Path
    """Relative to ``working_dir``."""
    overrides: tuple[str, ...]
    working_dir: Path
    """The folder that travels with the job: a checkout, or one that holds at least the recipe."""
    requirements: Path | None = None
    """Packages that are installed on each node first."""
    environment: tuple[tuple[str, str], ...] = ()
    """Plain settings, never secrets."""
    installed: bool = False
    """The nodes have ergo-rl installed; ``working_dir`` is no checkout."""

    @property
    def entrypoint(self) -> str:
        return shlex.join(["python", "-m", "ergo_rl.jobs", "train", self.recipe.as_posix(), *self.overrides])

    def runtime_env(self) -> dict[str, Any]:
        variables = {"RAY_JOB_STOP_WAIT_TIME_S": str(SAVE_S), "PYTHONUNBUFFERED": "1", **dict(self.environment)}
        env: dict[str, Any] = {"working_dir": str(self.working_dir), "excludes": EXCLUDES, "env_vars": variables}
        if self.requirements is not None:
            env["pip"] = {"packages": _packages(self.requirements), "pip_check": False}
        return env


def make_job(
    recipe: Path,
    overrides: Sequence[str] = (),
    working_dir: Path | None = None,
    requirements: Path | None = None,
    environment: Sequence[str] = (),
    installed: bool = False,
) -> Job:
    """Check what a job needs and put it together.

    working_dir: where None, this checkout; the current folder where ``installed`` is set or this program was installed
    from a wheel. environment: ``NAME=VALUE``. installed: the nodes have ergo-rl installed, so a working directory that
    is no checkout will do; assumed where this program itself was installed from a wheel, or ``requirements`` names
    ergo-rl. Raises ConfigError for a recipe that is wrong, or that could not work as a job; OSError."""
    config = load_config(recipe, overrides)
    from_wheel = not is_checkout(ROOT)
    home = (working_dir or (Path.cwd() if installed or from_wheel else ROOT)).resolve()
    if not recipe.resolve().is_relative_to(home):
        raise ConfigError(f"{recipe} is not below {home}, which is what the job gets: copy it there, or --working-dir")
    has_package = installed or from_wheel or (requirements is not None and _installs_ergo_rl(requirements))
    if not (checkout := is_checkout(home)) and not has_package:
        raise ConfigError(
            f"{home} is no checkout of ergo-rl: --working-dir names one; or give --installed, if the nodes of the "
            "cluster have ergo-rl installed"
        )
    pairs = [pair.partition("=") for pair in environment]
    for name, equals, _ in pairs:
        if not equals or not name:
            raise ConfigError(f"--env {name}: write NAME=VALUE")
        if _SECRET_NAME.search(name):
            raise ConfigError(
                f"--env {name} looks like a secret. Ray shows a job's environment to whoever reaches the cluster; "
                "set it where the nodes are started instead (docs/cluster.md)"
            )
    check_paths(config)
    relative = recipe.resolve().relative_to(home)
    settings = tuple((name, value) for name, _, value in pairs)
    return Job(config, relative, tuple(overrides), home, requirements, settings, installed=not checkout)


def is_checkout(folder: Path) -> bool:
    """Whether ``python -m ergo_rl.jobs train`` works in this folder with nothing installed but the dependencies."""
    return (folder / "ergo_rl" / "jobs" / "commands" / "train.py").is_file()


def _packages(requirements: Path) -> list[str]:
    lines = (line.partition("#")[0].strip() for line in requirements.read_text().splitlines())
    return [line for line in lines if line]


def _installs_ergo_rl(requirements: Path) -> bool:
    return any(re.match(r"(\S*/)?ergo[-_.]rl\b", package, re.IGNORECASE) for package in _packages(requirements))


def check_paths(config: TrainConfig) -> None:
    """Refuse paths that are lost with a job: its working directory is a copy, without large files, that ends with it.

    Raises ConfigError."""
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


# --- KubeRay and Slurm -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ManifestOptions:
    """What a manifest needs beyond the recipe, whose ``hardware`` says which nodes to ask for."""

    image: str = ""
    """KubeRay: holds this repository, or ergo-rl and the recipe, at ``HOME``."""
    claim: str = ""
    """KubeRay: volume claim that is mounted at ``runs_dir``."""
    secrets: tuple[str, ...] = ()
    """Names of variables."""
    time: str = "24:00:00"
    """Slurm: time limit."""
    checkout: str = ""
    """Slurm: this repository, or the folder of the recipe, on a disk that the nodes see."""
    environment: tuple[tuple[str, str], ...] = ()
    """Plain settings."""
    installed: bool = False
    """As in ``Job``."""


def kuberay(config: TrainConfig, entrypoint: str, options: ManifestOptions) -> str:
    """A ``RayJob`` with its own cluster: a head without workers, and ``hardware.nodes`` nodes with them.

    Raises ConfigError where nothing of the run would outlive its pods."""
    if not options.claim and not config.checkpoint.url:
        raise ConfigError("a pod's disk ends with it: --claim PVC is mounted at runs_dir, or give checkpoint.url=...")
    variables = {"PYTHONPATH": HOME, "RAY_JOB_STOP_WAIT_TIME_S": str(SAVE_S), **dict(options.environment)}
    return _render(
        "kuberay.yaml.jinja", config, entrypoint, options,
        variables=variables, home=HOME, secret_name=SECRET, driver_gib=DRIVER_GIB, ray_version=version("ray"),
    )  # fmt: skip


def slurm(config: TrainConfig, entrypoint: str, options: ManifestOptions) -> str:
    """A script for sbatch: the first node is the head and runs the driver; workers run on all nodes."""
    return _render("slurm.sh.jinja", config, entrypoint, options, save_s=SAVE_S)


def _render(template: str, config: TrainConfig, entrypoint: str, options: ManifestOptions, **more: Any) -> str:
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    # A JSON string is a YAML string, whatever is in it.
    environment.filters |= {"shell": shlex.quote, "quoted": lambda text: json.dumps(text, ensure_ascii=False)}
    text = (files("ergo_rl.jobs") / "templates" / template).read_text(encoding="utf-8")
    return environment.from_string(text).render(
        name=dns_name(config.name), config=config, hardware=config.hardware, entrypoint=entrypoint, options=options,
        **more,
    )  # fmt: skip


def dns_name(name: str) -> str:
    """A run's name as Kubernetes takes it: lower case, digits, hyphens, at most 47 characters (KubeRay adds some)."""
    plain = "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in name.lower())
    return plain.strip("-")[:47].strip("-") or "ergo-rl"


# --- over HTTP -------------------------------------------------------------------------------------------------------


class JobServer:
    """The jobs of one cluster. The jobs of a run are named NAME-1, NAME-2, ..."""

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
        """The jobs of a run, in the order in which they started."""
        jobs = [job for job in self._client.list_jobs() if (job.metadata or {}).get(RUN) == name]
        return sorted(jobs, key=lambda job: job.start_time or 0)

    def last(self, name: str) -> Any:
        """The last job of a run. Raises SubmitError where there is none."""
        if not (jobs := self.submissions(name)):
            raise SubmitError(f"{self.address} knows no job of a run {name!r}")
        return jobs[-1]

    def submit(self, job: Job, resources: Mapping[str, float] = HEAD, cpus: float = 0) -> str:
        """Start the job; returns the submission's id. Raises SubmitError while a job of this name runs.

        resources, cpus: what the node must have on which the driver runs."""
        earlier = self.submissions(job.config.name)
        if earlier and not (last := earlier[-1]).status.is_terminal():
            how = "--logs follows it, --stop ends it; or give another name"
            raise SubmitError(f"{last.submission_id} is {last.status.value.lower()}: {how}")
        taken = {known.submission_id for known in self._client.list_jobs()}
        free = (f"{job.config.name}-{number}" for number in itertools.count(len(earlier) + 1))
        submission: str = self._client.submit_job(
            entrypoint=job.entrypoint,
            submission_id=next(name for name in free if name not in taken),
            runtime_env=job.runtime_env(),
            metadata={RUN: job.config.name},
            entrypoint_num_cpus=cpus,
            entrypoint_resources=dict(resources),
        )
        return submission

    async def follow(self, submission: str) -> None:
        """Print the job's output until it ends; after a broken connection it reconnects and prints nothing twice."""
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
                print(f"ergo-rl submit: {error}; reconnecting", file=sys.stderr)
            if self._client.get_job_status(submission).is_terminal():
                return
            await asyncio.sleep(1)

    def status(self, submission: str) -> Any:
        return self._client.get_job_info(submission)

    def stop(self, submission: str) -> None:
        """Stop the job and wait until it has saved and ended. Raises SubmitError where it does not end."""
        self._client.stop_job(submission)
        deadline = time.monotonic() + SAVE_S + 30
        while not self._client.get_job_status(submission).is_terminal():
            if time.monotonic() > deadline:
                raise SubmitError(f"{submission} has not ended within {SAVE_S + 30} s")
            time.sleep(0.5)
