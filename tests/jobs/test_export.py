"""An exported folder: the weights of the checkpoint, readable by transformers, with a card that says what they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
import yaml
from omegaconf import OmegaConf

from ergo_rl.jobs import export
from ergo_rl.jobs.checkpoint_store import CheckpointStore, DamagedCheckpoint
from ergo_rl.jobs.commands.export import main
from ergo_rl.jobs.config import ConfigError, load_config
from ergo_rl.jobs.evaluation import wilson
from ergo_rl.jobs.report import NotARunFolder
from ergo_rl.learners.checkpoint import COUNTERS
from ergo_rl.learners.model import PolicyModel
from tests.conftest import ROOT
from tests.factories import tiny_model

HOSTILE = "{image}{question} | ``` `code`\n---\nlicense: none"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of steps 10 (the best) and 20 (the newest), in which every trained weight is the base's plus 1 or 2;
    the vision tower is frozen."""
    folder = tmp_path_factory.mktemp("runs") / "story"
    base = tiny_model(folder / "base")
    models = [f"{key}={base}" for key in ("learner.model", "rollout.engine.model")]
    config = load_config(ROOT / "configs" / "panels.yaml", [*models, "name=story", "total_steps=40"])
    config.episode.prompts.fine = HOSTILE
    settings = OmegaConf.to_yaml(OmegaConf.structured(config))
    (folder / "config.yaml").write_text(settings)
    lines = [
        {"step": n, "eval/trajectories": 100.0, "eval/accuracy": 0.5 + n / 100, "eval/unscored": 20.0 * (n == 10),
         "eval/coverage": 0.25} | ({"eval/questions": 110.0} if n == 10 else {}) for n in (0, 10)
    ]  # fmt: skip
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    trained = {name: one.data for name, one in PolicyModel(config.learner).vlm.named_parameters() if one.requires_grad}
    for step, more, score in ((10, 1.0, 0.9), (20, 2.0, 0.4)):
        state = {COUNTERS: torch.tensor([step, step])}
        for name, value in trained.items():
            state |= {name: value + more, f"{name}/exp_avg": value * 9, f"{name}/exp_avg_sq": value * 9}
        with CheckpointStore(folder / "checkpoints").write(step, score) as draft:
            draft.write("learner-00000.safetensors", safetensors.torch.save(state))
            draft.write("config.yaml", settings.encode())
    return folder


@pytest.mark.parametrize(("which", "step", "more"), [("", 20, 2.0), ("best", 10, 1.0), ("step-000010", 10, 1.0)])
def test_export_of_a_checkpoint_loads_in_transformers(
    run: Path, tmp_path: Path, which: str, step: int, more: float
) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    out = tmp_path / "deep" / "out"
    assert export.export(run, out, which) == step
    found = dict(AutoModelForImageTextToText.from_pretrained(out).named_parameters())
    before = dict(AutoModelForImageTextToText.from_pretrained(run / "base").named_parameters())
    assert found.keys() == before.keys() and len(found) > 30
    for name, value in found.items():
        torch.testing.assert_close(value, before[name] + (0.0 if "visual" in name else more))
    AutoProcessor.from_pretrained(out)
    assert {path.name for path in out.parent.iterdir()} == {"out"}, "nothing is left beside it"
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in out.iterdir())


def test_export_prefers_the_finished_policy(run: Path, tmp_path: Path) -> None:
    policy = run / "policy"
    policy.mkdir()
    try:
        (policy / "model.safetensors").write_bytes(b"the last weights")
        assert export.export(run, tmp_path / "out") == 40
    finally:
        (policy / "model.safetensors").unlink()
        policy.rmdir()
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == b"the last weights"


def test_model_card_describes_policy_scores_and_prompts(run: Path, tmp_path: Path) -> None:
    export.export(run, tmp_path / "out", "best")
    card = (tmp_path / "out" / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["library_name"] == "transformers" and "base_model" not in front, "a folder is no hub name"
    assert "license" not in front and "trained for | 10 of 40 steps of 64 trajectories |" in card
    low, high = wilson(66, 110)
    assert f"| accuracy | 50.0% (40.4% to 59.6%) | 60.0% ({low:.1%} to {high:.1%}) |" in card, "of all 110 rows after"
    assert "| target coverage | 25.0% | 25.0% |" in card
    assert "with ```` {image}{question} | ``` `code`\\n---\\nlicense: none ````" in card, "on one line, in code"
    recipe = load_config(tmp_path / "out" / "ergo-rl.yaml")
    assert recipe.episode.prompts.fine == HOSTILE
    config = recipe
    config.learner.model = "Qwen/Qwen2.5-VL-7B-Instruct"
    assert "\nbase_model: Qwen/Qwen2.5-VL-7B-Instruct\n" in export.model_card(config, 10, [])
    config.learner.model += "@v1.0"
    pinned = export.model_card(config, 10, [])
    assert "\nbase_model: Qwen/Qwen2.5-VL-7B-Instruct\n" in pinned and "`Qwen/Qwen2.5-VL-7B-Instruct@v1.0` |" in pinned
    assert "The run has no evaluation of step 10." in export.model_card(config, 10, [])


def test_export_refusals_leave_nothing_behind(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(NotARunFolder, match="has no checkpoint 'step-000015'; it has: step-000010, step-000020"):
        export.export(run, tmp_path / "out", "step-000015")
    with pytest.raises(NotARunFolder, match=r"it has no config\.yaml"):
        export.export(tmp_path, tmp_path / "out")
    with pytest.raises(ConfigError, match="already exists; name another folder with --out"):
        export.export(run, tmp_path)
    weights = run / "checkpoints" / "step-000010" / "learner-00000.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + b"\0")
    with pytest.raises(DamagedCheckpoint, match=r"the checksum of learner-00000\.safetensors differs"):
        export.export(run, tmp_path / "out", "step-000010")
    weights.write_bytes(content)
    assert not list(tmp_path.iterdir())
    assert main([str(tmp_path)]) == 1 and "ergo-rl export: " in capsys.readouterr().err
