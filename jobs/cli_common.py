"""What the commands share: arguments for a recipe and for an endpoint, and the handling of expected errors."""

from __future__ import annotations

import argparse
import functools
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ParamSpec

from ergo_rl.errors import ErgoError

DEFAULT_RECIPE = "configs/panels.yaml"
EXPECTED: tuple[type[Exception], ...] = (ErgoError, OSError)
"""Errors whose message says enough: ours, and files or addresses that are not there. A traceback would only hide it."""
STOPPED_BY_HAND = 130
"""Exit status after Ctrl-C, as shells have it (128 + SIGINT)."""
_OVERRIDE = re.compile(r"[^\s=/-][^\s=/]*=")
P = ParamSpec("P")


def command(
    name: str, stopped: str = "stopped by hand", also: tuple[type[Exception], ...] = ()
) -> Callable[[Callable[P, int]], Callable[P, int]]:
    """Decorate a command's ``main``: an expected error becomes one line on stderr and exit status 1, Ctrl-C becomes
    status 130.

    stopped: what to say after Ctrl-C; also: further expected errors of this command."""

    def decorate(main: Callable[P, int]) -> Callable[P, int]:
        @functools.wraps(main)
        def run(*args: P.args, **kwargs: P.kwargs) -> int:
            try:
                return main(*args, **kwargs)
            except (*EXPECTED, *also) as error:
                print(f"ergo-rl {name}: {explain(error)}", file=sys.stderr)
                return 1
            except KeyboardInterrupt:
                print(f"ergo-rl {name}: {stopped}", file=sys.stderr)
                return STOPPED_BY_HAND

        return run

    return decorate


def explain(error: BaseException) -> str:
    """The message and the notes added to it, on one line. Notes of several lines are Ray's tracebacks: left out."""
    notes = [note for note in getattr(error, "__notes__", []) if "\n" not in note]
    return "; ".join([str(error) or type(error).__name__, *notes])


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
