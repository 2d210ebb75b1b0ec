"""``ergo-rl config``: print a recipe with all its keys, or the reference of the keys from their dataclasses."""

from __future__ import annotations

import argparse
import ast
import inspect
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from functools import lru_cache
from typing import Any, get_args, get_type_hints

from omegaconf import MISSING as NO_VALUE
from omegaconf import OmegaConf

from ergo_rl.jobs.cli import add_recipe, command, parse_with_overrides, recipe_of
from ergo_rl.jobs.config import TrainConfig, load_config

HEAD = """# Configuration

Every key of a recipe, its type and default, and what it is for. `ergo-rl config --docs` prints this page from the
dataclasses that define the keys; a test keeps it so. Any key can be given on the command line as `key=value`;
`ergo-rl config RECIPE key=value ...` prints what comes out.
"""


def reference() -> str:
    """The page docs/configuration.md, in Markdown."""
    sections = [HEAD]
    for prefix, kind in _sections(TrainConfig):
        text = inspect.cleandoc(kind.__doc__ or "")
        about = [] if text.startswith(f"{kind.__name__}(") else [text, ""]
        rows = [_row(prefix, kind, name) for name, is_section in _keys(kind) if not is_section]
        if rows or about:
            title = f"`{prefix}`" if prefix else "The run"
            table = ["| key | type | default | |", "|---|---|---|---|", *rows] if rows else []
            sections.append("\n".join([f"## {title}", "", *about, *table]))
    return "\n\n".join(section.strip() for section in sections) + "\n"


def _sections(kind: type, prefix: str = "") -> Iterator[tuple[str, type]]:
    yield prefix, kind
    hints = get_type_hints(kind)
    for name, is_section in _keys(kind):
        if is_section:
            yield from _sections(hints[name], f"{prefix}.{name}".lstrip("."))


def _keys(kind: type) -> Iterator[tuple[str, bool]]:
    """(name, whether it is a section) in the order of the class."""
    hints = get_type_hints(kind)
    for key in fields(kind):
        yield key.name, is_dataclass(hints[key.name])


def _row(prefix: str, kind: type, name: str) -> str:
    key = f"{prefix}.{name}".lstrip(".")
    hint = get_type_hints(kind)[name]
    about = " ".join(docs_of(kind).get(name, "").split()).replace("|", "\\|")
    return f"| `{key}` | {_type(hint)} | {_default(kind, name)} | {about} |"


def _type(hint: Any) -> str:
    if isinstance(hint, type) and issubclass(hint, Enum):
        return " \\| ".join(f"`{member.value}`" for member in hint)
    if hint is Any:
        return "any"
    arguments = get_args(hint)
    if not arguments:
        return "null" if hint is type(None) else str(hint.__name__)
    if (origin := getattr(hint, "__origin__", None)) is not None:
        return f"{origin.__name__} of {' to '.join(map(_type, arguments))}"
    return " or ".join(map(_type, arguments))


def _default(kind: type, name: str) -> str:
    key = next(key for key in fields(kind) if key.name == name)
    value = key.default_factory() if key.default_factory is not MISSING else key.default
    if value is MISSING or value == NO_VALUE:
        return "(must be given)"
    if isinstance(value, Enum):
        return f"`{value.value}`"
    if isinstance(value, list):
        value = [item.value if isinstance(item, Enum) else item for item in value]
    shown = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return "(see there)" if len(shown) > 100 else f"`{shown.replace('|', chr(92) + '|')}`"


@lru_cache
def docs_of(kind: type) -> dict[str, str]:
    """The attribute docstrings of a class: the string below each attribute."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for attribute, below in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(attribute, ast.AnnAssign) and isinstance(attribute.target, ast.Name):
            text = below.value if isinstance(below, ast.Expr) else None
            if isinstance(text, ast.Constant) and isinstance(text.value, str):
                found[attribute.target.id] = inspect.cleandoc(text.value)
    return found


@command("config")
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="ergo-rl config", description="Print a recipe with all its keys, checked, or the reference of the keys."
    )
    parser.add_argument("--docs", action="store_true", help="the reference of every key, in Markdown")
    add_recipe(parser)
    options = parse_with_overrides(parser, argv)
    if options.docs:
        print(reference(), end="")
        return 0
    print(OmegaConf.to_yaml(OmegaConf.structured(load_config(*recipe_of(options)))), end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
