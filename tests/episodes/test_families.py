"""Sizes: what ``fit`` gives, the family's own processor must leave alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from ergo_rl.cluster.compat import repair_torchvision
from ergo_rl.episodes.families import Qwen3VL, Qwen25VL, family_of
from ergo_rl.episodes.types import Box, View

repair_torchvision()
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize  # noqa: E402

FAMILY = Qwen25VL()
UNIT = FAMILY.multiple
SIDES = st.integers(1, 20_000)
BUDGETS = st.integers(FAMILY.min_visual_tokens, 16_384)


@given(SIDES, SIDES, BUDGETS)
def test_fit_is_an_identity_for_the_processor_and_within_the_budget(width: int, height: int, budget: int) -> None:
    assume(max(width, height) <= 200 * min(width, height))
    fitted = FAMILY.fit(width, height, budget)
    columns, rows = fitted[0] // UNIT, fitted[1] // UNIT
    assert (columns * UNIT, rows * UNIT) == fitted
    assert FAMILY.min_visual_tokens <= columns * rows <= budget
    resized = smart_resize(fitted[1], fitted[0], UNIT, FAMILY.min_visual_tokens * UNIT**2, budget * UNIT**2)
    assert resized == (fitted[1], fitted[0])
    assert FAMILY.fit(*fitted, budget) == fitted


@given(st.integers(280, 8_000), st.integers(280, 8_000), BUDGETS)
def test_fit_equals_smart_resize_on_ordinary_images(width: int, height: int, budget: int) -> None:
    assume(max(width, height) <= 4 * min(width, height) and budget >= 64)
    height_, width_ = smart_resize(height, width, UNIT, FAMILY.min_visual_tokens * UNIT**2, budget * UNIT**2)
    assert FAMILY.fit(width, height, budget) == (width_, height_)


@pytest.mark.parametrize(
    ("size", "budget", "fitted"),
    [
        ((672, 672), 640, (672, 672)),  # 24 x 24 = 576 tokens fit: unchanged
        ((672, 672), 36, (168, 168)),  # 6 x 6
        ((1, 1), 640, (56, 56)),  # the family's least: 2 x 2
        ((42, 71), 4, (56, 56)),  # 1 x 2 tokens are below the family's least; of 1 x 4, 2 x 2, 4 x 1 the nearest
        ((5600, 28), 640, (5600, 28)),  # 1:200, the thinnest it takes
        ((8200, 41), 640, (5600, 28)),  # 41 rows round down to 28: 293:1 would be refused
    ],
)
def test_fit_of_small_thin_and_large_images(size: tuple[int, int], budget: int, fitted: tuple[int, int]) -> None:
    assert FAMILY.fit(*size, budget) == fitted


def test_fit_refuses_what_no_processor_takes() -> None:
    with pytest.raises(ValueError, match="budget of 3 visual tokens"):
        FAMILY.fit(100, 100, 3)
    with pytest.raises(ValueError, match="thinner than 1:200"):
        FAMILY.fit(2010, 10, 640)


def processor(max_tokens: int) -> Qwen2VLImageProcessorPil:
    return Qwen2VLImageProcessorPil(
        patch_size=14, merge_size=2, min_pixels=4 * UNIT**2, max_pixels=max_tokens * UNIT**2
    )


def blank(width: int, height: int) -> View:
    return View(Box(0, 0, width, height), np.zeros((height, width, 3), np.uint8))


def test_image_inputs_give_one_grid_row_per_view() -> None:
    pixels, grid = FAMILY.image_inputs(processor(1280), [blank(168, 56), blank(56, 84)])
    assert grid.tolist() == [[1, 4, 12], [1, 6, 4]]
    assert pixels.shape == (4 * 12 + 6 * 4, 3 * 2 * 14 * 14)


def test_image_inputs_refuse_a_processor_that_resizes() -> None:
    with pytest.raises(ValueError, match=r"resized views.*max_pixels"):
        FAMILY.image_inputs(processor(9), [blank(168, 168)])


def test_boxes_of_a_policy_are_pixels_of_the_coarse_view() -> None:
    coarse = View(Box(0, 0, 672, 672), np.zeros((168, 168, 3), np.uint8))
    assert FAMILY.write_corners(Box(336, 0, 672, 168), coarse) == (84, 0, 168, 42)
    assert FAMILY.read_corners((84, 0, 168, 42), coarse) == (84, 0, 168, 42)


def test_prompts_of_two_turns_are_the_chat_template() -> None:
    conversation = FAMILY.first_prompt("S", "U1") + "R1<|im_end|>" + FAMILY.next_prompt("U2")
    assert conversation == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU1<|im_end|>\n<|im_start|>assistant\nR1<|im_end|>\n"
        "<|im_start|>user\nU2<|im_end|>\n<|im_start|>assistant\n"
    )
    assert FAMILY.first_prompt("", "U").startswith("<|im_start|>user\n")


def test_every_special_token_is_reserved_and_plain_text_is_not() -> None:
    for token in FAMILY.vision_tokens + FAMILY.control_tokens:
        assert FAMILY.reserved_text(f"what does {token} mean?") == token
    assert FAMILY.reserved_text("a < b | c > d") is None


def test_reserved_text_when_a_tokenizer_is_given_then_it_is_what_that_one_adds() -> None:
    """In data, ``<think>`` is plain text until the tokenizer is known: some released ones have no token for it."""
    family = Qwen25VL()
    assert family.reserved_text("<think>") == "<think>" and family.reserved_text("<think>", tags=False) is None
    assert family.reserved_text("a <|box_start|>", tags=False) == "<|box_start|>"

    class Adds:
        def get_added_vocab(self) -> dict[str, int]:
            return {"<|im_end|>": 1, "<mark>": 2}

    family.reserve(Adds())
    assert [family.reserved_text(text) for text in ("<think>", "a <mark>", "<|im_end|>")] == [
        None,
        "<mark>",
        "<|im_end|>",
    ]
    assert Qwen25VL().reserved_text("<mark>") is None, "another family object does not know it"


def test_family_of_a_folder_goes_by_its_model_type(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_5_vl"}))
    assert isinstance(family_of(str(tmp_path)), Qwen25VL)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava"}))
    with pytest.raises(ValueError, match="'llava' model; known families: qwen2_5_vl, qwen3_vl"):
        family_of(str(tmp_path))


def test_qwen3_vl_sizes_and_boxes() -> None:
    """Units of 32 pixels, at least 8 x 8 of them; boxes in thousandths, whatever the view's size."""
    family = Qwen3VL()
    assert family.fit(1, 1, 640) == (256, 256)
    assert family.fit(1000, 500, 640) == (992, 512)  # 31.25 x 15.6 units, rounded
    coarse = View(Box(0, 0, 2000, 1000), np.zeros((256, 512, 3), np.uint8))
    assert family.write_corners(Box(500, 250, 1000, 1000), coarse) == (250, 250, 500, 1000)
    assert family.read_corners((250, 250, 500, 1000), coarse) == (128, 64, 256, 256)
    with pytest.raises(ValueError, match="below the 64 of qwen3_vl"):
        family.fit(1000, 1000, 63)


@given(SIDES, SIDES, st.integers(64, 16_384))
def test_qwen3_vl_fits_its_processor(width: int, height: int, budget: int) -> None:
    assume(max(width, height) <= 200 * min(width, height))
    fitted = Qwen3VL().fit(width, height, budget)
    assert smart_resize(fitted[1], fitted[0], 32, 64 * 32**2, budget * 32**2) == (fitted[1], fitted[0])
    assert 64 <= fitted[0] * fitted[1] // 32**2 <= budget
