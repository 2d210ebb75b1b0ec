"""What a data set writes in several ways is decided from all of its rows, or refused with what decides it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ergo_rl.jobs.commands.prepare import main
from ergo_rl.questions.conventions import lettered
from ergo_rl.questions.readers import Broken, read_records
from tests.questions.layouts import jsonl, png, put
from tests.questions.test_prepare import read, report_of


def prepared(folder: Path, rows: list[dict[str, Any]], *more: str, kind: str = "any") -> list[tuple[str, ...]]:
    """(options..., text of the answer) of each row."""
    put(folder / "a.png", png(0))  # 300 x 200
    path = jsonl(
        folder / "rows.jsonl",
        [{"image": "a.png", "question": "Which?", "answer": "A" if "options" in row else "red", **row} for row in rows],
    )
    assert main([kind, str(path), "--out", str(folder / "out.parquet"), *more]) == 0
    found = read(folder / "out.parquet")
    return [(*one.options, one.options["ABCDEFGHIJ".index(one.answer)] if one.options else one.answer) for one in found]


def refused(folder: Path, rows: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(AssertionError):
        prepared(folder, rows)
    return capsys.readouterr().err


def options(*texts: str, answer: str = "A") -> dict[str, Any]:
    return {"options": list(texts), "answer": answer}


@pytest.mark.parametrize(
    ("row", "found"),
    [
        (options("A.M.", "P.M.", answer="P.M."), ("A.M.", "P.M.", "P.M.")),
        (options("A.D.", "B.C.", answer="B"), ("A.D.", "B.C.", "B.C.")),
        (options("E. coli", "B. subtilis", "S. aureus", answer="B. subtilis"),
         ("E. coli", "B. subtilis", "S. aureus", "B. subtilis")),
        (options("A. red", "B. blue", answer="B. blue"), ("red", "blue", "blue")),
        (options("A: red", "B: blue", answer="(b)"), ("red", "blue", "blue")),
        (options("(A) red", "(C) blue", answer="C"), ("red", "blue", "blue")),
        ({"options": {"B": "blue", "A": "red"}, "answer": "B"}, ("red", "blue", "blue")),
        ({"options": {"A": "red", "C": "green", "D": "white"}, "answer": "C"}, ("red", "green", "white", "green")),
        ({"options": {"1": "red", "2": "blue"}, "answer": 2}, ("red", "blue", "blue")),
        ({"options": [{"key": "A", "text": "red"}, {"key": "B", "text": "blue"}], "answer": "B"},
         ("red", "blue", "blue")),
        ({"options": "['red', 'it\\'s']", "answer": "it's"}, ("red", "it's", "it's")),
        ({"options": None, "A": "red", "B": "", "C": "None", "answer": "C"}, ("red", "None", "None")),
        (options("red", "None", answer="None"), ("red", "None", "None")),
        (options("1", "2", "3", answer="2"), ("1", "2", "3", "2")),
        (options("red", "blue", answer="\\boxed{\\text{B}}"), ("red", "blue", "blue")),
        (options("red", "blue", answer="Option B"), ("red", "blue", "blue")),
        ({"options": {"(B)": "blue", "(A)": "red"}, "answer": "B"}, ("red", "blue", "blue")),
        ({"question": "Which? (A) red (B) blue", "answer": "B"}, ("red", "blue", "blue")),
        ({"question": "Which?\n(A) red (B) blue. Answer with the letter.", "answer": "B"}, ("red", "blue", "blue")),
        ({"question": "Which?\na) red\nb) blue", "answer": "b"}, ("red", "blue", "blue")),
        ({"question": "Is it type (A) or (C)?", "answer": "neither"}, ("neither",)),
        ({"question": None, "prompt": '[{"role": "user", "content": "Which?\\nA. red\\nB. blue"}]', "answer": "B"},
         ("red", "blue", "blue")),
        (options("red", "blue", answer="<think>so</think><answer> B </answer>"), ("red", "blue", "blue")),
    ],
)  # fmt: skip
def test_options_and_answers_are_read_as_they_are_meant(tmp_path: Path, row: dict[str, Any], found: Any) -> None:
    assert prepared(tmp_path, [row]) == [found]


def test_letters_of_options_that_are_not_there_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three open questions of which two have letters as answers: perhaps their options are in another column."""
    rows: list[dict[str, Any]] = [{"answer": "B"}, {"answer": "(C)"}, {"answer": "red"}]
    assert "of 2 of 3 rows without options are letters of options: name the column" in refused(tmp_path, rows, capsys)
    assert prepared(tmp_path, rows, "--answers", "text") == [("B",), ("(C)",), ("red",)]
    assert prepared(tmp_path, [{"answer": "B"}, {"answer": "red"}]) == [("B",), ("red",)]


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (options("x", "y", "z") | {"answer": ["A", "B"]}, "answer: names several options: ['A', 'B']"),
        ({"options": ["red", float("nan"), "blue"], "answer": "blue"}, "options: is missing"),
    ],
)
def test_row_that_names_no_option_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], row: dict[str, Any], why: str
) -> None:
    assert why in refused(tmp_path, [row], capsys)


def test_letters_are_taken_off_by_the_column_and_not_by_the_row(tmp_path: Path) -> None:
    plain = [options("E. coli", "S. aureus"), options("P. putida", "E. coli")]
    assert prepared(tmp_path, [options("A. thaliana", "B. subtilis"), *plain])[0][0] == "A. thaliana"
    rows = [options("A. red", "B. blue")] * 19 + [options("1", "2")]
    assert [one[0] for one in prepared(tmp_path, rows)] == ["red"] * 19 + ["1"]
    assert prepared(tmp_path, [options("A. thaliana", "B. subtilis")], "--letters", "keep")[0][0] == "A. thaliana"


def test_numbers_of_options_count_from_what_the_column_shows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    colours = ["red", "blue", "white"]
    rows = [{"options": colours, "answer": number} for number in (1, 0, 2)]
    assert [one[-1] for one in prepared(tmp_path, rows)] == ["blue", "red", "white"]
    rows = [{"options": colours, "answer": str(number)} for number in (1, 3, 2)]
    assert [one[-1] for one in prepared(tmp_path, rows)] == ["red", "white", "blue"]
    rows = [{"options": colours, "answer": number} for number in (1, 2, 2)]
    said = refused(tmp_path, rows, capsys)
    assert "--answers zero or --answers one" in said
    assert [one[-1] for one in prepared(tmp_path, rows, "--answers", "zero")] == ["blue", "white", "white"]


def test_letter_that_is_the_text_of_another_option_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [options("B", "A", answer="B")]
    assert "--answers letter or --answers text" in refused(tmp_path, rows, capsys)
    assert prepared(tmp_path, rows, "--answers", "text") == [("B", "A", "B")]
    assert prepared(tmp_path, rows, "--answers", "letter") == [("B", "A", "A")]
    assert prepared(tmp_path, [*rows, options("red", "A", answer="red")])[0][-1] == "B", (
        "another row says it is the text"
    )


def boxes_of(folder: Path, boxes: list[Any], *more: str) -> list[Any]:
    prepared(folder, [{"bbox": box} for box in boxes], *more)
    return [
        (one.boxes[0].x1, one.boxes[0].y1, one.boxes[0].x2, one.boxes[0].y2) for one in read(folder / "out.parquet")
    ]


def test_unit_of_boxes_is_decided_by_all_of_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The image is 300 x 200."""
    assert boxes_of(tmp_path, [[0.1, 0.2, 0.5, 0.6], [0, 0, 1, 1]]) == [(30, 40, 150, 120), (0, 0, 300, 200)]
    assert report_of(tmp_path / "out.parquet")["conventions"]["boxes"] == "shares"
    assert boxes_of(tmp_path, [[10, 20, 30, 40], [0, 0, 1, 1]]) == [(10, 20, 30, 40), (0, 0, 1, 1)]
    assert boxes_of(tmp_path, [[100, 500, 900, 1000]] * 20) == [(30, 100, 270, 200)] * 20
    for boxes in ([[100, 500, 900, 1000]], [[0, 0, 1, 1]], [[0.1, 0.1, 0.2, 0.2]] * 3 + [[9, 9, 10, 10]]):
        assert "--boxes pixels, --boxes shares" in refused(tmp_path, [{"bbox": box} for box in boxes], capsys)
    assert boxes_of(tmp_path, [[100, 500, 900, 1000]], "--boxes", "thousandths") == [(30, 100, 270, 200)]
    assert "--corners xywh" in refused(tmp_path, [{"bbox": [100, 90, 30, 40]}] * 2, capsys)
    assert boxes_of(tmp_path, [[100, 90, 30, 40]], "--corners", "xywh") == [(100, 90, 130, 130)]


def test_prepare_says_what_it_took_each_column_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepared(tmp_path, [options("(A) red", "(B) blue"), {"image": "gone.png"}, options("red", "blue", answer="x")])
    said = capsys.readouterr().out
    for line in ("text     'Which?'  (from question)", "image    300 x 200  (from image)", "letters keep",
                 "1 rows skipped (image is not there)", "1 rows skipped (answer is none of the options)"):  # fmt: skip
        assert line in said, said


def test_equal_ids_are_told_apart(tmp_path: Path) -> None:
    put(tmp_path / "a.png", png(0))
    for name in ("one", "two"):
        jsonl(tmp_path / f"{name}.jsonl", [{"id": "7", "image": "a.png", "question": "q?", "answer": "x"}] * 2)
    out = tmp_path / "out.parquet"
    assert main(["any", str(tmp_path / "one.jsonl"), str(tmp_path / "two.jsonl"), "--out", str(out)]) == 0
    assert [one.id for one in read(out)] == ["7", "one/2: 7", "two/1: 7", "two/2: 7"]
    assert report_of(out)["renamed"] == 3


@pytest.mark.parametrize(
    ("content", "cells"),
    [
        ('q\ta\n"Stop" sign?\tx\n"go\ty\n', ['"Stop" sign?', '"go']),
        ('q\ta\n"The ""Stop"" sign?"\tx\n"two\nlines"\ty\n', ['The "Stop" sign?', "two\nlines"]),
        ('q\ta\n"one"\tx\n"open\ty\n"two"\tz\n', ["one", None, "two"]),
    ],
)
def test_quotes_of_a_table_are_decided_for_the_whole_file(tmp_path: Path, content: str, cells: list[Any]) -> None:
    found = list(read_records(put(tmp_path / "a.tsv", content)))
    assert [None if isinstance(one, Broken) else one.cells["q"] for one in found] == cells


@pytest.mark.parametrize("text", [" " * 200_000, "A." + " " * 200_000, "(A)" * 70_000, "choose " * 30_000 + "\n"])
def test_long_texts_take_no_time(tmp_path: Path, text: str) -> None:
    lettered(text)
    jsonl(tmp_path / "rows.jsonl", [{"image": "/9j/" + text, "question": text + "x", "answer": text, "options": text}])
    assert main(["any", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "out.parquet")]) == 1
