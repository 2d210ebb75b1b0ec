"""Recipes: the shipped ones load, wrong ones are refused by key and reason, and older ones are still read."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from ergo_rl.config_fields import _warn_of_former_name
from ergo_rl.errors import ErgoError
from ergo_rl.jobs.config import (
    ConfigError,
    ExporterName,
    TrainConfig,
    check,
    keys_that_may_change,
    load_config,
    stored_config,
)
from ergo_rl.learners.config import Normalisation, ObjectiveName, Schedule
from tests.conftest import ROOT

PANELS = ROOT / "configs" / "panels.yaml"


@pytest.mark.parametrize("recipe", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_load_config_of_a_shipped_recipe_succeeds(recipe: Path) -> None:
    assert load_config(recipe).total_steps >= 1


def test_load_config_with_overrides_converts_their_types() -> None:
    config = load_config(PANELS, ["total_steps=7", "learner.optimizer.lr=3e-5", "reward.weights.format=0.5"])
    assert config.total_steps == 7
    assert config.learner.optimizer.lr == 3e-5 and config.learner.optimizer.total_steps == 7, "interpolated"
    assert config.reward.weights == {"accuracy": 1.0, "format": 0.5}


PAPER = ROOT / "configs" / "ergo-7b.yaml"


@pytest.mark.parametrize("schedule", ["linear", "COSINE"])
def test_falling_schedule_when_the_recipe_does_not_say_its_end_then_no_step_has_a_learning_rate_of_0(
    schedule: str,
) -> None:
    for steps in (1, 50, 3000):
        config = load_config(PAPER, [f"total_steps={steps}", f"learner.optimizer.schedule={schedule}"])
        rates = [config.learner.optimizer.learning_rate(step) for step in range(steps)]
        assert min(rates) > 0 and config.learner.optimizer.learning_rate(max(steps, 100)) == 0
    wrong = ["total_steps=3000", f"learner.optimizer.schedule={schedule}", "learner.optimizer.total_steps=1000"]
    with pytest.raises(
        ConfigError, match=r"learner.optimizer.total_steps \(1000\) must be at least total_steps \(3000\)"
    ):
        load_config(PAPER, wrong)


def test_constant_of_dr_grpo_when_not_given_then_it_is_the_sum_of_the_reply_limits() -> None:
    assert load_config(PANELS).learner.loss.longest_reply == 64 + 48
    assert load_config(PANELS, ["learner.loss.longest_reply=7"]).learner.loss.longest_reply == 7


def test_load_config_with_an_objective_in_any_case_takes_it() -> None:
    for chosen in ("dr_grpo", "DR_GRPO", "Dr_Grpo"):
        config = load_config(PANELS, [f"learner.loss.objective={chosen}", "learner.advantages.normalisation=none"])
        assert config.learner.loss.objective == ObjectiveName.DR_GRPO
        assert config.learner.advantages.normalisation is Normalisation.NONE


def test_load_config_without_loss_keys_takes_dapo_and_no_spare_groups() -> None:
    config = load_config(PANELS)
    loss = config.learner.loss
    assert (loss.objective, loss.clip_low, loss.clip_high, loss.dual_clip) == (ObjectiveName.DAPO, 0.2, 0.2, None)
    assert (loss.kl, loss.mask_truncated, config.spare_groups) == (0.0, False, 0)
    assert load_config(PANELS, ["dynamic_sampling=true"]).spare_groups == 3 * 8


def test_panels_recipe_has_the_prompts_of_pretraining() -> None:
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
        (
            "rollout.group_size=1",
            "rollout.group_size is 1; it must be at least 2: advantages are relative",
        ),
        ("learner.temperature=0.7", r"learner.temperature \(0.7\) must equal rollout.sampling.temperature \(1.0\)"),
        ("learner.model=other", "must be the same model"),
        ("rollout.engine.max_model_len=128", r"rollout.engine.max_model_len \(128\) must be above 184"),
        ("dynamic_sampling_most=0", "dynamic_sampling_most is 0; it must be at least 1"),
        ("learner.loss.objective=ppo", "learner.loss.objective: .*ppo"),
        (
            "learner.loss.mismatch_low=1.5",
            "learner.loss.mismatch_low is 1.5; it must be below 1: a ratio of 1",
        ),
        ("reward.weights.speed=1", "reward.weights takes accuracy, format, soft_box .*, not speed"),
        ("checkpoint.keep=0", "checkpoint.keep is 0; it must be at least 1"),
        ("checkpoint.url=s3://key:secret@bucket/runs", r"checkpoint\.url holds a user or password"),
        ("reward.verifier.endpoint.url=https://me:sk-1@host/v1", r"endpoint\.url holds a user or password"),
        ("reward.unscored_tolerance=2", "reward.unscored_tolerance is 2.0; it must be at most 1"),
        ("reward.verifier.engine.model=''", r"reward\.verifier\.engine\.model has no value: name a verifier"),
        ("reward.verifier.backend=endpoint", r"reward\.verifier\.endpoint needs url and model"),
        ("rollout.hang_timeout_s=.nan", "rollout.hang_timeout_s is nan; it must be a finite number"),
        ("reward.weights.format=.inf", "reward.weights.format is inf; it must be a finite number"),
        ("reward.gamma=0", "reward.gamma is 0.0; it must be above 0"),
        ("seven", "'seven' is not an override; write key=value"),
    ],
)
def test_load_config_with_a_wrong_value_names_key_and_reason(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(PANELS, [override])


def test_load_config_of_a_missing_file_lists_those_there() -> None:
    with pytest.raises(ConfigError, match=r"there is no recipe .*panel\.yaml; recipes there: .*panels\.yaml"):
        load_config(PANELS.with_name("panel.yaml"))


def test_load_config_without_a_required_key_says_how_to_give_it(tmp_path: Path) -> None:
    bare = tmp_path / "bare.yaml"
    bare.write_text("total_steps: 3\n")
    with pytest.raises(ConfigError, match=r"name has no value: set it in .*bare\.yaml or give name=\.\.\."):
        load_config(bare)


def test_load_config_of_broken_yaml_is_refused(tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("name: [unclosed\n")
    with pytest.raises(ConfigError, match="is not readable YAML"):
        load_config(bad)


def test_import_of_the_configuration_loads_neither_ray_nor_torch() -> None:
    code = (
        "import sys\n"
        "from ergo_rl.jobs.config import load_config\n"
        "print(*sorted({'ray', 'torch', 'vllm', 'transformers', 'pyarrow'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == ""


def test_config_error_is_an_ergo_error_and_a_value_error() -> None:
    assert issubclass(ConfigError, ErgoError) and issubclass(ConfigError, ValueError)


def recipe(folder: Path, text: str) -> Path:
    """A recipe with what every run needs, and ``text``."""
    path = folder / "recipe.yaml"
    path.write_text("name: some\nreward: {verifier: {engine: {model: v}}}\n" + text)
    return path


def shared(config: TrainConfig) -> tuple[object, ...]:
    return (
        (config.model, config.learner.model, config.rollout.engine.model),
        (config.family, config.learner.family, config.episode.family),
        (config.temperature, config.learner.temperature, config.rollout.sampling.temperature),
    )


def same(model: str, family: str, temperature: float) -> tuple[object, ...]:
    return (model,) * 3, (family,) * 3, (temperature,) * 3


QWEN = "ergo_rl.episodes.families:Qwen25VL"


@pytest.mark.parametrize(
    ("text", "overrides", "expected"),
    [
        (f"model: a\nfamily: {QWEN}\ntemperature: 0.5", [], same("a", QWEN, 0.5)),
        ("model: a", [], same("a", "", 1.0)),
        ("", [], same("models/panels-policy", "", 1.0)),
        ("learner: {model: a, temperature: 0.5}", [], same("a", "", 0.5)),
        ("rollout: {engine: {model: a}, sampling: {temperature: 0.5}}", [], same("a", "", 0.5)),
        ("model: a\nlearner: {model: '${model}'}", [], same("a", "", 1.0)),
        ("model: a", ["model=b", "temperature=0.5"], same("b", "", 0.5)),
        ("model: a", ["learner.model=b", "rollout.engine.model=b"], same("b", "", 1.0)),
        ("learner: {model: a}\nrollout: {engine: {model: a}}", ["model=b"], same("b", "", 1.0)),
        ("temperature: 0.5", ["temperature=1"], same("models/panels-policy", "", 1.0)),
    ],
)
def test_load_config_with_one_value_of_a_shared_key_fills_the_others(
    tmp_path: Path, text: str, overrides: list[str], expected: tuple[object, ...]
) -> None:
    config = load_config(recipe(tmp_path, text), overrides)
    assert shared(config) == expected
    written = tmp_path / "config.yaml"
    OmegaConf.save(OmegaConf.structured(config), written)
    assert load_config(written) == config
    assert shared(load_config(written, ["model=other"]))[0] == ("other",) * 3


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("model: a\nlearner: {model: b}", [], r"learner.model \(b\) must equal model \(a\)"),
        ("model: a", ["model=b", "learner.model=c"], r"learner.model \(c\) must equal model \(b\)"),
        ("learner: {model: a}\nrollout: {engine: {model: b}}", [], r"learner.model \(a\) and .*\(b\) must be the same"),
        ("model: a", ["rollout.engine.model=b"], r"learner.model \(a\) and .*\(b\) must be the same"),
        (
            "rollout: {sampling: {temperature: 1.0}}",
            ["learner.temperature=0.5"],
            r"temperature \(0.5\) must equal",
        ),
        ("temperature: 0.5", ["learner.temperature=1.0"], r"learner.temperature \(1.0\) must equal .* \(0.5\)"),
        (f"learner: {{family: '{QWEN}'}}\nepisode: {{family: 'a:B'}}", [], r"must equal episode.family \('a:B'\)"),
        ("temperature: 0", [], "learner.temperature is 0.0; it must be above 0"),
    ],
)
def test_load_config_with_two_values_of_a_shared_key_is_refused(
    tmp_path: Path, text: str, overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(recipe(tmp_path, text), overrides)


def test_train_config_built_in_python_fills_shared_keys() -> None:
    assert shared(TrainConfig(name="some")) == same("models/panels-policy", "", 1.0)
    assert shared(TrainConfig(name="some", model="a", family="a:B", temperature=0.5)) == same("a", "a:B", 0.5)
    config = TrainConfig(name="some", model="a")
    config.learner.model = "b"
    with pytest.raises(ConfigError, match=r"learner.model \(b\) and rollout.engine.model \(a\)"):
        check(config)


FORMER = "proof: {every: 7, replies: 2}\nguards: {window: 3}\nrollout: {stall_s: 30}\n"


def test_load_config_with_former_names_reads_them_and_warns_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _warn_of_former_name.cache_clear()
    path, overrides = recipe(tmp_path, FORMER), ["proof={every: 8}", "reward={stall_s: 20}"]
    with caplog.at_level(logging.WARNING):
        config = load_config(path, overrides)
        load_config(path, overrides)
    assert (config.weight_check.every, config.weight_check.replies, config.alerts.window) == (8, 2, 3)
    assert (config.rollout.hang_timeout_s, config.reward.hang_timeout_s) == (30.0, 20.0)
    renamed = {"proof": "weight_check", "guards": "alerts"}
    renamed |= {f"{role}.stall_s": f"{role}.hang_timeout_s" for role in ("reward", "rollout")}
    assert sorted(caplog.messages) == sorted(
        f"the key {former} is called {current} now; the old name is still read" for former, current in renamed.items()
    )


def test_load_config_with_both_names_of_a_key_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="proof and weight_check are the same key; give the second only"):
        load_config(recipe(tmp_path, "proof: {every: 7}\nweight_check: {every: 7}"))


def test_stored_config_of_an_older_run_has_the_keys_of_today(tmp_path: Path) -> None:
    from ergo_rl.jobs.resume import differences

    config = load_config(PANELS)
    text = OmegaConf.to_yaml(OmegaConf.structured(config))
    for now, former in (("weight_check:", "proof:"), ("alerts:", "guards:"), (" hang_timeout_s: 900", " stall_s: 900")):
        assert now in text
        text = text.replace(now, former)
    for added in ("model: models/panels-policy\n", "family: ''\n", "temperature: 1.0\n"):
        text = text.replace(added, "", 1)
    (tmp_path / "config.yaml").write_text(text)
    assert load_config(tmp_path / "config.yaml") == config
    assert differences(stored_config(tmp_path / "config.yaml"), config) == []
    other = load_config(PANELS, ["weight_check.every=9", "rollout.hang_timeout_s=5", "learner.ranks=2", "seed=4"])
    assert differences(stored_config(tmp_path / "config.yaml"), other) == [
        "questions.seed (0, now 4)",
        "seed (0, now 4)",
    ]


def test_load_config_with_enum_values_in_any_case_takes_them() -> None:
    for written in ("linear", "LINEAR", "Linear"):
        config = load_config(PANELS, [f"learner.optimizer.schedule={written}", "metrics.exporters=[WandB, PROMETHEUS]"])
        assert config.learner.optimizer.schedule is Schedule.LINEAR
        assert config.metrics.exporters == [ExporterName.WANDB, ExporterName.PROMETHEUS]
    assert load_config(PANELS, ["learner.attention=SDPA"]).learner.attention == "sdpa"
    with pytest.raises(ConfigError, match=r"learner.optimizer.schedule: .*linearly"):
        load_config(PANELS, ["learner.optimizer.schedule=linearly"])


@pytest.mark.parametrize("key", ["coarse", "direct"])
@pytest.mark.parametrize("template", ["{question}", "{image}{image}", ""])
def test_prompt_without_one_image_is_refused_at_start(key: str, template: str) -> None:
    with pytest.raises(ConfigError, match=r"needs \{image\} exactly once"):
        load_config(PANELS, [f"episode.prompts.{key}='{template}'"])


def test_keys_that_may_change_are_those_that_do_not_decide_what_is_learned() -> None:
    keys = keys_that_may_change()
    assert len(keys) == len(set(keys)) == 61
    for key in ("name", "total_steps", "weight_check", "alerts", "rollout.workers", "reward.hang_timeout_s",
                "rollout.engine.threads", "reward.verifier.engine.threads", "reward.verifier.endpoint.url",
                "episode.prompts.direct", "learner.zero_stage", "learner.micro_batch_tokens"):  # fmt: skip
        assert key in keys
    for key in ("seed", "model", "learner.model", "learner", "groups_per_step", "rollout.group_size", "questions",
                "rollout.engine.dtype", "reward.verifier.endpoint.model", "episode.prompts", "weights"):  # fmt: skip
        assert key not in keys
