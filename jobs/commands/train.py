"""``ergo-rl train``: train a policy."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ergo_rl.jobs.cli import add_recipe, command, parse_with_overrides, recipe_of
from ergo_rl.jobs.config import load_config
from ergo_rl.jobs.shutdown import Stopped
from ergo_rl.jobs.trainer import Trainer


@command("train", stopped="stopped by hand before anything could be saved")
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="ergo-rl train",
        description="Train a policy with ERGO: rollouts, rewards, updates, weights back into the engines. The same "
        "command resumes a run that was stopped or killed from its last checkpoint (resume=never begins a new run, "
        "resume=PATH begins one from another run's checkpoint). Ctrl-C and SIGTERM save first; Ctrl-C twice quits at "
        "once.",
        epilog="example: ergo-rl train configs/panels.yaml total_steps=50 learner.optimizer.lr=1e-4",
    )
    add_recipe(parser)
    config = load_config(*recipe_of(parse_with_overrides(parser, argv)))
    try:
        folder = Trainer(config).fit(handle_signals=True, live_display=True)
    except Stopped as stopped:
        stopped.add_note("the same command resumes the run")
        raise
    print(
        f"Done. {folder}/ holds metrics.jsonl, samples/ and policy/; curves: tensorboard --logdir {folder}/tensorboard"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
