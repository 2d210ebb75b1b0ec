"""``ergo-rl pretrain``: settings, resuming, the model card."""

from __future__ import annotations

from pathlib import Path

import pytest

from ergo_rl.examples.panels.pretrain import PretrainConfig, _continues, main, model_card


def test_scaled_config_has_fewer_steps_of_every_stage() -> None:
    short = PretrainConfig().scaled(0.01)
    assert (short.tower.steps, short.policy.steps, short.reward.steps, short.scene_batches) == (16, 20, 25, 12)
    assert PretrainConfig().scaled(2).scene_batches == PretrainConfig().scene_batches


def test_a_run_is_continued_only_with_its_own_settings(tmp_path: Path) -> None:
    work = tmp_path / "work"
    assert _continues(work, PretrainConfig(), resume=True)
    (work / "tower.pt").write_text("")
    assert _continues(work, PretrainConfig(), resume=True) and (work / "tower.pt").exists()
    assert not _continues(work, PretrainConfig(seed=1), resume=True) and (work / "tower.pt").exists()
    assert _continues(work, PretrainConfig(seed=1), resume=False) and not (work / "tower.pt").exists()


def test_the_command_line_refuses_what_makes_no_sense(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["panels", "--steps-scale", "0"])
    assert "must be above 0" in capsys.readouterr().err
    assert _continues(tmp_path / ".pretrain-0", PretrainConfig(seed=9), resume=False)
    assert main(["panels", "--out", str(tmp_path), "--resume"]) == 1
    assert "other settings" in capsys.readouterr().err


def test_the_card_says_how_it_was_made_and_what_it_can() -> None:
    card = model_card(
        "reward", "ergo-rl pretrain panels --seed 3", {"tower": 90.0}, {"questions": 512, "legible": 0.98}
    )
    assert "`ergo-rl pretrain panels --seed 3`" in card and "tower 1.5 min" in card
    assert "512 held-out scenes" in card and "| legible | 0.980 |" in card
