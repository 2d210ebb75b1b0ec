"""What a job is made of, what is refused before it travels, and the manifests."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import ray
import yaml

from ergo_rl.jobs import submission
from ergo_rl.jobs.commands.submit import main
from ergo_rl.jobs.config import ConfigError, load_config
from ergo_rl.jobs.submission import (
    EXCLUDES,
    MAX_MIB,
    ROOT,
    JobServer,
    ManifestOptions,
    SubmitError,
    dns_name,
    kuberay,
    make_job,
    needed_secrets,
    slurm,
)

PAPER = ROOT / "configs" / "ergo-7b.yaml"
PANELS = ROOT / "configs" / "panels.yaml"
ELSEWHERE = ["runs_dir=/shared/runs", "questions.paths=[/shared/train.parquet]", "evaluation.paths=[]"]
SECRETS = ("REWARD_KEY", "HF_TOKEN")
OPTIONS = ManifestOptions("registry/ergo:1", "runs-claim", SECRETS, "12:00:00", "/home/me/ergo rl", (("A", "b c"),))


def test_job_holds_checkout_and_recipe_but_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REWARD_KEY", "sk-very-secret")
    requirements = tmp_path / "needs.txt"
    requirements.write_text("# engines\nvllm==0.26.0\n\nray[default]==2.60.0  # as the cluster\n")
    overrides = [*ELSEWHERE, "name=two words", "reward.verifier.endpoint.api_key_env=REWARD_KEY"]
    job = make_job(PAPER, overrides, ROOT, requirements, ["NCCL_DEBUG=INFO"])
    assert shlex.split(job.entrypoint) == ["python", "-m", "ergo_rl.jobs", "train", "configs/ergo-7b.yaml", *overrides]
    environment = job.runtime_env()
    assert environment["working_dir"] == str(ROOT) and set(EXCLUDES) <= set(environment["excludes"])
    variables = environment["env_vars"]
    assert variables["NCCL_DEBUG"] == "INFO" and variables["RAY_JOB_STOP_WAIT_TIME_S"] == "600"
    assert environment["pip"]["packages"] == ["vllm==0.26.0", "ray[default]==2.60.0"]
    assert needed_secrets(job.config) == ["REWARD_KEY"]
    assert "sk-very-secret" not in json.dumps([environment, job.entrypoint])
    assert "pip" not in make_job(PAPER, ELSEWHERE, ROOT, None, []).runtime_env()


def test_job_of_the_panels_may_use_relative_data_paths() -> None:
    job = make_job(PANELS, ["runs_dir=/shared/runs"], ROOT, None, [])
    assert job.config.questions.paths == ["data/panels/train.parquet"]


@pytest.mark.parametrize(
    ("recipe", "overrides", "environment", "message"),
    [
        (PAPER, ELSEWHERE[1:], [], "runs_dir is 'runs': relative to a copy .* Give runs_dir=/a/disk/that/stays"),
        (PAPER, ELSEWHERE[:1], [], r"questions\.paths: 'data/train\.parquet' does not travel"),
        (PAPER, ELSEWHERE, ["OPENAI_API_KEY=sk-1"], "--env OPENAI_API_KEY looks like a secret"),
        (PAPER, ELSEWHERE, ["HF_TOKEN=x"], "--env HF_TOKEN looks like a secret"),
        (PAPER, ELSEWHERE, ["DEBUG"], "--env DEBUG: write NAME=VALUE"),
        (PAPER, ELSEWHERE, ["A;reboot=1"], "--env: 'A;reboot' is no name of a variable"),
        (PAPER, ELSEWHERE, ["STORE=s3://me:hunter2@host/b"], "--env STORE holds what looks like a key or password"),
        (PAPER, [*ELSEWHERE, "name=sk-abcdefghijklmnopqrst"], [], "name holds what looks like a key or password"),
        (PAPER, [*ELSEWHERE, "reward.verifier.endpoint.api_key_env='K; reboot'"], [], "'K; reboot' is no name of a"),
        (PAPER, [*ELSEWHERE, "total_step=3"], [], "did you mean 'total_steps'"),
    ],
)
def test_make_job_refuses_what_could_not_work(
    recipe: Path, overrides: list[str], environment: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_job(recipe, overrides, ROOT, None, environment)


def test_package_leaves_out_weights_runs_and_keys_that_the_recipe_does_not_use(tmp_path: Path) -> None:
    """By Ray's own packaging. Of two folders with weights the recipe names one; keys stay even inside of it."""
    from ray._private.runtime_env.packaging import create_package

    sent = ["recipes/mine.yaml", "models/policy [a]/config.json", "models/policy [a]/model.safetensors", "terms.py"]
    kept_here = [
        "models/Qwen2.5-VL-7B/model-00001-of-00005.safetensors", "exported/model.gguf", "wandb/run-1/files.txt",
        "my runs/a/run.log", "runs/b/run.log", ".env", ".env.local", "prod.env", "recipes/id_rsa", "hf_token",
        "models/policy [a]/server.pem", "credentials.json", ".aws/credentials", ".venv-gpu/lib/x.py", ".git/config",
    ]  # fmt: skip
    for name in (*sent, *kept_here):
        (tmp_path / "home" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "home" / name).write_text("x")
    recipe = tmp_path / "home" / "recipes" / "mine.yaml"
    recipe.write_text(PAPER.read_text())
    model = "models/policy [a]"
    overrides = [*ELSEWHERE[1:], "runs_dir=my runs", "checkpoint.url=s3://b/c", f"learner.model='{model}'"]
    job = make_job(recipe, [*overrides, f"rollout.engine.model='{model}'"], tmp_path / "home", installed=True)
    create_package(str(tmp_path / "home"), tmp_path / "x.zip", include_gitignore=True, excludes=job.excludes)
    names = {name for name in zipfile.ZipFile(tmp_path / "x.zip").namelist() if not name.endswith("/")}
    assert names == set(sent) == set(job.files())


def test_job_larger_than_ray_takes_is_refused_before_it_is_sent(mine: Path) -> None:
    (mine.parent / "pictures.dat").touch()
    os.truncate(mine.parent / "pictures.dat", (MAX_MIB + 5) * 2**20)
    job = make_job(mine, ELSEWHERE, mine.parent, installed=True)
    with pytest.raises(SubmitError, match=r"is 105 MiB .*Ray takes 100; largest: pictures\.dat \(105 MiB\)"):
        job.check_size()
    (mine.parent / ".rayignore").write_text("*.dat\n")
    assert job.check_size().startswith("Sends 2 files of ")


class Refusing(BaseHTTPRequestHandler):
    """A job server that is up and takes no package."""

    protocol_version = "HTTP/1.1"

    def _reply(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        known = {"version": "4", "ray_version": ray.__version__, "ray_commit": "x", "session_name": "s"}
        is_version = "version" in self.path
        self._reply(404 if "packages" in self.path else 200, json.dumps(known).encode() if is_version else b"[]")

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self._reply(500, b"Traceback\naiohttp.web_exceptions.HTTPRequestEntityTooLarge: Request Entity Too Large")

    def log_message(self, *_: object) -> None: ...


def test_submit_refused_by_the_job_server_ends_with_a_sentence(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        arguments = ["--address", address, "--working-dir", str(mine.parent), "--installed", "--detach"]
        assert main([str(mine), *ELSEWHERE, *arguments]) == 1
        server.shutdown()
    said = capsys.readouterr()
    assert "Sends 1 files of " in said.out
    assert re.fullmatch(r"ergo-rl submit: the job server at \S+ refused .*Request Entity Too Large\.?\S*\n", said.err)


@pytest.mark.parametrize(
    "wrong", [["--driver-on", "gpu=many"], ["--driver-on", "gpu"], ["--driver-cpus", "nan"], ["--driver-cpus", "-1"]]
)
def test_submit_refuses_amounts_that_are_none(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([str(PAPER), *ELSEWHERE, *wrong])
    assert f"argument {wrong[0]}: invalid" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"secrets": ("K; reboot",)}, "--secret: 'K; reboot' is no name"),
        ({"environment": (("A\nB", "c"),)}, "is no name of a variable"),
        ({"time": "1:00:00\n#SBATCH --uid=0"}, "--time .*write minutes"),
    ],
)
def test_manifest_options_refuse_what_would_be_more_than_one_word(more: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ManifestOptions(**more)


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A recipe in a folder of its own."""
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.yaml").write_text(PAPER.read_text())
    return tmp_path / "recipes" / "mine.yaml"


def test_make_job_refuses_a_recipe_outside_of_the_checkout(mine: Path) -> None:
    with pytest.raises(ConfigError, match=r"mine\.yaml is not below .*copy it there"):
        make_job(mine, ELSEWHERE, ROOT, None, [])
    with pytest.raises(ConfigError, match="is no checkout of ergo-rl"):
        make_job(mine, ELSEWHERE, mine.parent.parent, None, [])


def test_make_job_installed_ships_the_folder_of_the_recipe(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By itself the current folder; the entrypoint is the same as in a checkout."""
    monkeypatch.chdir(mine.parent.parent)
    for job in (
        make_job(mine, ELSEWHERE, installed=True),
        make_job(Path("recipes/mine.yaml"), ELSEWHERE, Path(), installed=True),
    ):
        assert job.installed and job.runtime_env()["working_dir"] == str(mine.parent.parent.resolve())
        assert job.entrypoint.startswith("python -m ergo_rl.jobs train recipes/mine.yaml runs_dir=/shared/runs ")
    with pytest.raises(ConfigError, match=r"ergo-7b\.yaml is not below"):
        make_job(PAPER, ELSEWHERE, installed=True)
    assert not make_job(PAPER, ELSEWHERE, ROOT, installed=True).installed, "a checkout is used where it travels"


def test_make_job_needs_no_checkout_when_requirements_install_ergo_rl(mine: Path) -> None:
    needs = mine.parent / "needs.txt"
    for line, enough in {
        "ergo-rl[gpu]==0.1.0": True,
        "/shared/ergo_rl-0.1.0-py3-none-any.whl": True,
        "vllm": False,
    }.items():
        needs.write_text(f"{line}\n")
        if enough:
            assert make_job(mine, ELSEWHERE, mine.parent, needs).installed
        else:
            with pytest.raises(ConfigError, match="or give --installed"):
                make_job(mine, ELSEWHERE, mine.parent, needs)


def test_make_job_from_a_wheel_ships_the_current_folder(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``ROOT`` is then a folder of site-packages."""
    monkeypatch.setattr(submission, "ROOT", Path(pytest.__file__).parent)
    monkeypatch.chdir(mine.parent)
    job = make_job(Path("mine.yaml"), ELSEWHERE)
    assert job.installed and job.recipe == Path("mine.yaml") and job.working_dir == mine.parent.resolve()


def test_make_job_accepts_relative_runs_dir_with_checkpoint_url() -> None:
    overrides = [*ELSEWHERE[1:], "checkpoint.url=s3://bucket/runs"]
    assert make_job(PAPER, overrides, ROOT, None, []).config.runs_dir == "runs"


def test_package_of_the_checkout_is_small_and_holds_the_code(tmp_path: Path) -> None:
    """By Ray's own packaging."""
    from ray._private.runtime_env.packaging import create_package

    package = tmp_path / "package.zip"
    job = make_job(PANELS, ["runs_dir=/shared/runs"], ROOT)
    create_package(str(ROOT), package, include_gitignore=True, excludes=job.excludes)
    names = zipfile.ZipFile(package).namelist()
    assert {name for name in names if not name.endswith("/")} == set(job.files()), "the size that is said is its size"
    wanted = {
        "jobs/commands/train.py",
        "configs/ergo-7b.yaml",
        "jobs/templates/report.js",
        "models/panels-policy/model.safetensors",
    }
    assert wanted <= set(names)
    unwanted = ("tests/", "docs/", "runs/", "data/", ".git/", ".venv/")
    assert not [name for name in names if name.startswith(unwanted) or "__pycache__" in name]
    assert package.stat().st_size < 30 * 2**20


def test_job_server_unreachable_is_named_with_the_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SubmitError, match=r"no job server answers at http://127\.0\.0\.1:9"):
        JobServer("http://127.0.0.1:9")
    assert main(["--status", "run", "--address", "http://127.0.0.1:9"]) == 1
    assert "http://HEAD:8265" in capsys.readouterr().err


def manifest(*overrides: str, options: ManifestOptions = OPTIONS) -> dict[str, Any]:
    config = load_config(PAPER, [*ELSEWHERE, *overrides])
    text = kuberay(config, "python -m ergo_rl.jobs train configs/ergo-7b.yaml", options)
    assert "# kubectl create secret generic ergo-rl --from-literal=REWARD_KEY=..." in text
    return dict(yaml.safe_load(text))


def test_kuberay_manifest_asks_for_the_hardware_of_the_recipe() -> None:
    found = manifest("hardware.nodes=2")
    assert (found["apiVersion"], found["kind"], found["metadata"]["name"]) == ("ray.io/v1", "RayJob", "ergo-7b")
    spec = found["spec"]
    assert spec["entrypoint"] == "python -m ergo_rl.jobs train configs/ergo-7b.yaml"
    assert spec["shutdownAfterJobFinishes"] is True
    variables = yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]
    assert variables == {"PYTHONPATH": "/ergo-rl", "RAY_JOB_STOP_WAIT_TIME_S": "600", "A": "b c"}
    head, (workers,) = spec["rayClusterSpec"]["headGroupSpec"], spec["rayClusterSpec"]["workerGroupSpecs"]
    assert head["rayStartParams"]["num-cpus"] == "0", "no role is put on the head, so the driver has it"
    assert [workers[key] for key in ("replicas", "minReplicas", "maxReplicas")] == [2, 2, 2]
    for group in (head, workers):
        (container,) = group["template"]["spec"]["containers"]
        assert container["image"] == "registry/ergo:1"
        key = {"secretKeyRef": {"name": "ergo-rl", "key": "HF_TOKEN"}}
        assert {"name": "HF_TOKEN", "valueFrom": key} in container["env"]
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounts == {"shared-memory": "/dev/shm", "runs": "/shared/runs"}
        assert {volume["name"] for volume in group["template"]["spec"]["volumes"]} == set(mounts)
    resources = workers["template"]["spec"]["containers"][0]["resources"]
    assert resources["limits"] == resources["requests"] == {"cpu": 32, "memory": "400Gi", "nvidia.com/gpu": 4}
    assert "nvidia.com/gpu" not in head["template"]["spec"]["containers"][0]["resources"]["limits"]


def test_manifests_equal_the_committed_files() -> None:
    """The Slurm script letter by letter, the RayJob as YAML, the environment in it as YAML too."""
    config = load_config(PAPER, [*ELSEWHERE, "hardware.nodes=2"])
    entrypoint = "python -m ergo_rl.jobs train configs/ergo-7b.yaml 'name=two words'"
    folder = Path(__file__).parent / "manifests"
    assert slurm(config, entrypoint, OPTIONS) == (folder / "slurm.sh").read_text()

    def parsed(text: str) -> dict[str, Any]:
        job = yaml.safe_load(text)
        job["spec"]["runtimeEnvYAML"] = yaml.safe_load(job["spec"]["runtimeEnvYAML"])
        job["spec"]["rayClusterSpec"].pop("rayVersion")
        return dict(job)

    assert parsed(kuberay(config, entrypoint, OPTIONS)) == parsed((folder / "kuberay.yaml").read_text())


HOSTILE = 'a: b # c "d" {e} [f] & *g\n- h \\ \N{SNOWMAN}'


def test_manifests_quote_hostile_values() -> None:
    options = ManifestOptions("reg/x:1", HOSTILE, ("KEY",), "1:00:00", "/x y/$(z)", (("A", HOSTILE),))
    config = load_config(PAPER, ELSEWHERE)
    config.runs_dir = f"/shared/{HOSTILE}"
    job = yaml.safe_load(kuberay(config, f"echo '{HOSTILE}'", options))["spec"]
    assert job["entrypoint"] == f"echo '{HOSTILE}'"
    assert yaml.safe_load(job["runtimeEnvYAML"])["env_vars"]["A"] == HOSTILE
    pod = job["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]
    assert pod["volumes"][1]["persistentVolumeClaim"]["claimName"] == HOSTILE
    assert pod["containers"][0]["volumeMounts"][1]["mountPath"] == f"/shared/{HOSTILE}"
    assert "cd '/x y/$(z)'\n" in slurm(config, "driver", options)


def test_kuberay_without_claim_or_url_is_refused() -> None:
    bare = ManifestOptions("image", "", ("REWARD_KEY",), "1:00:00", "/x")
    with pytest.raises(ConfigError, match="--claim PVC is mounted at runs_dir"):
        manifest(options=bare)
    found = manifest("checkpoint.url=s3://bucket/runs", options=bare)
    pod = found["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    assert [volume["name"] for volume in pod["volumes"]] == ["shared-memory"]


@pytest.mark.parametrize(
    ("name", "plain"),
    [("ergo-7b", "ergo-7b"), ("Run_1.5 (new)", "run-1-5--new"), ("x" * 60, "x" * 47), ("—", "ergo-rl")],
)
def test_dns_name_is_valid_for_kubernetes(name: str, plain: str) -> None:
    assert dns_name(name) == plain


def test_slurm_script_asks_for_the_hardware_and_holds_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REWARD_KEY", "sk-very-secret")
    config = load_config(PAPER, [*ELSEWHERE, "hardware.nodes=2"])
    text = slurm(config, "python -m ergo_rl.jobs train configs/ergo-7b.yaml 'name=two words'", OPTIONS)
    lines = [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH")]
    options = dict(line.partition("=")[::2] for line in lines)
    sizes = [options[name] for name in ("nodes", "gpus-per-node", "cpus-per-task", "mem")]
    assert sizes == ["2", "4", "32", "400G"]
    assert options["signal"] == "B:USR1@600" and options["export"] == "PATH,HOME,USER,REWARD_KEY,HF_TOKEN"
    assert "sk-very-secret" not in text
    script = tmp_path / "job.sh"
    script.write_text(text)
    assert subprocess.run(["bash", "-n", str(script)], capture_output=True).returncode == 0


def test_slurm_script_starts_nodes_and_driver_in_order(tmp_path: Path) -> None:
    """With stand-ins for Slurm's and Ray's commands, because there is no Slurm here: what is started where, in which
    order, with which environment, and that the token's file is private and goes."""
    bin_folder, checkout = tmp_path / "bin", tmp_path / "check out"
    bin_folder.mkdir()
    checkout.mkdir()
    stand_ins = {
        "scontrol": "printf 'node1\\nnode2\\n'",
        "srun": 'case "$*" in *hostname*) echo 10.0.0.1 10.0.0.2;; *) echo "srun $*" >> "$CALLS"; command -p sleep 1;; '
        "esac",
        "ray": '[ -e "$CALLS.asked" ] || { touch "$CALLS.asked"; exit 1; }',
        "sleep": ":",
        "driver": 'until [ "$(wc -l < "$CALLS")" = 2 ]; do command -p sleep 0.05; done; file=$RAY_AUTH_TOKEN_PATH\n'
        'echo "driver $RAY_ADDRESS $PLAIN $(stat -c %a "$file") $(wc -c < "$file")" >> "$CALLS"; exit 7',
    }
    for name, body in stand_ins.items():
        (bin_folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (bin_folder / name).chmod(0o755)
    options = ManifestOptions("", "", ("REWARD_KEY",), "1:00:00", str(checkout), (("PLAIN", "b c"),))
    text = slurm(load_config(PAPER, [*ELSEWHERE, "hardware.nodes=2"]), "driver", options)
    (tmp_path / "job.sh").write_text(text)
    path = f"{bin_folder}:/usr/bin:/bin:{Path(sys.executable).parent}"
    slurm_says = {"SLURM_JOB_ID": "5", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2"}
    environment = {"PATH": path, "CALLS": str(tmp_path / "calls"), **slurm_says}
    run = ["bash", str(tmp_path / "job.sh")]
    without = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=60)
    assert without.returncode != 0 and "REWARD_KEY: is not set in the shell that called sbatch" in without.stderr
    ended = subprocess.run(run, env={**environment, "REWARD_KEY": "sk"}, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 7, ended.stderr
    calls = (tmp_path / "calls").read_text().splitlines()
    calls = sorted(re.sub(r"python -c import .* keep ray", "KEEP ray", call) for call in calls)
    assert calls[0] == "driver 10.0.0.1:6379 b c 600 64"
    common = "--num-cpus=32 --num-gpus=4 --disable-usage-stats --block"
    assert calls[1:] == [
        f"srun --nodes=1 --ntasks=1 --exclude=node1 KEEP ray start --address=10.0.0.1:6379 {common}",
        "srun --nodes=1 --ntasks=1 --nodelist=node1 KEEP ray start --head --node-ip-address=10.0.0.1 "
        f"--port=6379 {common}",
    ]
    assert not list((checkout / "runs").iterdir()), "the token is gone"


def test_submit_dry_runs_print_the_manifests(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(PAPER), *ELSEWHERE, "--dry-run"]
    assert main([*arguments, "kuberay", "--claim", "c", "--secret", "HF_TOKEN"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["kind"] == "RayJob"
    assert main([*arguments, "slurm", "--time", "1:00:00"]) == 0
    assert "#SBATCH --time=1:00:00" in capsys.readouterr().out
    assert main([*arguments, "kuberay"]) == 1
    assert "--claim PVC" in capsys.readouterr().err
