"""Shared types: constructors refuse what cannot be, per-token arrays line up."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ergo_rl.episodes.types import Box, Finish, Outcome, Trajectory, Turn, View


def turn(prompt: list[int], sampled: list[int], logprobs: list[float]) -> Turn:
    return Turn(
        prompt_ids=np.array(prompt, np.int32),
        completion_ids=np.array(sampled, np.int32),
        logprobs=np.array(logprobs, np.float32),
        text="",
        finish=Finish.STOP,
        engine_prompt_length=len(prompt),
        policy_version=0,
    )


def view(box: Box) -> View:
    return View(box, np.zeros((56, 56, 3), np.uint8))


def test_box_is_half_open_and_never_empty() -> None:
    box = Box(2, 3, 10, 7)
    assert (box.width, box.height, box.area) == (8, 4, 32)
    for corners in [(5, 0, 5, 1), (5, 0, 4, 1), (0, 1, 1, 1), (-1, 0, 1, 1)]:
        with pytest.raises(ValueError, match="not a box"):
            Box(*corners)


def test_box_contains_itself_and_what_is_inside() -> None:
    outer = Box(0, 0, 10, 10)
    assert outer.contains(outer) and outer.contains(Box(9, 9, 10, 10))
    assert not outer.contains(Box(9, 9, 11, 10))


@pytest.mark.parametrize(
    "pixels", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 3), np.float32)]
)
def test_view_takes_only_rgb_bytes(pixels: np.ndarray) -> None:
    with pytest.raises(ValueError, match="uint8"):
        View(Box(0, 0, 4, 4), pixels)


def test_a_turn_says_which_weights_sampled_which_tokens() -> None:
    plain = turn([1], [5, 6, 7], [-1.0, -1.0, -1.0])
    assert plain.versions == (0,)
    assert replace(plain, updates=((1, 4), (2, 5))).versions == (0, 4, 5)
    for wrong in [((0, 1),), ((3, 1),), ((1, 0),), ((2, 1), (1, 2)), ((1, 2), (2, 2))]:
        with pytest.raises(ValueError, match="must ascend"):
            replace(plain, updates=wrong)


def test_turn_needs_one_logprob_per_sampled_token() -> None:
    with pytest.raises(ValueError, match="2 completion ids but 1 logprobs"):
        turn([1], [2, 3], [-0.5])


def test_trajectory_needs_as_many_views_as_turns() -> None:
    look = turn([1], [2], [-0.5])
    for views, turns in [
        ((), ()),
        ((view(Box(0, 0, 9, 9)),), (look, look)),
        ((view(Box(0, 0, 9, 9)),) * 3, (look,) * 3),
    ]:
        with pytest.raises(ValueError, match="as many views as turns"):
            Trajectory("q", 0, views, turns, Outcome.ANSWERED, "ok")


def test_per_token_arrays_of_two_turns_line_up() -> None:
    trajectory = Trajectory(
        "q",
        0,
        (view(Box(0, 0, 100, 50)), view(Box(0, 0, 20, 25))),
        (turn([1, 2], [3], [-0.25]), turn([4], [5, 6], [-0.5, -0.75])),
        Outcome.ANSWERED,
        "ok",
    )
    assert trajectory.token_ids.tolist() == [1, 2, 3, 4, 5, 6]
    assert trajectory.loss_mask.tolist() == [False, False, True, False, True, True]
    assert trajectory.logprobs.tolist() == [0, 0, -0.25, 0, -0.5, -0.75]
    assert (trajectory.token_ids.dtype, trajectory.logprobs.dtype) == (np.int32, np.float32)
    assert trajectory.area_ratio == 0.1  # 500 of 5,000 pixels
    assert trajectory.original == Box(0, 0, 100, 50)


def test_a_trajectory_without_a_crop_has_no_area_ratio() -> None:
    trajectory = Trajectory("q", 0, (view(Box(0, 0, 9, 9)),), (turn([1], [2], [-1.0]),), Outcome.BAD_BOX, "no_tag")
    assert trajectory.crop is None and trajectory.area_ratio is None
