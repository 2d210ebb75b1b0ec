"""Panels: deterministic, the target legible in a crop and physically illegible in the coarse view."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from ergo_rl.episodes import images
from ergo_rl.episodes.families import Qwen25VL
from ergo_rl.episodes.prompts import fill
from ergo_rl.episodes.types import Box
from ergo_rl.examples.panels import scenes
from ergo_rl.examples.panels.scenes import (
    COLOURS,
    MARKS,
    PROMPTS,
    VIEW_TOKENS,
    PanelScene,
    PanelsConfig,
    Split,
    question,
    scene,
)

FAMILY = Qwen25VL()


def the_scene(index: int, **keys: int | bool) -> PanelScene:
    return scene(PanelsConfig(**keys), 0, Split.TRAIN, index)  # type: ignore[arg-type]


def test_the_same_seed_draws_the_same_scene() -> None:
    first, again = (question(PanelsConfig(), 3, Split.TRAIN, 7) for _ in range(2))
    assert first == again
    assert first.id == "panels-train-000007"
    assert first.text.startswith("Which mark is on the ") and first.answer in MARKS and first.options == ()


@pytest.mark.parametrize(("seed", "split", "index"), [(4, Split.TRAIN, 7), (3, Split.HELDOUT, 7), (3, Split.TRAIN, 8)])
def test_another_seed_split_or_index_draws_another_scene(seed: int, split: Split, index: int) -> None:
    assert question(PanelsConfig(), seed, split, index).image != question(PanelsConfig(), 3, Split.TRAIN, 7).image


@settings(max_examples=40)
@given(index=st.integers(0, 10**6), count=st.integers(1, 4), blank=st.integers(0, 2), mark=st.integers(12, 40))
def test_panels_are_placed_apart_and_inside(index: int, count: int, blank: int, mark: int) -> None:
    drawn = the_scene(index, panels=count, blank_panels=blank, mark=mark)
    assert len(drawn.panels) == count + blank
    assert len({panel.colour for panel in drawn.panels}) == count + blank
    whole = images.full_box(drawn.pixels)
    for panel in drawn.panels:
        assert whole.contains(panel.box) and min(panel.box.width, panel.box.height) >= 90
        assert max(panel.box.width, panel.box.height) <= 150
        if panel.mark_box is not None:
            assert panel.box.contains(panel.mark_box) and panel.mark_box.area == mark * mark
    for panel in drawn.panels:
        assert sum(disjoint(panel.box, other.box) for other in drawn.panels) == count + blank - 1
    assert drawn.target.mark in MARKS


def disjoint(a: Box, b: Box) -> bool:
    return a.x2 <= b.x1 or b.x2 <= a.x1 or a.y2 <= b.y1 or b.y2 <= a.y1


def test_the_image_is_lossless_and_small() -> None:
    asked = question(PanelsConfig(), 0, Split.TRAIN, 0)
    assert isinstance(asked.image, bytes) and len(asked.image) < 40_000
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(asked.image))), the_scene(0).pixels)


def test_colour_tells_place_and_panel() -> None:
    drawn = the_scene(1, panels=1)
    red, blue = drawn.pixels[5, :, 0].astype(int), drawn.pixels[:, 5, 2].astype(int)
    assert red[-1] - red[0] > 100 and blue[-1] - blue[0] > 100 and (np.diff(red) >= 0).all()
    corner = drawn.pixels[drawn.target.box.y1, drawn.target.box.x1].astype(int)
    assert np.abs(corner - COLOURS[drawn.target.colour]).max() <= 12


def seen_marks(drawn: PanelScene, box: Box) -> NDArray[np.float64]:
    """float[4, h, w, 3]: the view of one crop, for each of the four marks on the asked panel."""
    views = []
    for mark in MARKS:
        target = replace(drawn.target, mark=mark)
        pixels = scenes._draw(PanelsConfig(), (target,), np.random.default_rng(0))
        views.append(images.view(pixels, box, FAMILY, VIEW_TOKENS).pixels.astype(float))
    return np.stack(views)


@pytest.mark.parametrize("index", range(12))
def test_the_mark_is_legible_in_a_crop_and_no_more_in_the_coarse_view(index: int) -> None:
    """Differences between two marks in grey levels of 255, and their mean over the square of the mark."""
    drawn = the_scene(index)
    fine, coarse = seen_marks(drawn, drawn.target.box), seen_marks(drawn, images.full_box(drawn.pixels))
    assert coarse.shape == (4, 168, 168, 3)
    for one in range(4):
        for other in range(one):
            near, far = np.abs(fine[one] - fine[other]), np.abs(coarse[one] - coarse[other])
            assert near.max() > 130 and far.max() < 70
            assert near.sum() / (26 * 26 * 3) > 10 and far.sum() / (6.5 * 6.5 * 3) < 20


def test_all_marks_are_equally_dark() -> None:
    drawn = the_scene(2)
    ink = seen_marks(drawn, drawn.target.box).sum(axis=(1, 2, 3))
    assert (ink.max() - ink.min()) / ink.mean() < 0.005


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"panels": 5, "blank_panels": 2}, "5 panels and 2 blank ones"),
        ({"panels": 0}, "at least 1"),
        ({"mark": 100}, "smallest_panel"),
        ({"mark": 4}, "cannot be drawn"),
        ({"colours": 7, "panels": 7}, "at most 6"),
    ],
)
def test_impossible_settings_are_refused(keys: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PanelsConfig(**keys)  # type: ignore[arg-type]


def test_panels_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit a scene of 200"):
        scene(PanelsConfig(side=200), 0, Split.TRAIN, 0)


def test_the_prompts_hold_one_image_and_the_question() -> None:
    asked = question(PanelsConfig(), 0, Split.TRAIN, 0)
    for template in (PROMPTS.coarse, PROMPTS.fine, PROMPTS.verify):
        text = fill(template, asked, FAMILY)
        assert text.count(FAMILY.image_pad) == 1 and asked.text in text
