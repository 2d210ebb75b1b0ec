"""What one question costs a rollout worker; with real engines in tests/system/test_rollouts.py."""

from __future__ import annotations

from ergo_rl.actors.rollout_worker import too_long
from ergo_rl.episodes.types import Question


def test_too_long_counts_the_question_and_its_options() -> None:
    """16 characters a token: 160 for a model of 10 tokens."""
    assert too_long(Question("q", b"", "w" * 150, "A", ("x" * 5, "y" * 5)), 10) == ""
    assert too_long(Question("q", b"", "w" * 151, "A", ("x" * 5, "y" * 5)), 10) == (
        "the question has 161 characters; at most 160 could fit the model's 10 tokens"
    )
