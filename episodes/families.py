"""All that differs between model families, one small class each.

A family knows how images are sized, how a box is written, which special tokens exist and how a chat is
assembled. It never loads weights. A new one is a subclass of ``ModelFamily``: a line in ``FAMILIES``, or named as
``package.module:Class`` in a configuration (docs/extending.md).
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Protocol, cast

from ergo_rl.episodes.plugins import import_class
from ergo_rl.episodes.types import Box, View
from ergo_rl.errors import ErgoError, first_line
from ergo_rl.model_names import pretrained, split_revision

Corners = tuple[float, float, float, float]


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that episodes need."""

    def encode(self, text: str, *, add_special_tokens: bool = ...) -> list[int]: ...
    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = ...) -> str: ...
    def convert_tokens_to_ids(self, tokens: str) -> int: ...


class ModelFamily(ABC):
    """Sizes are pixels. A *visual token* is what the language model sees: ``multiple x multiple`` pixels."""

    model_type: ClassVar[str]
    patch_size: ClassVar[int]
    merge_size: ClassVar[int]
    min_visual_tokens: ClassVar[int]
    """The family's processor enlarges anything smaller, so our views never are."""
    max_aspect_ratio: ClassVar[float] = 200.0
    """The family's processors refuse more (``smart_resize`` in transformers)."""

    shares: ClassVar[bool] = False
    """Whether boxes are written as shares of the image, 0 to 1. Where they are not, four such numbers are refused: as
    pixels they would be a box of one pixel."""

    image_pad: ClassVar[str] = "<|image_pad|>"
    image_placeholder: ClassVar[str] = "<|vision_start|><|image_pad|><|vision_end|>"
    vision_tokens: ClassVar[tuple[str, ...]] = (
        "<|vision_start|>",
        "<|vision_end|>",
        "<|vision_pad|>",
        "<|image_pad|>",
        "<|video_pad|>",
    )
    control_tokens: ClassVar[tuple[str, ...]] = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
    turn_end: ClassVar[str] = "<|im_end|>"
    further_tokens: ClassVar[tuple[str, ...]] = (
        *(f"<|{what}_{end}|>" for what in ("object_ref", "box", "quad") for end in ("start", "end")),
        *(f"<|{what}|>" for what in ("fim_prefix", "fim_middle", "fim_suffix", "fim_pad", "repo_name", "file_sep")),
    )
    """What else the released tokenizers make one id of."""
    tag_tokens: ClassVar[tuple[str, ...]] = tuple(
        f"<{slash}{what}>" for what in ("tool_call", "tool_response", "think") for slash in ("", "/")
    )
    """The same, but in the text of ordinary data, too; some of the released tokenizers have them."""

    _added: tuple[str, ...] = ()
    """Of the tokenizer, where ``reserve`` was given one."""

    @property
    def multiple(self) -> int:
        """Pixels that both sides of a view are multiples of."""
        return self.patch_size * self.merge_size

    def visual_tokens(self, view: View) -> int:
        return (view.width // self.multiple) * (view.height // self.multiple)

    def fit(self, width: int, height: int, budget: int) -> tuple[int, int]:
        """Return (width, height) for an image within ``budget`` visual tokens, aspect ratio kept as closely as
        multiples allow. Follows ``smart_resize`` (transformers, qwen2_vl), so that the processor's own
        resize is an identity on the result.

        Raises ValueError where the budget is below the family's minimum or the image is too thin."""
        if budget < self.min_visual_tokens:
            raise ValueError(
                f"a budget of {budget} visual tokens is below the {self.min_visual_tokens} of {self.model_type}"
            )
        if max(width, height) > self.max_aspect_ratio * min(width, height):
            raise ValueError(f"{width} x {height} is thinner than 1:{self.max_aspect_ratio:.0f}")
        unit = self.multiple
        columns, rows = round(width / unit), round(height / unit)
        if columns * rows > budget:
            shrink = math.sqrt(width * height / (budget * unit * unit))
            columns, rows = math.floor(width / shrink / unit), math.floor(height / shrink / unit)
        elif columns * rows < self.min_visual_tokens:
            grow = math.sqrt(self.min_visual_tokens * unit * unit / (width * height))
            columns, rows = math.ceil(width * grow / unit), math.ceil(height * grow / unit)
        columns, rows = max(1, columns), max(1, rows)
        if not (
            self.min_visual_tokens <= columns * rows <= budget
            and max(columns, rows) <= self.max_aspect_ratio * min(columns, rows)
        ):  # rounded out of the limits: an image that is small, thin, or has a budget close to the least
            columns, rows = self._nearest(width / height, budget)
        return columns * unit, rows * unit

    def _nearest(self, ratio: float, budget: int) -> tuple[int, int]:
        """Return (columns, rows) within the limits whose ratio is nearest; among equals, that of most tokens."""
        allowed = (
            (columns, rows)
            for rows in range(1, budget + 1)
            for columns in {budget // rows, math.ceil(self.min_visual_tokens / rows), round(ratio * rows)}
            if self.min_visual_tokens <= columns * rows <= budget
            and max(columns, rows) <= self.max_aspect_ratio * min(columns, rows)
        )
        return min(allowed, key=lambda size: (abs(math.log(size[0] / size[1] / ratio)), -size[0] * size[1]))

    @abstractmethod
    def read_corners(self, written: Corners, coarse: View) -> Corners:
        """Map the corners that a policy wrote to pixels of the coarse view."""

    @abstractmethod
    def write_corners(self, box: Box, coarse: View) -> tuple[int, int, int, int]:
        """Map a box in original pixels to the integers that a policy should write (for supervised targets)."""

    def banned_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """Return ids that must never be sampled: a sampled placeholder breaks the count of image features
        (R1-V #91, verl #3469, TRL #3847)."""
        return tuple(sorted(tokenizer.convert_tokens_to_ids(token) for token in self.vision_tokens))

    def reserve(self, tokenizer: Any) -> None:
        """Reserve what this Hugging Face tokenizer makes one id of, instead of what the released ones do."""
        self._added = tuple(tokenizer.get_added_vocab())

    def reserved_text(self, text: str, *, tags: bool = True) -> str | None:
        """Return a token that ``text`` spells out, or None. User text must not contain any: the tokenizer would make
        one id of it, as of the template's own.

        tags: without a tokenizer (``reserve``), also ``tag_tokens``, which are plain text to some models."""
        known = self.vision_tokens + self.control_tokens + self.further_tokens + (self.tag_tokens if tags else ())
        return next((token for token in self._added or known if token in text), None)

    def first_prompt(self, system: str, user: str) -> str:
        """Return the whole prompt of turn 1, ready for the assistant to continue."""
        head = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
        return f"{head}<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"

    def next_prompt(self, user: str) -> str:
        """Return what a further turn appends after the sampled end-of-turn token. The newline that the chat
        template puts after it was never sampled, so it belongs here (verl #6719)."""
        return f"\n<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"

    def image_inputs(self, image_processor: Any, views: list[View]) -> tuple[Any, Any]:
        """Return (pixel_values float[patches, channels], image_grid_thw int64[images, 3]) as torch tensors, made by
        the family's own Hugging Face image processor.

        Raises ValueError if the processor resized a view (trap: resizing twice)."""
        features = image_processor(images=[view.pixels for view in views], return_tensors="pt")
        grids = [(1, view.height // self.patch_size, view.width // self.patch_size) for view in views]
        got = [tuple(grid) for grid in features["image_grid_thw"].tolist()]
        if got != grids:
            raise ValueError(
                f"the image processor resized views: grids {got}, expected {grids}; "
                "raise its max_pixels to at least the visual-token budget"
            )
        return features["pixel_values"], features["image_grid_thw"]


class Qwen25VL(ModelFamily):
    """Qwen2.5-VL: patches of 14, boxes in pixels of the image the model sees."""

    model_type = "qwen2_5_vl"
    patch_size = 14
    merge_size = 2
    min_visual_tokens = 4

    def read_corners(self, written: Corners, coarse: View) -> Corners:
        return written

    def write_corners(self, box: Box, coarse: View) -> tuple[int, int, int, int]:
        sx, sy = coarse.width / coarse.box.width, coarse.height / coarse.box.height
        return round(box.x1 * sx), round(box.y1 * sy), round(box.x2 * sx), round(box.y2 * sy)


class Qwen3VL(ModelFamily):
    """Qwen3-VL: patches of 16, boxes in thousandths of the image's width and height."""

    model_type = "qwen3_vl"
    patch_size = 16
    merge_size = 2
    min_visual_tokens = 64
    """256 x 256 pixels, the ``shortest_edge`` of the released processors."""
    scale = 1000

    def read_corners(self, written: Corners, coarse: View) -> Corners:
        x1, y1, x2, y2 = written
        sx, sy = coarse.width / self.scale, coarse.height / self.scale
        return x1 * sx, y1 * sy, x2 * sx, y2 * sy

    def write_corners(self, box: Box, coarse: View) -> tuple[int, int, int, int]:
        sx, sy = self.scale / coarse.box.width, self.scale / coarse.box.height
        return round(box.x1 * sx), round(box.y1 * sy), round(box.x2 * sx), round(box.y2 * sy)


FAMILIES: dict[str, type[ModelFamily]] = {family.model_type: family for family in (Qwen25VL, Qwen3VL)}


class UnknownFamily(ErgoError, ValueError):
    """The model belongs to no known family, or to another one than the configuration says."""


class ModelNotFound(ErgoError, OSError):
    """There is no model of this name and revision, here or on the hub."""


def family_of(model: str, own: str = "") -> ModelFamily:
    """Return the family of a local folder or a hub name, ``org/name@revision``; ``own`` names a class of the user's,
    ``package.module:Class``.

    Raises UnknownFamily for a model type that no known family, or not the user's, is for; OSError where there is no
    such model; ValueError where there is no such class."""
    name, revision = split_revision(model)
    config = Path(name) / "config.json"
    if config.is_file():
        model_type = json.loads(config.read_text())["model_type"]
    elif Path(model).parent.name and Path(model).parent.is_dir():  # `folder/name` of a folder that is here: no hub name
        raise FileNotFoundError(f"there is no model at {model}: {config} is missing")
    else:
        from transformers import AutoConfig

        try:
            model_type = AutoConfig.from_pretrained(**pretrained(model)).model_type
        except OSError as error:
            pinned = f" at revision {revision}" if revision else ""
            raise ModelNotFound(f"the model {name}{pinned} cannot be loaded: {first_line(error)}") from error
    return family_of_type(model, model_type, own)


def family_of_type(model: str, model_type: str, own: str = "") -> ModelFamily:
    """As ``family_of``, where the model's type is known."""
    known = FAMILIES if not own else {(family := import_class(own, ModelFamily)).model_type: family}
    if model_type not in known:
        raise UnknownFamily(
            f"{model} is a {model_type!r} model; {own or 'known families'}: {', '.join(sorted(known))} "
            "(docs/extending.md: a family of your own)"
        )
    return known[model_type]()


def load_tokenizer(model: str) -> Tokenizer:
    from transformers import AutoTokenizer

    return cast(Tokenizer, AutoTokenizer.from_pretrained(**pretrained(model)))
