"""Decoding of every kind of image there is, cropping, and the map from coarse to original pixels."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, PngImagePlugin

from ergo_rl.episodes import images
from ergo_rl.episodes.families import Qwen25VL
from ergo_rl.episodes.images import UnreadableImage, decode, locate, view
from ergo_rl.episodes.types import Box, BoxOutcome, View
from tests.conftest import ROOT

FAMILY = Qwen25VL()


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def test_decode_turns_cmyk_into_rgb() -> None:
    pixels = decode(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"))
    assert pixels.shape == (8, 8, 3) and pixels[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_decode_scales_sixteen_bits(format: str) -> None:
    deep = Image.fromarray(np.array([[0, 32768, 65535]], np.uint16))
    assert decode(encoded(deep, format)).tolist() == [[[0] * 3, [128] * 3, [255] * 3]]


def test_decode_shows_transparency_as_white() -> None:
    clear = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    clear.putpixel((1, 0), (255, 0, 0, 255))
    assert decode(encoded(clear)).tolist() == [[[255, 255, 255], [255, 0, 0]]]
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    assert decode(encoded(palette, transparency=0)).tolist() == [[[255, 255, 255], [0, 0, 255]]]


def test_decode_applies_exif_rotation() -> None:
    image = Image.new("RGB", (3, 2))
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise: top left becomes top right
    pixels = decode(encoded(image, exif=exif))
    assert pixels.shape == (3, 2, 3)
    assert pixels[0, 1].tolist() == [255, 255, 255] and pixels.sum() == 3 * 255


XMP = b'<x:xmpmeta><rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/></x:xmpmeta>'


def behind_the_pixels(png: bytes, kind: bytes) -> bytes:
    """Move the chunks of one kind to the end."""
    chunks, at = [], 8
    while at < len(png):
        end = at + 12 + int.from_bytes(png[at : at + 4])
        chunks.append(png[at:end])
        at = end
    moved = [chunk for chunk in chunks if chunk[4:8] == kind]
    return png[:8] + b"".join([*(chunk for chunk in chunks[:-1] if chunk not in moved), *moved, chunks[-1]])


@pytest.mark.parametrize("kind", ["JPEG", "TIFF", "WEBP", "PNG", "AVIF", "XMP in JPEG", "XMP in WEBP", "XMP in PNG",
                                  "eXIf behind IDAT", "iTXt behind IDAT"])  # fmt: skip
def test_size_is_that_of_the_pixels_however_the_image_is_turned(kind: str) -> None:
    plain, exif, text = Image.new("RGB", (32, 12), "red"), Image.Exif(), PngImagePlugin.PngInfo()
    exif[274] = 6
    text.add_itxt("XML:com.adobe.xmp", XMP.decode())
    made = {
        "TIFF": lambda: encoded(plain, "TIFF", tiffinfo={274: 6}),
        "XMP in JPEG": lambda: encoded(plain, "JPEG", xmp=XMP),
        "XMP in WEBP": lambda: encoded(plain, "WEBP", xmp=XMP),
        "XMP in PNG": lambda: encoded(plain, pnginfo=text),
        "eXIf behind IDAT": lambda: behind_the_pixels(encoded(plain, exif=exif), b"eXIf"),
        "iTXt behind IDAT": lambda: behind_the_pixels(encoded(plain, pnginfo=text), b"iTXt"),
    }
    blob = made.get(kind, lambda: encoded(plain, kind, exif=exif))()
    assert images.size(blob) == (12, 32) == decode(blob).shape[1::-1]


RAMP = np.linspace(0, 1, 256 * 16).reshape(256, 16)


@pytest.mark.parametrize(
    ("white", "kind"),
    [(65535, np.uint16), (65535, np.int32), (255, np.int32), (1, np.float32), (255, np.float32)],
)
def test_deep_grey_is_scaled(white: int, kind: type[np.generic]) -> None:
    """An even ramp from black to white has the mean 127.5."""
    pixels = decode(encoded(Image.fromarray((RAMP * white).astype(kind)), "TIFF"))
    assert pixels.min() == 0 and pixels.max() == 255 and 126.5 < pixels.mean() < 128


@pytest.mark.parametrize(("low", "high", "kind"), [(-1, 1, np.float32), (0, 9000, np.float32), (0, 70_000, np.int32),
                                                   (0, np.nan, np.float32)])  # fmt: skip
def test_grey_of_no_known_depth_is_refused(low: float, high: float, kind: type[np.generic]) -> None:
    with pytest.raises(UnreadableImage, match="has grey values"):
        decode(encoded(Image.fromarray((low + RAMP * (high - low)).astype(kind)), "TIFF"))


def test_conversion_in_strips_gives_what_pillow_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "_STRIP_PIXELS", 64)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 21, 4), np.uint8))
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[274] = orientation
        blob = encoded(noise, exif=exif)
        upright = ImageOps.exif_transpose(Image.open(io.BytesIO(blob)))
        white = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
        assert (decode(blob) == np.asarray(white.convert("RGB"))).all()


def test_decode_takes_the_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "lime", "blue")]
    pixels = decode(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert pixels.shape == (4, 4, 3) and (pixels == (255, 0, 0)).all()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I", "F", "YCbCr", "LAB"])
def test_decode_turns_every_mode_into_rgb(mode: str, tmp_path: Path) -> None:
    format = "PNG" if mode in ("1", "L", "LA", "P", "RGB", "RGBA") else "TIFF"
    blob = encoded(Image.new(mode, (5, 3)), format)
    pixels = decode(blob)
    assert pixels.shape == (3, 5, 3) and pixels.dtype == np.uint8
    (tmp_path / "image").write_bytes(blob)
    assert (decode(tmp_path / "image") == pixels).all()


def test_decode_refuses_colours_of_a_palette_that_is_not_there() -> None:
    """Without its chunk PLTE (entries with length, name and checksum) Pillow would show the image as black."""
    blob = encoded(Image.new("P", (5, 3), 7), "PNG")
    at = blob.index(b"PLTE") - 4
    end = at + 12 + int.from_bytes(blob[at : at + 4])
    with pytest.raises(UnreadableImage, match="has no palette"):
        decode(blob[:at] + blob[end:])


def test_orientation_that_is_no_number_is_none() -> None:
    """An EXIF block with one entry: orientation, as the text "x"."""
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x02x\0\0\0\0\0\0\0"
    blob = encoded(Image.new("RGB", (5, 3)), "JPEG", exif=exif)
    assert images.size(blob) == (5, 3) and decode(blob).shape == (3, 5, 3)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "WEBP"])
def test_decode_refuses_a_truncated_file(format: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    blob = encoded(noise, format)
    with pytest.raises(UnreadableImage, match="not a readable image"):
        decode(blob[: len(blob) // 2])


def test_decode_refuses_what_is_no_image(tmp_path: Path) -> None:
    for image in (b"", b"hello", b"\x89PNG\r\n\x1a\n", tmp_path / "none.png", tmp_path):
        with pytest.raises(UnreadableImage, match="not a readable image"):
            decode(image)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decode_holds_the_pixel_limit_before_decoding() -> None:
    header = struct.pack(">IIBBBBB", 15_000, 15_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", len(header)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    bomb += struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))  # not one pixel follows
    with pytest.raises(UnreadableImage, match="15000 x 15000 is more than the limit of 200000000 pixels"):
        decode(bomb)
    with pytest.raises(UnreadableImage, match="limit of 11 pixels"):
        decode(encoded(Image.new("RGB", (4, 3))), max_pixels=11)
    assert decode(encoded(Image.new("RGB", (4, 3))), max_pixels=12).shape == (3, 4, 3)


def test_importing_does_not_change_pillows_limit_and_decoding_raises_it() -> None:
    code = (
        "from PIL import Image\n"
        "before = Image.MAX_IMAGE_PIXELS\n"
        "from ergo_rl.episodes import images\n"
        "assert Image.MAX_IMAGE_PIXELS == before < images.MAX_PIXELS\n"
        "try: images.decode(b'no image', max_pixels=300_000_000)\n"
        "except images.UnreadableImage: pass\n"
        "assert Image.MAX_IMAGE_PIXELS == 300_000_000\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


JPEG = encoded(Image.new("RGB", (16, 16), "teal"), "JPEG", exif=b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x00")
PNG = encoded(Image.new("RGB", (16, 16), "teal"))


@given(st.sampled_from([JPEG, PNG]), st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=6))
@settings(max_examples=300)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
def test_damaged_bytes_decode_or_are_unreadable(blob: bytes, damage: list[tuple[int, int]]) -> None:
    damaged = bytearray(blob)
    for place, value in damage:
        damaged[place % len(damaged)] = value
    try:
        assert decode(bytes(damaged), max_pixels=1_000_000).shape[2] == 3
    except UnreadableImage as error:
        assert str(error)


def test_view_within_the_budget_keeps_the_pixels() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (140, 168, 3), np.uint8)
    crop = view(pixels, Box(28, 0, 112, 56), FAMILY, 640)
    assert (crop.pixels == pixels[0:56, 28:112]).all()


def test_view_over_the_budget_is_made_smaller() -> None:
    pixels = np.zeros((672, 672, 3), np.uint8)
    coarse = view(pixels, images.full_box(pixels), FAMILY, 36)
    assert (coarse.width, coarse.height) == (168, 168) and coarse.box == Box(0, 0, 672, 672)
    assert FAMILY.visual_tokens(coarse) == 36


def test_view_of_a_box_outside_the_image_is_refused() -> None:
    with pytest.raises(ValueError, match="leaves an image of 100 x 60"):
        view(np.zeros((60, 100, 3), np.uint8), Box(0, 0, 101, 60), FAMILY, 640)


COARSE = View(Box(0, 0, 672, 1344), np.zeros((336, 168, 3), np.uint8))  # 1:4


@pytest.mark.parametrize(
    ("corners", "box", "outcome"),
    [
        ((10, 20, 50, 60), Box(40, 80, 200, 240), BoxOutcome.OK),
        ((0, 0, 168, 336), Box(0, 0, 672, 1344), BoxOutcome.OK),
        ((10.1, 20.2, 50.1, 60.2), Box(40, 80, 201, 241), BoxOutcome.OK),  # rounded outwards
        ((50, 60, 10, 20), Box(40, 80, 200, 240), BoxOutcome.REORDERED),
        ((50, 20, 10, 60), Box(40, 80, 200, 240), BoxOutcome.REORDERED),
        ((-5, -5, 50, 60), Box(0, 0, 200, 240), BoxOutcome.CLAMPED),
        ((160, 330, 9999, 1e308), Box(640, 1320, 672, 1344), BoxOutcome.CLAMPED),
        ((9999, 20, 10, 60), Box(40, 80, 672, 240), BoxOutcome.REORDERED),  # reversed and clamped
        ((10, 20, 10.001, 20.001), Box(40, 80, 41, 81), BoxOutcome.OK),  # at least one pixel
        ((167.9999, 0, 168, 10), Box(671, 0, 672, 40), BoxOutcome.OK),
        ((10, 20, 10, 60), None, BoxOutcome.EMPTY),
        ((10, 20, 50, 20), None, BoxOutcome.EMPTY),
        ((168, 20, 200, 60), None, BoxOutcome.OUTSIDE),
        ((-50, -50, -10, 0), None, BoxOutcome.OUTSIDE),
        ((float("nan"), 0, 1, 1), None, BoxOutcome.NOT_FINITE),
        ((0, 0, float("inf"), 1), None, BoxOutcome.NOT_FINITE),
        ((0, 0, 0.2, 336), None, BoxOutcome.SLIVER),  # 1 x 1344 pixels
    ],
)
def test_locate_maps_corners_or_names_the_refusal(
    corners: tuple[float, float, float, float], box: Box | None, outcome: BoxOutcome
) -> None:
    assert locate(corners, COARSE, FAMILY) == (box, outcome)
    assert outcome.usable == (box is not None)


@given(st.tuples(*[st.integers(0, 671)] * 2), st.tuples(*[st.integers(1, 672)] * 2))
def test_locate_reads_back_what_write_corners_wrote(start: tuple[int, int], size: tuple[int, int]) -> None:
    """Up to the rounding of the writer: half a coarse pixel, 2 original ones."""
    meant = Box(*start, min(start[0] + size[0], 672), min(start[1] + size[1], 1344))
    box, _ = locate(FAMILY.write_corners(meant, COARSE), COARSE, FAMILY)
    if box is not None:
        got = np.array([box.x1, box.y1, box.x2, box.y2])
        assert np.abs(got - [meant.x1, meant.y1, meant.x2, meant.y2]).max() <= 4


def test_expand_boxes_adds_a_margin_round_all_boxes() -> None:
    """(10, 20) to (50, 30) is 40 wide and 10 high: half of 40 on every side, cut at the edges."""
    boxes = [Box(10, 20, 30, 30), Box(40, 22, 50, 28)]
    assert images.expand_boxes(boxes, 0.0, 100, 100) == Box(10, 20, 50, 30)
    assert images.expand_boxes(boxes, 0.5, 100, 40) == Box(0, 0, 70, 40)


def test_mask_boxes_blackens_boxes_and_nothing_else() -> None:
    grey = np.full((20, 30, 3), 200, np.uint8)
    shown = decode(images.mask_boxes(encoded(Image.fromarray(grey)), [Box(5, 6, 10, 9), Box(0, 0, 1, 1)]))
    assert not shown[6:9, 5:10].any() and not shown[0, 0].any()
    assert (shown == 200).all(-1).sum() == 20 * 30 - 5 * 3 - 1
    with pytest.raises(UnreadableImage):
        images.mask_boxes(b"no image", [Box(0, 0, 1, 1)])
