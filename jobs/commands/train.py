"""``ergo-rl train``."""

from __future__ import annotations

from ergo_rl.jobs.train import main

__all__ = ["main"]

if __name__ == "__main__":
    raise SystemExit(main())
