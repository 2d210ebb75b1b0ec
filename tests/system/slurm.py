"""A real Slurm on this machine: Debian's packages, unpacked without installing them, one controller and one node."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.conftest import ROOT

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "slurm-wlm-basic-plugins", "libmunge2", "libhwloc15")
UNPACKED = ROOT / "build" / "slurm"
KILL_WAIT_S = 8
"""Between TERM and KILL; Slurm's own default is 30."""


class NoSlurm(Exception):
    """Slurm's packages cannot be had here."""


def unpacked() -> Path:
    """The root of the packages' files, fetched once. Raises NoSlurm with the reason."""
    root = UNPACKED / "root"
    if root.is_dir():
        return root
    if not (shutil.which("apt-get") and shutil.which("dpkg")):
        raise NoSlurm("this is no Debian: no apt-get, no dpkg")
    shutil.rmtree(UNPACKED, ignore_errors=True)
    (UNPACKED / "debs").mkdir(parents=True)
    got = subprocess.run(
        ["apt-get", "download", *PACKAGES], cwd=UNPACKED / "debs", capture_output=True, text=True, timeout=60
    )
    if got.returncode:
        raise NoSlurm(f"apt-get download: {(got.stderr.strip().splitlines() or ['failed'])[-1]}")
    for package in (UNPACKED / "debs").glob("*.deb"):
        subprocess.run(["dpkg", "-x", str(package), str(UNPACKED / "new")], check=True)
    (UNPACKED / "new").rename(root)
    return root


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def slurm(folder: Path) -> Iterator[dict[str, str]]:
    """Yields the environment in which sbatch, srun, scancel, squeue and scontrol talk to it. Raises NoSlurm."""
    if os.geteuid():
        raise NoSlurm("slurmd must be started by root")
    root = unpacked()
    (plugins := next(iter(root.glob("usr/lib/*/slurm-wlm")), None)) or _missing("plugins")
    assert plugins is not None
    libraries = f"{plugins}:{plugins.parent}"
    for name in ("state", "spool", "bin"):
        (folder / name).mkdir(parents=True)
    conf = folder / "slurm.conf"
    conf.write_text(_configuration(folder, plugins))
    environment = {**os.environ, "SLURM_CONF": str(conf)}
    programs = {path.name: path for path in (root / "usr" / "bin").glob("s*")}
    for name, path in programs.items():
        _wrapper(folder / "bin" / name, path, {"LD_LIBRARY_PATH": libraries, "SLURM_CONF": str(conf)})
    private = {**environment, "LD_LIBRARY_PATH": libraries}
    daemons = (
        ["slurmctld-wlm", "-D", "-i", "-f", str(conf)],
        ["slurmd-wlm", "-D", "-f", str(conf), "-N", socket.gethostname().partition(".")[0],
         "-d", str(root / "usr/sbin/slurmstepd-wlm")],
    )  # fmt: skip
    environment["PATH"] = f"{folder / 'bin'}:{environment['PATH']}"
    with ExitStack() as stack:
        for command in daemons:
            log = stack.enter_context((folder / f"{command[0]}.log").open("wb"))
            daemon = subprocess.Popen(
                [str(root / "usr/sbin" / command[0]), *command[1:]], env=private, stdout=log, stderr=log
            )
            stack.callback(_end, daemon)
        deadline = time.monotonic() + 20
        while "idle" not in _said(["sinfo", "--noheader", "--format=%T"], environment):
            if time.monotonic() > deadline:
                logs = "\n".join(path.read_text(errors="replace")[-500:] for path in folder.glob("*.log"))
                raise NoSlurm(f"it does not start here: {logs}")
            time.sleep(0.2)
        yield environment


def _missing(what: str) -> None:
    raise NoSlurm(f"the packages hold no {what}")


def _end(daemon: subprocess.Popen[bytes]) -> None:
    daemon.terminate()
    try:
        daemon.wait(10)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()


def _said(command: list[str], environment: Mapping[str, str]) -> str:
    done = subprocess.run(command, env=dict(environment), capture_output=True, text=True, timeout=30)
    return done.stdout


def _wrapper(path: Path, program: Path, variables: Mapping[str, str]) -> None:
    settings = " ".join(f"{name}={value!r}" for name, value in variables.items())
    path.write_text(f'#!/bin/bash\nexport {settings}\nexec {str(program)!r} "$@"\n')
    path.chmod(0o755)


def _configuration(folder: Path, plugins: Path) -> str:
    host = socket.gethostname().partition(".")[0]
    return f"""ClusterName=t
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldPort={free_port()}
SlurmdPort={free_port()}
PluginDir={plugins}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
KillWait={KILL_WAIT_S}
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 Sockets=1 CoresPerSocket=4 ThreadsPerCore=1 RealMemory=900000 State=UNKNOWN
PartitionName=p Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""
