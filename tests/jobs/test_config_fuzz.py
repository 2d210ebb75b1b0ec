"""Five hundred hostile recipes and overrides: each is refused with one line that says why, or is a configuration that
keeps the bounds beside its fields. Seeded, so that what is found is found again."""

from __future__ import annotations

import random
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from ergo_rl.config_fields import out_of_range
from ergo_rl.jobs.config import ConfigError, TrainConfig, all_keys, load_config
from tests.conftest import ROOT

CONFIGS = 500
PANELS = ROOT / "configs" / "panels.yaml"
VALUES = (
    "-1", "0", "1", "2", "3", "-0.5", "0.5", "1e400", ".nan", ".inf", "-.inf", "999999999999999999999999", "true",
    "null", "", " ", "''", "~", "text", "[]", "{}", "[1,2]", "{a: 1}", "{min: 1, max: 3}", "{min: 3, max: 1}",
    "{min: 1}", "???", "${seed}", "${nowhere}", "${", "$", "${oc.env:NO_SUCH_VARIABLE}", "${total_steps}", "@",
    "*anchor", "&anchor 1", "!!int x", "!!python/object/apply:os.getcwd []", "0x1F", "1_000", "12:30:45", "2026-01-01",
    "\x00", "\u202e", "[" * 200, "a" * 10_000, "{image}", "{image}{image}", "../../up", "/", "http://me:secret@host",
    "DAPO", "linear",
)  # fmt: skip
KEYS = (
    *all_keys(TrainConfig()), "rollout.workers.min", "rollout.workers.max", "", ".", "..", "a", "learner.", ".learner",
    "learner..optimizer", "questions.paths[0]", "questions.paths.0", "reward.weights.accuracy", "reward.weights.",
    "rollout.engine.extra.max_num_batched_tokens", "__class__", "name.name", "total_steps.x", "seed[", "a[b]c", "名前",
)  # fmt: skip


OWN: Any = OmegaConf.structured(load_config(PANELS))


def value_for(key: str, rng: random.Random) -> str:
    """Mostly something hostile; one time in four what the recipe itself has there, halved or doubled where it is a
    number."""
    own = OmegaConf.select(OWN, key) if key in all_keys(TrainConfig()) and rng.random() < 0.25 else None
    if own is None or OmegaConf.is_config(own):
        return rng.choice(VALUES)
    if isinstance(own, int | float) and not isinstance(own, bool):
        return str(type(own)(own * rng.choice((0.5, 1, 2))))
    return getattr(own, "name", str(own))


def fuzzed(rng: random.Random, folder: Path) -> tuple[Path, list[str]]:
    """A recipe and overrides: wrong values at right and wrong keys, or a recipe with damaged text."""
    keys = rng.choices(KEYS, k=rng.choice((1, 1, 1, 2, 5)))
    overrides = [f"{key}={value_for(key, rng)}" for key in keys]
    if rng.random() < 0.7:
        return PANELS, overrides if rng.random() < 0.95 else [rng.choice(VALUES)]
    blob = bytearray(PANELS.read_bytes())
    for _ in range(rng.randint(1, 8)):
        place = rng.randrange(len(blob))
        match rng.randrange(3):
            case 0:
                blob[place] = rng.randrange(256)
            case 1:
                del blob[place : place + rng.randint(1, 40)]
            case _:
                blob[place:place] = rng.choice(VALUES).encode()
    recipe = folder / "recipe.yaml"
    recipe.write_bytes(blob)
    return recipe, overrides if rng.random() < 0.3 else []


@pytest.mark.timeout(300)
def test_five_hundred_configs_are_taken_or_refused_with_a_reason(tmp_path: Path) -> None:
    rng, outcomes = random.Random(11), Counter[str]()
    for _ in range(CONFIGS):
        recipe, overrides = fuzzed(rng, tmp_path)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                config = load_config(recipe, overrides)
        except ConfigError as error:
            assert len(str(error)) > 10 and len(str(error)) < 2_000, error
            outcomes["refused"] += 1
        else:
            assert_holds(config, overrides)
            outcomes["taken"] += 1
    assert outcomes.total() == CONFIGS and min(outcomes.values()) > CONFIGS / 10, outcomes


def assert_holds(config: TrainConfig, overrides: list[str]) -> None:
    """What the rest of the program relies on, whatever was asked for."""
    assert not out_of_range(TrainConfig, config)
    assert config.rollout.size.min <= config.rollout.size.max
    for step in range(4):
        config.evaluation.due(step, config.total_steps), config.weight_check.due(step, config.total_steps)
        config.checkpoint.due(step, config.total_steps)
        assert 0 <= config.learner.optimizer.learning_rate(step) <= config.learner.optimizer.lr
    if random.Random(str(overrides)).random() < 0.8:  # it takes 50 ms
        return
    written: Any = OmegaConf.create(OmegaConf.to_yaml(OmegaConf.structured(config)))
    again = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(TrainConfig), written))
    assert again == config, overrides
