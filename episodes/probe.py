"""Is the crop used? The last turn of an episode is played again, behind the same turn 1, with what the policy looked at
replaced: its answer changes where it was read from there."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from itertools import cycle, islice

import numpy as np

from ergo_rl.episodes.episode import CoarseToFine, Generate, PreparedQuestion
from ergo_rl.episodes.images import UnreadableImage
from ergo_rl.episodes.types import Box, Trajectory, View

Views = tuple[View, ...]


class Replacement(StrEnum):
    """What is shown in place of the policy's crop."""

    NOISE = "noise"
    """Random pixels, as many as the crop has."""
    OTHER = "other"
    """The crop of a question about another image."""
    ORACLE = "oracle"
    """The crop of the target's own box."""
    NONE = "none"
    """Nothing: turn 2 comes without a picture, so that the coarse view is all there is."""


@dataclass(frozen=True, slots=True)
class Replay:
    """What the policy answered to a replaced crop."""

    answer: str | None
    """None where the reply has no answer, or was cut off or refused."""
    failure: str = ""
    """Why turn 2 could not be played again; empty where it was."""


async def replay_each(
    episodes: CoarseToFine,
    scene: PreparedQuestion,
    played: Trajectory,
    other: Trajectory | None,
    target: Box | None,
    generate: Generate,
    failures: tuple[type[Exception], ...] = (),
) -> dict[Replacement, Replay]:
    """Play turn 2 of ``played``, which has a crop, again with each replacement, all at once.

    other: a trajectory with a crop, of another image; target: the oracle's box, in original pixels. Without one its
    replacement is left out. failures: what ``generate`` may raise; that costs the one replacement."""
    looks = played.views[1:]
    makers: dict[Replacement, Callable[[], Views]] = {
        Replacement.NOISE: lambda: tuple(
            _noise(episodes, view, scene.question.id, place) for place, view in enumerate(looks)
        )
    }
    if other is not None:
        makers[Replacement.OTHER] = lambda: tuple(islice(cycle(other.views[1:]), len(looks)))
    if target is not None:
        makers[Replacement.ORACLE] = lambda: (episodes.crop(scene, target),) * len(looks)
    makers[Replacement.NONE] = tuple

    caught: tuple[type[Exception], ...] = (UnreadableImage, *failures)

    async def replay(make: Callable[[], Views]) -> Replay:
        try:
            views = await asyncio.to_thread(make)
            return Replay(await episodes.replay(scene, played, views, generate))
        except caught as error:
            return Replay(None, f"{type(error).__name__}: {error}")

    return dict(zip(makers, await asyncio.gather(*map(replay, makers.values())), strict=True))


def _noise(episodes: CoarseToFine, look: View, name: str, place: int) -> View:
    """The same question, the same noise. Of the look only its box is needed: its pixels may have been dropped."""
    width, height = episodes.family.fit(look.box.width, look.box.height, episodes.config.fine_tokens)
    random = np.random.default_rng([*name.encode(errors="surrogatepass"), place])
    return View(look.box, random.integers(0, 256, (height, width, 3), dtype=np.uint8))
