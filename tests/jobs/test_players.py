"""Episodes over an endpoint, records and reports of a grid, and the answer command: on a real HTTP server."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ergo_rl.actors.rollout_worker import EvalMode
from ergo_rl.episodes.types import Box, Question
from ergo_rl.jobs.config import ConfigError, TrainConfig, load_config
from ergo_rl.jobs.measuring import evaluate
from ergo_rl.jobs.measuring.grid import Mode, Record, run_grid
from ergo_rl.jobs.measuring.grid_report import as_markdown, figures, pareto, summarise, write_report
from ergo_rl.jobs.players import EndpointPlayer, NotPlayed, Play, endpoint_at
from ergo_rl.jobs.serving import answer
from tests.conftest import ROOT
from tests.factories import FAMILY
from tests.jobs.conftest import LOOK, READ, Server


@pytest.fixture(scope="module")
def config() -> TrainConfig:
    quick = [f"reward.verifier.endpoint.{key}" for key in ("retries=0", "timeout_s=20")]
    return load_config(ROOT / "configs" / "panels.yaml", quick)


def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (672, 672, 3), dtype=np.uint8)


def question(name: str = "q", source: str = "", image: bytes = b"", boxes: bool = True) -> Question:
    file = io.BytesIO()
    Image.fromarray(picture()).save(file, "PNG", compress_level=0)
    target = (Box(120, 120, 300, 300),) if boxes else ()
    return Question(name, image or file.getvalue(), "Which mark?", "ring", (), target, source)


def play(server: Server, config: TrainConfig, manner: EvalMode, box: Box | None = None) -> Play | NotPlayed:
    async def one() -> Play | NotPlayed:
        player = EndpointPlayer(config, await endpoint_at(server.url, "", config), FAMILY)
        try:
            return await player.play(question(), manner, box)
        finally:
            await player.close()

    return asyncio.run(one())


def pictures(body: dict[str, Any]) -> list[np.ndarray]:
    parts = [
        part for message in body["messages"] if isinstance(message["content"], list) for part in message["content"]
    ]
    urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))) for url in urls]


# --- over an endpoint -------------------------------------------------------------------------------------------------


def test_both_turns_over_an_endpoint(server: Server, config: TrainConfig) -> None:
    """672 pixels seen as 6 x 6 visual tokens: a quarter of each side, so 28 .. 84 is 112 .. 336 of the original."""
    found = play(server, config, EvalMode(36))
    assert isinstance(found, Play) and found.trajectory.crop is not None
    assert found.trajectory.crop.box == Box(112, 112, 336, 336) and found.trajectory.outcome == "answered"
    assert found.visual_tokens(FAMILY) == (36, 36) and found.reply_tokens == 14
    first, second = server.bodies
    assert [message["role"] for message in second["messages"]] == ["user", "assistant", "user"]
    assert second["messages"][1]["content"] == LOOK and first["messages"] == second["messages"][:1]
    assert (first["model"], first["temperature"], first["max_tokens"], second["max_tokens"]) == ("tiny", 0.0, 64, 48)
    coarse, crop = pictures(second)
    assert coarse.shape == (168, 168, 3) and (crop == found.trajectory.crop.pixels).all(), "nothing lost on the way"


def test_a_box_in_its_mouth_and_an_answer_at_once(server: Server, config: TrainConfig) -> None:
    oracle = play(server, config, EvalMode(36), Box(0, 0, 336, 336))
    assert isinstance(oracle, Play) and oracle.trajectory.crop is not None
    assert oracle.trajectory.crop.box == Box(0, 0, 336, 336)
    assert server.bodies[1]["messages"][1]["content"] == "<think>there</think><zoom>[0, 0, 84, 84]</zoom>"
    server.say = lambda messages: READ
    direct = play(server, config, EvalMode(16, direct=True))
    assert isinstance(direct, Play) and len(direct.trajectory.turns) == 1 and direct.visual_tokens(FAMILY) == (16,)
    assert len(server.bodies) == 3 and server.bodies[2]["max_tokens"] == 48


def test_what_an_endpoint_refuses_is_named(server: Server, config: TrainConfig) -> None:
    server.say = lambda messages: 503
    lost = play(server, config, EvalMode(36))
    assert isinstance(lost, NotPlayed) and lost.passing and "status 503, 1 attempts" in lost.reason
    with pytest.raises(ConfigError, match="does not list its models"):
        asyncio.run(endpoint_at("http://127.0.0.1:1/v1", "", config))
    with pytest.raises(ConfigError, match="holds a user or password"):
        asyncio.run(endpoint_at("http://me:secret@host/v1", "tiny", config))


# --- the grid ---------------------------------------------------------------------------------------------------------


def run(server: Server, config: TrainConfig, questions: list[Question], out: Path, **told: Any) -> list[Record]:
    async def all_of_it() -> list[Record]:
        player = EndpointPlayer(config, await endpoint_at(server.url, "", config), FAMILY)
        try:
            modes = [Mode.DIRECT, Mode.TWO_STAGE, Mode.ORACLE]
            return await run_grid(questions, player, config, modes, [16, 36], out, told, lambda done, wanted: None)
        finally:
            await player.close()

    return asyncio.run(all_of_it())


def test_a_grid_counts_failures_as_wrong_and_goes_on_where_it_was(
    server: Server, config: TrainConfig, tmp_path: Path
) -> None:
    """Three questions, one of them without a box and one without a picture: 2 budgets x (3 + 3 + 2) records."""
    questions = [question("a", "near"), question("b", "far", boxes=False), question("c", "far", b"no picture")]
    records = run(server, config, questions, tmp_path, policy="tiny")
    assert len(records) == 16 and len(server.bodies) == 2 * (2 * 1 + 2 * 2 + 1 * 2), "what cannot be read is not asked"
    found = {(one["mode"], one["budget"], one["category"]): one for one in summarise(records)}
    two = found["two-stage", 36, "all"]
    assert (two["questions"], two["failures"], two["accuracy"], two["calls"]) == (3, 1, 2 / 3, 2)
    assert (two["coarse_tokens"], two["crop_tokens"], two["visual_tokens"]) == (36, 36, 72)
    assert two["coverage"] == 1.0 and two["bad_box_rate"] == 0 and two["area_ratio"] == pytest.approx(1 / 9)
    direct = found["direct", 16, "all"]
    assert direct["accuracy"] == 0 and direct["calls"] == 1 and "coverage" not in direct, "it only looked"
    assert found["two-stage", 36, "near"]["accuracy"] == 1 and found["two-stage", 36, "far"]["accuracy"] == 0.5
    assert found["oracle", 16, "all"]["questions"] == 2
    assert [record.failure[:15] for record in records if record.failure] == ["UnreadableImage"] * 6

    lines = (tmp_path / "records.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "records.jsonl").write_text("".join(lines[:-2]) + lines[-2][:40])  # stopped in the middle of a line
    server.bodies.clear()
    again = run(server, config, questions, tmp_path, policy="tiny")
    assert [replace(one, seconds=0) for one in again] == [replace(one, seconds=0) for one in records]
    assert len(server.bodies) <= 4, "two records were missing"
    with pytest.raises(ConfigError, match="holds an evaluation with another policy; name another folder"):
        run(server, config, questions, tmp_path, policy="another")


def test_an_endpoint_that_was_down_is_asked_again(server: Server, config: TrainConfig, tmp_path: Path) -> None:
    say, server.say = server.say, lambda messages: 503
    assert all("503" in record.failure for record in run(server, config, [question()], tmp_path))
    server.say = say
    assert not any(record.failure for record in run(server, config, [question()], tmp_path))


def record(correct: bool, seconds: float = 1.0, failure: str = "", **changes: Any) -> Record:
    made = Record(
        "q", "", Mode.TWO_STAGE, 36, correct, "ring", "answered", "ok", 0.25, True, (36, 20), 2, seconds, (), failure
    )
    return replace(made, **changes)


def test_figures_in_numbers_that_one_can_check() -> None:
    some = [record(n < 15, seconds=n / 10) for n in range(20)]
    found = figures([*some, record(False, failure="gone", seconds=0.0)])
    assert found["accuracy"] == 15 / 21 and found["failures"] == 1 and found["visual_tokens"] == 56
    assert found["seconds_median"] == pytest.approx(0.95) and found["seconds_p95"] == 1.8
    assert (found["accuracy_low"], found["accuracy_high"]) == pytest.approx((0.5004, 0.8619), abs=1e-3)
    bad = record(False, box_outcome="no_tag", area_ratio=None, covered=False, visual_tokens=(36, 0), calls=1)
    assert figures([record(True), bad])["bad_box_rate"] == 0.5 and figures([record(True), bad])["coverage"] == 0.5
    assert "calls" not in figures([record(False, failure="gone")])


def test_the_pareto_front() -> None:
    assert pareto([(3, 0.5), (1, 0.2), (2, 0.6), (2, 0.4), (4, 0.6)]) == [(1, 0.2), (2, 0.6)]
    assert pareto([]) == []


def test_the_report_of_a_grid(tmp_path: Path) -> None:
    told = {"policy": "tiny", "in_flight": 8}
    records = [record(True), record(False, question="a|b", failure="UnreadableImage: <no>\npicture", mode=Mode.ORACLE)]
    figures_file, table, plot = write_report(tmp_path, told, records)
    read = json.loads(figures_file.read_text())
    assert [one["mode"] for one in read["figures"]] == ["two-stage", "oracle"] and len(read["failures"]) == 1
    text = table.read_text()
    row = (
        "| two-stage | 36 | all | 1 | 100.0% (20.7% to 100.0%) | 36 + 20 = 56 | 1.00 s, 1.00 s | 2.00 | 25.0% | 0.0% |"
    )
    assert f"{row} 100.0% | 0 |" in text and "- a\\|b, oracle, 36: UnreadableImage: &lt;no> picture" in text
    assert text == as_markdown(told, read["figures"], read["failures"])
    with Image.open(plot) as drawn:
        assert drawn.width > 500


# --- the commands -----------------------------------------------------------------------------------------------------


def test_answer_prints_both_turns_and_writes_the_pictures(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(picture()).save(tmp_path / "scene.png")
    recipe = str(ROOT / "configs" / "panels.yaml")
    given = [
        str(tmp_path / "scene.png"),
        "Which mark?",
        "--url",
        server.url,
        "--recipe",
        recipe,
        "--out",
        str(tmp_path),
    ]
    assert answer.main(given) == 0
    said = capsys.readouterr().out
    assert f"turn 1 (ok): {LOOK}" in said and f"turn 2: {READ}" in said and "answer: ring" in said
    assert "box: [112, 112, 336, 336] of the original, 11.1% of its area" in said
    assert "visual tokens: 36 + 36 = 72; sampled tokens: 14;" in said
    with Image.open(tmp_path / "scene-box.png") as shown, Image.open(tmp_path / "scene-crop.png") as crop:
        assert shown.size == (672, 672) and shown.getpixel((112, 224)) == (255, 255, 255) and crop.size == (168, 168)
    (tmp_path / "no.png").write_bytes(b"no picture")
    assert answer.main([str(tmp_path / "no.png"), "?", "--url", server.url, "--recipe", recipe]) == 1
    assert "does not decode" in capsys.readouterr().err


def test_the_modes_have_arguments_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        evaluate.main(["--budgets", "36"])
    assert "--budgets and --url are for --modes" in capsys.readouterr().err
