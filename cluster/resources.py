"""What an actor asks for. Apart from ``cluster.placement``, because configurations must not import Ray."""

from dataclasses import dataclass


@dataclass
class Resources:
    """What one actor of a role asks Ray for. Shares of a core are fine: threads are bounded per role."""

    cpus: float = 0.25
    gpus: float = 0.0
