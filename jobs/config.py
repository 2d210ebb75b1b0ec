"""One run's configuration: the packages' own configs put together, and the checks that span them.

OmegaConf structured configs: a key that does not exist is refused, by name, with the nearest one that does.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException
from yaml import YAMLError

from ergo_rl.actors.rollout_worker import RolloutConfig
from ergo_rl.cluster.placement import ClusterConfig
from ergo_rl.cluster.weight_sync import WeightsConfig
from ergo_rl.episodes.episode import EpisodeConfig
from ergo_rl.episodes.families import ModelFamily
from ergo_rl.episodes.plugins import import_class, is_import_path
from ergo_rl.episodes.prompts import around_image
from ergo_rl.episodes.types import Question
from ergo_rl.errors import ErgoError
from ergo_rl.jobs.alerts import GuardsConfig
from ergo_rl.jobs.checkpoint_store import CheckpointConfig
from ergo_rl.jobs.evaluation import EvaluationConfig
from ergo_rl.jobs.hardware import HardwareConfig
from ergo_rl.jobs.limits import out_of_range
from ergo_rl.jobs.metrics import MetricsConfig
from ergo_rl.learners.config import LearnerConfig
from ergo_rl.questions.dataset import QuestionsConfig
from ergo_rl.rewards.config import Backend, RewardConfig
from ergo_rl.rewards.terms import load_terms, term_weights

_SHOWN = 400
"""Characters of a value or a reason that a message shows."""


class ConfigError(ErgoError, ValueError):
    """The configuration is wrong; the message says which key, why, and what to do."""


@dataclass
class EmbeddedData:
    """The panels data set, made on the spot where its files are absent."""

    panels: str | None = None
    """Folder for train.parquet and heldout.parquet; null: no embedded data set."""
    train: int = 2048
    """Questions of the train split."""
    heldout: int = 256
    """Questions of the held-out split."""
    seed: int = 0


@dataclass
class ProofConfig:
    """Each publish is proved: every engine plays a question it has seen before, the learner computes the log-probs."""

    tolerance: float = 1.0e-2
    """Largest mean difference in nats; above it the run stops, because the engine does not hold the learner's weights.
    About 1e-6 is normal in float32, 1e-2 in bfloat16."""
    replies: int = 4
    """Replies of each engine."""
    every: int = 1
    """Prove every so many publishes, and always the first and the last."""

    def due(self, step: int, total_steps: int) -> bool:
        return step % self.every == 0 or step == total_steps

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"proof.every is {self.every}; at least 1")


@dataclass
class RecoveryConfig:
    """What a run does about a learner that fails; rollout and reward workers have ``restarts`` of their own."""

    learner_restarts: int = 3
    """Times that the learner is started again, from the last checkpoint, before the run gives up; engines stay."""
    backoff_s: float = 5.0
    """Wait before the first of them, in seconds; doubled each time."""


@dataclass
class TrainConfig:
    name: str = MISSING
    """Name of the run and of its folder."""
    runs_dir: str = "runs"
    seed: int = 0
    total_steps: int = 100
    """Optimiser updates."""
    groups_per_step: int = 8
    """Questions per optimiser update; each is played ``rollout.group_size`` times."""
    max_staleness: int = 0
    """How many policy versions a trajectory may be older than the update that uses it; 0 is on-policy."""
    stale_weight: float = 0.0
    """Of a group that is older than that: its advantages count so much for each version that it is too old. 0: it is
    dropped, and another question is played in its place."""
    start_deadline_s: float = 600.0
    """Workers that are not up by then end the run."""
    dynamic_sampling: bool = False
    """Play another question in place of one whose trajectories all earned the same: nothing is learned from those."""
    dynamic_sampling_most: int = 4
    """With dynamic_sampling: play at most so many times groups_per_step questions in a step."""
    shuffle_rewards: bool = False
    """A control: deal the scores of a step to its trajectories at random. Nothing about the task can be learned."""
    resume: str = "auto"
    """auto: go on with the unfinished run of this name, if there is one; never: begin a new one; a path or URL of a run
    or a checkpoint: begin a new one from there."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    recovery: RecoveryConfig = field(default_factory=RecoveryConfig)
    samples_every: int = 5
    """Write the trajectories of one group (text and pictures) every so many steps; 0: never."""
    embedded: EmbeddedData = field(default_factory=EmbeddedData)
    questions: QuestionsConfig = field(default_factory=QuestionsConfig)
    episode: EpisodeConfig = field(default_factory=EpisodeConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    proof: ProofConfig = field(default_factory=ProofConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    guards: GuardsConfig = field(default_factory=GuardsConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)

    @property
    def spare_groups(self) -> int:
        """Questions that a step may play in place of others."""
        return (self.dynamic_sampling_most - 1) * self.groups_per_step if self.dynamic_sampling else 0


def load_config(path: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """A recipe (YAML) with ``key=value`` overrides, typed and checked.

    Raises ConfigError naming the key for unknown keys, wrong types, missing values and bad combinations."""
    if not path.is_file():
        known = ", ".join(sorted(str(recipe) for recipe in path.parent.glob("*.yaml"))) or "none"
        raise ConfigError(f"there is no recipe {path}; recipes there: {known}")
    with _naming(str(path)):
        recipe: Any = OmegaConf.load(path)
    if not isinstance(recipe, DictConfig):
        raise ConfigError(f"{path} holds no keys and values, but {type(recipe).__name__}")
    for override in overrides:
        if not override.partition("=")[0].strip() or "=" not in override:
            raise ConfigError(f"{_short(override)!r} is not an override; write key=value, e.g. total_steps=50")
        with _naming(f"override {_short(override)}"):
            recipe = OmegaConf.merge(recipe, OmegaConf.from_dotlist([override]))
    try:
        config = OmegaConf.to_object(OmegaConf.merge(_schema(), recipe))
    except ConfigKeyError as error:
        raise ConfigError(_unknown_key(str(error.full_key or error.key), path)) from error
    except MissingMandatoryValue as error:
        raise ConfigError(f"{error.full_key} has no value: set it in {path} or give {error.full_key}=...") from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{_short(error.full_key or path)}: {_line(error)}") from error
    except (
        ValueError,
        TypeError,
        RecursionError,
    ) as error:  # a package refuses its own values; a value of a wrong kind
        raise ConfigError(_line(error)) from error
    assert isinstance(config, TrainConfig)
    check(config)
    return config


def check(config: TrainConfig) -> None:
    """Refuse combinations that cannot work, naming the keys. Nothing is changed on the quiet."""
    rollout, learner, episode = config.rollout, config.learner, config.episode
    longest = (
        episode.coarse_tokens
        + episode.fine_tokens
        + rollout.sampling.coarse_max_tokens
        + rollout.sampling.fine_max_tokens
    )
    verifier = config.reward.verifier
    problems = [
        (
            verifier.backend is Backend.ENGINE and not verifier.engine.model,
            "reward.verifier.engine.model has no value: name a reward model, or set reward.verifier.backend=endpoint",
        ),
        (
            verifier.backend is Backend.ENDPOINT and not (verifier.endpoint.url and verifier.endpoint.model),
            "reward.verifier.endpoint needs url and model where reward.verifier.backend is endpoint",
        ),
        (config.total_steps < 1, "total_steps must be at least 1"),
        (config.groups_per_step < 1, "groups_per_step must be at least 1"),
        (rollout.group_size < 2, "rollout.group_size must be at least 2: advantages are relative to the group"),
        (config.dynamic_sampling_most < 1, "dynamic_sampling_most must be at least 1 (times groups_per_step)"),
        (config.max_staleness < 0, "max_staleness must be 0 (on-policy) or more"),
        (
            rollout.engine.sleep and config.max_staleness > 0,
            "rollout.engine.sleep needs max_staleness=0: engines that sleep while the learner updates play nothing",
        ),
        (
            verifier.engine.sleep,
            "reward.verifier.engine.sleep must be false: only rollout engines are woken, by new weights",
        ),
        (not 0 <= config.stale_weight <= 1, "stale_weight must be from 0 (drop) to 1 (count in full)"),
        (rollout.sampling.temperature <= 0, "rollout.sampling.temperature must be above 0 for training"),
        (
            learner.temperature != rollout.sampling.temperature,
            f"learner.temperature ({learner.temperature}) must equal rollout.sampling.temperature "
            f"({rollout.sampling.temperature}): log-probs would be of another distribution",
        ),
        (
            learner.model != rollout.engine.model,
            f"learner.model ({learner.model}) and rollout.engine.model ({rollout.engine.model}) must be the same model",
        ),
        (
            learner.family != episode.family,
            f"learner.family ({learner.family!r}) must equal episode.family ({episode.family!r})",
        ),
        (
            longest >= rollout.engine.max_model_len,
            f"rollout.engine.max_model_len ({rollout.engine.max_model_len}) must be above {longest}, the sum of both "
            "visual-token budgets and both reply limits, with room for the prompts' text",
        ),
    ]
    problems += [(True, message) for message in out_of_range(config)]
    try:
        config.weights.for_roles(learner.resources, rollout.resources)
        load_terms(config.reward), term_weights(config.reward)
        for own in filter(None, (episode.family, config.reward.verifier.family)):
            import_class(own, ModelFamily)
        if is_import_path(learner.loss.objective):
            from ergo_rl.learners.losses import objective_named  # loads torch

            objective_named(learner.loss.objective)
        for prompts in (episode.prompts, config.reward.verifier.prompts):
            for template in (prompts.coarse, prompts.fine, prompts.verify):
                around_image(template, Question("", b"", "", ""))
    except ValueError as error:
        problems.append((True, str(error)))
    if wrong := [message for is_wrong, message in problems if is_wrong]:
        raise ConfigError("; ".join(wrong))


@cache
def _schema() -> Any:
    return OmegaConf.structured(TrainConfig)


@contextmanager
def _naming(what: str) -> Iterator[None]:
    """What cannot be read inside the block is refused by this name."""
    try:
        yield
    except (YAMLError, OmegaConfBaseException, ValueError, TypeError, LookupError, RecursionError) as error:
        reason = " ".join(str(error).split()) if isinstance(error, YAMLError) else _line(error)
        raise ConfigError(f"{what} is not readable YAML: {reason[:_SHOWN]}") from error


def _line(error: Exception) -> str:
    """The first line of a message: what comes after it is OmegaConf's account of its own types."""
    line = next(iter(str(error).splitlines()), "") or type(error).__name__
    return line if len(line) <= _SHOWN else f"{line[:_SHOWN]}..."


def _short(value: object) -> str:
    shown = repr(value) if isinstance(value, str) and not value.isprintable() else str(value)
    return shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."


def _unknown_key(key: str, path: Path) -> str:
    key = _short(key)
    known, leaf = _all_keys(TrainConfig()), key.rpartition(".")[2]
    same_leaf = [one for one in known if one.rpartition(".")[2] == leaf]  # right name, wrong place
    near = difflib.get_close_matches(key, same_leaf or known, n=1, cutoff=0.0 if same_leaf else 0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"unknown key {key!r} (in {path} or an override){hint}"


def _all_keys(config: Any, prefix: str = "") -> list[str]:
    keys = []
    for one in fields(config):
        keys.append(prefix + one.name)
        value = getattr(config, one.name)
        if is_dataclass(value):
            keys += _all_keys(value, f"{prefix}{one.name}.")
    return keys
