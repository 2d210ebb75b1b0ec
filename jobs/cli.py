"""The console command `ergo-rl COMMAND ...`: one file per command in ``commands/``, imported when called; and what they
share, arguments for a recipe and for an endpoint, and the handling of expected errors.
"""

from __future__ import annotations

import argparse
import difflib
import functools
import importlib
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import ParamSpec

from ergo_rl.cluster.devices import vllm_build
from ergo_rl.errors import ErgoError, explain

DEFAULT_RECIPE = "configs/panels-gpu.yaml" if vllm_build() == "gpu" else "configs/panels.yaml"
"""The panels on what this environment was set up for: vLLM's GPU build does not run without a GPU."""
EXPECTED: tuple[type[Exception], ...] = (ErgoError, OSError)
"""Errors whose message says enough: ours, and files or addresses that are not there. A traceback would only hide it."""
STOPPED_BY_HAND = 130
"""Exit status after Ctrl-C, as shells have it (128 + SIGINT)."""
_OVERRIDE = re.compile(r"[^\s=/-][^\s=/]*=")
P = ParamSpec("P")


def command(
    name: str, stopped: str = "stopped by hand", also: tuple[type[Exception], ...] = ()
) -> Callable[[Callable[P, int]], Callable[P, int]]:
    """Decorate a command's ``main``: an expected error becomes one line on stderr and its exit status,
    mostly 1; Ctrl-C becomes status 130, SIGTERM and SIGHUP 143 and 129.

    stopped: what to say after Ctrl-C; also: further expected errors of this command."""

    def decorate(main: Callable[P, int]) -> Callable[P, int]:
        @functools.wraps(main)
        def run(*args: P.args, **kwargs: P.kwargs) -> int:
            try:
                with ended_as_by_hand():
                    return main(*args, **kwargs)
            except (*EXPECTED, *also) as error:
                print(f"ergo-rl {name}: {explain(error)}", file=sys.stderr)
                return error.exit_status if isinstance(error, ErgoError) else 1
            except KeyboardInterrupt as stop:
                return _ended(name, stopped, stop)

        return run

    return decorate


class Ended(KeyboardInterrupt):
    """SIGTERM or SIGHUP, where nothing else handles them: what is open is closed as after Ctrl-C."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def ended_as_by_hand() -> Iterator[None]:
    """Within the block SIGTERM and SIGHUP raise Ended, until somebody sets handlers of his own; the second one ends the
    process at once. Does nothing outside of the main thread."""
    pid = os.getpid()

    def end(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        if os.getpid() != pid:  # a fork of this process, which is nobody's command
            os.kill(os.getpid(), number)
            return
        raise Ended(number)

    main_thread = threading.current_thread() is threading.main_thread()
    mine = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is signal.SIG_DFL]
    for number in mine if main_thread else []:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in mine if main_thread else []:
            if signal.getsignal(number) is end:
                signal.signal(number, signal.SIG_DFL)


def _ended(name: str, stopped: str, stop: KeyboardInterrupt) -> int:
    """Say why the command has ended. Returns its exit status."""
    number = stop.number if isinstance(stop, Ended) else signal.SIGINT
    by = "by hand" if number == signal.SIGINT else f"by {signal.Signals(number).name}"
    print(f"ergo-rl {name}: {stopped.replace('by hand', by)}", file=sys.stderr)
    return 128 + number


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """Add ``[recipe] [key=value ...]``; read them with ``parse_with_overrides``."""
    parser.add_argument("recipe", nargs="?", default=DEFAULT_RECIPE, help=f"YAML recipe (default: {DEFAULT_RECIPE})")
    add_overrides(parser, "values that override the recipe's")


def add_overrides(parser: argparse.ArgumentParser, help: str) -> None:
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=help)


def parse_with_overrides(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse arguments among which ``key=value`` overrides stand anywhere, in their order.

    argparse alone gives an override behind an option of several values (``--modes direct seed=3``) to that option. So
    overrides are taken out first: every ``key=value`` that is not the value of an option of exactly one value."""
    given = list(sys.argv[1:] if argv is None else argv)
    single = [name for action in parser._actions if action.nargs is None for name in action.option_strings]
    overrides, rest, before = list[str](), list[str](), ""
    for argument in given:
        is_value = before.startswith("--") and any(name.startswith(before) for name in single)  # may be abbreviated
        if _OVERRIDE.match(argument) and not is_value:
            overrides.append(argument)
        else:
            rest.append(argument)
        before = argument
    options = parser.parse_intermixed_args(rest)
    options.overrides = [*overrides, *options.overrides]
    return options


def recipe_of(arguments: argparse.Namespace) -> tuple[Path, list[str]]:
    """The recipe and its overrides; the recipe may be left out where only overrides are given."""
    if _OVERRIDE.match(arguments.recipe):
        return Path(DEFAULT_RECIPE), [arguments.recipe, *arguments.overrides]
    return Path(arguments.recipe), list(arguments.overrides)


def add_endpoint(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that put an endpoint in the place of an engine: ``url``, ``served_model``, ``family``."""
    from ergo_rl.episodes.families import FAMILIES

    parser.add_argument("--url", default="", help="ask an OpenAI-compatible endpoint instead: http://host:8000/v1")
    parser.add_argument("--served-model", default="", help="with --url: the model's name there (default: its only one)")
    parser.add_argument(
        "--family",
        default="qwen2_5_vl",
        help=f"with --url: how the model writes boxes and sizes images: {', '.join(FAMILIES)}, or package.module:Class "
        "(default: %(default)s)",
    )


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
    "pretrain": ("ergo_rl.examples.panels.pretrain", "Make the small models that the default run starts from"),
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
    _put_tools_on_path()
    module, _ = COMMANDS[name]
    try:
        with ended_as_by_hand():
            run: Callable[[list[str]], int] = importlib.import_module(module).main
    except KeyboardInterrupt as stop:  # imports take seconds
        return _ended(name, "stopped by hand", stop)
    return run(rest)


def _put_tools_on_path() -> None:
    """Let this process and its children find the programs of its environment, called as ``.venv/bin/ergo-rl``, too:
    DeepSpeed and vLLM compile with the ninja that is installed there."""
    tools, path = str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)
    if tools not in path.split(os.pathsep):
        os.environ["PATH"] = f"{tools}{os.pathsep}{path}"


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
