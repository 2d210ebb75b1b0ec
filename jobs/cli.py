"""The console command `ergo-rl COMMAND ...`: one file per command in ``commands/``, imported when called."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Callable

# command -> (module with `main(argv: list[str]) -> int`, what it does)
COMMANDS: dict[str, tuple[str, str]] = {
    "train": ("ergo_rl.jobs.commands.train", "Train a policy; overrides as key=value"),
    "evaluate": ("ergo_rl.jobs.commands.evaluate", "Measure a policy on held-out questions, beside baselines"),
    "answer": ("ergo_rl.jobs.commands.answer", "Ask about an image: both turns, the box and the crop"),
    "serve": ("ergo_rl.jobs.commands.serve", "An OpenAI-compatible chat endpoint that answers in two turns"),
    "report": ("ergo_rl.jobs.commands.report", "One HTML page of a run: curves, and its groups with every box"),
    "export": ("ergo_rl.jobs.commands.export", "A Hugging Face folder of a run's policy, with a model card"),
    "submit": ("ergo_rl.jobs.commands.submit", "Run a recipe as a job of a Ray cluster; KubeRay and Slurm as dry runs"),
    "scale": ("ergo_rl.jobs.commands.scale", "Change the number of workers of a run while it runs"),
    "ablate": ("ergo_rl.jobs.commands.ablate", "Train with other rewards and seeds: a table and a plot"),
    "config": (
        "ergo_rl.jobs.commands.config",
        "Print a recipe with all its keys, or the reference of the keys (--docs)",
    ),
    "plan": ("ergo_rl.jobs.commands.plan", "Say before a run whether it fits: memory per GPU, placement, time"),
    "prepare": (
        "ergo_rl.jobs.commands.prepare",
        "Make or convert a data set to the Parquet layout that training reads",
    ),
    "pretrain": ("ergo_rl.jobs.commands.pretrain", "Make the small models that the default run starts from"),
}
USAGE_ERROR = 2


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit status; 2 where the command is missing or unknown."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments:
        print(_help(), file=sys.stderr)
        return USAGE_ERROR
    name, rest = arguments[0], arguments[1:]
    if name in ("-h", "--help", "help"):
        print(_help())
        return 0
    if name not in COMMANDS:
        print(_unknown(name), file=sys.stderr)
        return USAGE_ERROR
    module, _ = COMMANDS[name]
    run: Callable[[list[str]], int] = importlib.import_module(module).main
    return run(rest)


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(
        ["usage: ergo-rl COMMAND [ARGUMENTS]", "", "commands:", *lines, "", "ergo-rl COMMAND --help tells more."]
    )


def _unknown(name: str) -> str:
    nearest = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f"did you mean `{nearest[0]}`?" if nearest else f"There are: {', '.join(COMMANDS)}."
    return f"ergo-rl: unknown command `{name}`; {hint}"


if __name__ == "__main__":
    sys.exit(main())
