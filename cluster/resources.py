"""What an actor asks for, and how many there are. Apart from ``cluster.placement``, because configurations must not
import Ray."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class Resources:
    """What one actor of a role asks Ray for. Shares of a core are fine: threads are bounded per role."""

    cpus: float = 0.25
    gpus: float = 0.0


@dataclass(frozen=True, slots=True)
class Size:
    """How many workers a pool may have; one number where least and most are equal."""

    min: int
    max: int

    @classmethod
    def read(cls, value: Any, key: str) -> Size:
        """From a configuration: a whole number, or ``{min: 1, max: 4}``. Raises ValueError naming ``key``."""
        bounds = value if isinstance(value, dict) else {"min": value, "max": value}
        whole = all(isinstance(one, int) and not isinstance(one, bool) for one in bounds.values())
        if set(bounds) != {"min", "max"} or not whole or not 1 <= bounds["min"] <= bounds["max"] <= _MOST:
            raise ValueError(
                f"{key} is {str(value)[:100]}; it takes a whole number from 1, or {{min: 1, max: 4}} with min up to max"
            )
        return cls(bounds["min"], bounds["max"])


_MOST = 10_000
