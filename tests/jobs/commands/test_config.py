"""The reference of the configuration says what the dataclasses say, and the committed page is it."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from omegaconf import OmegaConf

from ergo_rl.jobs.commands.config import docs_of, main, reference
from ergo_rl.jobs.config import TrainConfig, all_keys, load_config
from tests.conftest import ROOT


def test_the_committed_page_is_what_the_code_says() -> None:
    assert (ROOT / "docs" / "configuration.md").read_text() == reference(), (
        "write it anew: ergo-rl config --docs > docs/configuration.md"
    )


def test_every_key_is_in_it_once() -> None:
    rows = [line.split("`")[1] for line in reference().splitlines() if line.startswith("| `")]
    sections = {key.rpartition(".")[0] for key in rows} | {"reward.verifier"}
    everything = all_keys(TrainConfig())
    assert sorted(rows) == sorted(key for key in everything if not any(one.startswith(f"{key}.") for one in everything))
    assert len(rows) == len(set(rows)) and "learner.loss" in sections


def test_rows_in_words() -> None:
    rows = reference().splitlines()
    assert (
        "| `learner.zero_stage` | int | `2` | DeepSpeed ZeRO: 1 shards the optimiser's state, 2 the gradients too, 3 "
        "the parameters too. |" in rows
    )
    assert "| `name` | str | (must be given) | Name of the run and of its folder. |" in rows
    kinds = [row.split(" | ")[:3] for row in rows]
    assert ["| `learner.loss.dual_clip`", "float or null", "`null`"] in kinds
    assert any(row.startswith("| `reward.verifier.backend` | `engine` \\| `endpoint` | `engine` |") for row in rows)


def test_strings_below_attributes() -> None:
    @dataclass
    class Some:
        """About it."""

        one: int = 1
        """The
        first."""
        two: int = 2
        three: int = 3
        """The third."""

    assert docs_of(Some) == {"one": "The\nfirst.", "three": "The third."}


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--docs"]) == 0
    assert capsys.readouterr().out == reference()
    assert main([str(ROOT / "configs/panels.yaml"), "total_steps=7"]) == 0
    printed = OmegaConf.create(capsys.readouterr().out)
    expected = load_config(ROOT / "configs/panels.yaml", ["total_steps=7"])
    assert OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(TrainConfig), printed)) == expected
    assert main([str(ROOT / "configs/panels.yaml"), "total_step=7"]) == 1
    assert "did you mean" in capsys.readouterr().err
