"""The worked examples of docs/extending.md, taken from the page and used as it says, from a folder of a user's own."""

from __future__ import annotations

import asyncio
import math
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ergo_rl.episodes.config import EpisodeConfig
from ergo_rl.episodes.episode import CoarseToFine
from ergo_rl.episodes.families import ModelFamily, Qwen25VL, UnknownFamily, family_of, load_tokenizer
from ergo_rl.episodes.plugins import import_class
from ergo_rl.episodes.types import Box, Outcome, Score, View
from ergo_rl.jobs.config import ConfigError, TrainConfig, load_config
from ergo_rl.jobs.policy_clients import family_by_name
from ergo_rl.learners.batch import Batcher, Sample
from ergo_rl.learners.config import LearnerConfig, LossConfig
from ergo_rl.learners.losses import Objective, objective_named
from ergo_rl.learners.model import PolicyModel
from ergo_rl.rewards.config import RewardConfig
from ergo_rl.rewards.terms import RewardTerm, TotalReward
from tests.conftest import ROOT
from tests.episodes.test_episode import QUESTION, READ
from tests.factories import tiny_model
from tests.learners.test_losses import gradient, two_rows
from tests.rewards.builders import QUESTION as ASKED
from tests.rewards.builders import SCENE, ended_early, played

PAGE = (ROOT / "docs" / "extending.md").read_text()
FILES = dict(zip(re.findall(r"In `(my_\w+)\.py`", PAGE), re.findall(r"```python\n(.+?)```", PAGE, re.S), strict=True))
COMMANDS = [shlex.split(line) for line in re.findall(r"^ergo-rl train .+$", PAGE, re.M)]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with the page's files, which nothing but their names leads to."""
    for name, text in FILES.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield tmp_path
    objective_named.cache_clear()
    for name in [name for name in sys.modules if name.startswith("my_")]:
        del sys.modules[name]


def configured(word: str) -> TrainConfig:
    """By the page's own command line that has this word."""
    command = next(command for command in COMMANDS if word in str(command))
    return load_config(ROOT / command[2], command[3:])


def test_a_function_as_reward_term() -> None:
    """10 words of 40 in turn 1 of the builders' episode; a quarter of that is paid, credited to turn 1."""
    assert TotalReward(configured("my_functions").reward)(ASKED, played(look=" ".join(["word"] * 10)), "B") == Score(
        1 + 0.5 + 1 + 0 + 0.25 * 0.75,
        {"region": 1, "box": 1, "accuracy": 1, "format": 0, "brief": 0.75},
        (1 + 0.5 + 0 + 0.25 * 0.75, 1 + 1),
    )


def test_a_reward_term() -> None:
    """10 words of 40 in turn 1 of the builders' episode; a quarter of that is paid."""
    config = configured("short_thought").reward
    look = " ".join(["word"] * 10)
    assert TotalReward(config)(ASKED, played(look=look), "B") == Score(
        1 + 0.5 + 1 + 0 + 0.25 * 0.75,
        {"region": 1, "box": 1, "accuracy": 1, "format": 0, "short_thought": 0.75},
        (1 + 0.5 + 0 + 0.25 * 0.75, 1 + 1),
    )
    for trajectory in (played(look="word " * 50), ended_early(look, Outcome.BAD_BOX)):
        score = TotalReward(config)(ASKED, trajectory, "B")
        assert isinstance(score, Score) and score.parts["short_thought"] == 0


def test_an_objective() -> None:
    """Trajectory 0, advantage 2, ratios 1 and 2: weights 1, 1. Trajectory 1, advantage -1, ratios 1/2, 1, 2: weights
    1/2, 1, 1. The gradient on a token is -weight x advantage, the mean is over 5 tokens; log-probs -1, -1 and -3, -1,
    -1 times ln 2."""
    from ergo_rl.learners.losses import policy_loss

    config = configured("TOPR").learner.loss
    loss, sums = policy_loss(two_rows(), config)
    assert loss.item() == pytest.approx((2 + 2 - 1.5 - 1 - 1) * math.log(2))
    assert objective_named(config.objective).denominator([2, 3]) == 5
    wanted = torch.tensor([[-2.0, -2.0, 0.0], [0.5, 1.0, 1.0]])
    torch.testing.assert_close(gradient(two_rows(), config), wanted)
    found = sums.means()
    assert found is not None and found.clip_share == pytest.approx(2 / 5), "the two ratios of 2"


@dataclass
class Said:
    """A reply with the prompt length that an engine would report."""

    text: str
    token_ids: tuple[int, ...]
    prompt_length: int
    stopped: bool = True
    weight_version: int = 0
    updates: tuple[tuple[int, int], ...] = ()
    cached_tokens: int = 0

    @property
    def logprobs(self) -> tuple[float, ...]:
        return (-5.0,) * len(self.token_ids)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_model(tmp_path_factory.mktemp("models") / "tiny"))


def test_a_model_family(tiny: str) -> None:
    """An episode of the tiny model whose box is written in thousandths of a picture of 672 x 672, through the learner's
    batch and a forward pass."""
    config = configured("Thousandths")
    family, tokenizer = family_of(tiny, config.episode.family), load_tokenizer(tiny)
    assert type(family).__name__ == "Thousandths" and config.learner.family == config.episode.family
    replies = ("<think>left</think><zoom>[250, 500, 500, 1000]</zoom>", READ)

    async def generate(ids: Sequence[int], views: Sequence[View], turn: int) -> Said:
        said = tuple(tokenizer.encode(replies[turn] + family.turn_end, add_special_tokens=False))
        return Said(replies[turn], said, len(ids) + sum(family.visual_tokens(view) - 1 for view in views))

    episodes = CoarseToFine(family, tokenizer, EpisodeConfig(coarse_tokens=36, fine_tokens=36))
    scene = episodes.prepare(QUESTION)
    trajectory = asyncio.run(episodes.run(scene, 0, generate))
    assert trajectory.crop is not None and trajectory.crop.box == Box(168, 336, 336, 672)
    assert family.write_corners(trajectory.crop.box, scene.coarse) == (250, 500, 500, 1000)
    prompt = tokenizer.decode(list(scene.coarse_prompt), skip_special_tokens=False)
    assert prompt.startswith("<|im_start|>user\nYou are a helpful assistant.\n\n<|vision_start|><|image_pad|>")

    from transformers import AutoImageProcessor

    pad, end = (tokenizer.convert_tokens_to_ids(token) for token in (family.image_pad, family.turn_end))
    batcher = Batcher(family, AutoImageProcessor.from_pretrained(tiny), pad, end, 4096)
    plan = batcher.plan([Sample(trajectory, (1.0, 1.0))])
    (batch,) = batcher.batches(plan)
    with torch.no_grad():
        logprobs, _ = PolicyModel(LearnerConfig(model=tiny))(batch, 1.0, family.banned_ids(tokenizer))
    sampled = logprobs[batch.loss_mask]
    assert len(sampled) == sum(len(turn.completion_ids) for turn in trajectory.turns) and plan.length_mismatches == 0
    assert bool(torch.isfinite(sampled).all()) and bool((sampled < 0).all())


def test_an_own_family_is_for_its_own_type_of_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    with pytest.raises(UnknownFamily, match="is a 'llava' model; my_family:Thousandths: qwen2_5_vl"):
        family_of(str(tmp_path), "my_family:Thousandths")
    assert type(family_by_name("my_family:Thousandths")).__name__ == "Thousandths"
    assert isinstance(family_by_name("qwen2_5_vl"), Qwen25VL)
    with pytest.raises(ConfigError, match=r"--family: known are qwen2_5_vl, qwen3_vl, or .* 'qwen4_vl' does not say"):
        family_by_name("qwen4_vl")


@pytest.mark.parametrize(
    ("path", "kind", "message"),
    [
        ("my_terms.ShortThought", RewardTerm, "does not say where a class is; write package.module:Class"),
        ("../my_terms:ShortThought", RewardTerm, "does not say where a class is"),
        ("my_term:ShortThought", RewardTerm, "No module named 'my_term'; is it installed, in the working directory"),
        (
            "my_terms:Short",
            RewardTerm,
            "my_terms has nothing of that name; it must be a subclass of ergo_rl.rewards.terms.Rew",
        ),
        ("my_terms:LIMIT", RewardTerm, "my_terms has 40; it must be a subclass of ergo_rl.rewards.terms.RewardTerm"),
        ("my_terms:ShortThought", Objective, "it must be a subclass of ergo_rl.learners.losses.Objective"),
        ("ergo_rl.rewards.terms:RewardTerm", RewardTerm, "leaves out __call__ of ergo_rl.rewards.terms.RewardTerm"),
        ("my_broken:Term", RewardTerm, "my_broken:Term cannot be imported: ZeroDivisionError: division by zero"),
        ("my_needy:Term", RewardTerm, "my_needy:Term cannot be imported: ModuleNotFoundError: .*'no_such_package'$"),
    ],
)
def test_what_is_wrong_with_a_class_is_said(folder: Path, path: str, kind: Any, message: str) -> None:
    (folder / "my_broken.py").write_text("1 / 0\n")
    (folder / "my_needy.py").write_text("import no_such_package\n")
    with pytest.raises(ValueError, match=message):
        import_class(path, kind)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["reward.terms.brief=my_terms:ShortThought"], "reward.weights has none for brief of reward.terms"),
        (["reward.terms.box=my_terms:ShortThought"], "reward.terms: box is a term of ours"),
        (["reward.terms.brief=my_terms:Brief", "reward.weights.brief=1"], "my_terms has nothing of that name"),
        (["learner.loss.objective=my_objective:TOP"], "my_objective has nothing of that name"),
        (
            ["episode.family=my_family:Thousandths", "learner.family=my_family:Other"],
            r"learner.family \('my_family:Other'\) must equal episode.family",
        ),
        (
            ["reward.verifier.family=my_terms:ShortThought"],
            "must be a subclass of ergo_rl.episodes.families.ModelFamily",
        ),
    ],
)
def test_a_configuration_is_refused_before_anything_starts(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(ROOT / "configs" / "panels.yaml", overrides)


def test_without_a_class_of_ones_own_nothing_is_imported() -> None:
    load_config(ROOT / "configs" / "panels.yaml")
    assert not [name for name in sys.modules if name.startswith("my_")]
    assert replace(LossConfig(), objective="DR_GRPO").objective == "dr_grpo"
    assert RewardConfig().terms == {} and issubclass(Qwen25VL, ModelFamily) and SCENE.area == 10**6
