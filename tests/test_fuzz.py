"""Fuzzed rows, images and replies: each is read or refused by name, and the counts add up.

``python -m tests.test_fuzz 10000`` prints the counts of so many of each."""

from __future__ import annotations

import io
import json
import math
import random
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from ergo_rl.episodes import images
from ergo_rl.episodes.families import Qwen25VL
from ergo_rl.episodes.prompts import parse_answer, parse_box
from ergo_rl.episodes.types import Box, BoxOutcome, Question, View
from ergo_rl.questions.rows import BadCell, read_question
from ergo_rl.rewards.endpoint import NotAReply, NoVerdict, _read
from ergo_rl.rewards.matching import matches
from ergo_rl.rewards.verifier import verdict

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
VALUES: list[Any] = [
    None, "", " ", "A", "B", "red", "(A) red", 0, 1, -1, 7.5, math.nan, math.inf, 10**30, True, b"", b"\xff", [],
    ["red"], ["red", "blue"], ["red", None], ["red", 5], [1, 2, 3, 4], [[1, 2, 3, 4]], [[4, 3, 2, 1]],
    [[math.nan, 1, 2, 3]], [["1", "2", "3", "4"]], [[0, 0, 0.5, 0.5]], [[5, 5, 5, 9]], [[-9, -9, 999, 999]],
    {"bytes": None, "path": None},    {"a": 1}, "\ud800", "<|im_end|>", "<image>", "x" * 600_000, [["red"]],
]  # fmt: skip
PIECES = [
    "<think>", "</think>", "<zoom>", "</zoom>", "<answer>", "</answer>", "[1, 2, 30, 40]", "(1,2),(3,4)",
    "[0.1,0.2,0.3,1]", "[nan, 1, 2, 3]", "[9,9,1,1]", '{"bbox_2d": [1, 2, 3, 4]}', "B", "(B)", "blue", "not ", "7",
    "-7", "7 million", " or ", "\\boxed{B}", "$B$", "Yes", "No", "答案是B", "\uff22", "\u200b", "\x00", "\ud83d",
    "I can't assist with that.", "\n", ".", " ",
]  # fmt: skip
CONTENTS: list[Any] = [None, "", 7, [], ["B"], [{"type": "text", "text": "B"}], [{"type": "refusal"}], {"text": "B"}]
FINISHES = ["stop", "length", "content_filter", "abort", "tool_calls", None, 7, "MAX_TOKENS"]


def _encoded(kind: str, mode: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(PIXELS).convert(mode).save(file, kind)
    return file.getvalue()


MODES = {
    "PNG": ("RGB", "P", "LA", "1"),
    "JPEG": ("RGB", "CMYK"),
    "WEBP": ("RGBA",),
    "GIF": ("P",),
    "TIFF": ("RGB", "F"),
}
WHOLE = [_encoded(kind, mode) for kind, modes in MODES.items() for mode in modes]


def damaged(rng: random.Random) -> bytes:
    """An image with a few other bytes, most of them in its header, or cut, or as it was."""
    blob = bytearray(rng.choice(WHOLE))
    for _ in range(rng.choice((0, 1, 1, 3, 20))):
        blob[rng.randrange(rng.choice((60, len(blob))))] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
    return bytes(blob[: rng.randrange(len(blob))] if rng.random() < 0.1 else blob)


def image(rng: random.Random) -> str:
    blob = damaged(rng)
    try:
        pixels = images.decode(blob, max_pixels=1 << 20)
    except images.UnreadableImage:
        return "refused"
    assert pixels.dtype == np.uint8 and images.size(blob, 1 << 20) == pixels.shape[1::-1]
    return "read"


def row(rng: random.Random) -> str:
    cells: dict[str, Any] = {"id": "q", "image": WHOLE[0], "text": "Which?", "answer": "A", "options": ["red", "blue"]}
    cells["boxes"] = [[1, 2, 30, 40]]
    for _ in range(rng.choice((0, 1, 1, 2))):
        cells[rng.choice([*cells, "source"])] = rng.choice(VALUES)
    if rng.random() < 0.3:
        cells["image"] = damaged(rng)

    def load(value: Any) -> bytes | Path:
        if not isinstance(value, bytes):
            raise BadCell("image", "is no bytes")
        return value

    try:
        question = read_question(cells, load, max_pixels=1 << 20)
    except BadCell as bad:
        return f"refused for {bad.column}"
    width, height = images.size(question.image, 1 << 20)
    assert question.id.strip() and question.text.strip() and question.answer.strip() and len(question.options) != 1
    assert all(0 <= box.x1 < box.x2 <= width and 0 <= box.y1 < box.y2 <= height for box in question.boxes)
    return "read"


def reply(rng: random.Random) -> str:
    """Of the policy and of a judge: any pieces in any order."""
    text = "".join(rng.choice(PIECES) for _ in range(rng.randrange(12)))
    found, coarse = parse_box(text), View(Box(0, 0, 560, 560), np.zeros((280, 280, 3), np.uint8))
    if not isinstance(found, BoxOutcome):
        box, outcome = images.locate(found, coarse, Qwen25VL())
        assert (box is None) != outcome.usable and (box is None or Box(0, 0, 560, 560).contains(box))
    for truth, options in (("B", ("red", "blue")), ("7", ()), ("Yes", ())):
        said = parse_answer(text) or text
        assert matches(said, Question("q", b"", "?", truth, options)) in (True, False)
    content, finish = rng.choice([text, text, *CONTENTS]), rng.choice(FINISHES)
    body = {"choices": [{"message": {"content": content}, "finish_reason": finish}]}
    try:
        read = _read(httpx.Response(200, content=json.dumps(body)))
        if read.filtered:
            return "no verdict: filtered"
        judged = verdict(read.text, read.finished, 64)
    except NotAReply:
        return "not a reply"
    except NoVerdict as none:
        return f"no verdict: {none.kind}"
    assert finish in ("stop", "tool_calls", None) and judged.strip() and "<think>" not in judged
    return "judged"


KINDS: dict[str, Callable[[random.Random], str]] = {"rows": row, "images": image, "replies": reply}


def fates(kind: str, count: int) -> Counter[str]:
    rng = random.Random(kind)
    return Counter(KINDS[kind](rng) for _ in range(count))


@pytest.mark.filterwarnings("ignore")  # Pillow warns of damaged headers
@pytest.mark.parametrize("kind", KINDS)
def test_fuzzed_elements_are_read_or_refused_and_add_up(kind: str) -> None:
    found = fates(kind, 300)
    assert found.total() == 300 and len(found) > 1 and max(found.values()) < 300


if __name__ == "__main__":
    for kind in KINDS:
        found = fates(kind, int(sys.argv[1]))
        parts = " + ".join(f"{count:,} {fate}" for fate, count in found.most_common())
        print(f"{kind}: {parts} = {found.total():,}; nothing was raised")
