"""``ergo-rl pretrain``: make the small models that the default run starts from."""

from __future__ import annotations

import importlib

main = importlib.import_module("ergo_rl.examples.panels.pretrain").main  # by name: no package imports the examples

__all__ = ["main"]

if __name__ == "__main__":
    raise SystemExit(main())
