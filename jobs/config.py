"""A run's configuration: the sections of all packages, the checks that span them, and the reader of recipes.

Recipes are YAML, read by OmegaConf's structured configs: a key that does not exist is refused, by name, with the
nearest one that does. Importing this module loads neither Ray nor torch.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass, replace
from enum import Enum, StrEnum
from functools import cache, reduce
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Gt, Le
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException
from yaml import YAMLError

from ergo_rl.actors.config import RolloutConfig
from ergo_rl.cluster.config import ClusterConfig, WeightsConfig
from ergo_rl.config_fields import (
    MAY_CHANGE,
    Because,
    ConfigSection,
    Formerly,
    keys_marked,
    out_of_range,
    with_current_names,
)
from ergo_rl.episodes.config import EpisodeConfig, QuestionsConfig
from ergo_rl.episodes.plugins import import_class, is_import_path
from ergo_rl.errors import ErgoError
from ergo_rl.learners.config import LearnerConfig, Schedule
from ergo_rl.rewards.config import RewardConfig

_SHOWN = 400
"""Characters of a value or a reason that a message shows."""
_AZURE = ("abfs", "abfss", "az", "adl")
_QUERY = re.compile(r"\?[^/]*=")
_SHARED = {
    "model": ("learner.model", "rollout.engine.model"),
    "family": ("learner.family", "episode.family"),
    "temperature": ("learner.temperature", "rollout.sampling.temperature"),
}
"""Keys of the run, and the keys of its sections that get the same value."""
_ENVIRONMENT: dict[tuple[str, str], str] = {}
"""Interpolations of texts that were read from the environment, by key and resolved value. Not in TrainConfig: copies of
a configuration (``dataclasses.replace``) have them, too."""


class ConfigError(ErgoError, ValueError):
    """The configuration is wrong; the message says which key, why, and what to do."""


@dataclass
class EmbeddedData(ConfigSection):
    """The panels data set, which is made at the start of a run if its files are absent."""

    panels: str | None = None
    """Folder for train.parquet and heldout.parquet; null: no embedded data set."""
    train: Annotated[int, Ge(1)] = 2048
    """Questions of the train split."""
    heldout: Annotated[int, Ge(1)] = 256
    """Questions of the held-out split."""
    seed: Annotated[int, Ge(0)] = 0
    """Seed of its scenes."""


@dataclass
class CheckpointConfig(ConfigSection):
    """When checkpoints are saved, and how many are kept."""

    every: Annotated[int, Ge(0)] = 25
    """Save after every so many steps, and after the last; 0: only when the run is stopped or fails."""
    keep: Annotated[int, Ge(1)] = 2
    """How many of the newest checkpoints are kept; the best is kept as well."""
    best: str = "coverage"
    """The figure of the evaluation by which the best checkpoint is chosen, the highest wins (coverage, accuracy,
    ...)."""
    url: str = ""
    """Folder or fsspec URL (s3://bucket/runs, gs://..., abfs://container@account.dfs.core.windows.net/runs, ...) that
    gets a copy of each checkpoint as URL/RUN/step-...; of a run's own folder and the URL the newest checkpoint counts;
    empty: no copies."""
    outage_deadline_s: Annotated[float, Ge(0)] = 3600.0
    """Training goes on without copies for this many seconds while the URL does not answer; then the run ends, saved in
    its own folder."""
    accept_changes: list[str] = field(default_factory=list)
    """Keys (with all below them) that may have another value, or other content behind their paths, than at the
    checkpoint that is resumed, such as [questions.paths]; all other changes of what is learned are refused."""

    def __post_init__(self) -> None:
        super().__post_init__()
        protocol, _, rest = self.url.rpartition("://")
        user, at, host = rest.split("/")[0].rpartition("@")
        azure = protocol in _AZURE and "." in host and ":" not in user  # CONTAINER@ACCOUNT.dfs.core.windows.net
        if (at and not azure) or (protocol and _QUERY.search(rest)):
            raise ValueError(
                "checkpoint.url holds a user or password, or a signature: it would be in config.yaml and in the logs; "
                "put it into the environment, where the storage's own package looks"
            )

    def due(self, step: int, total_steps: int) -> bool:
        """Tell whether to save after this many steps."""
        return self.every > 0 and (step % self.every == 0 or step == total_steps)


@dataclass
class WeightCheckConfig(ConfigSection):
    """A check after weights are published: every engine answers a question that it has seen before, and the learner
    computes the log-probs of the same tokens. They must agree."""

    tolerance: Annotated[float, Ge(0)] = 1.0e-2
    """Largest mean difference in nats; above it the run stops, because the engine does not hold the learner's weights.
    About 1e-6 is normal in float32, 1e-2 in bfloat16."""
    replies: Annotated[int, Ge(1)] = 4
    """Replies of each engine."""
    every: Annotated[int, Ge(1)] = 1
    """Check after every so many publishes, and always after the first and the last."""

    def due(self, step: int, total_steps: int) -> bool:
        """Tell whether to check after this many steps."""
        return step % self.every == 0 or step == total_steps


@dataclass
class RecoveryConfig(ConfigSection):
    """What a run does when its learner fails; rollout and reward workers have ``restarts`` of their own."""

    learner_restarts: Annotated[int, Ge(0)] = 3
    """How often the learner is restarted, from the last checkpoint, before the run gives up; engines keep running."""
    backoff_s: Annotated[float, Ge(0)] = 5.0
    """Wait before the first restart, in seconds; doubled each time."""


@dataclass
class EvaluationConfig(ConfigSection):
    """Evaluation on held-out questions, during training and by ``ergo-rl evaluate``."""

    paths: list[str] = field(default_factory=list)
    """Parquet files of held-out questions; empty: no evaluation during training."""
    questions: Annotated[int, Ge(0)] = 128
    """How many of them, from the first; 0: all."""
    every: Annotated[int, Ge(0)] = 0
    """Evaluate before the first step, after every so many steps, and after the last; 0: never."""
    probe: Annotated[int, Ge(0)] = 0
    """Probe whether the crop is used with every so many evaluations, the first and the last among them: the crop is
    replaced by noise, by another question's, by the oracle's, by none; 0: never."""
    in_flight: Annotated[int, Ge(1)] = 64
    """Questions in progress at once."""
    oracle_margin: Annotated[float, Ge(0)] = 1.0
    """The oracle's box is the target's, grown on each side by this share of its longer side."""
    random_area: Annotated[float, Ge(0), Le(1)] = 0.1
    """Area of a random box as a share of the image."""

    def due(self, step: int, total_steps: int) -> bool:
        """Tell whether to evaluate before step 0, 1, ... and, as step ``total_steps``, after the last."""
        return bool(self.paths) and self.every > 0 and (step % self.every == 0 or step == total_steps)

    def probe_due(self, step: int, total_steps: int) -> bool:
        """Tell whether an evaluation that is due comes with a probe."""
        return self.probe > 0 and (step % (self.every * self.probe) == 0 or step == total_steps)


class ExporterName(StrEnum):
    """Where figures go besides metrics.jsonl."""

    TENSORBOARD = "tensorboard"
    WANDB = "wandb"
    MLFLOW = "mlflow"
    PROMETHEUS = "prometheus"


@dataclass
class MetricsConfig(ConfigSection):
    """Where figures go, and what counts as a whole image or as tiny."""

    exporters: list[ExporterName] = field(default_factory=lambda: [ExporterName.TENSORBOARD])
    """Where figures go besides metrics.jsonl (docs/metrics.md): any of tensorboard, wandb, mlflow, prometheus."""
    project: str = "ergo-rl"
    """Project of W&B, experiment of MLflow."""
    full_image_ratio: float = 0.9
    """A crop of at least this share of the image counts as the whole image."""
    tiny_box_ratio: float = 0.005
    """A crop of at most this share of the image counts as tiny."""


@dataclass
class AlertsConfig(ConfigSection):
    """Known ways in which a run goes wrong while its reward still looks fine. Each alert looks at the mean of the last
    ``window`` steps."""

    window: Annotated[int, Ge(1)] = 5
    """Steps."""
    full_image_rate: float = 0.5
    """Alert above this share of crops that are (nearly) the whole image: the policy avoids choosing a region."""
    tiny_box_rate: float = 0.5
    """Alert above this share of tiny crops: boxes shrink for the sake of r_box."""
    entropy: float = 0.1
    """Alert below this share of the entropy of the first steps: the policy has stopped exploring."""
    equal_groups: float = 0.8
    """Alert above this share of groups of equal rewards: nothing is learned from them."""
    unscored: float = 0.1
    """Alert above this share of trajectories without a score; ``reward/unscored_KIND`` says why: cut, empty, thoughts,
    filtered, refused or unavailable."""
    paid_without_coverage: float = 0.4
    """Alert if r_region is above the coverage of the targets by more than this: the verifier pays for regions that do
    not contain them."""


@dataclass
class HardwareConfig(ConfigSection):
    """The machines that a recipe is meant for, read by ``ergo-rl plan`` (does it fit?) and ``ergo-rl submit --dry-run``
    (what to ask for). Training itself takes what the cluster has."""

    nodes: Annotated[int, Ge(1)] = 1
    """Machines."""
    gpus_per_node: Annotated[int, Ge(0)] = 0
    """0: everything runs on CPUs."""
    gpu_memory_gib: Annotated[float, Gt(0)] = 80.0
    """Memory of one GPU."""
    gpu_tflops: Annotated[float, Gt(0)] = 989.0
    """Dense bfloat16 peak of one GPU (an H100's), for the estimate of time."""
    gpu_bandwidth_tb_s: Annotated[float, Gt(0)] = 3.35
    """Memory bandwidth of one GPU, terabytes a second (an H100's)."""
    cpus_per_node: Annotated[int, Ge(1)] = 2
    """CPU cores of one machine."""
    memory_gib_per_node: Annotated[float, Gt(0)] = 16.0
    """Main memory of one machine."""


@dataclass
class TrainConfig(ConfigSection):
    name: Annotated[str, MAY_CHANGE] = MISSING
    """Name of the run and of its folder."""
    runs_dir: Annotated[str, MAY_CHANGE] = "runs"
    """Folder that holds the folders of runs."""
    seed: Annotated[int, Ge(0)] = 0
    """Seed of the run."""
    model: str = ""
    """The policy: local folder or hub name of a vision-language model of a known family, for learner.model and
    rollout.engine.model. ``org/name@revision`` pins a hub name to a branch, tag or commit, here and wherever a model is
    named."""
    family: str = ""
    """``package.module:Class`` of your own model family (docs/extending.md), for learner.family and episode.family;
    empty: one of ours, by the model's type."""
    temperature: float | None = None
    """Temperature of sampling, for learner.temperature and rollout.sampling.temperature; null: 1.0."""
    total_steps: Annotated[int, Ge(1), MAY_CHANGE] = 100
    """Optimiser updates."""
    groups_per_step: Annotated[int, Ge(1)] = 8
    """Questions per optimiser update, with ``rollout.group_size`` trajectories each."""
    max_staleness: Annotated[int, Ge(0)] = 0
    """How many policy versions a trajectory may be older than the update that uses it; 0 is on-policy."""
    stale_weight: Annotated[float, Ge(0), Le(1), Because("0 drops what is too old, 1 counts it in full")] = 0.0
    """Advantages of a group that is older than that are multiplied by this for each version that it is too old. 0: the
    group is dropped, and another question takes its place."""
    start_deadline_s: Annotated[float, Ge(1), MAY_CHANGE] = 600.0
    """The run ends if workers are not up after this many seconds."""
    dynamic_sampling: bool = False
    """Replace a question whose trajectories all earned the same, because nothing is learned from it."""
    dynamic_sampling_most: Annotated[int, Ge(1), Because("it counts in units of groups_per_step")] = 4
    """With dynamic_sampling: at most this many times groups_per_step questions in a step."""
    shuffle_rewards: bool = False
    """A control: deal the scores of a step to its trajectories at random. Nothing about the task can be learned."""
    resume: Annotated[str, MAY_CHANGE] = "auto"
    """auto: resume the unfinished run of this name, if there is one; never: begin a new run; a path or URL of a run or
    a checkpoint: begin a new run from there."""
    checkpoint: Annotated[CheckpointConfig, MAY_CHANGE] = field(default_factory=CheckpointConfig)
    recovery: Annotated[RecoveryConfig, MAY_CHANGE] = field(default_factory=RecoveryConfig)
    samples_every: Annotated[int, Ge(0), MAY_CHANGE] = 5
    """Write the trajectories of one group (text and images) every so many steps; 0: never."""
    embedded: Annotated[EmbeddedData, MAY_CHANGE] = field(default_factory=EmbeddedData)
    questions: QuestionsConfig = field(default_factory=QuestionsConfig)
    episode: EpisodeConfig = field(default_factory=EpisodeConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    weight_check: Annotated[WeightCheckConfig, Formerly("proof"), MAY_CHANGE] = field(default_factory=WeightCheckConfig)
    evaluation: Annotated[EvaluationConfig, MAY_CHANGE] = field(default_factory=EvaluationConfig)
    metrics: Annotated[MetricsConfig, MAY_CHANGE] = field(default_factory=MetricsConfig)
    alerts: Annotated[AlertsConfig, Formerly("guards"), MAY_CHANGE] = field(default_factory=AlertsConfig)
    cluster: Annotated[ClusterConfig, MAY_CHANGE] = field(default_factory=ClusterConfig)
    hardware: Annotated[HardwareConfig, MAY_CHANGE] = field(default_factory=HardwareConfig)

    def __post_init__(self) -> None:
        """Fill the keys that share a value: sections that are at their defaults follow the run's key, and the run's key
        follows the sections where it is not set."""
        super().__post_init__()
        for name, keys in _SHARED.items():
            of_run = getattr(self, name)
            if of_run in ("", None):
                of_run = _read(self, keys[0])
                setattr(self, name, of_run)
            untouched = all(_read(self, key) == _read(_defaults(), key) for key in keys)
            for key in keys:
                if untouched or _read(self, key) == "":
                    section, _, leaf = key.rpartition(".")
                    setattr(_read(self, section), leaf, of_run)
        if self.learner.optimizer.total_steps is None:
            self.learner.optimizer.total_steps = self.total_steps

    @property
    def spare_groups(self) -> int:
        """Questions that a step may use in place of others."""
        return (self.dynamic_sampling_most - 1) * self.groups_per_step if self.dynamic_sampling else 0

    def problems(self) -> Iterator[str]:
        """Yield what cannot work together, across sections."""
        rollout, learner, episode = self.rollout, self.learner, self.episode
        sampling = rollout.sampling
        if rollout.engine.sleep and self.max_staleness > 0:
            yield (
                "rollout.engine.sleep needs max_staleness=0: engines that sleep while the learner updates play nothing"
            )
        if sampling.temperature <= 0:
            yield "rollout.sampling.temperature must be above 0 for training"
        if learner.temperature != sampling.temperature:
            yield (
                f"learner.temperature ({learner.temperature}) must equal rollout.sampling.temperature "
                f"({sampling.temperature}): log-probs would be of another distribution"
            )
        if learner.model != rollout.engine.model:
            yield (
                f"learner.model ({learner.model}) and rollout.engine.model ({rollout.engine.model}) must be the same "
                "model"
            )
        if learner.family != episode.family:
            yield f"learner.family ({learner.family!r}) must equal episode.family ({episode.family!r})"
        optimizer = learner.optimizer
        if optimizer.schedule is not Schedule.CONSTANT and (optimizer.total_steps or 0) < self.total_steps:
            yield (
                f"learner.optimizer.total_steps ({optimizer.total_steps}) must be at least total_steps "
                f"({self.total_steps}): with schedule={optimizer.schedule} the steps from there on would learn nothing "
                "(a rate of 0); leave it out, and it follows the run"
            )
        longest = episode.coarse_tokens + episode.fine_tokens + sampling.coarse_max_tokens + sampling.fine_max_tokens
        if longest >= rollout.engine.max_model_len:
            yield (
                f"rollout.engine.max_model_len ({rollout.engine.max_model_len}) must be above {longest}, the sum of "
                "both visual-token budgets and both reply limits, with room for the prompts' text"
            )


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a recipe (YAML) with ``key=value`` overrides, typed and checked. Former names of keys are read with a
    warning.

    Raises ConfigError naming the key for unknown keys, wrong types, missing values and bad combinations."""
    path = Path(path)
    loaded, changes = _read_recipe(path), _read_overrides(overrides)
    try:
        layers = _shared(_current(loaded), _current(changes))
        merged = OmegaConf.merge(_schema(), *layers)
        resolved = OmegaConf.to_container(merged, resolve=True)
        if wrong := out_of_range(TrainConfig, resolved):
            raise ConfigError("; ".join(wrong))
        config = OmegaConf.to_object(merged)
        for _ in range(2):  # the second time for keys that point to one behind them
            _note_environment(OmegaConf.to_container(merged), resolved)
    except ConfigError:
        raise
    except ConfigKeyError as error:
        raise ConfigError(_unknown_key(str(error.full_key or error.key), path)) from error
    except MissingMandatoryValue as error:
        raise ConfigError(f"{error.full_key} has no value: set it in {path} or give {error.full_key}=...") from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{_short(error.full_key or path)}: {_line(error)}") from error
    except (ValueError, TypeError, RecursionError) as error:  # a section refuses its values, a value is of a wrong kind
        raise ConfigError(_line(error)) from error
    assert isinstance(config, TrainConfig)
    if all(_read(layer, "learner.loss.longest_reply") is None for layer in layers):
        sampling = config.rollout.sampling
        config.learner.loss.longest_reply = sampling.coarse_max_tokens + sampling.fine_max_tokens
    check(config)
    return config


def check(config: TrainConfig) -> None:
    """Refuse values and combinations that cannot work, naming the keys.

    Imports the classes that the configuration names. Raises ConfigError."""
    from ergo_rl.episodes.families import ModelFamily
    from ergo_rl.episodes.prompts import around_image
    from ergo_rl.episodes.types import Question
    from ergo_rl.rewards.terms import load_terms, term_weights

    problems = [*out_of_range(TrainConfig, config), *config.problems(), *config.reward.verifier.problems()]
    try:
        config.weights.for_roles(config.learner.resources, config.rollout.resources)
        load_terms(config.reward), term_weights(config.reward)
        for own in filter(None, (config.episode.family, config.reward.verifier.family)):
            import_class(own, ModelFamily)
        if is_import_path(config.learner.loss.objective):
            from ergo_rl.learners.losses import objective_named  # loads torch

            objective_named(config.learner.loss.objective)
        for prompts in (config.episode.prompts, config.reward.verifier.prompts):
            for template in (prompts.coarse, prompts.fine, prompts.direct, prompts.verify):
                around_image(template, Question("", b"", "", ""))
    except ValueError as error:
        problems.append(str(error))
    if problems:
        raise ConfigError("; ".join(problems))


def config_yaml(config: TrainConfig) -> str:
    """Return a configuration as a recipe. Texts that ``load_config`` took from the environment stay interpolations: a
    key must not end in config.yaml, checkpoints and trackers."""
    return OmegaConf.to_yaml(OmegaConf.create(config_values(config)))


def config_values(config: TrainConfig) -> dict[str, Any]:
    """Return what ``config_yaml`` writes, as nested mappings."""
    values: dict[str, Any] = _unresolved(_plain(config))
    return values


def _plain(value: Any) -> Any:
    """Sections as mappings, members of enumerations by name."""
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.name if isinstance(value, Enum) else value


def _note_environment(given: Any, resolved: Any, key: str = "") -> None:
    """Note the texts of a configuration that come from the environment, directly or by another key."""
    if isinstance(given, dict | list) and isinstance(resolved, dict | list):
        for name in given if isinstance(given, dict) else range(len(given)):
            _note_environment(given[name], resolved[name], f"{key}.{name}" if key else str(name))
    elif isinstance(given, str) and isinstance(resolved, str) and _reads_environment(given, resolved):
        shared = next((keys for keys in ((name, *keys) for name, keys in _SHARED.items()) if key in keys), (key,))
        _ENVIRONMENT.update({(name, resolved): given for name in shared})


def _reads_environment(given: str, resolved: str) -> bool:
    return "oc.env" in given or ("${" in given and any(value and value in resolved for _, value in _ENVIRONMENT))


def _unresolved(value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        return {name: _unresolved(item, f"{key}.{name}" if key else str(name)) for name, item in value.items()}
    if isinstance(value, list):
        return [_unresolved(item, f"{key}.{index}") for index, item in enumerate(value)]
    return _ENVIRONMENT.get((key, value), value) if isinstance(value, str) else value


def same_when_resolved(key: str, old: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether a text from the environment has the value with which an older version saved it, resolved."""
    return bool(_unresolved(old[key], key) == now[key])


def keys_of_run() -> tuple[str, ...]:
    """Return the keys that only fill others."""
    return tuple(_SHARED)


def with_model(config: TrainConfig, model: str) -> TrainConfig:
    """Return the configuration with another policy, in every key that names it."""
    engine = replace(config.rollout.engine, model=model)
    rollout, learner = replace(config.rollout, engine=engine), replace(config.learner, model=model)
    return replace(config, model=model, rollout=rollout, learner=learner)


def keys_that_may_change() -> tuple[str, ...]:
    """Return the keys (with all below them) that may have another value when a run is resumed."""
    return keys_marked(TrainConfig, MAY_CHANGE)


def stored_config(path: Path) -> Any:
    """Read the config.yaml of a run or checkpoint, by the keys of today, without any check.

    Raises OSError where there is no such file, ConfigError where it is no recipe."""
    with _naming(str(path)):
        loaded = OmegaConf.load(path)
        if not isinstance(loaded, DictConfig):
            raise ValueError(f"it holds no keys and values, but {type(loaded).__name__}")
        return OmegaConf.create(_current(loaded))


def _read_recipe(path: Path) -> DictConfig:
    if not path.is_file():
        known = ", ".join(sorted(str(recipe) for recipe in path.parent.glob("*.yaml"))) or "none"
        raise ConfigError(f"there is no recipe {path}; recipes there: {known}")
    with _naming(str(path)):
        recipe = OmegaConf.load(path)
    if not isinstance(recipe, DictConfig):
        raise ConfigError(f"{path} holds no keys and values, but {type(recipe).__name__}")
    return recipe


def _read_overrides(overrides: Sequence[str]) -> Any:
    """Return ``key=value`` texts as nested keys; of equal keys the last wins."""
    changes: Any = OmegaConf.create()
    for override in overrides:
        if not override.partition("=")[0].strip() or "=" not in override:
            raise ConfigError(f"{_short(override)!r} is not an override; write key=value, e.g. total_steps=50")
        with _naming(f"override {_short(override)}"):
            changes = OmegaConf.merge(changes, OmegaConf.from_dotlist([override]))
    return changes


def _current(layer: Any) -> dict[Any, Any]:
    """Return what a file or the overrides give, by the keys of today, interpolations unresolved."""
    return with_current_names(OmegaConf.to_container(layer), TrainConfig)  # type: ignore[arg-type]


def _shared(recipe: dict[Any, Any], changes: dict[Any, Any]) -> tuple[dict[Any, Any], dict[Any, Any]]:
    """Give the keys of ``_SHARED`` the same value, as far as they are not given themselves; overrides win.

    Raises ValueError where a recipe, or the overrides, give two that differ."""
    for of_run, keys in _SHARED.items():
        for layer in (recipe, changes):
            if (value := _read(layer, of_run)) in (None, ""):
                continue
            for key in keys:
                if (own := _read(layer, key)) is None:
                    _write(layer, key, value)
                elif own != value and "${" not in f"{own}{value}":
                    raise ValueError(f"{key} ({_short(own)}) must equal {of_run} ({_short(value)})")
        if (overridden := next((own for key in keys if (own := _read(changes, key)) is not None), None)) is not None:
            _write(recipe, of_run, overridden)
        given = [own for layer in (changes, recipe) for key in keys if (own := _read(layer, key)) not in (None, "")]
        for key in keys if given else ():
            if _read(recipe, key) is None and _read(changes, key) is None:
                _write(recipe, key, given[0])
    return recipe, changes


def _read(values: Any, key: str) -> Any:
    """Return what is at a dotted key of nested mappings or sections; None where nothing is."""
    return reduce(
        lambda below, name: below.get(name) if isinstance(below, Mapping) else getattr(below, name, None),
        key.split("."),
        values,
    )


def _write(values: dict[Any, Any], key: str, value: Any) -> None:
    """Set a dotted key of nested mappings. A value in the place of a section stays: it is refused later, by name."""
    *sections, leaf = key.split(".")
    for name in sections:
        if values.get(name) is None:
            values[name] = {}
        if not isinstance(values[name], dict):
            return
        values = values[name]
    values[leaf] = value


@cache
def _schema() -> Any:
    return OmegaConf.structured(TrainConfig)


@cache
def _defaults() -> Any:
    """Return the sections at their defaults, those of ``_SHARED`` not filled yet."""
    return OmegaConf.to_container(_schema())


@contextmanager
def _naming(what: str) -> Iterator[None]:
    """Name what cannot be read inside the block in the error."""
    try:
        yield
    except (YAMLError, OmegaConfBaseException, ValueError, TypeError, LookupError, RecursionError) as error:
        reason = " ".join(str(error).split()) if isinstance(error, YAMLError) else _line(error)
        raise ConfigError(f"{what} is not readable YAML: {reason[:_SHOWN]}") from error


def _line(error: Exception) -> str:
    """Return the first line of a message: what comes after it is OmegaConf's account of its own types."""
    line = next(iter(str(error).splitlines()), "") or type(error).__name__
    return line if len(line) <= _SHOWN else f"{line[:_SHOWN]}..."


def _short(value: object) -> str:
    shown = repr(value) if isinstance(value, str) and not value.isprintable() else str(value)
    return shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."


def _unknown_key(key: str, path: Path) -> str:
    key = _short(key)
    known, leaf = all_keys(TrainConfig()), key.rpartition(".")[2]
    same_leaf = [name for name in known if name.rpartition(".")[2] == leaf]  # right name, wrong section
    near = difflib.get_close_matches(key, same_leaf or known, n=1, cutoff=0.0 if same_leaf else 0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"unknown key {key!r} (in {path} or an override){hint}"


def all_keys(config: Any, prefix: str = "") -> list[str]:
    """Return the dotted keys of a configuration, sections included."""
    keys = []
    for key in fields(config):
        keys.append(prefix + key.name)
        value = getattr(config, key.name)
        if is_dataclass(value):
            keys += all_keys(value, f"{prefix}{key.name}.")
    return keys
