"""What the commands that take a recipe share: its arguments, what can go wrong, the start of those who play."""

from __future__ import annotations

import argparse
from pathlib import Path

from ergo_rl.actors.rollout_pool import RolloutPool
from ergo_rl.cluster.placement import Cluster
from ergo_rl.cluster.worker_pool import PoolExhausted
from ergo_rl.episodes.families import UnknownFamily, family_of
from ergo_rl.episodes.questions import DatasetError
from ergo_rl.jobs.config import ConfigError, TrainConfig
from ergo_rl.jobs.outage import RewardsUnavailable
from ergo_rl.jobs.proof import WeightsDiffer
from ergo_rl.jobs.saving.checkpoints import DamagedCheckpoint
from ergo_rl.learners.learner_group import LearnerFailed
from ergo_rl.rewards.config import Backend
from ergo_rl.rewards.reward_pool import RewardPool
from ergo_rl.rewards.verifier import VerifierUnavailable

DEFAULT_RECIPE = "configs/panels.yaml"
EXPECTED = (
    ConfigError,
    DamagedCheckpoint,
    DatasetError,
    LearnerFailed,
    OSError,  # a model or file that is not there, a Ray address that does not answer
    PoolExhausted,
    RewardsUnavailable,
    TimeoutError,
    UnknownFamily,
    VerifierUnavailable,
    WeightsDiffer,
)
"""What can go wrong without a bug of ours: the message says it all, a traceback would only hide it."""


def explain(error: BaseException) -> str:
    """The message and our notes to it, on one line; Ray's notes are tracebacks."""
    notes = [note for note in getattr(error, "__notes__", []) if "\n" not in note]
    return "; ".join([str(error), *notes])


def add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?", default=DEFAULT_RECIPE, help=f"YAML recipe (default: {DEFAULT_RECIPE})")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values that override the recipe's")


def recipe_of(arguments: argparse.Namespace) -> tuple[Path, list[str]]:
    """The recipe and its overrides; the recipe may be left out where only overrides are given."""
    if "=" in arguments.recipe:
        return Path(DEFAULT_RECIPE), [arguments.recipe, *arguments.overrides]
    return Path(arguments.recipe), list(arguments.overrides)


def launch_players(cluster: Cluster, config: TrainConfig) -> tuple[RolloutPool, RewardPool]:
    """Rollout and reward workers, starting in the background. A model that is not there is said now (OSError,
    UnknownFamily), not by a worker in a minute."""
    family_of(config.rollout.engine.model, config.episode.family)
    if config.reward.verifier.backend is Backend.ENGINE:
        family_of(config.reward.verifier.engine.model, config.reward.verifier.family)
    return RolloutPool.launch(cluster, config.rollout, config.episode), RewardPool.launch(cluster, config.reward)
