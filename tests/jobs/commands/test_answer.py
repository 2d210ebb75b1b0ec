"""``ergo-rl answer``, on a real HTTP server."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from ergo_rl.jobs.commands import answer
from tests.conftest import ROOT
from tests.jobs.conftest import LOOK, READ, Server, scene


def test_answer_prints_both_turns_and_writes_the_images(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(scene()).save(tmp_path / "scene.png")
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
    (tmp_path / "no.png").write_bytes(b"no image")
    assert answer.main([str(tmp_path / "no.png"), "?", "--url", server.url, "--recipe", recipe]) == 1
    assert "does not decode" in capsys.readouterr().err
