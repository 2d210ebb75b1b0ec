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
import logging
import re
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

from ergo_rl.errors import ErgoError, first_line
from ergo_rl.jobs.config import ConfigError, TrainConfig, load_config
from ergo_rl.rewards.config import Backend

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[1]
"""The checkout that this program runs from; inside site-packages where it was installed from a wheel."""
WEIGHTS = ("safetensors", "bin", "pt", "pth", "ckpt", "gguf", "onnx", "distcp", "npz")
"""Endings of files that travel only where the recipe names their folder."""
EXCLUDES = [
    ".git", "/.gpu", "/runs", "/data", "/build", "/dist", "/docs", "/tests", "/benchmarks", "/models/.*", "exported",
    "wandb", "mlruns", "checkpoints", ".venv*", "venv", "node_modules", "__pycache__", ".*_cache", ".hypothesis",
    "*.egg-info", "*.parquet", ".env", ".env.*", "*.env", ".envrc", ".netrc", ".npmrc", ".pypirc", ".git-credentials",
    ".ssh", ".aws", ".azure", ".kube", ".config", "*.pem", "*.key", "*.p12", "*.pfx", "*.jks", "id_rsa*", "id_dsa*",
    "id_ecdsa*", "id_ed25519*", "credentials", "credentials.*", "secrets", "secrets.*", "secret.*", "token",
    "*[_-]token", "token.txt", "*[_-]token.txt", ".ray-token*", "*api[_-]key", "*api[_-]key.txt", "kubeconfig*",
    "service[_-]account*.json",
]  # fmt: skip
"""What of the working directory is not sent, whatever the recipe says (Ray leaves out what .gitignore and .rayignore
name, too)."""
MAX_MIB = 100
"""Ray's job server takes no larger package."""
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
_SECRET_VALUE = re.compile(
    r"://[^/\s:@]*:[^/\s@]+@|\b(?:sk|hf|gh[pousr]|xox[abp]|glpat)[-_][\w-]{16,}|\bAKIA[0-9A-Z]{16}\b|-----BEGIN "
)
"""A password in a URL, or what the keys of known services look like."""
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_TIME_LIMIT = re.compile(r"\d+|\d+:\d\d(:\d\d)?|\d+-\d+(:\d\d){0,2}", re.ASCII)


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

    @property
    def excludes(self) -> list[str]:
        """Patterns as in .gitignore, of which the last that fits decides: weights stay here unless the recipe names
        their folder, and secrets stay even then."""
        weights = [f"*.{ending}" for ending in WEIGHTS]
        used = [f"!/{_literal(folder)}/*.{ending}" for folder in self._used_folders() for ending in WEIGHTS]
        runs = Path(self.config.runs_dir)
        return [*weights, *used, *EXCLUDES, *([] if runs.is_absolute() else [f"/{_literal(runs)}"])]

    def _used_folders(self) -> list[Path]:
        """Folders below the working directory that a value of the recipe names."""
        home, found = self.working_dir, dict[Path, None]()
        for value in _texts(asdict(self.config)):
            if value and len(value) < 4096 and "\0" not in value and value.strip("./"):
                folder = (home / value).resolve()
                if folder.is_relative_to(home) and folder != home and folder.is_dir():
                    found[folder.relative_to(home)] = None
        return list(found)

    def files(self) -> dict[str, int]:
        """What travels: bytes by path, the largest first. Follows what Ray's own packaging does."""
        from ray._private.runtime_env.packaging import _dir_travel, _get_excludes

        sizes = dict[str, int]()

        def see(path: Path) -> None:
            if path.is_file():
                sizes[path.relative_to(self.working_dir).as_posix()] = path.stat().st_size

        leave_out = [_get_excludes(self.working_dir, self.excludes)]
        _dir_travel(self.working_dir, leave_out, see, include_gitignore=True, logger=logger)
        return dict(sorted(sizes.items(), key=lambda entry: -entry[1]))

    def check_size(self) -> str:
        """Say how much travels. Raises SubmitError where it is more than Ray takes."""
        files = self.files()
        total = sum(files.values()) / 2**20
        if total > MAX_MIB:
            largest = ", ".join(f"{path} ({size / 2**20:.0f} MiB)" for path, size in list(files.items())[:3])
            raise SubmitError(
                f"{self.working_dir} is {total:.0f} MiB without what is left out, and Ray takes {MAX_MIB}; largest: "
                f"{largest}. Name what is not needed in .rayignore, or put it on a disk that the nodes see"
            )
        return f"Sends {len(files)} files of {self.working_dir}, {total:.1f} MiB."

    def runtime_env(self) -> dict[str, Any]:
        variables = {"RAY_JOB_STOP_WAIT_TIME_S": str(SAVE_S), "PYTHONUNBUFFERED": "1", **dict(self.environment)}
        env: dict[str, Any] = {"working_dir": str(self.working_dir), "excludes": self.excludes, "env_vars": variables}
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
    for override in overrides:
        if _SECRET_VALUE.search(override):
            key = override.partition("=")[0]
            raise ConfigError(f"{key} holds what looks like a key or password, {_SHOWN_TO_ALL}")
    pairs = [pair.partition("=") for pair in environment]
    for name, equals, value in pairs:
        if not equals:
            raise ConfigError(f"--env {name}: write NAME=VALUE")
        check_variable(name, "--env")
        if _SECRET_VALUE.search(value):
            raise ConfigError(f"--env {name} holds what looks like a key or password, {_SHOWN_TO_ALL}")
        if _SECRET_NAME.search(name):
            raise ConfigError(f"--env {name} looks like a secret, {_SHOWN_TO_ALL}")
    check_paths(config)
    needed_secrets(config)
    relative = recipe.resolve().relative_to(home)
    settings = tuple((name, value) for name, _, value in pairs)
    return Job(config, relative, tuple(overrides), home, requirements, settings, installed=not checkout)


_SHOWN_TO_ALL = (
    "and Ray shows a job's environment and command to whoever reaches the cluster; set it where the nodes are started "
    "instead (docs/cluster.md)"
)


def check_variable(name: str, where: str) -> None:
    """Refuse what is no name of an environment variable, before it becomes a part of a script. Raises ConfigError."""
    if not _VARIABLE.fullmatch(name):
        raise ConfigError(f"{where}: {name!r} is no name of a variable (letters, digits, _)")


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, Sequence):
        for inner in value:
            yield from _texts(inner)


def _literal(path: Path) -> str:
    return re.sub(r"([\\*?\[\]!# ])", r"\\\1", path.as_posix())


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
    """Variables that the run reads keys from. Raises ConfigError where one has no name of a variable."""
    verifier = config.reward.verifier
    name = verifier.endpoint.api_key_env if verifier.backend is Backend.ENDPOINT else ""
    if not name:
        return []
    check_variable(name, "reward.verifier.endpoint.api_key_env")
    return [name]


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

    def __post_init__(self) -> None:
        """Raises ConfigError for what would be more than one word of a script."""
        for name in self.secrets:
            check_variable(name, "--secret")
        for name, _ in self.environment:
            check_variable(name, "--env")
        if not _TIME_LIMIT.fullmatch(self.time):
            raise ConfigError(f"--time {self.time!r}: write minutes, [HOURS:]MINUTES:SECONDS or DAYS-HOURS")


def kuberay(config: TrainConfig, entrypoint: str, options: ManifestOptions) -> str:
    """A ``RayJob`` with its own cluster: a head without workers, and ``hardware.nodes`` nodes with them.

    KubeRay puts the entrypoint unquoted into a shell line behind ``ray job submit --``: it must be one simple command,
    because what follows ``&&`` or ``;`` would run in the submitter's pod. Ray starts it in the pods' ``workingDir``.

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
        except Exception as error:  # Ray and requests have no common base
            raise SubmitError(
                f"no job server answers at {address}: {first_line(error)}. It is the dashboard's address, "
                "http://HEAD:8265; a cluster with a token needs RAY_AUTH_MODE=token and the token in this environment"
            ) from error
        self.address = address

    def _ask(self, what: str, *arguments: Any, **more: Any) -> Any:
        """Call the job server. Raises SubmitError with what it says."""
        try:
            return getattr(self._client, what)(*arguments, **more)
        except Exception as error:  # a bare RuntimeError with the page that the server sent
            said = next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), "")[:300]
            raise SubmitError(
                f"the job server at {self.address} refused or did not answer ({what.replace('_', ' ')}): "
                f"{type(error).__name__}: {said}"
            ) from error

    def submissions(self, name: str) -> list[Any]:
        """The jobs of a run, in the order in which they started."""
        jobs = [job for job in self._ask("list_jobs") if (job.metadata or {}).get(RUN) == name]
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
        taken = {known.submission_id for known in self._ask("list_jobs")}
        free = (f"{job.config.name}-{number}" for number in itertools.count(len(earlier) + 1))
        submission: str = self._ask(
            "submit_job",
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
            except Exception as error:  # Ray's and aiohttp's; whether the server is still there is asked next
                print(f"ergo-rl submit: {first_line(error)}; reconnecting", file=sys.stderr)
            if self._ask("get_job_status", submission).is_terminal():
                return
            await asyncio.sleep(1)

    def status(self, submission: str) -> Any:
        return self._ask("get_job_info", submission)

    def stop(self, submission: str) -> None:
        """Stop the job and wait until it has saved and ended. Raises SubmitError where it does not end."""
        self._ask("stop_job", submission)
        deadline = time.monotonic() + SAVE_S + 30
        while not self._ask("get_job_status", submission).is_terminal():
            if time.monotonic() > deadline:
                raise SubmitError(f"{submission} has not ended within {SAVE_S + 30} s")
            time.sleep(0.5)
