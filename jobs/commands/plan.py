"""``ergo-rl plan``: say before a run whether it fits: memory per GPU, placement, time."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ergo_rl.console import PlainConsole
from ergo_rl.jobs.cli import add_recipe, command, parse_with_overrides, recipe_of
from ergo_rl.jobs.config import load_config
from ergo_rl.jobs.placement_plan import make_plan, show

DOES_NOT_FIT = 3
"""Exit status."""


@command("plan")
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="ergo-rl plan",
        description="Which role runs on which GPU, what each needs there, and where the time goes, before anything is "
        f"started. Exit status {DOES_NOT_FIT} where it cannot fit. The keys `hardware.*` describe the cluster.",
        epilog="example: ergo-rl plan configs/ergo-7b.yaml hardware.gpu_memory_gib=40",
    )
    add_recipe(parser)
    plan = make_plan(load_config(*recipe_of(parse_with_overrides(parser, argv))))
    show(plan, PlainConsole(width=120, soft_wrap=True))
    return DOES_NOT_FIT if plan.problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
