"""What vLLM's sources define and what ours ask of them, read by ``ast``: nothing is imported, so the sources may be of
a build that cannot run here."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Protocol

from tests.conftest import ROOT

OURS = ("actors", "benchmarks", "cluster", "jobs", "learners", "rewards")
Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


class Sources(Protocol):
    def read(self, path: str) -> str | None: ...


@dataclass(frozen=True)
class Parameters:
    """Of a function, or of the constructor of a class that is a list of fields."""

    positional: tuple[str, ...] = ()
    keywords: tuple[str, ...] = ()
    """That can only be given by name."""
    required: frozenset[str] = frozenset()
    any_positional: bool = False
    any_keyword: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        return self.positional + self.keywords

    def why_not(self, call: ast.Call) -> str:
        """Why a call does not fit; empty if it does."""
        given = [word.arg for word in call.keywords if word.arg]
        if unknown := [name for name in given if name not in self.names and not self.any_keyword]:
            return f"takes no {', '.join(unknown)}"
        if len(call.args) > len(self.positional) and not self.any_positional:
            return f"takes {len(self.positional)} arguments"
        open_ended = len(given) < len(call.keywords) or any(isinstance(value, ast.Starred) for value in call.args)
        missing = self.required - {*given, *self.positional[: len(call.args)]}
        return f"needs {', '.join(sorted(missing))}" if missing and not open_ended else ""


@dataclass
class Code:
    """Looks names up in a package's sources."""

    sources: Sources
    _trees: dict[str, ast.Module | None] = field(default_factory=dict)

    def module(self, name: str) -> ast.Module | None:
        if name not in self._trees:
            path = name.replace(".", "/")
            text = self.sources.read(f"{path}.py") or self.sources.read(f"{path}/__init__.py")
            self._trees[name] = None if text is None else ast.parse(text)
        return self._trees[name]

    def has(self, module: str, name: str) -> bool:
        tree = self.module(module)
        if tree is None:
            return False
        return (
            name in _names(tree) or self._moved(module, name) is not None or self.module(f"{module}.{name}") is not None
        )

    def find(self, module: str, name: str) -> tuple[str, Definition] | None:
        """The definition of a class or function and its module, through re-exports."""
        tree = self.module(module)
        for node in _statements(tree) if tree else ():
            if isinstance(node, Definition) and node.name == name:
                return module, node
        moved = self._moved(module, name)
        return self.find(*moved) if moved else None

    def _moved(self, module: str, name: str) -> tuple[str, str] | None:
        """Where a module has this name from: an import, or vLLM's table of lazy imports ("vllm.x:Name")."""
        tree = self.module(module)
        for node in ast.walk(tree) if tree else ():
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        return self._absolute(module, node), alias.name
            if isinstance(node, ast.Dict):
                for key, value in zip(node.keys, node.values, strict=True):
                    if _text(key) == name and ":" in _text(value):
                        where, _, what = _text(value).partition(":")
                        return (f"{module}{where}" if where.startswith(".") else where), what
        return None

    def _absolute(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        is_package = self.sources.read(f"{module.replace('.', '/')}/__init__.py") is not None
        parts = module.split(".")
        base = parts[: len(parts) - node.level + is_package]
        return ".".join([*base, *([node.module] if node.module else [])])

    def members(self, module: str, name: str) -> dict[str, ast.stmt]:
        """Methods and fields of a class, inherited ones included, in order of definition."""
        found = self.find(module, name)
        if found is None or not isinstance(found[1], ast.ClassDef):
            return {}
        where, node = found
        members: dict[str, ast.stmt] = {}
        for base in node.bases:
            inner = base.value if isinstance(base, ast.Subscript) else base
            if isinstance(inner, ast.Name):
                members |= self.members(where, inner.id)
        for statement in node.body:
            if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
                members[statement.name] = statement
            elif isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                members[statement.target.id] = statement
            elif isinstance(statement, ast.Assign):
                members |= {target.id: statement for target in statement.targets if isinstance(target, ast.Name)}
        return members

    def parameters(self, module: str, name: str, method: str = "") -> Parameters | None:
        """Of a function, a method, or a class's constructor; None where there is none."""
        found = self.find(module, name)
        if found is None:
            return None
        if isinstance(found[1], ast.ClassDef):
            members = self.members(module, name)
            node = members.get(method or "__init__")
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                return _of_function(node, skip_first=not _has(node, "staticmethod"))
            return None if method else _of_fields(members)
        return None if method else _of_function(found[1], skip_first=False)

    def abstract(self, module: str, name: str) -> set[str]:
        """Methods that a class of ours must define."""
        members = self.members(module, name)
        return {key for key, node in members.items() if isinstance(node, Definition) and _has(node, "abstractmethod")}


def _of_function(node: ast.FunctionDef | ast.AsyncFunctionDef, skip_first: bool) -> Parameters:
    spec = node.args
    positional = [argument.arg for argument in (*spec.posonlyargs, *spec.args)][skip_first:]
    needed = positional[: len(positional) - len(spec.defaults)] if spec.defaults else positional
    keyword = [argument.arg for argument in spec.kwonlyargs]
    needed += [name for name, default in zip(keyword, spec.kw_defaults, strict=True) if default is None]
    return Parameters(
        tuple(positional), tuple(keyword), frozenset(needed), spec.vararg is not None, spec.kwarg is not None
    )


def _of_fields(members: dict[str, ast.stmt]) -> Parameters:
    positional, keywords, required = [], [], set()
    for name, node in members.items():
        if not isinstance(node, ast.AnnAssign) or "ClassVar" in ast.unparse(node.annotation):
            continue
        call = node.value if isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == "field" else None
        words = {word.arg for word in call.keywords} if call else set()
        (keywords if "kw_only" in words else positional).append(name)
        if node.value is None or (call and not words & {"default", "default_factory"}):
            required.add(name)
    return Parameters(tuple(positional), tuple(keywords), frozenset(required))


def _has(node: Definition, decorator: str) -> bool:
    return any(ast.unparse(one).endswith(decorator) for one in node.decorator_list)


def _text(node: ast.expr | None) -> str:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def _statements(tree: ast.Module) -> Iterator[ast.stmt]:
    """At the top of a module, conditional ones included."""
    rest: list[ast.stmt] = list(tree.body)
    while rest:
        node = rest.pop(0)
        yield node
        if isinstance(node, ast.If | ast.Try | ast.With):
            rest += [child for child in ast.walk(node) if isinstance(child, ast.stmt) and child is not node]


def _names(tree: ast.Module) -> set[str]:
    names: set[str] = set()
    for node in _statements(tree):
        if isinstance(node, Definition):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


# --- our side ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Use:
    """A name of vLLM's that a file of ours imports, and the calls of it there."""

    file: Path
    module: str
    name: str
    calls: tuple[tuple[str, ast.Call], ...]
    """(method, call); the method is empty where the name itself is called."""


@cache
def uses() -> tuple[Use, ...]:
    return tuple(use for folder in OURS for file in sorted((ROOT / folder).rglob("*.py")) for use in _uses_of(file))


def _uses_of(file: Path) -> Iterator[Use]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
            for alias in node.names:
                yield Use(file, node.module or "", alias.name, tuple(_calls(tree, alias.asname or alias.name)))


def _calls(tree: ast.AST, name: str) -> Iterator[tuple[str, ast.Call]]:
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        for inner in (call.func, *call.args):  # `to_thread(f, x)` calls f(x)
            arguments = call if inner is call.func else ast.Call(call.func, call.args[call.args.index(inner) + 1 :], [])
            if isinstance(inner, ast.Name) and inner.id == name and inner is call.func:
                yield "", arguments
            if isinstance(inner, ast.Attribute) and ast.unparse(inner.value) == name:
                yield inner.attr, arguments


def calls_of(path: str, *objects: str) -> list[tuple[str, ast.Call]]:
    """The method calls on these expressions in a file of ours or of vLLM's text."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8") if path.endswith(".py") else path)
    return [entry for name in objects for entry in _calls(tree, name)]
