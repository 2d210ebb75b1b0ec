"""Classes that users bring along: named as ``package.module:Class`` in a configuration, with nothing to edit here."""

from __future__ import annotations

import importlib
import os
import sys
from typing import TypeVar

Kind = TypeVar("Kind")
_MAX_LENGTH = 300


def is_import_path(name: str) -> bool:
    """Return whether a name in a configuration is ``package.module:Class``, not the name of something built in."""
    return ":" in name


def import_class(path: str, kind: type[Kind]) -> type[Kind]:
    """Import the class at ``package.module:Class``, a subclass of ``kind``.

    Works by name in whichever process asks (driver, Ray worker), and finds modules in the working directory too.

    Raises ValueError, saying what is wrong with the path, the module or the class."""
    if len(path) > _MAX_LENGTH:
        raise ValueError(f"{path[:40]!r}... has {len(path)} characters; write package.module:Class")
    module, _, name = path.partition(":")
    if not (all(part.isidentifier() for part in module.split(".")) and name.isidentifier()):
        raise ValueError(f"{path!r} does not say where a class is; write package.module:Class")
    if (here := os.getcwd()) not in sys.path:
        # The console script does not have the working directory on its path, Ray's workers do. It stays there: the
        # user's functions may import their neighbours later, when they run. It goes last, so it hides no other module.
        sys.path.append(here)
    try:
        found = getattr(importlib.import_module(module), name, None)
    except Exception as error:  # whatever a user's module raises while it is imported
        hint = "; is it installed, in the working directory, or on PYTHONPATH?"
        absent = isinstance(error, ModuleNotFoundError) and error.name in (module, module.partition(".")[0])
        raise ValueError(
            f"{path} cannot be imported: {type(error).__name__}: {error}{hint if absent else ''}"
        ) from error
    if not (isinstance(found, type) and issubclass(found, kind)):
        what = "nothing of that name" if found is None else f"{found!r}"
        raise ValueError(f"{path}: {module} has {what}; it must be a subclass of {kind.__module__}.{kind.__qualname__}")
    if missing := sorted(getattr(found, "__abstractmethods__", ())):
        raise ValueError(f"{path} leaves out {', '.join(missing)} of {kind.__module__}.{kind.__qualname__}")
    return found
