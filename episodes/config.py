"""Configuration of questions and episodes."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated

from annotated_types import Ge

from ergo_rl.config_fields import MAY_CHANGE, ConfigSection

MAX_PIXELS = 200_000_000
"""Default limit on decoded images: 200 megapixels, 600 MB of RGB."""


@dataclass
class PromptTemplates(ConfigSection):
    """``{image}``, ``{question}`` and ``{options}`` are filled in. Options are lettered, a line each, and are shown in
    the fine turn only (METHOD: the released prompts ask turn 1 without them)."""

    system: str = "You are a helpful assistant."
    """System prompt; empty: none."""
    coarse: str = (
        "{image}{question}\nThe image is a small copy of a large one. Think about where to look, then name the one "
        "region that answers the question, in pixels of this image. Reply as "
        "<think>...</think><zoom>[x1, y1, x2, y2]</zoom>"
    )
    """Turn 1: the coarse view."""
    fine: str = (
        "{image}This is the region at full resolution. {question}{options}\n"
        "Reply as <think>...</think><answer>...</answer>. For a multiple-choice question answer with the letter."
    )
    """Turn 2: the crop."""
    direct: Annotated[str, MAY_CHANGE] = (
        "{image}{question}{options}\nReply as <think>...</think><answer>...</answer>. "
        "For a multiple-choice question answer with the letter."
    )
    """Evaluation in mode direct: a single turn, without a crop."""
    verify: str = (
        "{image}{question}{options}\nAnswer from this image alone, as <answer>...</answer>. "
        "For a multiple-choice question answer with the letter."
    )
    """What the verifier is asked about the crop."""


class OnBadBox(StrEnum):
    """What a reply of turn 1 without a usable box leads to. STOP: the episode ends without an answer. WHOLE_IMAGE: it
    continues with the whole image as the crop (as the authors' released client does)."""

    STOP = "stop"
    WHOLE_IMAGE = "whole_image"


class BoxNotation(StrEnum):
    """How turn 1 may write its box. ZOOM: one ``<zoom>[x1, y1, x2, y2]</zoom>``. ANY: there or behind the thought, also
    as JSON (``"bbox_2d": [...]``), nested lists or two points, ``(x1, y1), (x2, y2)``."""

    ZOOM = "zoom"
    ANY = "any"


@dataclass
class EpisodeConfig(ConfigSection):
    """The two turns of an episode."""

    family: str = ""
    """Filled from the key ``family``."""
    coarse_tokens: Annotated[int, Ge(1)] = 640
    """Visual-token budget of the coarse view (paper: 640 or 1280)."""
    fine_tokens: Annotated[int, Ge(1)] = 640
    """Visual-token budget of the crop."""
    on_bad_box: OnBadBox = OnBadBox.STOP
    """What a reply of turn 1 without a usable box leads to. stop: the episode ends; whole_image: the crop is the whole
    image."""
    box_notation: BoxNotation = BoxNotation.ZOOM
    """How turn 1 may write its box. zoom: one ``<zoom>[x1, y1, x2, y2]</zoom>``; any: also JSON with bbox_2d, nested
    lists and (x1, y1), (x2, y2), with or without the tag (r_format still asks for it)."""
    max_image_pixels: Annotated[int, Ge(1)] = MAX_PIXELS
    """Larger images are refused before they are decoded."""
    prompts: PromptTemplates = field(default_factory=PromptTemplates)


class OnBadRow(StrEnum):
    """What a row that is not a question leads to."""

    SKIP = "skip"
    ERROR = "error"


@dataclass
class QuestionsConfig(ConfigSection):
    """The questions that the policy is trained on."""

    paths: list[str] = field(default_factory=list)
    """Parquet files; their rows together are the data set."""
    image_root: str = ""
    """Folder that image paths are relative to and may not leave; empty: the folder of the Parquet file."""
    seed: Annotated[int, Ge(0)] = 0
    """Seed of the order."""
    shuffle: bool = True
    """true: row groups in a new order each epoch, and the rows within each; false: the order of the files."""
    on_bad_row: OnBadRow = OnBadRow.SKIP
    """skip: leave the row out, count it and log it; error: stop at the first bad row."""
    max_image_pixels: Annotated[int, Ge(1)] = MAX_PIXELS
    """A row with a larger image is bad."""
