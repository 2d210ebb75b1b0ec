"""From encoded images to views: decode, crop at original resolution, resize to a visual-token budget."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ergo_rl.episodes.config import MAX_PIXELS
from ergo_rl.episodes.families import Corners, ModelFamily
from ergo_rl.episodes.types import Box, BoxOutcome, Pixels, View
from ergo_rl.errors import ErgoError, first_line

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "JPEG2000", "AVIF")
"""What is decoded. Pillow knows more than thirty, among them PostScript, for which it would start an interpreter."""
_EXIF_ORIENTATION = 274
_BITS_PER_SAMPLE = 258


class UnreadableImage(ErgoError, ValueError):
    """The image cannot be decoded or used; the message says why."""


def decode(image: bytes | Path, max_pixels: int = MAX_PIXELS) -> Pixels:
    """Decode to uint8[height, width, 3] RGB, upright (orientation of EXIF, XMP or TIFF applied), transparency on white,
    grey values of 16 or 32 bits and floats scaled to 8 bits.

    Raises UnreadableImage for a missing, damaged, unknown or oversized image, for grey values of no known depth, and
    where the pixels are not of the size that ``size`` says; the size is checked before any pixel is decoded."""
    try:
        with _open(image, max_pixels) as opened:
            shown = _shown_size(opened, max_pixels)
            opened.load()
            pixels = _upright(_rgb(opened), _orientation(opened))
    except UnreadableImage:
        raise
    except Exception as error:  # Pillow lets out whatever a decoder meets in damaged bytes: struct.error, KeyError, ...
        raise UnreadableImage(f"not a readable image: {_why(error)}") from error
    if pixels.shape[1::-1] != shown:
        found = f"{pixels.shape[1]} x {pixels.shape[0]}"
        raise UnreadableImage(f"not a readable image: its header says {shown[0]} x {shown[1]}, its pixels are {found}")
    return pixels


def size(image: bytes | Path, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Return (width, height) as shown: what ``decode`` gives. From the header alone, but for a PNG that has more to say
    behind its pixels.

    Raises UnreadableImage for a missing, unknown or oversized image."""
    try:
        with _open(image, max_pixels) as opened:
            return _shown_size(opened, max_pixels)
    except UnreadableImage:
        raise
    except Exception as error:  # as in ``decode``
        raise UnreadableImage(f"does not decode: {_why(error)}") from error


def _shown_size(opened: Image.Image, max_pixels: int) -> tuple[int, int]:
    width, height = opened.size
    if width * height > max_pixels:
        raise UnreadableImage(f"is too large: {width} x {height} is more than the limit of {max_pixels} pixels")
    if opened.format == "PNG" and _says_more_behind_its_pixels(opened):
        opened.load()
    return (height, width) if _orientation(opened) in (5, 6, 7, 8) else (width, height)


def _orientation(opened: Image.Image) -> int:
    if opened.format == "TIFF":
        return 1  # Pillow itself turns it
    # Not the method of PNG, which decodes the whole image to look for EXIF; ``_says_more_behind_its_pixels`` knows.
    turned = Image.Image.getexif(opened).get(_EXIF_ORIENTATION)
    return turned if isinstance(turned, int) else 1


def _says_more_behind_its_pixels(opened: Image.Image) -> bool:
    """Whether a PNG has EXIF, or text that could be XMP, behind its pixels. Only the heads of its chunks are read."""
    file = getattr(opened, "fp", None)
    if file is None:  # it is decoded already
        return False
    at, pixels_came = file.tell(), False
    file.seek(8)
    while len(head := file.read(8)) == 8 and head[4:] != b"IEND":
        if pixels_came and head[4:] in (b"eXIf", b"iTXt", b"tEXt", b"zTXt"):
            break
        pixels_came |= head[4:] == b"IDAT"
        file.seek(int.from_bytes(head[:4]) + 4, io.SEEK_CUR)
    file.seek(at)
    return len(head) == 8 and head[4:] != b"IEND"


_STRIP_PIXELS = 1 << 20
"""So many pixels are converted at once: beside the decoded image only the result is held whole."""


def _rgb(opened: Image.Image) -> Pixels:
    """Return the pixels of a decoded image as RGB, transparency on white."""
    if opened.mode == "P" and not (opened.palette and opened.palette.palette):
        raise UnreadableImage("has no palette, and its pixels are colours of one")
    width, height = opened.size
    rows, white = max(1, _STRIP_PIXELS // max(1, width)), _white(opened)
    pixels = np.empty((height, width, 3), np.uint8)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        strip = opened.crop((0, top, width, bottom))
        pixels[top:bottom] = _rgb_strip(strip) if white is None else _grey_strip(strip, white)[..., None]
    return pixels


def _rgb_strip(strip: Image.Image) -> Pixels:
    if strip.has_transparency_data:
        strip = Image.alpha_composite(Image.new("RGBA", strip.size, "white"), strip.convert("RGBA"))
    return np.asarray(strip.convert("RGB"))


def _grey_strip(strip: Image.Image, white: int) -> Pixels:
    values = np.asarray(strip).astype(np.float64)
    if not np.isfinite(values).all():
        raise UnreadableImage("has grey values that are no numbers")
    scaled: Pixels = (np.rint(values * 255) if white == 1 else np.floor(values * 256 / (white + 1))).astype(np.uint8)
    return scaled


def _white(opened: Image.Image) -> int | None:
    """Return the value of white in an image of deep grey; None for any other image.

    Sixteen bits have theirs by definition. Integers of 32 bits and floats have none: their values must lie in one of
    the ranges that are in use, or else the image is refused: clipped, it would be white or black."""
    if opened.mode.startswith("I;16"):
        twelve = opened.format == "TIFF" and getattr(opened, "tag_v2", {}).get(_BITS_PER_SAMPLE) == (12,)
        return 4095 if twelve else 65535
    if opened.mode not in ("I", "F"):
        return None
    if opened.mode == "I" and opened.format == "PPM":
        return 65535  # Pillow scales them to that
    extrema: Any = opened.getextrema()  # of one band
    lowest, highest = extrema
    for white in (255, 65535) if opened.mode == "I" else (1, 255):
        if 0 <= lowest <= highest <= white:
            return white
    wanted = "0 to 255 or to 65535" if opened.mode == "I" else "0 to 1 or to 255"
    raise UnreadableImage(
        f"has grey values from {lowest} to {highest}, which is neither {wanted}: save it with 8 or 16 bits"
    )


_TURNS: dict[int, Callable[[Pixels], Pixels]] = {
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: lambda pixels: np.rot90(pixels),
}
"""EXIF orientation -> what makes the image upright."""


def _upright(pixels: Pixels, orientation: int) -> Pixels:
    return np.ascontiguousarray(_TURNS[orientation](pixels)) if orientation in _TURNS else pixels


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
    return str(error) if plain else first_line(error)


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
    if not family.shares and all(0 <= value <= 1 for value in corners):
        return None, BoxOutcome.SHARES
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
