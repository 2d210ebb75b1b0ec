"""``ergo-rl pretrain``: make the small models that the default run starts from."""

from __future__ import annotations

from ergo_rl.jobs.pretraining.pretrain import main

__all__ = ["main"]

if __name__ == "__main__":
    raise SystemExit(main())
