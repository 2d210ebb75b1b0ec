"""A real cluster of two nodes with a job server: a run is submitted over HTTP, followed, given a worker on the second
node, loses that node, is stopped, and resumes when the same name is submitted again; a run without a checkout, on nodes
that have the wheel installed; and KubeRay's line of shell, with the real ``ray`` command."""

from __future__ import annotations

import json
import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.job_submission import JobSubmissionClient

from benchmarks.lives import descendants, lines_of, small_run, still
from ergo_rl.jobs.config import load_config
from ergo_rl.jobs.submission import ManifestOptions, kuberay
from tests.conftest import ROOT
from tests.system.installed import build_wheel, dependencies_only, install

pytestmark = pytest.mark.system
MANY = 5000
"""Steps that the first job would make."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


@dataclass
class TwoNodes:
    """Ray processes that this test started. Everything is ended by process id."""

    folder: Path
    home: Path
    address: str
    server: str
    environment: dict[str, str]
    python: Path
    """Interpreter of the nodes, of their jobs and of the commands."""
    cwd: Path = ROOT
    """Where commands are called."""
    nodes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    started: int = 0

    def add(self, *arguments: str) -> None:
        """One more node with one CPU; returns when the cluster has it. Ray's raylet gives up where its agents take more
        than 15 s to start, which they do on a busy machine: then once more.

        Each node has a session folder of its own, as two machines have: in a shared one the second node's agent unpacks
        the working directory anew while processes of the first stand in it (``overwrite=True`` of Ray's working_dir
        plugin), and those then find no files."""
        command = [
            str(self.python), "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=1", "--num-gpus=0",
            f"--object-store-memory={500 * 2**20}", "--disable-usage-stats", *arguments,
        ]  # fmt: skip
        self.started += 1
        wanted, log = len(self.nodes) + 1, self.folder / f"node-{self.started}.log"
        command += [f"--temp-dir={self.home / str(self.started)}"]
        for _ in range(3):
            ports = [f"--{port}={free_port()}" for port in ("dashboard-agent-listen-port", "metrics-export-port")]
            with log.open("wb") as file:
                node = subprocess.Popen(
                    [*command, *ports], cwd=self.folder, env=self.environment, stdout=file, stderr=subprocess.STDOUT
                )
            self.nodes.append(node)
            deadline = time.monotonic() + 120
            while node.poll() is None and time.monotonic() < deadline:
                if self.alive() == wanted:
                    return
                time.sleep(0.2)
            self.kill(self.nodes.pop())
        pytest.fail(f"a node did not start\n{log.read_text()[-4000:]}")

    def join(self) -> None:
        """A second node joins the head."""
        self.add(f"--address={self.address}", '--resources={"second": 1}')

    def kill(self, node: subprocess.Popen[bytes]) -> None:
        """As a machine that goes off: everything on it at once."""
        family = [(node.pid, "ray start"), *descendants(node.pid)]
        for pid, _ in family:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        node.wait()
        deadline = time.monotonic() + 20
        while still(family) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not still(family)

    def alive(self) -> int:
        """Nodes that the cluster has, as its job server says."""
        try:
            return len(re.findall(r'"state":\s*"ALIVE"', self.get("/nodes?view=summary")))
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return 0

    def get(self, path: str) -> str:
        """What the job server answers."""
        request = urllib.request.Request(f"{self.server}{path}")
        request.add_header("x-ray-authorization", f"Bearer {self.environment['RAY_AUTH_TOKEN']}")
        with urllib.request.urlopen(request, timeout=10) as answer:
            return str(answer.read().decode())

    def command(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(self.python), "-m", "ergo_rl.jobs", *arguments], cwd=self.cwd, env=self.environment,
            capture_output=True, text=True, timeout=400, **options,
        )  # fmt: skip

    @contextmanager
    def following(self, log: Path, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
        with log.open("wb") as file:
            process = subprocess.Popen(
                [str(self.python), "-m", "ergo_rl.jobs", *arguments], cwd=self.cwd, env=self.environment, stdout=file,
                stderr=subprocess.STDOUT,
            )  # fmt: skip
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoNodes]:
    """On the nodes nothing of this project is installed: what they run is the checkout that travels with the job."""
    folder = tmp_path_factory.mktemp("cluster")
    with two_nodes(folder, dependencies_only(folder / "environment")) as nodes:
        yield nodes


@pytest.fixture
def cluster_with_wheel(cluster: TwoNodes, tmp_path: Path) -> TwoNodes:
    """The same, and now the wheel is installed on the nodes and where commands are called, a folder that holds a recipe
    only; with a second node again, where the first is gone."""
    install(cluster.python, build_wheel())
    shutil.copyfile(ROOT / "configs" / "panels.yaml", tmp_path / "mine.yaml")
    cluster.cwd = tmp_path
    if cluster.alive() < 2:
        cluster.join()
    return cluster


@contextmanager
def two_nodes(folder: Path, python: Path) -> Iterator[TwoNodes]:
    """The head with one CPU, and a second node with one that has the resource ``second``."""
    home = Path(tempfile.mkdtemp(prefix="ergo-ray-", dir="/tmp"))  # Ray's sockets have short names
    port, dashboard = free_port(), free_port()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    # A token of its own, in the environment alone: what a job is sent must not hold it.
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    # A job's entrypoint says `python`, as it does on a cluster whose image has the environment on its PATH.
    tools = (python.parent, Path(sys.executable).parent)  # DeepSpeed looks for ninja
    environment["PATH"] = os.pathsep.join([*map(str, tools), os.environ.get("PATH", os.defpath)])
    # Asked of a fresh process: here a Ray of other tests may have made it 127.0.0.1, and nodes must have one address.
    asked = "from ray.util import get_node_ip_address; print(get_node_ip_address())"
    address = subprocess.check_output([sys.executable, "-c", asked], env=environment, text=True).strip()
    nodes = TwoNodes(folder, home, f"{address}:{port}", f"http://{address}:{dashboard}", environment, python)
    started = time.monotonic()
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, home, ignore_errors=True)
        stack.callback(lambda: [nodes.kill(node) for node in reversed(nodes.nodes) if node.poll() is None])
        nodes.add(
            "--head", f"--port={port}", f"--node-ip-address={address}",
            "--include-dashboard=true", f"--dashboard-host={address}", f"--dashboard-port={dashboard}",
            f"--ray-client-server-port={free_port()}",
        )  # fmt: skip
        nodes.join()
        print(f"two nodes: {time.monotonic() - started:.1f} s")
        yield nodes


def wait_for(what: str, happened: Callable[[], bool], timeout_s: float, log: Callable[[], str]) -> None:
    started = time.monotonic()
    while not happened():
        if time.monotonic() - started > timeout_s:
            pytest.fail(f"no {what} within {timeout_s:.0f} s\n{log()[-6000:]}")
        time.sleep(0.2)
    print(f"{what}: {time.monotonic() - started:.1f} s")


@pytest.mark.timeout(1500)
def test_a_job_survives_the_loss_of_a_node_and_resumes(cluster: TwoNodes, tmp_path: Path) -> None:
    settings = {"rollout.resources.cpus": 0.5, "learner.optimizer.total_steps": MANY, "checkpoint.every": MANY}
    overrides = small_run(tmp_path, MANY, **settings)
    submit = ["submit", "configs/panels.yaml", *overrides, "--address", cluster.server]
    run, log = tmp_path / "run", tmp_path / "first.log"

    def steps() -> int:
        return len(lines_of(run / "metrics.jsonl"))

    def said() -> str:
        return log.read_text(errors="replace") + ((run / "run.log").read_text() if (run / "run.log").exists() else "")

    # Until the run is given more workers another job holds the second node, so that it is known what runs there.
    bearer = {"Authorization": f"Bearer {cluster.environment['RAY_AUTH_TOKEN']}"}
    client: Any = JobSubmissionClient(cluster.server, headers=bearer)
    held = client.submit_job(entrypoint="sleep 3600", entrypoint_num_cpus=1, entrypoint_resources={"second": 1})
    wait_for("the second node to be held", lambda: client.get_job_status(held).value == "RUNNING", 120, str)

    with cluster.following(log, *submit) as following:
        wait_for("two steps", lambda: steps() >= 2 or following.poll() is not None, 400, said)
        assert steps() >= 2, said()
        assert "Submitted run-1." in log.read_text()
        again = cluster.command(*submit)
        assert again.returncode == 1 and "run-1 is running: --logs follows it" in again.stderr

        client.stop_job(held)
        wait_for("the second node to be free", lambda: client.get_job_status(held).is_terminal(), 60, said)
        scaled = cluster.command("scale", "run", "--rollout-workers", "2", "--address", cluster.address)
        assert (scaled.returncode, scaled.stdout.strip()) == (0, "2 rollout workers"), scaled.stderr + said()
        processes = "\n".join(command for _, command in descendants(cluster.nodes[1].pid))
        assert "ray::RolloutWorker" in processes, processes
        before = steps()
        wait_for("two steps of two workers", lambda: steps() >= before + 2, 300, said)

        cluster.kill(cluster.nodes.pop())
        before = steps()
        wait_for("three steps after the node's death", lambda: steps() >= before + 3, 300, said)
        scaled = cluster.command("scale", "run", "--rollout-workers", "1", "--address", cluster.address)
        assert (scaled.returncode, scaled.stdout.strip()) == (0, "1 rollout workers"), scaled.stderr + said()
        stopped = cluster.command("submit", "--stop", "run", "--address", cluster.server)
        assert "run-1: STOPPED" in stopped.stdout, stopped.stderr + said()
        assert following.wait(30) == 1 and "run-1: STOPPED" in log.read_text()

    # Ray notices a node's death by heartbeats that stay away; until then it would place the next job's actors there.
    wait_for("the head to know that the node is gone", lambda: cluster.alive() == 1, 120, said)
    made = steps()
    assert (run / "checkpoints" / "LATEST").read_text().strip() == f"step-{made:06d}", "it saved where it stood"
    rest = [one if not one.startswith("total_steps=") else f"total_steps={made + 2}" for one in submit]
    with cluster.following(tmp_path / "second.log", *rest) as following:
        wait_for("the end", lambda: following.poll() is not None, 400, lambda: (tmp_path / "second.log").read_text())
    second = (tmp_path / "second.log").read_text()
    assert following.returncode == 0 and "Submitted run-2." in second and "run-2: SUCCEEDED" in second, second[-3000:]
    assert [line["step"] for line in lines_of(run / "metrics.jsonl")] == list(range(made + 2)), (
        "no step twice, none lost"
    )
    assert "Done. " in second and (run / "policy" / "model.safetensors").exists()

    status = cluster.command("submit", "--status", "run", "--address", cluster.server)
    assert status.stdout.strip().startswith("run-2: SUCCEEDED")
    table = cluster.get("/api/jobs/")
    assert "run-2" in table and cluster.environment["RAY_AUTH_TOKEN"] not in table


@pytest.mark.timeout(900)
def test_a_job_without_a_checkout_runs_where_the_wheel_is_installed(
    cluster_with_wheel: TwoNodes, tmp_path: Path
) -> None:
    cluster = cluster_with_wheel
    models = [f"{key}={ROOT / 'models' / 'panels-policy'}" for key in ("learner.model", "rollout.engine.model")]
    models.append(f"reward.verifier.engine.model={ROOT / 'models' / 'panels-reward'}")
    overrides = small_run(tmp_path, 2, **{"name": "wheel", "rollout.resources.cpus": 0.5})
    done = cluster.command("submit", "mine.yaml", *overrides, *models, "--address", cluster.server)
    assert done.returncode == 0 and "wheel-1: SUCCEEDED" in done.stdout, done.stdout[-4000:] + done.stderr[-2000:]
    assert "No checkout travels with this job" in done.stdout
    assert [line["step"] for line in lines_of(tmp_path / "wheel" / "metrics.jsonl")] == [0, 1]
    where = 'python -c "import ergo_rl.jobs.cli as cli; print(cli.__file__)"'
    bearer = {"Authorization": f"Bearer {cluster.environment['RAY_AUTH_TOKEN']}"}
    client: Any = JobSubmissionClient(cluster.server, headers=bearer)
    job = client.submit_job(entrypoint=where)
    wait_for("the answer of a job", lambda: client.get_job_status(job).is_terminal(), 60, str)
    assert str(cluster.python.parent.parent) in client.get_job_logs(job), "the code was the wheel's"


def test_kuberay_submits_the_whole_command_and_it_runs_in_the_pods_folder(cluster: TwoNodes, tmp_path: Path) -> None:
    """KubeRay joins these words with blanks and gives them to a shell in the submitter's pod (``job.go``,
    ``GetK8sJobCommand``), where nothing of the project need be: here its folder is another one than that of the head,
    the pods' ``workingDir``."""
    (cluster.folder / "printed.py").write_text("import json, os, sys; print(json.dumps([os.getcwd(), *sys.argv[1:]]))")
    words = ["name=two  words", "it's", '"$HOME" && `id`; #', "[/INST]", "a\\b", ""]
    entrypoint = shlex.join(["python", "printed.py", *words])
    config = load_config(ROOT / "configs" / "panels.yaml", ["runs_dir=/runs"])
    entry = yaml.safe_load(kuberay(config, entrypoint, ManifestOptions("image", "claim")))["spec"]["entrypoint"]
    at = ["--address", cluster.server]
    line = ["if", "!", "ray", "job", "status", *at, "printed", ">/dev/null", "2>&1", ";", "then"]
    line += ["ray", "job", "submit", *at, "--no-wait", "--submission-id", "printed", "--", entry, ";", "fi", ";"]
    line += ["ray", "job", "logs", *at, "--follow", "printed"]
    done = subprocess.run(
        ["/bin/bash", "-ce", "--", " ".join(line)], cwd=tmp_path, env=cluster.environment, capture_output=True,
        text=True, timeout=120,
    )  # fmt: skip
    job = json.loads(cluster.get("/api/jobs/printed"))
    assert shlex.split(job["entrypoint"]) == ["python", "printed.py", *words], done.stdout + done.stderr
    assert job["status"] == "SUCCEEDED", done.stdout + done.stderr
    assert json.dumps([str(cluster.folder), *words]) in done.stdout
