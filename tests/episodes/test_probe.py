"""Turn 2 again, with what the policy looked at replaced."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ergo_rl.episodes.config import EpisodeConfig
from ergo_rl.episodes.episode import CoarseToFine, TurnRefused
from ergo_rl.episodes.families import Tokenizer
from ergo_rl.episodes.probe import Replacement, Replay, replay_each
from ergo_rl.episodes.types import Box, Completion, Outcome, Question, View
from tests.episodes.test_episode import FAMILY, LOOK, QUESTION, READ, Script
from tests.factories import trajectory, view

OTHER = trajectory(crop=view(3, 1, seed=9))
TARGET = Box(0, 0, 112, 112)


def replays(
    tokenizer: Tokenizer, script: Script, question: Question = QUESTION, target: Box | None = TARGET, other: bool = True
) -> dict[Replacement, Replay]:
    episodes = CoarseToFine(FAMILY, tokenizer, EpisodeConfig(coarse_tokens=36, fine_tokens=36))
    scene = episodes.prepare(question)

    async def play() -> dict[Replacement, Replay]:
        played = await episodes.run(scene, 0, Script(tokenizer, [(LOOK, True), (READ, True)]).generate)
        donor = OTHER if other else None
        return await replay_each(episodes, scene, played, donor, target, script.generate, (ConnectionError,))

    return asyncio.run(play())


def test_replay_keeps_turn_1_and_replaces_the_view(tokenizer: Tokenizer) -> None:
    """The policy looked at 40 .. 208, 80 .. 248, that is 168 x 168; the target's box is shown as it is."""
    script = Script(tokenizer, [(LOOK, True), (READ, True)])
    assert replays(tokenizer, script) == dict.fromkeys(Replacement, Replay("A"))
    assert [turn for *_, turn in script.asked] == [1, 1, 1, 1], "turn 1 is not played again"
    asked = {len(views) > 1 and views[1].pixels.shape[:2]: (ids, views) for ids, views, _ in script.asked}
    (noise, other, oracle), (none, seen) = [asked[size] for size in ((168, 168), (28, 84), (112, 112))], asked[False]
    assert noise[0] == other[0] == oracle[0] and other[1][1] is OTHER.crop and oracle[1][1].box == TARGET
    texts = [tokenizer.decode(ids, skip_special_tokens=False) for ids in (noise[0], none)]
    assert f"{LOOK}<|im_end|>\n<|im_start|>user\n" in texts[0] and len(seen) == 1
    before, after = texts[0].rsplit(FAMILY.image_placeholder, 1)
    assert texts[1] == before + after, "the same words without the picture"


def test_replay_noise_is_that_of_the_question(tokenizer: Tokenizer) -> None:
    def noise(question: Question) -> np.ndarray:
        script = Script(tokenizer, [(LOOK, True), (READ, True)])
        assert list(replays(tokenizer, script, question, None, other=False)) == [Replacement.NOISE, Replacement.NONE]
        (pixels,) = [views[1].pixels for _, views, _ in script.asked if len(views) > 1]
        return pixels

    first = noise(QUESTION)
    assert (first == noise(QUESTION)).all() and (first != noise(replace(QUESTION, id="q2"))).mean() > 0.9


def test_replay_that_fails_costs_itself_alone(tokenizer: Tokenizer) -> None:
    """A target that no crop can show; an endpoint that is away for the noise; no room for another's crop."""

    class Failing(Script):
        async def generate(self, token_ids: Sequence[int], views: Sequence[View], turn: int) -> Completion:  # type: ignore[override]
            if len(views) > 1 and views[1] is OTHER.crop:
                raise TurnRefused("longer than the maximum model length of 512")
            if len(views) > 1:
                raise ConnectionError("status 503")
            return await super().generate(token_ids, views, turn)

    found = replays(tokenizer, Failing(tokenizer, [(LOOK, True), (READ, True)]), target=Box(0, 0, 400, 1))
    assert found[Replacement.NOISE] == Replay(None, "ConnectionError: status 503")
    assert "cannot be shown" in found[Replacement.ORACLE].failure
    assert found[Replacement.OTHER] == Replay(None) and found[Replacement.NONE] == Replay("A")


def test_replay_answers_as_an_episode_does(tokenizer: Tokenizer) -> None:
    for second in ((READ, True), (READ, False), ("a cross", True)):
        script = Script(tokenizer, [(LOOK, True), second])
        found = set(replays(tokenizer, script).values())
        assert found == {Replay("A" if second == (READ, True) else None)}, f"{second}: cut off, or without an answer"
    assert OTHER.outcome is Outcome.ANSWERED
