"""The frozen reward model: answers a question from a crop, and from nothing else."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import numpy as np
from PIL import Image

from ergo_rl.cluster.worker_pool import WorkerDied
from ergo_rl.episodes.families import ModelFamily
from ergo_rl.episodes.types import Question, View


class VerifierUnavailable(RuntimeError):
    """The reward model gave no answer to this question; the message says why. Never a reward of 0."""


class VerifierDied(WorkerDied):
    """The reward model's engine is gone: its worker must be replaced."""


class Verifier(Protocol):
    """A frozen vision-language model behind one method."""

    async def answer(self, question: Question, crop: View) -> str:
        """Its reply to the crop and the question's words.

        Raises VerifierUnavailable where there is none (retries included), VerifierDied where there will be none."""
        ...

    async def close(self) -> None: ...


def blind(question: Question) -> Question:
    """Only what the reward model may know: seeing the original would let it answer without the crop."""
    return replace(question, image=b"", answer="", boxes=())


def refit(crop: View, family: ModelFamily, budget: int) -> View:
    """A view sized for one family, resized so that ``family``'s processor leaves it as it is. The same view where
    it would anyway (same family, and within ``budget`` visual tokens)."""
    size = family.fit(crop.width, crop.height, budget)
    if size == (crop.width, crop.height):
        return crop
    return View(crop.box, np.asarray(Image.fromarray(crop.pixels).resize(size, Image.Resampling.BICUBIC)))
