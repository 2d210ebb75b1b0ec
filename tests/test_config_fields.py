"""Bounds, former names and marks beside the fields of a configuration class."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated, Any

import pytest
from annotated_types import Ge, Gt, Le, Lt

from ergo_rl.config_fields import (
    MAY_BE_INFINITE,
    MAY_CHANGE,
    Because,
    ConfigSection,
    Formerly,
    keys_marked,
    out_of_range,
    with_current_names,
)


class Colour(StrEnum):
    RED = "red_light"


@dataclass
class Inner(ConfigSection):
    share: Annotated[float | None, Gt(0), Lt(1)] = None
    weights: dict[str, float] = field(default_factory=dict)
    colours: list[Colour] = field(default_factory=list)


@dataclass
class Outer(ConfigSection):
    count: Annotated[int, Ge(1), Le(3), Because("there are three"), Formerly("number"), MAY_CHANGE] = 1
    limit: Annotated[float, Ge(0), MAY_BE_INFINITE] = 1.0
    inner: Annotated[Inner, Formerly("inside")] = field(default_factory=Inner)
    flag: Annotated[bool, MAY_CHANGE] = True


@pytest.mark.parametrize(
    ("values", "problems"),
    [
        ({"count": 3, "limit": math.inf, "inner": {"share": None}}, []),
        ({"count": 0}, ["count is 0; it must be at least 1: there are three"]),
        ({"count": 4}, ["count is 4; it must be at most 3: there are three"]),
        ({"inner": {"share": 0.0}}, ["inner.share is 0.0; it must be above 0"]),
        ({"inner": {"share": 1}}, ["inner.share is 1; it must be below 1"]),
        ({"limit": math.nan}, ["limit is nan; it must be a finite number"]),
        ({"limit": -math.inf}, ["limit is -inf; it must be at least 0"]),
        ({"inner": {"weights": {"a": math.inf}}}, ["inner.weights.a is inf; it must be a finite number"]),
        ({"count": "???", "flag": False, "inner": None}, []),
    ],
)
def test_out_of_range_names_key_value_and_bound(values: dict[str, Any], problems: list[str]) -> None:
    assert out_of_range(Outer, values) == problems


def test_section_with_a_value_out_of_range_is_refused_when_built() -> None:
    with pytest.raises(ValueError, match=r"^count is 4; it must be at most 3: there are three$"):
        Outer(count=4)
    assert out_of_range(Outer, Outer()) == []


def test_keys_marked_lists_dotted_keys() -> None:
    assert keys_marked(Outer, MAY_CHANGE) == ("count", "flag")


def test_with_current_names_renames_keys_and_finds_enum_members() -> None:
    given = {"number": 2, "inside": {"colours": ["Red", "RED_LIGHT", "green"]}, "unknown": 1}
    assert with_current_names(given, Outer) == {
        "count": 2,
        "inner": {"colours": ["RED", "RED", "green"]},
        "unknown": 1,
    }


def test_with_current_names_of_both_names_is_refused() -> None:
    with pytest.raises(ValueError, match="number and count are the same key; give the second only"):
        with_current_names({"number": 2, "count": 2}, Outer)
