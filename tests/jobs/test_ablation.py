"""The plan of an ablation and its report; the training itself is tested in tests/system."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ergo_rl.jobs.ablation import AblationPlan, Curve, as_markdown, load_plan, runs_of, slug, write_report
from ergo_rl.jobs.commands.ablate import main
from ergo_rl.jobs.config import ConfigError
from tests.conftest import ROOT


@pytest.mark.parametrize("plan", sorted((ROOT / "configs" / "ablations").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_shipped_plans_load_row_by_row(plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    loaded = load_plan(plan, ["total_steps=3"])
    assert len(loaded.seeds) >= 3 and len(loaded.rows) >= 3 and loaded.overrides[-1] == "total_steps=3"


def test_a_misspelt_key_is_named_with_its_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    plan = tmp_path / "plan.yaml"
    plan.write_text("recipe: configs/panels.yaml\nrows: {good: [], bad: [reward.alhpa=1]}\n")
    with pytest.raises(ConfigError, match=r"row 'bad': unknown key 'reward\.alhpa'"):
        load_plan(plan, [])
    plan.write_text("recipe: configs/panels.yaml\nrow: {}\n")
    with pytest.raises(ConfigError, match="row"):
        load_plan(plan, [])
    with pytest.raises(ConfigError, match="there is no plan"):
        load_plan(tmp_path / "none.yaml", [])


def test_runs_go_row_by_row_and_finished_ones_count_with_their_settings_only(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("a: 0\nc: 3\n")
    plan = AblationPlan(str(recipe), ["a=1"], [0, 1], {"region + box": ["b=2"], "full": []})
    runs = runs_of(plan, tmp_path)
    assert [(run.row, run.seed) for run in runs] == [("region + box", 0), ("region + box", 1), ("full", 0), ("full", 1)]
    assert runs[0].overrides == ("a=1", "b=2") and runs[0].folder == tmp_path / "region-box"
    assert slug("weights (0.5, 0.25)") == "weights-0-5-0-25"
    runs[0].folder.mkdir()
    evaluations = [{"step": 0, "eval/coverage": 0.25}, {"step": 2, "eval/coverage": 0.5}]
    runs[0].result.write_text(
        json.dumps({"settings": runs[0].settings(), "training_s": 90.0, "evaluations": evaluations})
    )
    assert runs[0].curve() == Curve(0, evaluations, 90.0)
    changed = runs_of(AblationPlan(str(recipe), ["a=2"], [0], plan.rows), tmp_path)[0]
    assert changed.curve() is None, "another override makes it another run"
    recipe.write_text("a: 0\nc: 4\n")
    assert runs[0].curve() is None, "and so does an edited recipe"
    recipe.write_text("a: 5\nc: 3\n")
    assert runs[0].curve() is not None, "but not where an override covers the edit"
    runs[0].result.write_text("{")
    assert runs[0].curve() is None, "a result that was cut off is made again"


def curve(seed: int, after: float) -> Curve:
    steps = [{"step": 0, "eval/coverage": 0.25, "eval/accuracy": 0.5}, {"step": 4, "eval/coverage": after}]
    return Curve(seed, steps, 90.0)


def test_the_table_by_hand(tmp_path: Path) -> None:
    """Coverage 50 and 70 %: mean 60, sample deviation 14.1. A row without all its seeds says so."""
    rows = {"full": [], "region only": ["reward.beta=0"], "none yet": []}
    curves = {"full": [curve(0, 0.5), curve(1, 0.7)], "region only": [curve(1, 0.4)], "none yet": []}
    text = as_markdown("ergo-rl ablate x", rows, curves, seeds=2)
    assert "| *before RL* | 25.0% | 50.0% | - |" in text
    assert "| full | 60.0% ± 14.1 | - |" in text and "0: 50.0%, 1: 70.0% | 1.5 min, 1.5 min |" in text
    assert "| region only (1 of 2 seeds) | 40.0% |" in text and "| none yet (0 of 2 seeds) | - |" in text
    assert "- region only: `reward.beta=0`" in text
    written = write_report(tmp_path, "ergo-rl ablate x", rows, curves, 2)
    assert [path.name for path in written] == ["ablation.md", "ablation.json", "ablation.png"]
    assert (tmp_path / "ablation.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "ablation.json").read_text())["evaluations"]["full"]["1"][1]["eval/coverage"] == 0.7


def test_a_report_of_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert main(["configs/ablations/panels.yaml", "--report-only", "--out", str(tmp_path)]) == 0
    assert "(0 of 3 seeds)" in (tmp_path / "ablation.md").read_text()
    assert main(["no/such/plan.yaml", "--out", str(tmp_path)]) == 1
