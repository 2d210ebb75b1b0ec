"""Recipes: every shipped one parses; what is wrong is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from ergo_rl.jobs.config import ConfigError, load_config
from ergo_rl.learners.advantages import Normalisation
from ergo_rl.learners.config import ObjectiveName
from tests.conftest import ROOT

PANELS = ROOT / "configs" / "panels.yaml"


@pytest.mark.parametrize("recipe", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_parses(recipe: Path) -> None:
    assert load_config(recipe).total_steps >= 1


def test_overrides_are_typed() -> None:
    config = load_config(PANELS, ["total_steps=7", "learner.optimizer.lr=3e-5", "reward.weights.format=0.5"])
    assert config.total_steps == 7
    assert config.learner.optimizer.lr == 3e-5 and config.learner.optimizer.total_steps == 7, "interpolated"
    assert config.reward.weights == {"accuracy": 1.0, "format": 0.5}


def test_objectives_are_chosen_by_name_or_value() -> None:
    for chosen in ("dr_grpo", "DR_GRPO"):
        config = load_config(PANELS, [f"learner.loss.objective={chosen}", "learner.advantages.normalisation=none"])
        assert config.learner.loss.objective == ObjectiveName.DR_GRPO
        assert config.learner.advantages.normalisation is Normalisation.NONE


def test_the_default_is_todays_loss_and_no_replaced_groups() -> None:
    config = load_config(PANELS)
    loss = config.learner.loss
    assert (loss.objective, loss.clip_low, loss.clip_high, loss.dual_clip) == (ObjectiveName.DAPO, 0.2, 0.2, None)
    assert (loss.kl, loss.mask_truncated, config.spare_groups) == (0.0, False, 0)
    assert load_config(PANELS, ["dynamic_sampling=true"]).spare_groups == 3 * 8


def test_the_panels_recipe_plays_what_was_pretrained() -> None:
    from ergo_rl.examples.panels.scenes import PROMPTS, VIEW_TOKENS

    config = load_config(PANELS)
    assert config.episode.prompts == PROMPTS and config.reward.verifier.prompts == PROMPTS
    assert config.episode.coarse_tokens == config.episode.fine_tokens == VIEW_TOKENS
    assert (config.reward.alpha, config.reward.beta, config.reward.gamma) == (1.0, 0.5, 0.6)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("total_step=7", r"unknown key 'total_step'.*did you mean 'total_steps'"),
        ("learner.optimiser.lr=1", r"unknown key 'learner.optimiser'.*did you mean 'learner.optimizer'"),
        ("rollout.engine.dtyp=x", r"unknown key 'rollout.engine.dtyp'.*did you mean 'rollout.engine.dtype'"),
        ("learner.lr=1", r"unknown key 'learner.lr'.*did you mean 'learner.optimizer.lr'"),
        ("total_steps=many", r"total_steps: .*many.*could not be converted"),
        ("learner.zero_stage=4", "zero_stage is 4; known: 1, 2, 3"),
        ("questions.on_bad_row=perhaps", "questions.on_bad_row: .*perhaps"),
        ("rollout.group_size=1", "rollout.group_size must be at least 2"),
        ("learner.temperature=0.7", r"learner.temperature \(0.7\) must equal rollout.sampling.temperature \(1.0\)"),
        ("learner.model=other", "must be the same model"),
        ("rollout.engine.max_model_len=128", r"rollout.engine.max_model_len \(128\) must be above 184"),
        ("dynamic_sampling_most=0", "dynamic_sampling_most must be at least 1"),
        ("learner.loss.objective=ppo", "learner.loss.objective: .*ppo"),
        ("learner.loss.mismatch_low=1.5", "mismatch_low is 1.5, mismatch_high 8.0; 1 lies between"),
        ("reward.weights.speed=1", "reward.weights takes accuracy, format, soft_box .*, not speed"),
        ("checkpoint.keep=0", r"checkpoint\.keep 0; need at least"),
        ("checkpoint.url=s3://key:secret@bucket/runs", r"checkpoint\.url holds a user or password"),
        ("reward.verifier.endpoint.url=https://me:sk-1@host/v1", r"endpoint\.url holds a user or password"),
        ("reward.unscored_tolerance=2", "unscored_tolerance is 2.0; it is a share"),
        ("reward.verifier.engine.model=''", r"reward\.verifier\.engine\.model has no value: name a reward model"),
        ("reward.verifier.backend=endpoint", r"reward\.verifier\.endpoint needs url and model"),
        ("seven", "'seven' is not an override; write key=value"),
    ],
)
def test_what_is_wrong_is_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(PANELS, [override])


def test_a_recipe_that_does_not_exist_says_which_do() -> None:
    with pytest.raises(ConfigError, match=r"there is no recipe .*panel\.yaml; recipes there: .*panels\.yaml"):
        load_config(PANELS.with_name("panel.yaml"))


def test_a_missing_value_says_how_to_give_it(tmp_path: Path) -> None:
    bare = tmp_path / "bare.yaml"
    bare.write_text("total_steps: 3\n")
    with pytest.raises(ConfigError, match=r"name has no value: set it in .*bare\.yaml or give name=\.\.\."):
        load_config(bare)


def test_a_recipe_that_is_no_yaml(tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("name: [unclosed\n")
    with pytest.raises(ConfigError, match="is not readable YAML"):
        load_config(bad)
