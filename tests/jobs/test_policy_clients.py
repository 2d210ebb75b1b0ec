"""Episodes over an endpoint, on a real HTTP server."""

from __future__ import annotations

import asyncio
import base64
import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ergo_rl.actors.rollout_pool import Rollout
from ergo_rl.actors.rollout_worker import EvalMode, SkippedQuestion
from ergo_rl.episodes.probe import Replacement, Replay
from ergo_rl.episodes.types import Box
from ergo_rl.jobs.config import ConfigError, TrainConfig
from ergo_rl.jobs.policy_clients import (
    EndpointClient,
    EndpointRollouts,
    EpisodeError,
    EpisodeResult,
    endpoint_at,
)
from tests.factories import FAMILY
from tests.jobs.conftest import LOOK, READ, Server, question


def run_episode(server: Server, config: TrainConfig, manner: EvalMode, box: Box | None = None) -> EpisodeResult:
    async def run() -> EpisodeResult:
        client = EndpointClient(config, await endpoint_at(server.url, "", config), FAMILY)
        try:
            return await client.run_episode(question(), manner, box)
        finally:
            await client.close()

    return asyncio.run(run())


def sent_images(body: dict[str, Any]) -> list[np.ndarray]:
    parts = [
        part for message in body["messages"] if isinstance(message["content"], list) for part in message["content"]
    ]
    urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))) for url in urls]


# --- over an endpoint -------------------------------------------------------------------------------------------------


def test_endpoint_client_sends_both_turns_with_lossless_images(server: Server, config: TrainConfig) -> None:
    """672 pixels seen as 6 x 6 visual tokens: a quarter of each side, so 28 .. 84 is 112 .. 336 of the original."""
    found = run_episode(server, config, EvalMode(36))
    assert found.trajectory.crop is not None
    assert found.trajectory.crop.box == Box(112, 112, 336, 336) and found.trajectory.outcome == "answered"
    assert found.visual_tokens(FAMILY) == (36, 36) and found.reply_tokens == 14
    first, second = server.bodies
    assert [message["role"] for message in second["messages"]] == ["user", "assistant", "user"]
    assert second["messages"][1]["content"] == LOOK and first["messages"] == second["messages"][:1]
    assert (first["model"], first["temperature"], first["max_tokens"], second["max_tokens"]) == ("tiny", 0.0, 64, 48)
    coarse, crop = sent_images(second)
    assert coarse.shape == (168, 168, 3) and (crop == found.trajectory.crop.pixels).all(), "nothing lost on the way"


def test_endpoint_client_replaces_the_box_or_answers_directly(server: Server, config: TrainConfig) -> None:
    oracle = run_episode(server, config, EvalMode(36), Box(0, 0, 336, 336))
    assert oracle.trajectory.crop is not None
    assert oracle.trajectory.crop.box == Box(0, 0, 336, 336)
    assert server.bodies[1]["messages"][1]["content"] == "<think>there</think><zoom>[0, 0, 84, 84]</zoom>"
    server.say = lambda messages: READ
    direct = run_episode(server, config, EvalMode(16, direct=True))
    assert len(direct.trajectory.turns) == 1 and direct.visual_tokens(FAMILY) == (16,)
    assert len(server.bodies) == 3 and server.bodies[2]["max_tokens"] == 48


def test_endpoint_rollouts_keep_the_crops_of_a_few_and_replay_all(server: Server, config: TrainConfig) -> None:
    """Of "b" only the box is kept; its noise is as large as its crop was."""

    async def story() -> None:
        client = EndpointClient(config, await endpoint_at(server.url, "", config), FAMILY)
        rollouts = EndpointRollouts(client, config, keep=["a"])
        kept = [await rollouts.rollout(question(name)) for name in ("a", "b")]
        bad = await rollouts.rollout(question("bad", image=b"no picture"))
        assert isinstance(bad, SkippedQuestion) and "not a readable image" in bad.reason
        (a,), (b,) = [one.trajectories for one in kept if isinstance(one, Rollout)]
        sizes = [[view.pixels.shape[:2] for view in played.views] for played in (a, b)]
        assert sizes == [[(0, 0), (168, 168)], [(0, 0), (0, 0)]] and a.crop.box == b.crop.box
        found = await rollouts.replay(question("b"), (b,), (a,), Box(0, 0, 336, 336))
        assert found == dict.fromkeys(Replacement, Replay("ring"))
        second = [images[1] for body in server.bodies if len(images := sent_images(body)) == 2]
        assert [image.shape for image in second[-3:]] == [(168, 168, 3)] * 3
        await client.close()

    asyncio.run(story())


def test_endpoint_failures_are_named_and_marked_transient(server: Server, config: TrainConfig) -> None:
    server.say = lambda messages: 503
    with pytest.raises(EpisodeError, match="status 503, 1 attempts") as failed:
        run_episode(server, config, EvalMode(36))
    assert failed.value.transient
    with pytest.raises(ConfigError, match="does not list its models"):
        asyncio.run(endpoint_at("http://127.0.0.1:1/v1", "", config))
    with pytest.raises(ConfigError, match="holds a user or password"):
        asyncio.run(endpoint_at("http://me:secret@host/v1", "tiny", config))
