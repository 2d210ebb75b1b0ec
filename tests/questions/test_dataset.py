"""Parquet questions: order, cursor, and a clear message about everything that is wrong with a file or a row."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ergo_rl.episodes.config import OnBadRow, QuestionsConfig
from ergo_rl.episodes.families import UnknownFamily
from ergo_rl.episodes.images import UnreadableImage
from ergo_rl.episodes.prompts import ReservedText
from ergo_rl.episodes.types import Box, Question
from ergo_rl.errors import ErgoError
from ergo_rl.questions.dataset import BadRow, Cursor, DatasetError, QuestionStream, write_questions
from ergo_rl.questions.image_store import ImageNotFound
from ergo_rl.questions.rows import BadCell


def png(width: int = 8, height: int = 6, **keys: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height)).save(buffer, "PNG", **keys)
    return buffer.getvalue()


def row(number: int, **cells: Any) -> dict[str, Any]:
    plain = {
        "id": f"q{number}",
        "image": png(),
        "text": "Which?",
        "options": [],
        "answer": "ring",
        "boxes": [],
        "source": "s",
    }
    return {**plain, **cells}


Write = Callable[..., str]


@pytest.fixture(scope="session")
def write(tmp_path_factory: pytest.TempPathFactory) -> Write:
    folder = tmp_path_factory.mktemp("questions")
    count = iter(range(10**6))

    def to_file(rows: Sequence[dict[str, Any]], per_group: int = 4, **types: pa.DataType) -> str:
        path = folder / f"{next(count)}.parquet"
        table = pa.Table.from_pylist(list(rows))
        for name, kind in types.items():
            table = table.set_column(table.column_names.index(name), name, table.column(name).cast(kind))
        pq.write_table(table, path, row_group_size=per_group)
        return str(path)

    return to_file


@pytest.fixture(scope="session")
def eleven(write: Write) -> list[str]:
    """11 rows in two files, row groups of 4, 3 | 2, 2."""
    return [write([row(number) for number in range(7)], 4), write([row(number) for number in range(7, 11)], 2)]


def ids(questions: Sequence[Question]) -> list[str]:
    return [question.id for question in questions]


def take(stream: QuestionStream, count: int) -> list[Question]:
    return list(islice(stream, count))


def test_stream_unshuffled_follows_the_files_and_rolls_over(eleven: list[str]) -> None:
    stream = QuestionStream(QuestionsConfig(eleven, shuffle=False))
    assert len(stream) == 11
    assert ids(take(stream, 13)) == [f"q{number}" for number in [*range(11), 0, 1]]
    assert stream.cursor == Cursor(epoch=1, position=2)


@settings(max_examples=25)
@given(seed=st.integers(0, 2**31))
def test_stream_shuffled_gives_another_permutation_each_epoch(eleven: list[str], seed: int) -> None:
    stream = QuestionStream(QuestionsConfig(eleven, seed=seed))
    epochs = [ids(take(stream, 11)) for _ in range(6)]
    assert all(sorted(epoch) == sorted(f"q{number}" for number in range(11)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    again = QuestionStream(QuestionsConfig(eleven, seed=seed))
    assert ids(take(again, 66)) == [identity for epoch in epochs for identity in epoch]


@settings(max_examples=40)
@given(seed=st.integers(0, 2**31), taken=st.integers(0, 40))
def test_cursor_saved_anywhere_gives_the_same_continuation(eleven: list[str], seed: int, taken: int) -> None:
    config = QuestionsConfig(eleven, seed=seed)
    stream = QuestionStream(config)
    take(stream, taken)
    saved = json.loads(json.dumps(asdict(stream.cursor)))
    fresh = QuestionStream(config)
    fresh.restore(Cursor(**saved))
    assert ids(take(fresh, 15)) == ids(take(stream, 15))
    assert fresh.cursor == stream.cursor


def test_row_group_is_read_only_when_needed(eleven: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    plain = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile,
        "read_row_group",
        lambda self, index, **keys: (read.append(index), plain(self, index, **keys))[1],
    )
    stream = QuestionStream(QuestionsConfig(eleven, shuffle=False))
    assert not read
    take(stream, 4)
    assert read == [0]
    stream.restore(Cursor(0, 8))
    assert ids(take(stream, 1)) == ["q8"] and read == [0, 0]  # the first group of the second file; nothing before it


def test_written_questions_are_read_back(tmp_path: Path) -> None:
    questions = [
        Question(f"q{number}", png(), "Which?", "B", ("ring", "dot"), (Box(1, 2, 3, 4), Box(0, 0, 8, 6)), "mine")
        for number in range(5)
    ]
    assert write_questions(tmp_path / "q.parquet", iter(questions), rows_per_group=2) == 5
    assert take(QuestionStream(QuestionsConfig([str(tmp_path / "q.parquet")], shuffle=False)), 5) == questions


def test_image_column_may_hold_bytes_paths_or_structs(write: Write, tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "a.png").write_bytes(png())
    root = str(tmp_path)
    paths = write([row(0, image="inside/a.png")])
    structs = write(
        [row(0, image={"bytes": png(), "path": None}), row(1, image={"bytes": None, "path": "inside/a.png"})]
    )
    first = take(QuestionStream(QuestionsConfig([paths], root)), 1)[0]
    assert first.image == (tmp_path / "inside" / "a.png").resolve()
    both = take(QuestionStream(QuestionsConfig([structs], root, shuffle=False)), 2)
    assert both[0].image == png() and both[1].image == first.image


def test_image_paths_without_root_are_relative_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    pq.write_table(pa.Table.from_pylist([row(0, image="a.png")]), tmp_path / "q.parquet")
    assert (
        take(QuestionStream(QuestionsConfig([str(tmp_path / "q.parquet")])), 1)[0].image
        == (tmp_path / "a.png").resolve()
    )


def test_optional_columns_absent_and_numeric_ids_are_read(write: Write) -> None:
    plain = {name: cell for name, cell in row(0, id=17, options=None).items() if name not in ("boxes", "source")}
    one = take(QuestionStream(QuestionsConfig([write([plain])])), 1)[0]
    assert (one.id, one.options, one.boxes, one.source) == ("17", (), (), "")


def test_boxes_with_fractions_are_rounded_outwards(write: Write) -> None:
    path = write([row(0, boxes=[[1.5, 2.0, 3.2, 4.9]])])
    assert take(QuestionStream(QuestionsConfig([path])), 1)[0].boxes == (Box(1, 2, 4, 5),)


def test_boxes_are_checked_against_the_upright_image(write: Write) -> None:
    exif = Image.Exif()
    exif[274] = 6  # to be shown turned: 8 x 6 is seen as 6 x 8
    path = write([row(0, image=png(exif=exif), boxes=[[0, 0, 6, 8]])])
    assert take(QuestionStream(QuestionsConfig([path])), 1)[0].boxes == (Box(0, 0, 6, 8),)


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("id", {"id": None}, "is missing"),
    ("id", {"id": " "}, "is empty"),
    ("answer", {"answer": None}, "is missing"),
    ("answer", {"answer": ""}, "is empty"),
    ("text", {"text": ""}, "is empty"),
    ("text", {"text": "see <|image_pad|>"}, r"special token <\|image_pad\|>"),
    ("answer", {"answer": "<|im_end|>"}, r"special token <\|im_end\|>"),
    ("options", {"options": ["a", "<|vision_start|>"]}, r"special token <\|vision_start\|>"),
    ("options", {"options": ["a", ""]}, "is empty"),
    ("options", {"options": ["a", None]}, "is missing"),
    ("options", {"options": ["ring"]}, "should be 2 to 26 or none: there are 1"),
    ("options", {"options": ["ring"] * 27}, "there are 27"),
    ("answer", {"options": ["dot", "disc"]}, "is none of the options: 'ring'"),
    ("text", {"text": "x" * 524_289}, "is too long: 524289 characters"),
    ("image", {"image": None}, "is missing"),
    ("image", {"image": b""}, "is empty"),
    ("image", {"image": b"no image at all"}, "does not decode"),
    ("image", {"image": png()[:20]}, "does not decode"),
    ("boxes", {"boxes": [[1, 2, 3]]}, "four finite numbers"),
    ("boxes", {"boxes": [[1, 2, 1, 4]]}, "is empty or leaves the image of 8 x 6"),
    ("boxes", {"boxes": [[1, 2, 9, 4]]}, "is empty or leaves the image of 8 x 6"),
    ("boxes", {"boxes": [[-1, 2, 3, 4]]}, "is empty or leaves the image of 8 x 6"),
    ("boxes", {"boxes": [[1, 2, None, 4]]}, "four finite numbers"),
]


@pytest.mark.parametrize(("column", "cells", "message"), BAD)
def test_bad_row_is_skipped_counted_and_named(
    write: Write, caplog: pytest.LogCaptureFixture, column: str, cells: dict[str, Any], message: str
) -> None:
    path = write([row(0, boxes=[[0, 0, 1, 1]], options=["a", "ring"]), row(1, **cells), row(2)])
    stream = QuestionStream(QuestionsConfig([path], shuffle=False))
    with caplog.at_level(logging.WARNING):
        assert ids(take(stream, 2)) == ["q0", "q2"]
    assert stream.skipped == {column: 1}
    identity = cells.get("id", "q1")
    assert stream.reasons[0].startswith(f"{path}, row 1 (id {identity!r}), column {column!r}: ")
    assert caplog.messages == [f"bad row skipped: {stream.reasons[0]}"]
    with pytest.raises(BadRow, match=message):
        take(QuestionStream(QuestionsConfig([path], shuffle=False, on_bad_row=OnBadRow.ERROR)), 2)


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("answer", [3, 4], "should be text, is int"),
        ("text", [1.5, 2.5], "should be text, is float"),
        ("options", ["a, b", "c"], "should be a list, is str"),
        ("image", [3, 4], "should be bytes or a path, is int"),
        ("boxes", [3, 4], "should be a list, is int"),
        ("source", [3, 4], "should be text, is int"),
    ],
)
def test_column_of_a_wrong_type_is_named(write: Write, column: str, values: list[Any], message: str) -> None:
    path = write([row(number, **{column: value}) for number, value in enumerate(values)])
    with pytest.raises(BadRow, match=f"row 0 .*column '{column}': {message}"):
        take(QuestionStream(QuestionsConfig([path], shuffle=False, on_bad_row=OnBadRow.ERROR)), 1)


def test_image_paths_stay_inside_the_root(write: Write, tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "secret.png").write_bytes(png())
    (tmp_path / "root" / "link.png").symlink_to(tmp_path / "secret.png")
    for image in ("../secret.png", str(tmp_path / "secret.png"), "link.png"):
        config = QuestionsConfig([write([row(0, image=image)])], str(tmp_path / "root"), on_bad_row=OnBadRow.ERROR)
        with pytest.raises(BadRow, match="leaves"):
            take(QuestionStream(config), 1)
    config = QuestionsConfig([write([row(0, image="none.png")])], str(tmp_path), on_bad_row=OnBadRow.ERROR)
    with pytest.raises(BadRow, match="no file"):
        take(QuestionStream(config), 1)


def test_huge_image_is_refused_by_its_header(write: Write) -> None:
    config = QuestionsConfig([write([row(0)])], on_bad_row=OnBadRow.ERROR, max_image_pixels=47)
    with pytest.raises(BadRow, match="8 x 6 is more than the limit of 47"):
        take(QuestionStream(config), 1)


def test_missing_column_is_named_with_those_present(write: Write) -> None:
    path = write([{"id": "a", "image": b"", "question": "Which?", "options": [], "answer": "x"}])
    with pytest.raises(
        DatasetError, match=r"has no column 'text'; its columns are id, image, question, options, answer"
    ) as error:
        QuestionStream(QuestionsConfig([path]))
    assert path in str(error.value)


def test_unreadable_files_are_named(write: Write, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="paths is empty"):
        QuestionStream(QuestionsConfig())
    with pytest.raises(DatasetError, match=r"there is no file .*nowhere\.parquet"):
        QuestionStream(QuestionsConfig([str(tmp_path / "nowhere.parquet")]))
    (tmp_path / "text.parquet").write_text("id,image,text")
    with pytest.raises(DatasetError, match="is not a Parquet file"):
        QuestionStream(QuestionsConfig([str(tmp_path / "text.parquet")]))
    pq.write_table(pa.Table.from_pylist([row(0)]).slice(0, 0), tmp_path / "empty.parquet")
    with pytest.raises(DatasetError, match="has no rows"):
        QuestionStream(QuestionsConfig([str(tmp_path / "empty.parquet")]))


@pytest.mark.parametrize("start", [Cursor(), Cursor(0, 1)])
def test_file_without_a_usable_row_is_refused(write: Write, start: Cursor) -> None:
    stream = QuestionStream(QuestionsConfig([write([row(number, answer="") for number in range(15)])]))
    stream.restore(start)
    with pytest.raises(DatasetError, match=r"no usable row .* bad rows, the last: .*column 'answer': is empty"):
        next(stream)


def test_only_the_first_bad_rows_are_logged(write: Write, caplog: pytest.LogCaptureFixture) -> None:
    stream = QuestionStream(
        QuestionsConfig([write([*(row(number, text="") for number in range(30)), row(30)])], shuffle=False)
    )
    with caplog.at_level(logging.WARNING):
        assert ids(take(stream, 1)) == ["q30"]
    assert stream.skipped == {"text": 30} and len(stream.reasons) == 20 and len(caplog.messages) == 10
    assert caplog.messages[-1].endswith("further ones are only counted")


def test_errors_for_users_have_a_common_base() -> None:
    for kind in (BadRow, DatasetError, BadCell, ImageNotFound, UnreadableImage, ReservedText, UnknownFamily):
        assert issubclass(kind, ErgoError), kind
    assert issubclass(DatasetError, ValueError) and issubclass(UnknownFamily, ValueError)


def test_cursor_of_other_files_is_refused(eleven: list[str]) -> None:
    with pytest.raises(ValueError, match="does not fit 11 rows"):
        QuestionStream(QuestionsConfig(eleven)).restore(Cursor(0, 12))


cells = st.one_of(st.none(), st.text(max_size=5), st.sampled_from(["ring", "<|image_pad|>", "<|im_end|>"]))


@settings(max_examples=60)
@given(
    rows=st.lists(
        st.fixed_dictionaries(
            {
                "id": cells,
                "image": st.one_of(st.none(), st.binary(max_size=30), st.just(png())),
                "text": cells,
                "options": st.one_of(st.none(), st.lists(cells, max_size=3)),
                "answer": cells,
                "boxes": st.one_of(st.none(), st.lists(st.lists(st.floats(), max_size=5), max_size=2)),
            }
        ),
        max_size=8,
    )
)
def test_any_row_is_a_question_or_counted(write: Write, rows: list[dict[str, Any]]) -> None:
    path = write([*rows, row(0, boxes=[[0.0, 0.0, 1.0, 1.0]])], image=pa.binary(), text=pa.string())
    stream = QuestionStream(QuestionsConfig([path], shuffle=False))
    good = 0
    while stream.cursor.position < len(rows) + 1:
        question = next(stream)
        good += 1
        assert question.text.strip() and question.answer.strip() and question.id.strip()
    assert good + stream.skipped.total() == len(rows) + 1
