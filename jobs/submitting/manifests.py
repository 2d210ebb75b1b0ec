"""A recipe as a KubeRay ``RayJob`` and as a Slurm script. What to ask for is in the recipe's ``hardware``.

Secrets are named, never written: Kubernetes puts them into the pods from a Secret, Slurm takes them from the
environment of the shell that calls sbatch. KubeRay's fields: https://docs.ray.io/en/latest/cluster/kubernetes/
(API ray.io/v1).
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import yaml

from ergo_rl.jobs.config import ConfigError, TrainConfig

SECRET = "ergo-rl"
"""Name of the Kubernetes Secret that holds the variables."""
HOME = "/ergo-rl"
"""The repository in the image."""
DRIVER_GIB = 8
"""Main memory of the head, which runs the driver and no worker."""
SAVE_S = 600
"""A run that is told to stop finishes its step and saves: so long before the time limit Slurm tells it, and so long
Ray waits (by itself three seconds)."""


@dataclass(frozen=True, slots=True)
class Extras:
    """What the recipe does not say. secrets: names of variables; time: Slurm's limit; checkout: this repository, on a
    disk that the nodes see; environment: plain settings."""

    image: str
    claim: str
    secrets: tuple[str, ...]
    time: str
    checkout: str
    environment: tuple[tuple[str, str], ...] = ()


def kuberay(config: TrainConfig, entrypoint: str, extras: Extras) -> str:
    """A ``RayJob`` with its own cluster: a head without work, ``hardware.nodes`` workers."""
    hardware = config.hardware
    limits = {"cpu": hardware.cpus_per_node, "memory": f"{hardware.memory_gib_per_node:g}Gi"}
    if hardware.gpus_per_node:
        limits["nvidia.com/gpu"] = hardware.gpus_per_node
    variables = {"PYTHONPATH": HOME, "RAY_JOB_STOP_WAIT_TIME_S": str(SAVE_S), **dict(extras.environment)}
    head = {"cpu": 2, "memory": f"{DRIVER_GIB}Gi"}
    cluster = {
        "rayVersion": version("ray"),
        "headGroupSpec": {
            "rayStartParams": {"num-cpus": "0", "dashboard-host": "0.0.0.0"},
            "template": _pod(config, "ray-head", head, extras),
        },
        "workerGroupSpecs": [
            {
                "groupName": "workers",
                "replicas": hardware.nodes,
                "minReplicas": hardware.nodes,
                "maxReplicas": hardware.nodes,
                "rayStartParams": {},
                "template": _pod(config, "ray-worker", limits, extras),
            }
        ],
    }
    job = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": dns_name(config.name)},
        "spec": {
            "entrypoint": f"cd {HOME} && {entrypoint}",
            "shutdownAfterJobFinishes": True,
            "runtimeEnvYAML": yaml.safe_dump({"env_vars": variables}),
            "rayClusterSpec": cluster,
        },
    }
    secret = [f"# kubectl create secret generic {SECRET} --from-literal={name}=..." for name in extras.secrets]
    about = [
        f"# {extras.image} must hold this repository at {HOME} and what constraints/gpu.txt names.",
        "# kubectl apply -f THIS; the same again, after kubectl delete rayjob, goes on where the run stopped.",
    ]
    return "\n".join([*about, *secret, yaml.safe_dump(job, sort_keys=False)])


def _pod(config: TrainConfig, name: str, resources: dict[str, Any], extras: Extras) -> dict[str, Any]:
    """vLLM, NCCL and Ray's object store live in shared memory, of which a container has 64 MB by itself."""
    volumes: list[dict[str, Any]] = [{"name": "shared-memory", "emptyDir": {"medium": "Memory"}}]
    mounts = [{"name": "shared-memory", "mountPath": "/dev/shm"}]
    if extras.claim:
        volumes.append({"name": "runs", "persistentVolumeClaim": {"claimName": extras.claim}})
        mounts.append({"name": "runs", "mountPath": config.runs_dir})
    elif not config.checkpoint.url:
        raise ConfigError("a pod's disk ends with it: --claim PVC is mounted at runs_dir, or give checkpoint.url=...")
    variables = [
        {"name": each, "valueFrom": {"secretKeyRef": {"name": SECRET, "key": each}}} for each in extras.secrets
    ]
    container = {
        "name": name,
        "image": extras.image,
        "workingDir": HOME,
        "env": [{"name": "PYTHONPATH", "value": HOME}, *variables],
        "resources": {"requests": dict(resources), "limits": dict(resources)},
        "volumeMounts": mounts,
    }
    return {"spec": {"containers": [container], "volumes": volumes}}


def dns_name(name: str) -> str:
    """A run's name as Kubernetes takes it: lower case, digits, hyphens, at most 47 characters (KubeRay adds some)."""
    plain = "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in name.lower())
    return plain.strip("-")[:47].strip("-") or "ergo-rl"


def slurm(config: TrainConfig, entrypoint: str, extras: Extras) -> str:
    """A script for sbatch: the first node is the head and runs the driver, all nodes work. The environment of the
    checkout (``make setup``) must be on a disk that they see."""
    hardware, quoted = config.hardware, shlex.quote(extras.checkout)
    gpus = [f"#SBATCH --gpus-per-node={hardware.gpus_per_node}"] if hardware.gpus_per_node else []
    start = f"--num-cpus={hardware.cpus_per_node} --num-gpus={hardware.gpus_per_node} --disable-usage-stats --block"
    exports = ",".join(["PATH", "HOME", "USER", *extras.secrets])
    lines = [
        "#!/bin/bash",
        f"#SBATCH --job-name={dns_name(config.name)}",
        f"#SBATCH --nodes={hardware.nodes}",
        "#SBATCH --ntasks-per-node=1",
        f"#SBATCH --cpus-per-task={hardware.cpus_per_node}",
        f"#SBATCH --mem={int(hardware.memory_gib_per_node)}G",
        *gpus,
        f"#SBATCH --time={extras.time}",
        "#SBATCH --exclusive",
        f"#SBATCH --signal=B:TERM@{SAVE_S}",
        "#SBATCH --requeue",
        f"#SBATCH --export={exports}",
        "# Variables are taken from the shell that calls sbatch; none is written here.",
        "set -euo pipefail",
        f"cd {quoted}",
        f'export PATH={quoted}/.venv/bin:"$PATH" PYTHONPATH={quoted}',
        *(f"export {name}={shlex.quote(value)}" for name, value in extras.environment),
        *(f': "${{{name}:?is not set in the shell that called sbatch}}"' for name in extras.secrets),
        "",
        "# Ray's nodes know one another by a token that only this user can read.",
        "umask 077",
        f'export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={quoted}/runs/.ray-token-"$SLURM_JOB_ID"',
        "trap 'rm -f \"$RAY_AUTH_TOKEN_PATH\"' EXIT",
        'mkdir -p "$(dirname "$RAY_AUTH_TOKEN_PATH")"',
        'python -c "import secrets; print(secrets.token_hex(32), end=str())" > "$RAY_AUTH_TOKEN_PATH"',
        "",
        'head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)',
        'address=$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address | cut -d " " -f 1)',
        'srun --nodes=1 --ntasks=1 --nodelist="$head" \\',
        f'  ray start --head --node-ip-address="$address" --port=6379 {start} &',
        "sleep 15",
        'if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then',
        '  srun --nodes=$((SLURM_JOB_NUM_NODES - 1)) --ntasks=$((SLURM_JOB_NUM_NODES - 1)) --exclude="$head" \\',
        f'    ray start --address="$address:6379" {start} &',
        "fi",
        "",
        'export RAY_ADDRESS="$address:6379"',
        f"{entrypoint} &",
        "driver=$!",
        "# The limit is near, or scancel: the run saves; a requeued job goes on there.",
        "trap 'kill -TERM $driver; wait $driver || true; scontrol requeue \"$SLURM_JOB_ID\"; exit 0' TERM",
        "wait $driver",
    ]
    return "\n".join(lines) + "\n"
