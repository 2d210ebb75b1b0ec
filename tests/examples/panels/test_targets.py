"""Crops, replies and labels that the tiny models are taught."""

from __future__ import annotations

import re

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ergo_rl.episodes import images
from ergo_rl.episodes.episode import read_box
from ergo_rl.episodes.families import Qwen25VL
from ergo_rl.episodes.types import Box
from ergo_rl.examples.panels.scenes import COLOURS, MARKS, PanelScene, PanelsConfig, Split, scene
from ergo_rl.examples.panels.targets import (
    CUT,
    Pointing,
    coarse_view,
    crop_anywhere,
    crop_cutting,
    crop_to_read,
    crop_view,
    crop_with,
    legible,
    look_reply,
    point,
    token_labels,
)

FAMILY = Qwen25VL()


def the_scene(index: int) -> PanelScene:
    return scene(PanelsConfig(), 0, Split.PRETRAIN, index)


@settings(max_examples=200)
@given(seed=st.integers(0, 10**6), inset=st.floats(-60, 90), jitter=st.floats(0, 60), x=st.integers(0, 540))
def test_pointing_never_leaves_the_scene(seed: int, inset: float, jitter: float, x: int) -> None:
    box = point(Box(x, 540, x + 132, 672), Pointing(inset, jitter), 672, np.random.default_rng(seed))
    assert Box(0, 0, 672, 672).contains(box) and min(box.width, box.height) >= 28


def test_pointing_without_jitter_moves_every_edge_inwards() -> None:
    assert point(Box(100, 200, 220, 330), Pointing(10, 0), 672, np.random.default_rng(0)) == Box(110, 210, 210, 320)


@settings(max_examples=200)
@given(seed=st.integers(0, 10**6), x=st.integers(0, 646), y=st.integers(0, 646))
def test_crops_contain_their_target(seed: int, x: int, y: int) -> None:
    mark, rng = Box(x, y, x + 26, y + 26), np.random.default_rng(seed)
    crop = crop_with(mark, 672, 0.0017, 0.165, rng)
    assert crop.contains(mark) and Box(0, 0, 672, 672).contains(crop) and crop.area <= 0.166 * 672**2
    assert Box(0, 0, 672, 672).contains(crop_anywhere(672, rng))


@settings(max_examples=200)
@given(seed=st.integers(0, 10**6), x=st.integers(0, 646), y=st.integers(0, 646))
def test_a_cutting_crop_shows_a_part_of_its_target(seed: int, x: int, y: int) -> None:
    mark = Box(x, y, x + 26, y + 26)
    crop = crop_cutting(mark, 672, np.random.default_rng(seed))
    wide = min(crop.x2, mark.x2) - max(crop.x1, mark.x1)
    high = min(crop.y2, mark.y2) - max(crop.y1, mark.y1)
    assert (wide == 26) != (high == 26) and 5 <= min(wide, high) <= 21


def test_crops_to_read_are_mostly_but_not_only_legible() -> None:
    rng = np.random.default_rng(0)
    shown = []
    for index in range(200):
        drawn = the_scene(index)
        view = crop_view(drawn, crop_to_read(drawn, drawn.target, rng), FAMILY)
        assert FAMILY.visual_tokens(view) <= 36 and drawn.target.mark_box is not None
        shown.append(legible(view, drawn.target.mark_box))
    assert 0.45 < np.mean(shown) < 0.75


def test_the_whole_scene_is_not_legible_and_a_cut_mark_neither() -> None:
    drawn = the_scene(0)
    mark = drawn.target.mark_box
    assert mark is not None
    assert not legible(coarse_view(drawn, FAMILY), mark)
    assert legible(crop_view(drawn, drawn.target.box, FAMILY), mark)
    cut = Box(mark.x1 + 1, mark.y1, mark.x2, mark.y2)
    assert not legible(crop_view(drawn, cut, FAMILY), mark)


def test_the_reply_parses_back_to_the_box_that_was_taught() -> None:
    drawn = the_scene(1)
    coarse = coarse_view(drawn, FAMILY)
    taught = Box(100, 200, 220, 332)  # multiples of the 4 pixels of a coarse pixel
    reply = look_reply(drawn.target, coarse, taught, FAMILY)
    assert re.fullmatch(
        r"<think>\w+ panel, row [1-6] column [1-6]</think><zoom>\[25,50,55,83\]</zoom><\|im_end\|>", reply
    )
    box, outcome = read_box(reply, coarse, FAMILY)
    assert box == taught and outcome.usable


def test_dense_labels_say_where_each_panel_is() -> None:
    drawn = the_scene(2)
    coarse = coarse_view(drawn, FAMILY)
    labels = token_labels(drawn, coarse, FAMILY)
    assert labels.colour.shape == (36,) and labels.edges.shape == (36, 4) and not labels.mark.any()
    for panel in drawn.panels:
        mine = labels.colour == 1 + list(COLOURS).index(panel.colour)
        assert mine.any()
        corners = np.array([panel.box.x1, panel.box.y1, panel.box.x2, panel.box.y2]) / 4  # coarse pixels
        assert (labels.edges[mine] == np.floor(corners / 4)).all()
    assert (labels.edges[labels.colour == 0] == -100).all()


def test_dense_labels_of_a_crop_say_where_the_mark_is() -> None:
    drawn = the_scene(3)
    mark = drawn.target.mark_box
    assert mark is not None
    view = crop_view(drawn, mark, FAMILY)  # the mark fills the crop of 26 pixels, enlarged to 2 x 2 visual tokens
    labels = token_labels(drawn, view, FAMILY)
    assert labels.mark.tolist() == [1 + MARKS.index(drawn.target.mark)] * 4
    left, top, right, bottom = labels.border.T.tolist()
    assert left == [True, False, True, False] and right == [False, True, False, True]
    assert top == [True, True, False, False] and bottom == [False, False, True, True]
    half = crop_view(drawn, Box(mark.x1, mark.y1, mark.x1 + 13, mark.y2), FAMILY)
    assert set(token_labels(drawn, half, FAMILY).mark.tolist()) == {CUT}
    elsewhere = images.view(drawn.pixels, Box(0, 0, 6, 6), FAMILY, 36)
    assert not token_labels(drawn, elsewhere, FAMILY).mark.any()
