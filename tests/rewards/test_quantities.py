"""Numbers with magnitudes and units, by hand."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ergo_rl.rewards.quantities import Quantity, quantities, quantity


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        ("7", 7, ""), ("1,250", 1250, ""), ("-3", -3, ""), ("2e3", 2000, ""), ("10^3", 1000, ""), ("1/4", "1/4", ""),
        ("5 1/2", "11/2", ""), (".5", "1/2", ""), ("5 million", 5_000_000, ""), ("5k", 5000, ""),
        ("$3bn", 3 * 10**9, "$"),
        ("two dozen", 24, ""), ("half a dozen", 6, ""), ("twenty-one", 21, ""), ("one hundred and five", 105, ""),
        ("two thousand three hundred", 2300, ""), ("two point five", "5/2", ""), ("three quarters", "3/4", ""),
        ("seven and a half", "15/2", ""), ("minus five", -5, ""), ("5 cm", 5, "cm"), ("5 centimeters", 5, "cm"),
        ("20 degrees Celsius", 20, "°c"), ("60 km/h", 60, "km/h"), ("7 cars", 7, "car"), ("十五", 15, ""),
        ("三百二十", 320, ""),
        ("15 万", 150_000, ""), ("两个", 2, ""), ("about 7", 7, ""),
    ],
)  # fmt: skip
def test_quantity_reads_value_and_unit(text: str, value: int | str, unit: str) -> None:
    assert quantity(text) == Quantity(Fraction(value), unit)


@pytest.mark.parametrize(
    "text",
    ["", "red", "3rd", "third", "12B", "7-8", "7:30", "50/50", "more than 7", "7+", "7 or more",
     "two one", "第三", "7 of 10", "5G", "nan", "1e9999"],
)  # fmt: skip
def test_quantity_is_none_where_a_text_is_no_single_number(text: str) -> None:
    assert quantity(text) is None


@given(st.integers(-(10**12), 10**12), st.sampled_from(["", " cm", " cars", "%"]))
def test_quantity_reads_any_whole_number_exactly(number: int, unit: str) -> None:
    read = quantity(f"{number:,}{unit}")
    assert read is not None and read.value == number


WORDS = [
    "one",
    "two",
    "twenty",
    "hundred",
    "thousand",
    "and",
    "point",
    "minus",
    "a",
    "half",
    "dozen",
    "7",
    "1/2",
    "个",
    "万",
    "third",
    "-",
]


@given(st.lists(st.sampled_from(WORDS)).map(" ".join) | st.text())
def test_quantities_come_in_order_and_do_not_overlap(text: str) -> None:
    past = 0
    for found in quantities(text):
        assert past <= found.start < found.end <= len(text)
        past = found.end
