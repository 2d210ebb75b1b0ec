"""From encoded images to views: decode, crop at original resolution, resize to a visual-token budget."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ergo_rl.episodes.config import MAX_PIXELS
from ergo_rl.episodes.families import Corners, ModelFamily
from ergo_rl.episodes.types import Box, BoxOutcome, Pixels, View
from ergo_rl.errors import ErgoError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "JPEG2000", "AVIF")
"""What is decoded. Pillow knows more than thirty, among them PostScript, for which it would start an interpreter."""
_EXIF_ORIENTATION = 274


class UnreadableImage(ErgoError, ValueError):
    """The image cannot be decoded or used; the message says why."""


def decode(image: bytes | Path, max_pixels: int = MAX_PIXELS) -> Pixels:
    """Decode to uint8[height, width, 3] RGB, upright (EXIF orientation applied), transparency on white.

    Raises UnreadableImage for a missing, damaged, unknown or oversized image; the size is checked before
    any pixel is decoded."""
    try:
        with _open(image, max_pixels) as opened:
            width, height = opened.size
            if width * height > max_pixels:
                raise UnreadableImage(f"{width} x {height} is more than the limit of {max_pixels} pixels")
            opened.load()
            upright = ImageOps.exif_transpose(opened)
            if upright.mode.startswith("I;16"):
                upright = upright.point(lambda value: value / 256).convert("L")
            if upright.has_transparency_data:
                upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright.convert("RGBA"))
            return np.asarray(upright.convert("RGB"))
    except UnreadableImage:
        raise
    except Exception as error:  # Pillow lets out whatever a decoder meets in damaged bytes: struct.error, KeyError, ...
        raise UnreadableImage(f"not a readable image: {_why(error)}") from error


def size(image: bytes | Path, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Return (width, height) as shown, from the header alone.

    Raises UnreadableImage for a missing, unknown or oversized image."""
    try:
        with _open(image, max_pixels) as opened:
            width, height = opened.size
            # Asked only where the header has it: for a PNG without it Pillow would decode the whole image.
            turned = "exif" in opened.info and opened.getexif().get(_EXIF_ORIENTATION, 1) in (5, 6, 7, 8)
    except Exception as error:  # as in ``decode``
        raise UnreadableImage(f"does not decode: {_why(error)}") from error
    if width * height > max_pixels:
        raise UnreadableImage(f"{width} x {height} is more than the limit of {max_pixels} pixels")
    return (height, width) if turned else (width, height)


def _open(image: bytes | Path, max_pixels: int) -> Image.Image:
    # Pillow has one limit for the whole process and refuses above twice its number, 179 megapixels by default: less
    # than ours. It is raised here, where an image is opened, and not on import; callers check the size themselves.
    if Image.MAX_IMAGE_PIXELS is not None:
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, MAX_PIXELS, max_pixels)
    Image.init()  # every plugin is known then
    known = [format for format in FORMATS if format in Image.OPEN]  # AVIF is not, before Pillow 11.3
    return Image.open(io.BytesIO(image) if isinstance(image, bytes) else image, formats=known)


def _why(error: Exception) -> str:
    plain = isinstance(error, OSError | ValueError | SyntaxError) and str(error)
    return str(error) if plain else f"{type(error).__name__} {error}".strip()


def full_box(pixels: Pixels) -> Box:
    """Return the box of the whole image."""
    return Box(0, 0, int(pixels.shape[1]), int(pixels.shape[0]))


def expand_boxes(boxes: Sequence[Box], margin: float, width: int, height: int) -> Box:
    """Return the smallest box round all ``boxes``, grown on each side by ``margin`` times its longer side and cut to an
    image of ``width`` x ``height``."""
    x1, y1 = min(box.x1 for box in boxes), min(box.y1 for box in boxes)
    x2, y2 = max(box.x2 for box in boxes), max(box.y2 for box in boxes)
    grow = round(margin * max(x2 - x1, y2 - y1))
    return Box(max(0, x1 - grow), max(0, y1 - grow), min(width, x2 + grow), min(height, y2 + grow))


def mask_boxes(image: bytes | Path, boxes: Sequence[Box]) -> bytes:
    """Return the image as PNG with every box painted black (boxes of the upright image).

    Raises UnreadableImage."""
    pixels = decode(image).copy()
    for box in boxes:
        pixels[box.y1 : box.y2, box.x1 : box.x2] = 0
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def view(pixels: Pixels, box: Box, family: ModelFamily, budget: int) -> View:
    """Cut ``box`` out of the original ``pixels``, resized to at most ``budget`` visual tokens (bicubic).

    Raises ValueError when the box leaves the image or is too thin for the family."""
    if not full_box(pixels).contains(box):
        raise ValueError(f"{box} leaves an image of {pixels.shape[1]} x {pixels.shape[0]}")
    size = family.fit(box.width, box.height, budget)
    crop = pixels[box.y1 : box.y2, box.x1 : box.x2]
    if size != (box.width, box.height):
        crop = np.asarray(Image.fromarray(crop).resize(size, Image.Resampling.BICUBIC))
    return View(box, np.ascontiguousarray(crop))


def locate(corners: Corners, coarse: View, family: ModelFamily) -> tuple[Box | None, BoxOutcome]:
    """Map the corners that a policy wrote to a box in original pixels, and name the outcome.

    Corners are put in order, clamped to the image, mapped to the original and rounded outwards, so that the box covers
    at least what was asked for. The box is None exactly where the outcome is a refusal."""
    xa, ya, xb, yb = family.read_corners(corners, coarse)
    if not all(math.isfinite(value) for value in (xa, ya, xb, yb)):
        return None, BoxOutcome.NOT_FINITE
    x1, x2, y1, y2 = min(xa, xb), max(xa, xb), min(ya, yb), max(ya, yb)
    if x1 == x2 or y1 == y2:
        return None, BoxOutcome.EMPTY
    if x2 <= 0 or y2 <= 0 or x1 >= coarse.width or y1 >= coarse.height:
        return None, BoxOutcome.OUTSIDE
    clamped = x1 < 0 or y1 < 0 or x2 > coarse.width or y2 > coarse.height
    x1, y1, x2, y2 = max(x1, 0), max(y1, 0), min(x2, coarse.width), min(y2, coarse.height)
    original = coarse.box
    sx, sy = original.width / coarse.width, original.height / coarse.height
    left, top = min(math.floor(x1 * sx), original.width - 1), min(math.floor(y1 * sy), original.height - 1)
    right = min(max(math.ceil(x2 * sx), left + 1), original.width)
    bottom = min(max(math.ceil(y2 * sy), top + 1), original.height)
    box = Box(left, top, right, bottom)
    if max(box.width, box.height) > family.max_aspect_ratio * min(box.width, box.height):
        return None, BoxOutcome.SLIVER
    if (xa, ya, xb, yb) != (min(xa, xb), min(ya, yb), max(xa, xb), max(ya, yb)):
        return box, BoxOutcome.REORDERED
    return box, BoxOutcome.CLAMPED if clamped else BoxOutcome.OK
