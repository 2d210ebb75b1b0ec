"""What a user sets about rewards."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from ergo_rl.cluster.engine import EngineConfig
from ergo_rl.cluster.resources import Resources
from ergo_rl.episodes.prompts import PromptTemplates


class Backend(StrEnum):
    """Where the reward model runs: in a vLLM engine of this job, or behind an OpenAI-compatible URL."""

    ENGINE = "engine"
    ENDPOINT = "endpoint"


@dataclass
class EndpointConfig:
    url: str = ""
    """Base URL up to and including the version, such as http://host:8000/v1."""
    model: str = ""
    """Name under which the endpoint serves the reward model."""
    api_key_env: str = ""
    """Name of the environment variable that holds the API key; empty: no key is sent."""
    timeout_s: float = 120.0
    """One attempt, in seconds."""
    retries: int = 4
    """Further attempts after a failed one (no connection, timeout, status 408, 409, 425, 429 or 5xx)."""
    backoff_s: float = 1.0
    """Wait before the first further attempt, in seconds; doubled each time."""
    max_backoff_s: float = 30.0
    """Longest wait between two attempts, in seconds."""
    concurrency: int = 32
    """Requests in flight per reward worker."""

    def __post_init__(self) -> None:
        if "@" in self.url.split("://")[-1].split("/")[0]:
            raise ValueError(
                "reward.verifier.endpoint.url holds a user or password: it would be in config.yaml and in the logs; "
                "put the key into the environment and name the variable in reward.verifier.endpoint.api_key_env"
            )


@dataclass
class VerifierConfig:
    """The frozen reward model."""

    backend: Backend = Backend.ENGINE
    """engine | endpoint."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """For backend engine."""
    family: str = ""
    """For backend engine: ``package.module:Class`` of the reward model's own family; empty: ours, by its type."""
    endpoint: EndpointConfig = field(default_factory=EndpointConfig)
    """For backend endpoint."""
    prompts: PromptTemplates = field(default_factory=PromptTemplates)
    """Only ``system`` and ``verify`` are used."""
    max_tokens: int = 128
    """Longest reply of the reward model."""
    max_visual_tokens: int = 16384
    """Backend engine: crops of more visual tokens are made smaller (Qwen2.5-VL's processor takes 16384)."""


@dataclass
class RewardConfig:
    """R = alpha * r_region + beta * r_box + the weighted other terms (ERGO, arXiv 2509.21991)."""

    alpha: float = 1.0
    """Weight of r_region."""
    beta: float = 0.5
    """Weight of r_box."""
    gamma: float = 0.6
    """Largest area(crop) / area(original) that r_box pays for."""
    gamma_quantile: float | None = None
    """Take gamma from the data instead: this quantile (0 .. 1) of the areas, as shares of their images, of the target
    boxes that the training questions know, grown by ``gamma_margin``. null: ``gamma`` as it is (the paper)."""
    gamma_margin: float = 0.0
    """With ``gamma_quantile``: grow a known box on each side by this share of its longer side first, because a region
    needs some context."""
    weights: dict[str, float] = field(default_factory=lambda: {"accuracy": 1.0, "format": 1.0})
    """Weights of the other terms, by their names in ``rewards.terms.TERMS`` (among them ``soft_box``, ours); 0 measures
    a term without paying it."""
    terms: dict[str, str] = field(default_factory=dict)
    """Terms of your own (docs/extending.md), ``name: package.module:Class``; each needs its weight."""
    number_tolerance: float = 0.01
    """Relative tolerance for answers that are decimal numbers; whole numbers must be equal."""
    verifier: VerifierConfig = field(default_factory=VerifierConfig)
    workers: int = 1
    """Reward workers; each hosts one reward model (or one client of the endpoint)."""
    resources: Resources = field(default_factory=Resources)
    """Per worker."""
    restarts: int = 3
    """Dead or hung workers replaced before the run gives up."""
    stall_s: float = 900.0
    """A worker that has work and finishes none of it for so long counts as dead, seconds."""
    backoff_s: float = 2.0
    """Wait before the second replacement in a row, in seconds; doubled each time, a minute at most."""
    unscored_tolerance: float = 0.25
    """Where more than this share of a step's trajectories could not be scored, training waits and has them scored
    again."""
    outage_deadline_s: float = 3600.0
    """After waiting so long the run is saved and ends, seconds."""

    def __post_init__(self) -> None:
        if not 0 <= self.unscored_tolerance <= 1:
            raise ValueError(f"reward.unscored_tolerance is {self.unscored_tolerance}; it is a share, 0 to 1")
        if self.gamma_quantile is not None and not 0 <= self.gamma_quantile <= 1:
            raise ValueError(f"reward.gamma_quantile is {self.gamma_quantile}; a quantile lies between 0 and 1")
        if not 0 < self.gamma <= 1:
            raise ValueError(f"reward.gamma is {self.gamma}; it is a share of the image, above 0 and at most 1")
