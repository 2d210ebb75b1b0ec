"""What one question costs a rollout worker; with real engines in tests/system/test_rollouts.py."""

from __future__ import annotations

from ergo_rl.actors.rollout_worker import summarize, too_long
from ergo_rl.episodes.types import Question
from tests.factories import trajectory, view


def test_too_long_counts_the_question_and_its_options() -> None:
    """16 characters a token: 160 for a model of 10 tokens."""
    assert too_long(Question("q", b"", "w" * 150, "A", ("x" * 5, "y" * 5)), 10) == ""
    assert too_long(Question("q", b"", "w" * 151, "A", ("x" * 5, "y" * 5)), 10) == (
        "the question has 161 characters; at most 160 could fit the model's 10 tokens"
    )


def test_summarize_counts_the_visual_tokens_of_all_views() -> None:
    """A coarse view of 3 x 2 and a crop of 2 x 4; the coarse view alone where there was no crop."""
    assert summarize(trajectory(coarse=view(3, 2), crop=view(2, 4))).visual_tokens == 14
    assert summarize(trajectory(coarse=view(3, 2), replies=(5,))).visual_tokens == 6
