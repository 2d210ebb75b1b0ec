"""Panels, the embedded data set: a question whose answer cannot be read in the coarse view, only in the crop.

A scene is a smooth gradient (red rises with x, blue with y, so colour tells place) with a few panels in distinct
colours; in each panel one small black mark. "Which mark is on the green panel?" In a coarse view of 36 visual tokens
the panels are plain to see and the marks are smudges of 6 pixels, so a policy has to find the named panel, zoom, and
read. Crops get the same budget: a crop of half the scene is illegible again. Everything follows from (seed, split,
index); nothing is downloaded.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ergo_rl.episodes.config import PromptTemplates
from ergo_rl.episodes.types import Box, Pixels, Question

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 45, 45),
    "green": (45, 185, 60),
    "blue": (60, 90, 235),
    "yellow": (235, 215, 50),
    "white": (240, 240, 240),
    "cyan": (60, 215, 220),
}
MARKS = ("cross", "ring", "bar", "dot")
GENERATOR = 1
"""Counts up whenever the same seed would give other scenes."""
VIEW_TOKENS = 36
"""Visual-token budget of the coarse view and of the crop: 168 x 168 pixels for Qwen2.5-VL."""
_PLAIN = "{image}{question}"
PROMPTS = PromptTemplates(system="", coarse=_PLAIN, fine=_PLAIN, direct=_PLAIN, verify=_PLAIN)
"""What the tiny models are pretrained on, and therefore what a panels recipe must play."""


class Split(StrEnum):
    """Scenes of different splits come from different random streams."""

    TRAIN = "train"
    HELDOUT = "heldout"
    PRETRAIN = "pretrain"
    LANGUAGE = "language"


@dataclass
class PanelsConfig:
    """Harder: more panels, smaller marks, more blank panels."""

    side: int = 672
    """Side of the square scene, pixels."""
    panels: int = 4
    """Panels with a mark, each in a colour of its own."""
    blank_panels: int = 0
    """Further panels without a mark (distractors), in further colours; never asked about."""
    smallest_panel: int = 90
    """Shortest side of a panel, pixels."""
    largest_panel: int = 150
    """Longest side of a panel, pixels."""
    mark: int = 26
    """Side of the square around a mark, pixels."""
    colours: int = 6
    """How many of the six colours are used."""

    def __post_init__(self) -> None:
        if not self.panels + self.blank_panels <= self.colours <= len(COLOURS):
            raise ValueError(
                f"{self.panels} panels and {self.blank_panels} blank ones need as many colours; "
                f"colours is {self.colours}, at most {len(COLOURS)}"
            )
        if self.panels < 1 or self.blank_panels < 0:
            raise ValueError("panels must be at least 1 and blank_panels at least 0")
        if not self.mark + 2 * _MARGIN <= self.smallest_panel <= self.largest_panel <= self.side:
            raise ValueError(
                f"need mark + {2 * _MARGIN} <= smallest_panel <= largest_panel <= side, got "
                f"{self.mark}, {self.smallest_panel}, {self.largest_panel}, {self.side}"
            )
        if self.mark < 8:
            raise ValueError(f"a mark of {self.mark} pixels cannot be drawn; at least 8")


@dataclass(frozen=True, slots=True)
class Panel:
    """A coloured rectangle; ``mark`` is empty and ``mark_box`` None on a blank one."""

    colour: str
    box: Box
    mark: str = ""
    mark_box: Box | None = None


@dataclass(frozen=True, slots=True, eq=False)
class PanelScene:
    """``pixels`` uint8[side, side, 3]; ``panels`` in no particular order; ``asked`` is the place of one with a mark."""

    pixels: Pixels
    panels: tuple[Panel, ...]
    asked: int

    @property
    def target(self) -> Panel:
        return self.panels[self.asked]


def ask(colour: str) -> str:
    return f"Which mark is on the {colour} panel?"


def scene(config: PanelsConfig, seed: int, split: Split, index: int) -> PanelScene:
    """Draw scene number ``index`` of a split. Raises ValueError where the panels do not fit without overlap."""
    rng = np.random.default_rng([seed, list(Split).index(split), index])
    boxes = _place(config, rng)
    colours = rng.permutation(list(COLOURS)[: config.colours])[: len(boxes)]
    panels = tuple(
        _with_mark(str(colour), box, config, rng) if number < config.panels else Panel(str(colour), box)
        for number, (colour, box) in enumerate(zip(colours, boxes, strict=True))
    )
    asked = int(rng.integers(config.panels))
    return PanelScene(_draw(config, panels, rng), panels, asked)


def question(config: PanelsConfig, seed: int, split: Split, index: int) -> Question:
    """Draw a scene as a dataset row: PNG bytes, an open question, and the mark's box as the target."""
    drawn = scene(config, seed, split, index)
    assert drawn.target.mark_box is not None
    return Question(
        id=f"panels-{split}-{index:06d}",
        image=_png(drawn.pixels),
        text=ask(drawn.target.colour),
        answer=drawn.target.mark,
        boxes=(drawn.target.mark_box,),
        source="panels",
    )


_GAP = 6
"""Least distance of panels from one another and from the border, pixels."""
_WAVE = 5
"""Wavelength of the hatching of marks, pixels."""
_MARGIN = 4
"""Least distance of a mark from the edge of its panel, pixels."""


def _place(config: PanelsConfig, rng: np.random.Generator) -> list[Box]:
    wanted = config.panels + config.blank_panels
    for _ in range(20):  # a layout that got stuck is thrown away as a whole
        boxes: list[Box] = []
        for _ in range(50 * wanted):
            width, height = (int(side) for side in rng.integers(config.smallest_panel, config.largest_panel + 1, 2))
            x, y = (int(rng.integers(_GAP, max(config.side - side - _GAP, _GAP) + 1)) for side in (width, height))
            box = Box(x, y, x + width, y + height)
            if x + width <= config.side and y + height <= config.side and not any(_near(box, other) for other in boxes):
                boxes.append(box)
            if len(boxes) == wanted:
                return boxes
    raise ValueError(f"{wanted} panels of up to {config.largest_panel} pixels do not fit a scene of {config.side}")


def _near(a: Box, b: Box) -> bool:
    return a.x1 < b.x2 + _GAP and b.x1 < a.x2 + _GAP and a.y1 < b.y2 + _GAP and b.y1 < a.y2 + _GAP


def _with_mark(colour: str, box: Box, config: PanelsConfig, rng: np.random.Generator) -> Panel:
    x = int(rng.integers(box.x1 + _MARGIN, box.x2 - _MARGIN - config.mark + 1))
    y = int(rng.integers(box.y1 + _MARGIN, box.y2 - _MARGIN - config.mark + 1))
    return Panel(colour, box, MARKS[int(rng.integers(len(MARKS)))], Box(x, y, x + config.mark, y + config.mark))


def _draw(config: PanelsConfig, panels: tuple[Panel, ...], rng: np.random.Generator) -> Pixels:
    ramp = np.linspace(60, 190, config.side)
    red, green, blue = rng.integers(-10, 11, 3)
    pixels = np.empty((config.side, config.side, 3), np.uint8)
    pixels[..., 0] = (ramp + red).astype(np.uint8)[None, :]
    pixels[..., 1] = 110 + green
    pixels[..., 2] = (ramp + blue).astype(np.uint8)[:, None]
    for panel in panels:
        _patch(pixels, panel.box)[:] = np.array(COLOURS[panel.colour]) + rng.integers(-12, 13, 3)
        if panel.mark_box is not None:
            paper = 1 - _ink(panel.mark, config.mark)
            _patch(pixels, panel.mark_box)[:] = _patch(pixels, panel.mark_box) * paper[..., None]
    return pixels


def _patch(pixels: Pixels, box: Box) -> Pixels:
    return pixels[box.y1 : box.y2, box.x1 : box.x2]


@lru_cache
def _ink(mark: str, side: int) -> NDArray[np.float64]:
    """float[side, side], 0 .. 1, how black a mark is: a disc hatched with bars, a grid of crosses, dots or rings, all
    waves of one length and one mean darkness. A view of a quarter of the resolution cannot carry waves that short, so
    there all four are the same grey disc: illegible by the sampling theorem, not by want of skill."""
    y, x = np.mgrid[:side, :side] - (side - 1) / 2
    radius = np.hypot(x, y)

    def wave(along: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.sin(2 * np.pi * along / _WAVE)

    hatching = {
        "bar": wave(y),
        "cross": (wave(x) + wave(y)) / 2,
        "dot": (wave((x + y) / np.sqrt(2)) + wave((x - y) / np.sqrt(2))) / 2,
        "ring": wave(radius),
    }[mark]
    return np.asarray(np.clip(0.5 + hatching, 0, 1) * (radius <= side / 2))


def _png(pixels: Pixels) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
