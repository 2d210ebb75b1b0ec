"""The training command, whole: bad data is skipped and counted, a bad set-up is refused with one clear message."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.lives import descendants
from ergo_rl.episodes.probe import Replacement
from ergo_rl.examples.panels.scenes import PanelsConfig, Split, question
from ergo_rl.jobs.trackers import gauge_name
from ergo_rl.questions.dataset import write_questions
from tests.cluster.test_placement import LOOPBACK, listening, sockets_of
from tests.conftest import ROOT
from tests.jobs.test_trackers import on_the_dashboard

pytestmark = pytest.mark.system
TIMEOUT_S = 420


@contextmanager
def listeners_outside_loopback(root: int) -> Iterator[set[str]]:
    """Fills, while the block runs, with whatever processes below ``root`` listen on elsewhere (command and address)."""
    seen, over = set[str](), threading.Event()

    def look() -> None:
        while not over.wait(0.3):
            owners, ports = sockets_of(descendants(root)), listening(os.getuid())
            here = {f"{owners[one][:60]} {ports[one]}" for one in owners.keys() & ports.keys()}
            seen.update(one for one in here if one.split()[-1].split(":")[0] not in LOOPBACK)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


def named_elsewhere(folder: Path) -> list[str]:
    """A command prefix, under which this machine's own name resolves to another of its addresses; empty where no
    namespaces can be made (some containers)."""
    hosts = folder / "hosts"
    hosts.write_text(f"127.0.0.1 localhost\n{other_address()} {socket.gethostname()}\n")
    inside = f'mount --bind {hosts} /etc/hosts; exec "$@"'
    prefix = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", inside, "-"]
    works = subprocess.run([*prefix, "true"], capture_output=True)
    return prefix if works.returncode == 0 and not works.stderr else []


def other_address() -> str:
    """As other machines reach this one; where none does, one of its own that is not 127.0.0.1."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # nothing is sent
            return str(probe.getsockname()[0])
        except OSError:
            return "127.0.0.2"


def ergo_rl_train(*overrides: str, prefix: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    command = [
        *prefix,
        sys.executable,
        "-m",
        "ergo_rl.jobs.commands.train",
        "configs/panels.yaml",
        "embedded.panels=null",
        "evaluation.paths=[]",
        *overrides,
    ]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S)


@pytest.mark.timeout(TIMEOUT_S + 60)
def test_train_with_bad_rows_skips_and_counts_them(tmp_path: Path) -> None:
    """Three steps of 3 x 4 trajectories from 12 rows, 3 of them bad: one image is no picture, one is cut off behind its
    header, one text holds a special token. ZeRO-3 on two ranks. The machine's name resolves to an address that others
    reach, and yet no process of the run listens there."""
    rows = [question(PanelsConfig(), 0, Split.TRAIN, index) for index in range(12)]
    image = rows[3].image
    assert isinstance(image, bytes)
    rows[3] = replace(rows[3], image=image[: len(image) // 2])
    rows[5] = replace(rows[5], image=b"no picture at all")
    rows[7] = replace(rows[7], text="What is <|image_pad|>?")
    write_questions(tmp_path / "questions.parquet", iter(rows))

    with listeners_outside_loopback(os.getpid()) as elsewhere:
        done = ergo_rl_train(
            "name=bad-rows", f"runs_dir={tmp_path}", f"questions.paths=[{tmp_path / 'questions.parquet'}]",
            "total_steps=3", "groups_per_step=4", "rollout.group_size=3", "samples_every=2", "weight_check.every=1",
            f"evaluation.paths=[{tmp_path / 'questions.parquet'}]", "evaluation.questions=4", "evaluation.every=2",
            "evaluation.probe=1",
            "learner.ranks=2", "learner.zero_stage=3", "learner.threads=1",
            "metrics.exporters=[tensorboard,prometheus]", prefix=named_elsewhere(tmp_path),
        )  # fmt: skip
    assert elsewhere == set()
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.rstrip().splitlines()[-1].startswith(f"Done. {tmp_path / 'bad-rows'}/ holds")

    run = tmp_path / "bad-rows"
    steps: list[dict[str, Any]] = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [one["step"] for one in steps] == [0, 1, 2]
    for one in steps:
        assert one["rollout/trajectories"] == 12
        assert one["learner/length_mismatches"] == 0 and one["reward/unscored"] == 0
        assert one["learner/mismatch_mean"] <= 1e-5 and one["learner/mismatch_max"] <= 1e-3
        assert one["proof/mismatch_mean"] <= 1e-5 and one["proof/mismatch_max"] <= 1e-3
    # 12 questions are played; the 9 good rows are not enough, so each bad one was met once at least. Two are seen to be
    # bad when the row is read, the image that is cut off behind its header only when it is decoded.
    assert steps[-1]["count/bad_rows"] >= 2 and steps[-1]["count/unplayable"] >= 1
    evaluations = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    assert [one["step"] for one in evaluations] == [0, 2, 3]
    # of the first four rows, in the order of the file, the last is the one that is cut off
    assert all(one["eval/trajectories"] == 3 and one["eval/failed"] == 1 for one in evaluations)
    assert all(0 <= one["eval/coverage"] <= 1 for one in evaluations)
    for one in evaluations:  # and in each column of the probe it fails once
        assert {one[f"eval/probe_{how}_failed"] for how in Replacement} == {1} and one["eval/visual_tokens"] >= 36
        assert one["eval/probe_none_replaced"] <= 3 and "eval/probe_none_gain_low" in one
    assert "Held-out questions, before -> after: target coverage" in done.stdout

    figures = {name for one in (*steps, *evaluations) for name in one}
    assert on_the_dashboard() - {f"ray_{gauge_name(name)}" for name in figures} == set()

    log = (run / "run.log").read_text()
    for bad in (3, 5, 7):
        assert rows[bad].id in log
    assert "<|image_pad|>" in log

    assert {path.name for path in (run / "samples").iterdir()} == {"step-000000", "step-000002"}
    sample = json.loads((run / "samples" / "step-000000" / "trajectories.jsonl").read_text().splitlines()[0])
    assert sample["policy_versions"][0] == 0 and sample["replies"]
    assert list((run / "tensorboard").iterdir()) and (run / "config.yaml").is_file()

    from transformers import AutoModelForImageTextToText

    AutoModelForImageTextToText.from_pretrained(run / "policy")  # loads as an ordinary folder


def test_train_names_a_misspelt_key() -> None:
    done = ergo_rl_train("learner.optimizer.learning_rate=1")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "unknown key 'learner.optimizer.learning_rate'" in done.stderr


def test_train_names_a_missing_column(tmp_path: Path) -> None:
    table = pa.table({"id": ["a"], "image": [b"x"], "text": ["?"], "options": [[]]})
    pq.write_table(table, tmp_path / "bad.parquet")
    done = ergo_rl_train(f"questions.paths=[{tmp_path / 'bad.parquet'}]", f"runs_dir={tmp_path}")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "bad.parquet" in done.stderr and "answer" in done.stderr


def test_train_refuses_a_bad_row_when_told_so(tmp_path: Path) -> None:
    bad = replace(question(PanelsConfig(), 0, Split.TRAIN, 0), id="the-bad-one", text="What is <|image_pad|>?")
    write_questions(tmp_path / "questions.parquet", iter([bad]))
    done = ergo_rl_train(
        f"questions.paths=[{tmp_path / 'questions.parquet'}]", "questions.on_bad_row=error", f"runs_dir={tmp_path}"
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "the-bad-one" in done.stderr and "<|image_pad|>" in done.stderr


def test_train_names_an_unreachable_verifier_endpoint(tmp_path: Path) -> None:
    """Before the first step, not as a reward of 0."""
    write_questions(tmp_path / "questions.parquet", iter([question(PanelsConfig(), 0, Split.TRAIN, 0)]))
    done = ergo_rl_train(
        f"questions.paths=[{tmp_path / 'questions.parquet'}]", f"runs_dir={tmp_path}",
        "reward.verifier.backend=endpoint",
        "reward.verifier.endpoint.url=http://127.0.0.1:9/v1", "reward.verifier.endpoint.model=x",
        "reward.verifier.endpoint.retries=1", "reward.verifier.endpoint.backoff_s=0.1",
    )  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr[-2000:]
    assert "http://127.0.0.1:9/v1/chat/completions: ConnectError" in done.stderr


def test_train_names_a_missing_model(tmp_path: Path) -> None:
    write_questions(tmp_path / "questions.parquet", iter([question(PanelsConfig(), 0, Split.TRAIN, 0)]))
    done = ergo_rl_train(
        f"questions.paths=[{tmp_path / 'questions.parquet'}]", f"runs_dir={tmp_path}",
        "learner.model=models/no-such-policy", "rollout.engine.model=models/no-such-policy",
    )  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr[-2000:]
    assert "models/no-such-policy" in done.stderr


def test_evaluate_names_a_missing_model(tmp_path: Path) -> None:
    write_questions(tmp_path / "questions.parquet", iter([question(PanelsConfig(), 0, Split.HELDOUT, 0)]))
    module = "ergo_rl.jobs.commands.evaluate"
    command = [sys.executable, "-m", module, "--model", "models/no-such-policy", "embedded.panels=null"]
    paths = [
        f"questions.paths=[{tmp_path / 'questions.parquet'}]",
        f"evaluation.paths=[{tmp_path / 'questions.parquet'}]",
    ]
    done = subprocess.run([*command, *paths], cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr[-2000:]
    assert "there is no model at models/no-such-policy" in done.stderr
