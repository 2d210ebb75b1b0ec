"""``ergo-rl submit``: run a recipe as a job of a Ray cluster, follow or stop it; KubeRay and Slurm as dry runs."""

from __future__ import annotations

import argparse
import asyncio
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ergo_rl.jobs.cli import STOPPED_BY_HAND, add_recipe, command, parse_with_overrides, recipe_of
from ergo_rl.jobs.submission import HEAD, Job, JobServer, ManifestOptions, kuberay, make_job, needed_secrets, slurm


def _report(info: Any) -> int:
    print(f"{info.submission_id}: {info.status.value}{f' ({info.message})' if info.message else ''}")
    return 0 if info.status.value == "SUCCEEDED" else 1


def _resource(text: str) -> tuple[str, float]:
    """Read RESOURCE=AMOUNT."""
    name, _, amount = text.partition("=")
    return name, _amount(amount)


def _amount(text: str) -> float:
    amount = float(text)
    if not 0 <= amount < math.inf:
        raise ValueError
    return amount


def _submit(job: Job, address: str, resources: Mapping[str, float], driver_cpus: float, detach: bool) -> int:
    server = JobServer(address)
    for name in needed_secrets(job.config):
        print(f"The run reads a key from {name}: the nodes of the cluster must have it in their environment.")
    if job.installed and job.requirements is None:
        print("No checkout travels with this job: the nodes of the cluster must have ergo-rl installed.")
    print(job.check_size(), flush=True)
    submission = server.submit(job, resources, driver_cpus)
    where = f"--address {address}"
    print(f"Submitted {submission}. ergo-rl submit {where} --logs|--status|--stop {job.config.name}", flush=True)
    return 0 if detach else _follow(server, submission)


def _follow(server: JobServer, submission: str) -> int:
    try:
        asyncio.run(server.follow(submission))
    except KeyboardInterrupt:
        print(f"\nNo longer following; {submission} continues.", file=sys.stderr)
        return STOPPED_BY_HAND
    return _report(server.status(submission))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ergo-rl submit",
        description="Run a recipe as a job of a Ray cluster, over HTTP: this checkout (or, with ergo-rl installed on "
        "the nodes, the folder of the recipe) travels with it, its logs are followed. Submitting the same name again "
        "resumes where the last job stopped.",
        epilog="example: ergo-rl submit configs/ergo-7b.yaml runs_dir=/shared/runs --address http://head:8265",
    )
    add_recipe(parser)
    parser.add_argument("--address", default="http://127.0.0.1:8265", help="the job server (default: %(default)s)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--logs", metavar="NAME", help="follow the last job of this run")
    what.add_argument("--status", metavar="NAME", help="print the state of the last job of this run")
    what.add_argument("--stop", metavar="NAME", help="stop the last job of this run: it finishes its step and saves")
    what.add_argument("--dry-run", choices=["kuberay", "slurm"], help="print a RayJob or a Slurm script instead")
    parser.add_argument("--detach", action="store_true", help="do not follow the logs")
    parser.add_argument(
        "--working-dir", type=Path, help="what travels (default: this checkout; with --installed the current folder)"
    )
    parser.add_argument(
        "--installed", action="store_true", help="the nodes have ergo-rl installed: no checkout travels"
    )
    parser.add_argument("--requirements", type=Path, help="packages to install first (constraints/gpu.txt)")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="a setting; never a secret")
    parser.add_argument(
        "--driver-on", action="append", type=_resource, default=[], metavar="RESOURCE=AMOUNT",
        help="custom resource of the node that the driver should run on (default: the head)",
    )  # fmt: skip
    parser.add_argument(
        "--driver-cpus", type=_amount, default=0, help="CPUs reserved for the driver (default: %(default)s)"
    )
    parser.add_argument("--image", default="ergo-rl:latest", help="kuberay: image with this repository at /ergo-rl")
    parser.add_argument("--claim", default="", metavar="PVC", help="kuberay: volume claim that is mounted at runs_dir")
    parser.add_argument(
        "--secret", action="append", default=[], metavar="NAME",
        help="dry runs: variable that the cluster's processes get, from a Kubernetes secret or from your shell",
    )  # fmt: skip
    parser.add_argument("--time", default="24:00:00", help="slurm: time limit (default: %(default)s)")
    return parser


@command("submit", also=(ValueError,))
def main(argv: Sequence[str] | None = None) -> int:
    options = parse_with_overrides(_parser(), argv)
    if name := options.logs or options.status or options.stop:
        server = JobServer(options.address)
        submission = server.last(name).submission_id
        if options.logs:
            return _follow(server, submission)
        if options.stop:
            server.stop(submission)
        _report(server.status(submission))
        return 0
    recipe, overrides = recipe_of(options)
    job = make_job(recipe, overrides, options.working_dir, options.requirements, options.env, options.installed)
    if options.dry_run is None:
        return _submit(job, options.address, dict(options.driver_on) or HEAD, options.driver_cpus, options.detach)
    secrets = tuple(dict.fromkeys([*needed_secrets(job.config), *options.secret]))
    manifest = ManifestOptions(
        options.image, options.claim, secrets, options.time, str(job.working_dir), job.environment, job.installed
    )
    print({"kuberay": kuberay, "slurm": slurm}[options.dry_run](job.config, job.entrypoint, manifest), end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
