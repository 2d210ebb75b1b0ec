"""Five thousand hostile rows and images, two hundred damaged Parquet files: each row is a question or is skipped and
counted, each question can be prepared for an episode or says why not. Seeded, so that failures repeat."""

from __future__ import annotations

import io
import logging
import os
import random
import re
import struct
import zlib
from collections import Counter
from collections.abc import Callable
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ergo_rl.episodes.config import EpisodeConfig, QuestionsConfig
from ergo_rl.episodes.episode import CoarseToFine
from ergo_rl.episodes.families import Qwen25VL, Tokenizer
from ergo_rl.episodes.images import UnreadableImage
from ergo_rl.episodes.prompts import ReservedText
from ergo_rl.questions.dataset import DatasetError, QuestionStream

ROWS, PER_FILE, DAMAGED_FILES = 5_000, 250, 200
LIMIT = 100_000
"""Pixels; every honest image here has fewer."""
pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning"),
]
Rng = random.Random
GOOD, BAD, EITHER = "good", "bad", "either"


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def random_image(rng: Rng, mode: str = "RGB") -> Image.Image:
    size = rng.randint(8, 40), rng.randint(8, 40)
    if mode in ("I;16", "I", "F"):
        return Image.new(mode, size, rng.randint(0, 65535))
    noise = bytes(rng.randbytes(size[0] * size[1] * len(Image.new(mode, (1, 1)).getbands())))
    return Image.frombytes(mode, size, noise)


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png_bomb(rng: Rng) -> bytes:
    side = rng.choice((400, 15_000, 60_000, 2**31 - 1))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


def bmp_bomb(rng: Rng) -> bytes:
    side = rng.choice((400, 30_000, -30_000))
    return b"BM" + struct.pack("<IIIIiiHHIIiiII", 1000, 0, 54, 40, side, side, 1, 24, 0, 0, 0, 0, 0, 0)


def gif_bomb(rng: Rng) -> bytes:
    """A small screen, and a frame of 65535 x 65535 on it."""
    frame = b"," + struct.pack("<HHHHB", 0, 0, 65535, 65535, 0) + b"\x08\x02\x4c\x01\x00;"
    return b"GIF89a" + struct.pack("<HHBBB", 8, 8, 0x80, 0, 0) + bytes(6) + frame


def animation(rng: Rng, format: str) -> bytes:
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "lime", "blue")]
    return encoded(frames[0], format, save_all=True, append_images=frames[1:], duration=40)


def rotated(rng: Rng) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = rng.randint(0, 9)  # 1 to 8 mean something
    return encoded(random_image(rng), rng.choice(("JPEG", "PNG", "WEBP")), exif=exif)


def cut(rng: Rng) -> bytes:
    blob = encoded(random_image(rng), rng.choice(("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF")))
    return blob[: rng.randint(0, len(blob) // 3)]


def damaged(rng: Rng) -> bytes:
    kinds = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO", "PCX")
    blob = bytearray(encoded(random_image(rng), rng.choice(kinds)))
    for _ in range(rng.randint(1, 20)):
        blob[rng.randrange(len(blob)) if rng.random() < 0.5 else rng.randrange(min(64, len(blob)))] = rng.randrange(256)
    return bytes(blob)


IMAGES: list[tuple[str, str, Callable[[Rng], Any]]] = [
    ("plain", GOOD, lambda rng: encoded(random_image(rng), rng.choice(("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")))),
    ("CMYK", GOOD, lambda rng: encoded(random_image(rng, "CMYK"), rng.choice(("JPEG", "TIFF")))),
    ("16 bits", GOOD, lambda rng: encoded(random_image(rng, "I;16"), rng.choice(("PNG", "TIFF")))),
    ("32 bits", EITHER, lambda rng: encoded(random_image(rng, rng.choice("IF")), "TIFF")),
    ("alpha", GOOD, lambda rng: encoded(random_image(rng, rng.choice(("RGBA", "LA"))), "PNG")),
    ("alpha in WebP", GOOD, lambda rng: encoded(random_image(rng, "RGBA"), "WEBP")),
    ("EXIF", GOOD, rotated),
    ("animated GIF", GOOD, lambda rng: animation(rng, "GIF")),
    ("animated WebP", GOOD, lambda rng: animation(rng, "WEBP")),
    ("APNG", GOOD, lambda rng: animation(rng, "PNG")),
    ("one pixel", GOOD, lambda rng: encoded(Image.new("RGB", (1, 1)), "PNG")),
    ("sliver", EITHER, lambda rng: encoded(Image.new("L", (1, rng.randint(190, 3000))), "PNG")),
    *[("truncated", EITHER, cut), ("damaged", EITHER, damaged)] * 5,
    ("PNG bomb", BAD, png_bomb),
    ("BMP bomb", BAD, bmp_bomb),
    ("GIF bomb", BAD, gif_bomb),
    ("PostScript", BAD, lambda rng: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(id) run showpage\n"),
    ("zero bytes", BAD, lambda rng: bytes(rng.randint(0, 200))),
    ("noise", BAD, lambda rng: rng.randbytes(rng.randint(1, 200))),
    ("null", BAD, lambda rng: None),
]
WORDS: list[tuple[str, Callable[[Rng], Any]]] = [
    (BAD, lambda rng: None),
    (BAD, lambda rng: ""),
    (BAD, lambda rng: " \n\t\u2003"),
    (BAD, lambda rng: f"see <|{rng.choice(('image_pad', 'im_end', 'im_start', 'vision_start', 'endoftext'))}|>!"),
    (GOOD, lambda rng: "<|not_a_token|> {image} {options} {0} %s \\"),
    (GOOD, lambda rng: "".join(chr(rng.choice((rng.randint(1, 0xD7FF), 0x202E, 0x1F600))) for _ in range(30)) + "x"),
    (GOOD, lambda rng: "x\0y"),
    (GOOD, lambda rng: "long " * rng.choice((200, 3_000))),
]
BOXES: list[tuple[str, Callable[[Rng], Any]]] = [
    (GOOD, lambda rng: None),
    (GOOD, lambda rng: [[0.0, 0.0, 1.0, 1.0]] * rng.randint(1, 3)),
    (GOOD, lambda rng: [[0.2, 0.3, 0.6, 0.7]]),
    (BAD, lambda rng: [[5.0, 5.0, 2.0, 2.0]]),
    (BAD, lambda rng: [[rng.choice((float("nan"), float("inf"), -float("inf"), -1.0, 1e308)), 0.0, 1.0, 1.0]]),
    (BAD, lambda rng: [[0.0, 0.0, 1e9, 1e9]]),
    (BAD, lambda rng: [[0.0] * rng.choice((0, 1, 3, 5, 100))]),
    (BAD, lambda rng: [None]),
    (BAD, lambda rng: [[0.0, 0.0, None, 1.0]]),
]


def honest(number: int, rng: Rng) -> dict[str, Any]:
    image = encoded(random_image(rng), "PNG")
    return {"id": f"q{number}", "image": image, "text": "Which?", "options": ["a", "c"], "answer": "a", "boxes": None}


def hostile(number: int, rng: Rng) -> tuple[str, str, dict[str, Any]]:
    """(what must become of it, what it is, the row): one cell of an honest row is spoiled."""
    row = honest(number, rng)
    what = rng.choice(("image", "image", "image", "text", "answer", "options", "boxes", "id"))
    if what == "image":
        name, fate, make = rng.choice(IMAGES)
        row["image"] = make(rng)
        return fate, name, row
    if what == "boxes":
        fate, make = rng.choice(BOXES)
        row["boxes"] = make(rng)
        return fate, what, row
    fate, make = rng.choice(WORDS)
    if what == "id" and fate == BAD and "<|" in str(make(Rng(0))):
        fate = EITHER  # an id is never a part of a prompt
    row[what] = ["a", make(rng)] if what == "options" else make(rng)
    if what == "answer":
        row["options"] = []  # a text that is none of the options is no answer
    return fate, what, row


SCHEMA = pa.schema(
    {"id": pa.string(), "image": pa.binary(), "text": pa.string(), "options": pa.list_(pa.string()),
     "answer": pa.string(), "boxes": pa.list_(pa.list_(pa.float64()))}
)  # fmt: skip


@pytest.fixture
def episodes(tokenizer: Tokenizer) -> CoarseToFine:
    return CoarseToFine(Qwen25VL(), tokenizer, EpisodeConfig(36, 36, max_image_pixels=LIMIT))


def epoch(path: Path, episodes: CoarseToFine, **keys: Any) -> tuple[list[str], list[str], Counter[str], int]:
    """(ids that could be prepared, ids that could not, skipped rows by column, rows)."""
    stream = QuestionStream(QuestionsConfig([str(path)], shuffle=False, max_image_pixels=LIMIT, **keys))
    prepared_ids, refused = list[str](), list[str]()
    while stream.cursor.position < len(stream):
        try:
            question = next(stream)
        except DatasetError as error:
            if "no usable row" not in str(error):
                raise
            break  # every row was bad
        if stream.cursor.epoch:
            break
        try:
            prepared = episodes.prepare(question)
        except (UnreadableImage, ReservedText) as error:  # what a rollout worker skips
            assert str(error)
            refused.append(question.id)
        else:
            assert prepared.pixels.shape[2] == 3 and prepared.pixels.size <= 3 * LIMIT
            prepared_ids.append(question.id)
    return prepared_ids, refused, stream.skipped, len(stream)


def test_five_thousand_hostile_rows_add_up(
    episodes: CoarseToFine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rng, fates = Rng(5), Counter[str]()
    caplog.set_level(logging.ERROR)
    for start in range(0, ROWS, PER_FILE):
        rows = [hostile(number, rng) for number in range(start, start + PER_FILE - 1)]
        rows.append((GOOD, "honest", honest(start + PER_FILE - 1, rng)))
        path = tmp_path / f"{start}.parquet"
        pq.write_table(pa.Table.from_pylist([row for _, _, row in rows], SCHEMA), path, row_group_size=64)
        prepared_ids, refused, skipped, count = epoch(path, episodes)
        assert len(prepared_ids) + len(refused) + skipped.total() == count == PER_FILE
        # rows that have one id are told apart by file and row in front of it
        plain_ids = {*prepared_ids, *(re.sub(r"\A\d+/[^/]+/\d+: ", "", one) for one in prepared_ids)}
        for fate, name, row in rows:
            fates[fate] += 1
            prepared = row["id"] in plain_ids
            assert fate == EITHER or prepared == (fate == GOOD), f"{name}: {row['id']!r}"
    assert fates.total() == ROWS and min(fates.values()) > ROWS / 10, fates


def columns() -> list[tuple[str, str, pa.Array]]:
    """(column, what becomes of its three rows, values of a type that is not ours)."""
    instant = pa.array([datetime(2026, 1, 1)] * 3, pa.timestamp("s"))
    text = pa.array([b"caf\xe9", b"\xff\xfe", b"\x80"], pa.binary())
    latin = pa.StringArray.from_buffers(3, text.buffers()[1], text.buffers()[2])
    square = [[[0, 0, 1, 1]]] * 3
    return [
        ("id", GOOD, pa.array([1, 2**62, -3])),
        ("id", BAD, pa.array([True, False, True])),
        ("id", BAD, instant),
        ("id", BAD, pa.array([2**60] * 3, pa.timestamp("ms"))),  # a year that datetime does not have
        ("id", BAD, latin),
        ("id", GOOD, pa.array(["a", "b", "c"]).dictionary_encode()),
        ("text", GOOD, pa.array(["a", "b", "c"], pa.large_string())),
        ("text", BAD, latin),
        ("text", BAD, pa.array([b"bytes"] * 3)),
        ("text", BAD, pa.array([None] * 3, pa.null())),
        ("answer", BAD, pa.array([1.5, float("nan"), float("inf")])),
        ("answer", BAD, pa.array([[("a", "b")]] * 3, pa.map_(pa.string(), pa.string()))),
        ("options", BAD, pa.array(["a, b"] * 3)),
        ("options", BAD, pa.array([[1, 2]] * 3)),
        ("options", BAD, pa.array([[["a"]]] * 3)),
        ("options", GOOD, pa.array([["a", "b"]] * 3, pa.large_list(pa.large_string()))),
        ("boxes", GOOD, pa.array(square, pa.list_(pa.list_(pa.int8(), 4)))),
        ("boxes", BAD, pa.array([[[Decimal("0"), Decimal("0"), Decimal("1"), Decimal("1")]]] * 3)),
        ("boxes", BAD, pa.array([[{"x1": 0, "y1": 0, "x2": 1, "y2": 1}]] * 3)),
        ("boxes", BAD, pa.array([[[False, False, True, True]]] * 3)),
        ("boxes", BAD, pa.array([["0 0 1 1"]] * 3)),
        ("boxes", BAD, pa.array([[[-(2**63), 0, 2**63 - 1, 1]]] * 3)),
        ("image", BAD, pa.array([1, 2, 3])),
        ("image", BAD, pa.array([[b"a", b"b"]] * 3)),
        ("image", BAD, pa.array([{"bytes": None, "path": None}] * 3)),
        ("image", BAD, pa.array([{"bytes": 3, "path": 4.5}] * 3)),
        ("image", BAD, pa.array(["../../etc/passwd", "/etc/passwd", "a\0b"])),
        ("image", BAD, pa.array(["x" * 5_000, "a/" * 3_000, ""])),
        ("image", BAD, pa.array([".", "..", "loop"])),
        ("image", BAD, pa.array([{"bytes": None, "path": "../" * 40 + "etc/hostname"}] * 3)),
        ("image", BAD, pa.array(["pipe"] * 3)),
    ]  # fmt: skip


@pytest.mark.hostile("schemas")
@pytest.mark.parametrize(("column", "fate", "values"), columns(), ids=lambda value: str(getattr(value, "type", value)))
def test_column_of_any_type_is_read_or_counted(
    column: str, fate: str, values: pa.Array, episodes: CoarseToFine, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "loop").symlink_to(root / "loop")
    os.mkfifo(root / "pipe")  # whoever opens it to read waits forever
    table = pa.Table.from_pylist([honest(number, Rng(number)) for number in range(3)], SCHEMA)
    table = table.set_column(table.column_names.index(column), column, values)
    pq.write_table(table, tmp_path / "some.parquet")
    prepared_ids, refused, skipped, _ = epoch(tmp_path / "some.parquet", episodes, image_root=str(root))
    assert not refused
    if fate == GOOD:
        assert len(prepared_ids) == 3 and not skipped
    else:
        assert not prepared_ids and skipped == {column: 3}


def test_damaged_parquet_files_are_named(episodes: CoarseToFine, tmp_path: Path) -> None:
    """Read, or refused with the file's name; where it can be read the rows add up."""
    rng, outcomes = Rng(7), Counter[str]()
    table = pa.Table.from_pylist([honest(number, rng) for number in range(6)], SCHEMA)
    pq.write_table(table, tmp_path / "whole.parquet", row_group_size=3)
    whole = (tmp_path / "whole.parquet").read_bytes()
    for number in range(DAMAGED_FILES):
        blob = bytearray(whole)
        if rng.random() < 0.2:
            blob = blob[: rng.randrange(len(blob))]
        for _ in range(rng.choice((1, 1, 2, 30)) if blob else 0):
            blob[rng.randrange(len(blob))] = rng.randrange(256)
        path = tmp_path / f"damaged-{number}.parquet"
        path.write_bytes(blob)
        try:
            prepared_ids, refused, skipped, count = epoch(path, episodes)
        except DatasetError as error:
            assert path.name in str(error)
            outcomes["refused"] += 1
        else:  # a damaged id may be there twice
            assert len(prepared_ids) + len(refused) + skipped.total() <= count
            outcomes["read"] += 1
    assert outcomes.total() == DAMAGED_FILES and min(outcomes.values()) > 10, outcomes
