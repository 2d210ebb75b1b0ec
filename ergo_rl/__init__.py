"""The open trainer for ERGO: reinforcement learning that teaches a vision-language model where to look.

Example::

    from ergo_rl import Policy, Trainer, load_config

    folder = Trainer(load_config("configs/panels.yaml", ["total_steps=3"])).fit()
    with Policy.load(folder) as policy:
        print(policy.answer("street.jpg", "What does the sign say?").answer)

Names are imported on first use, so that ``import ergo_rl`` loads neither Ray nor torch nor vLLM.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ergo_rl.episodes.families import ModelFamily
    from ergo_rl.episodes.types import Question, Trajectory
    from ergo_rl.errors import ErgoError
    from ergo_rl.jobs.benchmark import evaluate
    from ergo_rl.jobs.config import TrainConfig, load_config
    from ergo_rl.jobs.policy import Policy
    from ergo_rl.jobs.trainer import Trainer
    from ergo_rl.learners.losses import Objective
    from ergo_rl.rewards.terms import RewardTerm

__all__ = [
    "ErgoError",
    "ModelFamily",
    "Objective",
    "Policy",
    "Question",
    "RewardTerm",
    "TrainConfig",
    "Trainer",
    "Trajectory",
    "evaluate",
    "load_config",
]

_MODULES = {
    "ErgoError": "errors",
    "ModelFamily": "episodes.families",
    "Objective": "learners.losses",
    "Policy": "jobs.policy",
    "Question": "episodes.types",
    "RewardTerm": "rewards.terms",
    "TrainConfig": "jobs.config",
    "Trainer": "jobs.trainer",
    "Trajectory": "episodes.types",
    "evaluate": "jobs.benchmark",
    "load_config": "jobs.config",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
