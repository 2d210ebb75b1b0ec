"""What a run notices when it is resumed: another configuration, other content behind the same paths, bad notes."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from ergo_rl.jobs import fingerprints
from ergo_rl.jobs.checkpoint_store import CheckpointStore
from ergo_rl.jobs.config import CheckpointConfig, ConfigError, TrainConfig, config_yaml, load_config, stored_config
from ergo_rl.jobs.fingerprints import inputs_json, inputs_of, other_content, read_inputs
from ergo_rl.jobs.resume import differences, find_resume_point
from ergo_rl.jobs.run_folder import RunFolder
from ergo_rl.jobs.run_paths import CHECKPOINTS, CONFIG, ENDED, INPUTS, POLICY, replace_file
from tests.conftest import ROOT

PANELS = ROOT / "configs" / "panels.yaml"


@cache
def configured(*overrides: str) -> TrainConfig:
    return load_config(PANELS, overrides)


def stored(config: TrainConfig, **without: str) -> Any:
    return OmegaConf.create(config_yaml(config))


@pytest.mark.parametrize(
    ("before", "now", "expected"),
    [
        ([], ["reward.weights.soft_box=1.0"], ["reward.weights.soft_box (not there, now 1.0)"]),
        (["reward.weights.soft_box=1.0"], [], ["reward.weights.soft_box (1.0, now not there)"]),
        ([], ["rollout.engine.extra.rope_theta=5"], ["rollout.engine.extra.rope_theta (not there, now 5)"]),
        (["reward.verifier.engine.extra.a=1"], [], ["reward.verifier.engine.extra.a (1, now not there)"]),
        (["rollout.engine.extra.a={b: 1}"], ["rollout.engine.extra.a={b: 2}"],
         ["rollout.engine.extra.a.b (1, now 2)"]),
        ([], ["reward.alpha=3"], ["reward.alpha (1.0, now 3.0)"]),
        ([], ["start_deadline_s=7", "alerts.window=9", "checkpoint.every=3", "learner.ranks=2"], []),
        ([], ["reward.alpha=3", "reward.weights.soft_box=1", "checkpoint.accept_changes=[reward.weights]"],
         ["reward.alpha (1.0, now 3.0)"]),
    ],
)  # fmt: skip
def test_differences_name_every_key_that_is_another_one(before: list[str], now: list[str], expected: list[str]) -> None:
    assert differences(stored(configured(*before)), configured(*now)) == expected


def test_key_that_an_older_version_did_not_know_counts_with_its_default() -> None:
    saved = stored(configured())
    for key in ("stale_weight", "temperature", "model"):
        del saved[key]
    del saved.learner.loss.objective
    assert differences(saved, configured()) == []
    found = differences(saved, configured("stale_weight=0.5"))
    assert found == ["stale_weight (not known to the version that saved it, now 0.5)"]


# --- content --------------------------------------------------------------------------------------------------------


@pytest.fixture
def inputs(tmp_path: Path) -> TrainConfig:
    """A training file and a base model that a test may change."""
    shutil.copytree(ROOT / "models" / "panels-policy", tmp_path / "model")
    (tmp_path / "train.parquet").write_bytes(bytes(range(256)) * 4000)
    config = configured()
    return replace(
        config,
        runs_dir=str(tmp_path / "runs"),
        name="story",
        questions=replace(config.questions, paths=[str(tmp_path / "train.parquet")]),
        learner=replace(config.learner, model=str(tmp_path / "model")),
    )


def put(path: Path, at: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at, 0 if at >= 0 else 2)
        file.write(content)


def remove_tokens(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("whole", [True, False], ids=["hashed whole", "in pieces"])
@pytest.mark.parametrize(
    ("change", "key"),
    [
        (lambda folder: put(folder / "train.parquet", 0, b"\xff"), "questions.paths.0"),
        (lambda folder: put(folder / "train.parquet", -1, b"\x00"), "questions.paths.0"),
        (lambda folder: (folder / "train.parquet").write_bytes(b"shorter"), "questions.paths.0"),
        (lambda folder: put(folder / "model" / "model.safetensors", -4000, b"\x3f" * 4000), "learner.model"),
        (lambda folder: put(folder / "model" / "model.safetensors", 9, b"X"), "learner.model"),
        (lambda folder: put(folder / "model" / "config.json", 2, b"X"), "learner.model"),
        (lambda folder: remove_tokens(folder / "model" / "tokenizer.json"), "learner.model"),
    ],
)
def test_other_content_behind_the_same_path_is_named(
    inputs: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any, key: str, whole: bool
) -> None:
    if not whole:
        monkeypatch.setattr(fingerprints, "WHOLE_BYTES", 1 << 10)
        monkeypatch.setattr(fingerprints, "PIECE_BYTES", 1 << 10)
    before = inputs_of(inputs)
    assert before == inputs_of(inputs) and set(before) == {
        "questions.paths.0", "learner.model", "reward.verifier.engine.model",
    }  # fmt: skip
    change(tmp_path)
    found = other_content(before, inputs_of(inputs), inputs)
    assert list(found) == [key] and f"{key} (other content behind {tmp_path}" in found[key]


def test_pieces_of_a_large_file_reach_from_its_first_to_its_last_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = list(fingerprints._pieces(10**12))
    assert len(pieces) == 256 and pieces[0][0] == 0 and sum(pieces[-1]) == 10**12, "16 MiB of a terabyte"
    assert list(fingerprints._pieces(0)) == []


def save(config: TrainConfig, step: int = 10) -> Path:
    """A run with one checkpoint, as far as resuming looks at it."""
    with RunFolder.open(config) as folder:
        with CheckpointStore(folder.path / CHECKPOINTS).write(step) as writer:
            for name in (CONFIG, INPUTS):
                writer.write(name, (folder.path / name).read_bytes())
        return folder.path


def test_resume_with_other_content_is_refused_by_key_unless_it_is_accepted(inputs: TrainConfig, tmp_path: Path) -> None:
    run = save(inputs)
    put(tmp_path / "train.parquet", 500_000, b"another row")
    put(tmp_path / "model" / "model.safetensors", -4000, b"\x3f" * 4000)
    with pytest.raises(ConfigError) as refused:
        find_resume_point(inputs)
    assert f"{run} holds a run that stands after step 10 and has another " in str(refused.value)
    assert "learner.model (other content behind" in str(refused.value)
    assert "questions.paths.0 (other content behind" in str(refused.value)
    assert "checkpoint.accept_changes" in str(refused.value) and "resume=never" in str(refused.value)
    some = replace(inputs, checkpoint=CheckpointConfig(accept_changes=["questions.paths"]))
    with pytest.raises(ConfigError, match=r"has another learner\.model \(other content"):
        find_resume_point(some)
    accepted = replace(inputs, checkpoint=CheckpointConfig(accept_changes=["questions", "learner.model"]))
    with (start := find_resume_point(accepted)).lock:
        assert start.folder == run and start.checkpoint is not None
    with (start := find_resume_point(replace(inputs, resume="never"))).lock:
        assert start.folder.name == "story-2"


def test_inputs_that_were_not_noted_are_not_compared(inputs: TrainConfig, tmp_path: Path, caplog: Any) -> None:
    assert read_inputs(tmp_path / "none.json") == {}
    for content in (b"", b"[]", b"\xff", b"[" * 100_000):
        (tmp_path / "inputs.json").write_bytes(content)
        assert read_inputs(tmp_path / "inputs.json") == {}
    assert "inputs.json cannot be read" in caplog.text
    (tmp_path / "inputs.json").write_bytes(inputs_json({"a": "1"}))
    assert read_inputs(tmp_path / "inputs.json") == {"a": "1"}
    nowhere = replace(inputs, learner=replace(inputs.learner, model="some/model-of-the-hub"))
    assert "learner.model" not in inputs_of(nowhere)


# --- texts from the environment ---------------------------------------------------------------------------------------


def test_texts_from_the_environment_are_never_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither into config.yaml nor by a copy of the configuration; numbers are written, for they are no keys."""
    monkeypatch.setenv("JUDGE_KEY", "sk-secret-1")
    monkeypatch.setenv("BASE", str(ROOT / "models" / "panels-policy"))
    monkeypatch.setenv("SEED", "7")
    recipe = tmp_path / "recipe.yaml"
    text = PANELS.read_text().replace("models/panels-policy", "${oc.env:BASE}")
    recipe.write_text(text)
    config = load_config(
        recipe,
        [
            f"runs_dir={tmp_path}", "name=story", "seed=${oc.env:SEED}",
            "rollout.engine.extra.key=${oc.env:JUDGE_KEY}", "rollout.engine.extra.list=[a,'${oc.env:JUDGE_KEY}']",
            "metrics.project=${rollout.engine.extra.key}-mine", "reward.verifier.endpoint.model=${oc.env:JUDGE_KEY}",
        ],
    )  # fmt: skip
    extra = config.rollout.engine.extra
    assert (extra["key"], extra["list"], config.seed) == ("sk-secret-1", ["a", "sk-secret-1"], 7)
    with RunFolder.open(replace(config, samples_every=1)) as folder:
        written = (folder.path / CONFIG).read_text()
        assert "sk-secret" not in written and "seed: 7" in written
        assert "key: ${oc.env:JUDGE_KEY}" in written and "model: ${oc.env:BASE}" in written
        assert str(ROOT / "models" / "panels-policy") not in written
        again = load_config(folder.path / CONFIG)
        assert (
            again == replace(config, samples_every=1) and differences(stored_config(folder.path / CONFIG), again) == []
        )
    monkeypatch.setenv("JUDGE_KEY", "sk-secret-2")  # a key that is changed is no other run
    assert differences(stored_config(folder.path / CONFIG), load_config(folder.path / CONFIG)) == []
    resolved = OmegaConf.create(written.replace("${oc.env:JUDGE_KEY}", "sk-secret-1"))  # as older versions wrote it
    assert differences(resolved, config) == []


# --- small files of state -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b'"done"', b'{"done": 1}', b"[" * 100_000])
def test_unreadable_ended_json_is_named_and_survived(inputs: TrainConfig, content: bytes, caplog: Any) -> None:
    run = save(inputs)
    (run / ENDED).write_bytes(content)
    with (start := find_resume_point(inputs)).lock:
        assert start.folder == run and start.checkpoint is not None, "it has no policy: it was not finished"
    assert f"{run / ENDED} cannot be read" in caplog.text or content == b'{"done": 1}'
    (run / POLICY).mkdir()
    with (start := find_resume_point(inputs)).lock:
        assert start.folder.name == ("story" if content == b'{"done": 1}' else "story-2")


def test_small_files_are_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.json"
    replace_file(path, b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr("os.fsync" if name == "fsync" else "pathlib.Path.replace", full)
            with pytest.raises(OSError, match="No space"):
                replace_file(path, b"new")
        assert path.read_bytes() == b"old" and [one.name for one in tmp_path.iterdir()] == ["state.json"]
    replace_file(path, b"new")
    assert path.read_bytes() == b"new"


def test_run_whose_configuration_cannot_be_read_and_that_saved_nothing_begins_anew(
    inputs: TrainConfig, caplog: Any
) -> None:
    with (start := find_resume_point(inputs)).lock:
        (start.folder / CONFIG).write_bytes(b"\xff\xfe{")
    with (again := find_resume_point(inputs)).lock:
        assert again.folder == start.folder and again.checkpoint is None
    assert "cannot be read" in caplog.text


def ended(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / ENDED).read_bytes())
    return found


def test_error_that_ends_a_run_is_not_hidden_by_a_disk_that_is_full(
    inputs: TrainConfig, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(RuntimeError, match="the reason"), RunFolder.open(inputs) as folder:
        monkeypatch.setattr("ergo_rl.jobs.run_folder.replace_file", full)
        raise RuntimeError("the reason")
    assert "ended.json could not be written: [Errno 28]" in caplog.text and not (folder.path / ENDED).exists()
