"""Targets to pretrain tiny models on: crops of a panels scene, replies about them, labels of their visual tokens.

The boxes that the policy is taught are bad on purpose: it learns where the panel is, but its boxes are too tight and
jittered, which leaves reinforcement learning something to improve. The reward model is taught a random answer for
every crop from which the mark cannot be read, so that it learns to guess there.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ergo_rl.episodes import images
from ergo_rl.episodes.families import ModelFamily
from ergo_rl.episodes.types import Box, View
from ergo_rl.examples.panels.scenes import COLOURS, MARKS, VIEW_TOKENS, Panel, PanelScene

LEGIBLE_AREA = 0.165
"""A crop of this share of the default scene still shows a mark at 16 of its 26 pixels."""
_LEGIBLE_MARK = 13.0
"""Least side of a mark in a view that is taught as readable, pixels."""
CUT = 1 + len(MARKS)
"""Dense label of a mark that is not wholly in the view."""
EDGE_BIN = 4
"""Width of the bins of panel edges in the dense labels, pixels of the coarse view."""


@dataclass
class Pointing:
    """How badly the pretrained policy points: each edge of the panel moves inwards, pixels of the scene."""

    inset: float = 19.0
    """Mean of the move."""
    jitter: float = 14.0
    """Standard deviation of the move, each edge for itself."""


def point(panel: Box, config: Pointing, side: int, rng: np.random.Generator, least: int = 28) -> Box:
    """Draw the panel's box in a scene of ``side`` pixels, too tight and jittered, at least ``least`` pixels a side."""
    left, top, right, bottom = (float(move) for move in rng.normal(config.inset, config.jitter, 4))
    x1, x2 = _between(panel.x1 + left, panel.x2 - right, least, side)
    y1, y2 = _between(panel.y1 + top, panel.y2 - bottom, least, side)
    return Box(x1, y1, x2, y2)


def _between(low: float, high: float, least: int, side: int) -> tuple[int, int]:
    """Whole numbers of 0 .. side, ``least`` or more apart."""
    if high - low < least:
        low = (low + high - least) / 2
        high = low + least
    start = min(max(round(low), 0), side - least)
    return start, min(max(round(high), start + least), side)


def crop_with(target: Box, side: int, smallest: float, largest: float, rng: np.random.Generator) -> Box:
    """Draw a box round ``target``, anywhere, of an area between two shares of the scene (log-uniform)."""
    area = side * side * np.exp(rng.uniform(np.log(smallest), np.log(largest)))
    aspect = np.exp(rng.uniform(-0.5, 0.5))
    width = int(np.clip(np.sqrt(area * aspect), target.width, side))
    height = int(np.clip(area / width, target.height, side))
    x = int(rng.integers(max(target.x2 - width, 0), min(target.x1, side - width) + 1))
    y = int(rng.integers(max(target.y2 - height, 0), min(target.y1, side - height) + 1))
    return Box(x, y, x + width, y + height)


def crop_anywhere(side: int, rng: np.random.Generator) -> Box:
    width, height = (int(length) for length in rng.integers(60, 260, 2))
    x, y = int(rng.integers(side - width + 1)), int(rng.integers(side - height + 1))
    return Box(x, y, x + width, y + height)


def crop_cutting(target: Box, side: int, rng: np.random.Generator, margin: int = 5) -> Box:
    """Draw a box with an edge through ``target``, at least ``margin`` pixels inside it.

    What is cut by less looks whole to a model of this size, and targets that say otherwise blur the others."""
    around = crop_with(target, side, 0.004, 0.18, rng)
    corners = [around.x1, around.y1, around.x2, around.y2]
    edge = int(rng.integers(4))
    low = target.x1 if edge % 2 == 0 else target.y1
    high = target.x2 if edge % 2 == 0 else target.y2
    corners[edge] = int(rng.integers(low + margin, high - margin + 1))
    return Box(*corners)


def crop_to_read(scene: PanelScene, target: Panel, rng: np.random.Generator) -> Box:
    """Draw a crop to teach reading with: mostly with the target, legible; some that cut the mark, some too large, some
    of other places."""
    assert target.mark_box is not None
    side, kind = scene.pixels.shape[0], rng.random()
    if kind < 0.55:
        return crop_with(target.mark_box, side, 0.0017, 0.18, rng)
    if kind < 0.77:
        return crop_cutting(target.mark_box, side, rng)
    if kind < 0.83:
        return crop_with(target.mark_box, side, 0.18, 1.0, rng)
    if kind < 0.89:
        return point(target.box, Pointing(), side, rng)
    if kind < 0.95:
        other = scene.panels[int(rng.integers(len(scene.panels)))]
        return crop_with(other.mark_box or other.box, side, 0.0017, 0.18, rng)
    return crop_anywhere(side, rng)


def legible(view: View, mark: Box) -> bool:
    """Return whether the whole mark is in the view, and large enough there to be taught as readable."""
    return view.box.contains(mark) and large_enough(view, mark)


def large_enough(view: View, mark: Box) -> bool:
    scale = min(view.width / view.box.width, view.height / view.box.height)
    return scale * min(mark.width, mark.height) >= _LEGIBLE_MARK


def look_reply(panel: Panel, coarse: View, box: Box, family: ModelFamily) -> str:
    """Write turn 1: the place in words (sixths of the scene), then the box."""
    side = coarse.box.width
    row = (panel.box.y1 + panel.box.y2) * 3 // side + 1
    column = (panel.box.x1 + panel.box.x2) * 3 // side + 1
    corners = ",".join(str(corner) for corner in family.write_corners(box, coarse))
    return f"<think>{panel.colour} panel, row {row} column {column}</think><zoom>[{corners}]</zoom>{family.turn_end}"


def read_reply(mark: str, family: ModelFamily) -> str:
    """Write turn 2."""
    return f"<think>a {mark}</think><answer>{mark}</answer>{family.turn_end}"


def verify_reply(mark: str, family: ModelFamily) -> str:
    """Write the reward model's reply."""
    return f"<answer>{mark}</answer>{family.turn_end}"


@dataclass(frozen=True, slots=True)
class TokenLabels:
    """Labels of each of a view's N visual tokens, row by row."""

    colour: NDArray[np.int64]
    """[N]: 0 none, else 1 + index in COLOURS, of the panel that fills most of the token."""
    mark: NDArray[np.int64]
    """[N]: 0 none, 1 + index in MARKS where a legible mark lies in the token, CUT where the view cuts that mark."""
    edges: NDArray[np.int64]
    """[N, 4]: bins of that panel's x1, y1, x2, y2 in the view, -100 where there is no panel."""
    border: NDArray[np.bool_]
    """[N, 4]: whether the token is at the left, top, right, bottom of the view."""

    def without_edges(self) -> TokenLabels:
        return TokenLabels(self.colour, self.mark, np.full_like(self.edges, -100), self.border)


def token_labels(scene: PanelScene, view: View, family: ModelFamily) -> TokenLabels:
    columns, rows = view.width // family.multiple, view.height // family.multiple
    share = np.zeros((rows * columns,))
    colour, mark = np.zeros(rows * columns, np.int64), np.zeros(rows * columns, np.int64)
    edges = np.full((rows * columns, 4), -100, np.int64)
    for panel in scene.panels:
        inside = _overlap(panel.box, view, rows, columns, family.multiple) / family.multiple**2
        mine = (inside > 0.12) & (inside > share)
        share[mine] = inside[mine]
        colour[mine] = 1 + list(COLOURS).index(panel.colour)
        edges[mine] = edge_bins(panel.box, view)
        if panel.mark_box is not None and large_enough(view, panel.mark_box):
            ink = _overlap(panel.mark_box, view, rows, columns, family.multiple)
            whole = view.box.contains(panel.mark_box)
            mark[ink > 0.15 * ink.sum()] = 1 + MARKS.index(panel.mark) if whole else CUT
    column, row = np.arange(rows * columns) % columns, np.arange(rows * columns) // columns
    border = np.stack([column == 0, row == 0, column == columns - 1, row == rows - 1], axis=1)
    return TokenLabels(colour, mark, edges, border)


def edge_bins(box: Box, view: View) -> tuple[int, int, int, int]:
    """Return x1, y1, x2, y2 of a box in bins of the view."""
    x1, y1, x2, y2 = (max(0, int(corner // EDGE_BIN)) for corner in _in_view(box, view))
    return x1, y1, x2, y2


def coarse_view(scene: PanelScene, family: ModelFamily) -> View:
    return images.view(scene.pixels, images.full_box(scene.pixels), family, VIEW_TOKENS)


def crop_view(scene: PanelScene, box: Box, family: ModelFamily) -> View:
    return images.view(scene.pixels, box, family, VIEW_TOKENS)


def _in_view(box: Box, view: View) -> NDArray[np.float64]:
    sx, sy = view.width / view.box.width, view.height / view.box.height
    left, top = view.box.x1, view.box.y1
    return np.array([(box.x1 - left) * sx, (box.y1 - top) * sy, (box.x2 - left) * sx, (box.y2 - top) * sy])


def _overlap(box: Box, view: View, rows: int, columns: int, unit: int) -> NDArray[np.float64]:
    """float[rows * columns], pixels of the view that ``box`` shares with each visual token."""
    x1, y1, x2, y2 = _in_view(box, view)
    left, top = np.arange(columns) * unit, np.arange(rows) * unit
    wide = np.clip(np.minimum(x2, left + unit) - np.maximum(x1, left), 0, None)
    high = np.clip(np.minimum(y2, top + unit) - np.maximum(y1, top), 0, None)
    return np.asarray(high[:, None] * wide[None, :]).reshape(-1)
