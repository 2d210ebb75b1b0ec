"""Configuration of rewards and of the verifier."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated, Any

from annotated_types import Ge, Gt, Le

from ergo_rl.cluster.config import EngineConfig, Resources
from ergo_rl.config_fields import MAY_CHANGE, ConfigSection, Formerly
from ergo_rl.episodes.config import PromptTemplates


class Backend(StrEnum):
    """Where the verifier runs: in a vLLM engine of this job, or behind an OpenAI-compatible URL."""

    ENGINE = "engine"
    ENDPOINT = "endpoint"


class LimitName(StrEnum):
    """What an endpoint calls the limit on a reply's tokens."""

    MAX_TOKENS = "max_tokens"
    MAX_COMPLETION_TOKENS = "max_completion_tokens"


@dataclass
class EndpointConfig(ConfigSection):
    """An OpenAI-compatible endpoint that serves the verifier."""

    url: Annotated[str, MAY_CHANGE] = ""
    """Base URL up to and including the version, such as http://host:8000/v1."""
    model: str = ""
    """Name under which the endpoint serves the verifier."""
    api_key_env: Annotated[str, MAY_CHANGE] = ""
    """Name of the environment variable that holds the API key; empty: no key is sent."""
    timeout_s: Annotated[float, Ge(0.001), MAY_CHANGE] = 120.0
    """Time limit of each attempt, from the request to the last byte of the reply, in seconds."""
    retries: Annotated[int, Ge(0), MAY_CHANGE] = 4
    """Further attempts after a failed one (no connection, timeout, status 408, 409, 425, 429 or 5xx)."""
    backoff_s: Annotated[float, Ge(0), MAY_CHANGE] = 1.0
    """Wait before the first further attempt, in seconds; doubled each time."""
    max_backoff_s: Annotated[float, Ge(0), MAY_CHANGE] = 30.0
    """Longest wait between two attempts, in seconds."""
    concurrency: Annotated[int, Ge(1), MAY_CHANGE] = 32
    """Requests in flight per reward worker."""
    limit_name: LimitName = LimitName.MAX_TOKENS
    """Parameter that limits a reply: max_tokens, or max_completion_tokens for endpoints that refuse it."""
    extra_body: dict[str, Any] = field(default_factory=lambda: {"repetition_penalty": 1.0})
    """Further fields of every request. The default undoes a penalty that vLLM takes from a model's
    ``generation_config.json``; ``repetition_penalty: null`` for endpoints that refuse the field."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if "@" in self.url.split("://")[-1].split("/")[0]:
            raise ValueError(
                "reward.verifier.endpoint.url holds a user or password: it would be in config.yaml and in the logs; "
                "put the key into the environment and name the variable in reward.verifier.endpoint.api_key_env"
            )


@dataclass
class VerifierConfig(ConfigSection):
    """The verifier: a frozen model that reads the crop."""

    backend: Backend = Backend.ENGINE
    """engine: a vLLM engine of this job; endpoint: an OpenAI-compatible URL."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """For backend engine."""
    family: str = ""
    """``package.module:Class`` of the verifier's own family; empty: one of ours, by its type (backend endpoint:
    Qwen2.5-VL's sizes)."""
    endpoint: EndpointConfig = field(default_factory=EndpointConfig)
    """For backend endpoint."""
    prompts: PromptTemplates = field(default_factory=PromptTemplates)
    """Only ``system`` and ``verify`` are used."""
    max_tokens: Annotated[int, Ge(1)] = 128
    """Longest reply of the verifier, in tokens."""
    fine_tokens: Annotated[int, Ge(0)] = 0
    """Visual-token budget of the crop that the verifier sees, cut from the original image; 0: it sees what the policy
    saw (``episode.fine_tokens``)."""
    max_visual_tokens: Annotated[int, Ge(1)] = 16384
    """Backend engine: crops of more visual tokens are made smaller (Qwen2.5-VL's processor takes 16384)."""

    def problems(self) -> Iterator[str]:
        """Yield what is missing or cannot work in a run."""
        if self.backend is Backend.ENGINE and not self.engine.model:
            yield "reward.verifier.engine.model has no value: name a verifier, or set reward.verifier.backend=endpoint"
        if self.backend is Backend.ENDPOINT and not (self.endpoint.url and self.endpoint.model):
            yield "reward.verifier.endpoint needs url and model where reward.verifier.backend is endpoint"
        if self.engine.sleep:
            yield "reward.verifier.engine.sleep must be false: only rollout engines are woken, by new weights"


@dataclass
class RewardConfig(ConfigSection):
    """R = alpha * r_region + beta * r_box + the weighted other terms (ERGO, arXiv 2509.21991)."""

    alpha: float = 1.0
    """Weight of r_region."""
    beta: float = 0.5
    """Weight of r_box."""
    gamma: Annotated[float, Gt(0), Le(1)] = 0.6
    """Largest area(crop) / area(original) that r_box pays for."""
    gamma_quantile: Annotated[float | None, Ge(0), Le(1)] = None
    """Take gamma from the data instead: this quantile (0 to 1) of the areas of the target boxes that the training
    questions have, as shares of their images and grown by ``gamma_margin``. null: use ``gamma`` (as the paper does)."""
    gamma_margin: Annotated[float, Ge(0)] = 0.0
    """With ``gamma_quantile``: first grow a target box on each side by this share of its longer side, because a region
    needs some context."""
    weights: dict[str, float] = field(default_factory=lambda: {"accuracy": 1.0, "format": 1.0})
    """Weights of the other terms, by their names in ``rewards.terms.TERMS`` (which has ``soft_box``, too); a term with
    weight 0 is measured and not paid."""
    terms: dict[str, str] = field(default_factory=dict)
    """Terms of your own (docs/extending.md), ``name: package.module:Class`` or ``package.module:function``; each needs
    its weight."""
    handed_over: list[str] = field(default_factory=list)
    """Names of terms that a Python program hands over as objects, ``Trainer(reward_terms=[...])``, which fills this in:
    a run with such terms resumes with the same ones. Set it yourself to give such a term a weight other than 1."""
    number_tolerance: Annotated[float, Ge(0)] = 0.0
    """Relative tolerance where the ground truth is a decimal number; 0: exact. Whole numbers must always be equal."""
    verifier: VerifierConfig = field(default_factory=VerifierConfig)
    workers: Annotated[int, Ge(1), MAY_CHANGE] = 1
    """Reward workers; each hosts a verifier (or a client of the endpoint)."""
    resources: Annotated[Resources, MAY_CHANGE] = field(default_factory=Resources)
    """Per worker."""
    restarts: Annotated[int, Ge(0), MAY_CHANGE] = 3
    """Dead or hung workers that are replaced before the run gives up."""
    hang_timeout_s: Annotated[float, Ge(1), Formerly("stall_s"), MAY_CHANGE] = 900.0
    """A worker that has work and finishes none of it for this many seconds counts as dead."""
    backoff_s: Annotated[float, Ge(0), MAY_CHANGE] = 2.0
    """Wait before the second replacement in a row, in seconds; doubled each time, up to a minute."""
    unscored_tolerance: Annotated[float, Ge(0), Le(1), MAY_CHANGE] = 0.25
    """If more than this share of a step's trajectories could not be scored, training waits and has them scored
    again."""
    outage_deadline_s: Annotated[float, Ge(0), MAY_CHANGE] = 3600.0
    """After waiting this many seconds the run is saved and ends."""
