"""Answers without their dress, by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ergo_rl.rewards.answer_text import plain


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"so $\boxed{\text{B}}$.", "B"),
        (r"\boxed{A}, \boxed{B}", "A or B"),
        (r"\boxed{A} and \boxed{A}", "A"),
        (r"\dfrac{1}{2}", "1/2"),
        (r"3\times10^{3}", "3e3"),
        (r"1{,}000", "1,000"),
        (r"90^\circ", "90°"),
        (r"\$5 or \$6", "$5 or $6"),
        ("$5 or $6", "$5 or $6"),
        ("$B$", "B"),
        ("10²", "10^2"),
        ("5½", "5 1/2"),
        ("①③", "1 3"),
        ("\N{FULLWIDTH LATIN CAPITAL LETTER B}。", "B."),
        ("r\u200bed\ufeff", "red"),
        ("**B**\nThe car is blue", "B. The car is blue"),
        ("<answer>B</answer>", "B"),
        ("5'", "5 ft"),
        ('5"', "5 inch"),
        ("“5”", "5"),
        ('{"answer": "B"}', "answer : B"),
        ("it's", "it's"),
        ("C#", "C#"),
    ],
)
def test_plain_drops_dress_and_keeps_what_tells_answers_apart(text: str, expected: str) -> None:
    assert plain(text).replace(" :", ":") == expected.replace(" :", ":")


@given(st.text())
def test_plain_is_clean_whatever_the_text(text: str) -> None:
    found = plain(text)
    assert found == " ".join(found.split()) and not any("\ue000" <= character <= "\uf8ff" for character in found)
