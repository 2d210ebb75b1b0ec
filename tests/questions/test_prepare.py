"""``ergo-rl prepare``: published files as questions that training reads; the report; no half-written files."""

from __future__ import annotations

import base64
import csv
import io
import json
import os
import subprocess
import sys
import zipfile
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

from ergo_rl.episodes.config import OnBadRow, QuestionsConfig
from ergo_rl.episodes.types import Box, Question
from ergo_rl.jobs.commands.prepare import main
from ergo_rl.questions.dataset import QuestionStream
from tests.conftest import ROOT


def encoded(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40 + number, 30), (number, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def read(path: Path) -> list[Question]:
    """Every row, as training gets it; a row that it would not take is an error."""
    stream = QuestionStream(QuestionsConfig([str(path)], shuffle=False, on_bad_row=OnBadRow.ERROR))
    return list(islice(stream, len(stream)))


def report_of(out: Path) -> dict[str, Any]:
    return dict(json.loads(out.with_suffix(".report.json").read_text()))


def test_vstar_folders_are_converted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home = tmp_path / "vstar_bench"
    (home / "relative_position").mkdir(parents=True)
    lines = []
    for number in range(3):
        image = f"relative_position/sa_{number}.jpg"
        (home / image).write_bytes(encoded(number))
        (home / image).with_suffix(".json").write_text(json.dumps({"bbox": [[number, 1, 2, 3], [5, 5, 4, 4]]}))
        text = "Left or right?\n(A) left\n(B) right\nAnswer with the option's letter from the given choices directly."
        lines.append({"question_id": str(number), "image": image, "text": text, "label": "AB"[number % 2],
                      "category": "relative_position"})  # fmt: skip
    lines[2]["image"] = "relative_position/gone.jpg"
    (home / "test_questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + "{\n")
    out = tmp_path / "new" / "vstar.parquet"
    assert main(["vstar", str(home / "test_questions.jsonl"), "--out", str(out)]) == 0
    assert read(out) == [
        Question(str(number), encoded(number), "Left or right?", "AB"[number], ("left", "right"),
                 (Box(number, 1, number + 2, 4), Box(5, 5, 9, 9)), "relative_position")
        for number in range(2)
    ]  # fmt: skip
    said = capsys.readouterr().out
    assert "2 questions, 2 of them with boxes" in said
    assert "1 rows skipped (image is not there), the first: " in said
    assert "row 3: image: is not there: no 'relative_position/gone.jpg' in" in said
    report = report_of(out)
    assert report["skipped"] == {"image is not there": 1, "row is no JSON": 1}
    assert "row 4: is no JSON" in report["examples"]["row is no JSON"][0]


def test_hrbench_table_with_shared_images_is_converted(tmp_path: Path) -> None:
    path, out = tmp_path / "hr_bench_4k.tsv", tmp_path / "hr.parquet"
    with path.open("w", newline="") as file:
        table = csv.writer(file, delimiter="\t")
        table.writerow(["index", "question", "answer", "category", "A", "B", "C", "D", "cycle_category", "image"])
        for number in range(8):
            image = base64.b64encode(encoded(number)).decode() if number % 4 == 0 else str(number - number % 4)
            table.writerow([number, 'The "small" sign?', "ABCD"[number % 4], "single", 1, 2, 3, 4, number % 4, image])
    assert main(["hrbench", str(path), "--out", str(out)]) == 0
    assert read(out) == [
        Question(str(number), encoded(number - number % 4), 'The "small" sign?', "ABCD"[number % 4],
                 ("1", "2", "3", "4"), (), "single")
        for number in range(8)
    ]  # fmt: skip


def test_mme_realworld_json_with_an_archive_is_converted(tmp_path: Path) -> None:
    rows = [
        {"Question_id": f"q{number}", "Image": f"{number}.png", "Text": "What?", "Question Type": "Multiple Choice",
         "Answer choices": ["(A) x", "(B) y", "(C) z", "(D) w", "(E) not there"], "Ground truth": "E",
         "Category": "c", "Subtask": "s", "Task": "t"}
        for number in range(5)
    ]  # fmt: skip
    (tmp_path / "MME_RealWorld_Lite.json").write_text(json.dumps(rows))
    with zipfile.ZipFile(tmp_path / "imgs.zip", "w") as archive:
        for number in range(5):
            archive.writestr(f"imgs/{number}.png", encoded(number))
    out = tmp_path / "mme.parquet"
    arguments = ["mme-realworld", str(tmp_path / "MME_RealWorld_Lite.json"), "--images", str(tmp_path / "imgs.zip")]
    assert main([*arguments, "--out", str(out), "--limit", "4"]) == 0
    assert [(one.id, one.image, one.answer, one.options[4]) for one in read(out)] == [
        (f"q{number}", encoded(number), "E", "not there") for number in range(4)
    ]


def test_csv_with_mapped_columns_is_converted(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.png").write_bytes(encoded(0))
    (tmp_path / "mine.csv").write_text('bild,frage,antwort,wo\na.png,"Was, bitte?",7,"[0.5, 0, 1, 1]"\n')
    out = tmp_path / "mine.parquet"
    columns = [f"--map={one}" for one in ("image=bild", "text=frage", "answer=antwort", "boxes=wo")]
    assert main(["any", str(tmp_path / "mine.csv"), "--images", str(tmp_path / "mine"), "--out", str(out), *columns,
                 "--unit", "share"]) == 0  # fmt: skip
    assert read(out) == [Question("mine-1", encoded(0), "Was, bitte?", "7", (), (Box(20, 0, 40, 30),), "mine")]


def one_row(folder: Path) -> tuple[Path, Path]:
    (folder / "a.png").write_bytes(encoded(1))
    rows = folder / "rows.jsonl"
    rows.write_text('{"image": "a.png", "question": "q", "answer": "a"}\n')
    return rows, folder / "out.parquet"


def test_conversion_is_repeated_only_when_its_files_changed(tmp_path: Path) -> None:
    rows, out = one_row(tmp_path)
    assert main(["any", str(rows), "--out", str(out)]) == 0
    before = out.stat().st_mtime_ns
    assert main(["any", str(rows), "--out", str(out)]) == 0
    assert out.stat().st_mtime_ns == before
    rows.write_text(rows.read_text() * 2)
    assert main(["any", str(rows), "--out", str(out)]) == 0
    assert len(read(out)) == 2 and report_of(out)["written"] == 2


def test_decode_option_refuses_images_that_break_off(tmp_path: Path) -> None:
    rows, out = one_row(tmp_path)
    noise = io.BytesIO()
    Image.effect_noise((64, 64), 50).convert("RGB").save(noise, "PNG")
    (tmp_path / "a.png").write_bytes(noise.getvalue()[:2000])
    assert main(["any", str(rows), "--out", str(out)]) == 0, "the header is whole"
    out.unlink()
    assert main(["any", str(rows), "--out", str(out), "--decode"]) == 1


def test_failed_conversion_leaves_no_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, out = one_row(tmp_path)
    rows.write_text('{"image": "b.png", "question": "q", "answer": "a"}\n')
    assert main(["any", str(rows), "--out", str(out)]) == 1
    assert "no row is a question; 1 rows skipped (image is not there), the first: " in capsys.readouterr().err
    assert sorted(one.name for one in tmp_path.iterdir()) == ["a.png", "rows.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rows.jsonl", "--out", "x.csv"], "must end in .parquet"),
        (["gone.jsonl", "--out", "x.parquet"], "there is no"),
        (["rows.jsonl", "--out", "x.parquet", "--map", "text"], "write FIELD=COLUMN"),
        (["rows.jsonl", "--out", "x.parquet", "--map", "colour=x"], "a question has no such field"),
        (["rows.jsonl", "--out", "x.parquet", "--limit", "0"], "at least 1"),
        (["rows.jsonl", "--out", "x.parquet", "--images", "gone.zip"], "there is no gone.zip"),
    ],
)
def test_wrong_arguments_say_what_to_do(
    tmp_path: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one_row(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(["any", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_memory_does_not_grow_with_the_data(tmp_path: Path) -> None:
    """Images of 4 MB in row groups of 8 MB: after 6 of them, 30 more take nothing that 6 did not; they are 120 MB."""
    large = io.BytesIO()
    Image.new("RGB", (1165, 1200)).save(large, "BMP")
    row = {"image": base64.b64encode(large.getvalue()).decode(), "question": "q", "answer": "a"}
    line = json.dumps(row) + "\n"
    for count in (6, 30):
        (tmp_path / f"{count}.jsonl").write_text(line * count)
    measured = (
        "import functools, resource\n"
        "from ergo_rl.jobs.commands import prepare\n"
        "from ergo_rl.questions import prepare as library\n"
        "library.write_questions = functools.partial(library.write_questions, group_bytes=8 << 20)\n"
        "def peak(count):\n"
        "    assert prepare.main(['any', f'{count}.jsonl', '--out', f'{count}.parquet']) == 0\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "print(-peak(6) + peak(30))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [sys.executable, "-c", measured], cwd=tmp_path, env=environment, capture_output=True, timeout=240
    )
    assert ended.returncode == 0, ended.stderr
    groups = pq.ParquetFile(tmp_path / "30.parquet").metadata
    assert (groups.num_rows, groups.num_row_groups) == (30, 4), "eight rows share an image, in memory 32 MiB"
    assert int(ended.stdout.split()[-1]) / 1024 < 50


def test_panels_command_writes_both_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["panels", "--out", str(tmp_path), "--train", "2", "--heldout", "1"]) == 0
    assert "train.parquet" in capsys.readouterr().out
    assert main(["panels", "--out", str(tmp_path), "--train", "0"]) == 1
    assert "at least one row" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main(["panels", "--out", str(tmp_path / "file"), "--train", "1"]) == 1
    assert str(tmp_path / "file") in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0 and "panels" in capsys.readouterr().out
