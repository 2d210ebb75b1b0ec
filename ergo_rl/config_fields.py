"""What a configuration class can say beside a field: bounds, a former name, whether it may differ on resume.

Example::

    @dataclass
    class RolloutConfig(ConfigSection):
        group_size: Annotated[int, Ge(2), Because("advantages are relative to the group")] = 8
        hang_timeout_s: Annotated[float, Ge(1), Formerly("stall_s"), MAY_CHANGE] = 900.0

``Ge``, ``Gt``, ``Le`` and ``Lt`` are those of the package annotated-types. Imports nothing heavy.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, is_dataclass
from enum import Enum
from functools import cache
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Because:
    """Why a field has its bounds; said after the bound."""

    reason: str


@dataclass(frozen=True, slots=True)
class Formerly:
    """A name that the key had; recipes and run folders that have it are still read, with a warning."""

    name: str


@dataclass(frozen=True, slots=True)
class _Flag:
    name: str


MAY_CHANGE = _Flag("may change")
"""The key, and all below it, may have another value when a run is resumed: it changes how the run is done, not what is
learned."""
MAY_BE_INFINITE = _Flag("may be infinite")
"""``.inf`` is a value of this number; without this mark numbers must be finite."""


class ConfigSection:
    """Base of the configuration classes: a value outside the bounds of its field is refused when it is set."""

    def __post_init__(self) -> None:
        """Raises ValueError naming the field, the value and the bound."""
        if problems := out_of_range(type(self), self):
            raise ValueError("; ".join(problems))


def out_of_range(kind: Any, values: Any, prefix: str = "") -> list[str]:
    """Return a sentence for each number that its field does not allow, sections below included.

    kind: a configuration class; values: an instance of it, or its values by name; prefix: of the keys, with a dot."""
    problems = []
    for name, hint in hints_of(kind).items():
        value = values.get(name) if isinstance(values, Mapping) else getattr(values, name)
        if is_dataclass(section := bare(hint)):
            if isinstance(value, Mapping) or is_dataclass(value):
                problems += out_of_range(section, value, f"{prefix}{name}.")
            continue
        for key, number in _numbers(value, f"{prefix}{name}"):
            if wrong := _wrong(number, marks(hint)):
                problems.append(f"{key} is {number}; it must be {wrong}")
    return problems


def keys_marked(kind: Any, mark: object, prefix: str = "") -> tuple[str, ...]:
    """Return the dotted keys with this mark. What is below a marked section is not listed."""
    keys: list[str] = []
    for name, hint in hints_of(kind).items():
        if mark in marks(hint):
            keys.append(prefix + name)
        elif is_dataclass(section := bare(hint)):
            keys += keys_marked(section, mark, f"{prefix}{name}.")
    return tuple(keys)


def with_current_names(given: Mapping[Any, Any], kind: type, prefix: str = "") -> dict[Any, Any]:
    """Return values as a YAML file or an older version has them, by the keys of today, with a warning for each former
    name. The names and values of enumerations may be in any case.

    given: values by key, sections as mappings, interpolations unresolved. Keys that do not exist stay as they are.
    Raises ValueError where a key is given by both its names."""
    hints = hints_of(kind)
    former = {mark.name: name for name, hint in hints.items() for mark in marks(hint) if isinstance(mark, Formerly)}
    current: dict[Any, Any] = {}
    for key, value in given.items():
        name = former.get(key, key)
        if name != key:
            if name in given:
                raise ValueError(f"{prefix}{key} and {prefix}{name} are the same key; give the second only")
            _warn_of_former_name(f"{prefix}{key}", f"{prefix}{name}")
        current[name] = _in_known_case(value, bare(hints[name]), f"{prefix}{name}.") if name in hints else value
    return current


@cache
def hints_of(kind: Any) -> dict[str, Any]:
    """Return the fields' annotations by name, with their marks."""
    return get_type_hints(kind, include_extras=True)


def bare(hint: Any) -> Any:
    """Return an annotation without its marks."""
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def marks(hint: Any) -> tuple[Any, ...]:
    return get_args(hint)[1:] if get_origin(hint) is Annotated else ()


def _wrong(number: float, marks: tuple[Any, ...]) -> str:
    """Return what a number must be and is not; empty where it is allowed."""
    if math.isnan(number) or (math.isinf(number) and MAY_BE_INFINITE not in marks):
        return "a finite number"
    because = "".join(f": {mark.reason}" for mark in marks if isinstance(mark, Because))
    for mark in marks:
        match mark:
            case Ge(ge=bound) if not number >= bound:  # type: ignore[operator]
                return f"at least {bound:g}{because}"
            case Gt(gt=bound) if not number > bound:  # type: ignore[operator]
                return f"above {bound:g}{because}"
            case Le(le=bound) if not number <= bound:  # type: ignore[operator]
                return f"at most {bound:g}{because}"
            case Lt(lt=bound) if not number < bound:  # type: ignore[operator]
                return f"below {bound:g}{because}"
    return ""


def _numbers(value: Any, key: str) -> Iterator[tuple[str, float]]:
    """Yield key and value of every number, also those in lists and mappings (by their index or name)."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _numbers(item, f"{key}.{name}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _numbers(item, f"{key}.{index}")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield key, value


def _in_known_case(value: Any, hint: Any, prefix: str) -> Any:
    """Return a section with the keys of today, and a text that names a member of an enumeration as that name."""
    if is_dataclass(hint) and isinstance(hint, type) and isinstance(value, Mapping):
        return with_current_names(value, hint, prefix)
    if get_origin(hint) is list and isinstance(value, list):
        return [_in_known_case(item, get_args(hint)[0], prefix) for item in value]
    if isinstance(hint, type) and issubclass(hint, Enum) and isinstance(value, str):
        wanted = value.lower()
        names = [member.name for member in hint if wanted in (member.name.lower(), str(member.value).lower())]
        return names[0] if names else value
    return value


@cache
def _warn_of_former_name(former: str, current: str) -> None:
    """Once per process: a run folder is read more than once."""
    logger.warning("the key %s is called %s now; the old name is still read", former, current)
