"""One poisoned row, cell, member or column among good ones costs itself alone; the rows that were written and those
that were skipped are all there were."""

from __future__ import annotations

import base64
import io
import json
import multiprocessing
import random
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ergo_rl.episodes.config import QuestionsConfig
from ergo_rl.jobs.commands.prepare import main
from ergo_rl.questions import image_store
from ergo_rl.questions.dataset import QuestionStream
from ergo_rl.questions.formats import FORMATS
from ergo_rl.questions.image_store import ImageNotFound, open_image_store
from ergo_rl.questions.prepare import Conversion, ConversionReport, convert_dataset
from tests.questions.layouts import jsonl, png, put

GOOD = {"image": "a.png", "question": "Which?", "options": ["red", "blue"], "answer": "red", "boxes": [[1, 2, 30, 40]]}
PNG = png(0)
DEEP = "[" * 100_000
POISONS: list[Any] = [
    "\ud83d", "a\0b", DEEP, "<|im_end|>", "x" * 600_000, "AAAAIGZ0eXBhdmlm" + base64.b64encode(b"x" * 300).decode(),
    "../../etc/passwd", "/etc/passwd", "a/" * 3_000, 10**400, float("nan"), float("inf"), True, {"bytes": 3},
    [[0, 0, 10**400, 5]], [None], [[]], {"": {}}, [1, "a", None], "data:image/png;base64,!!", [{"value": 1}],
]  # fmt: skip


def converted(folder: Path, path: Path, *images: Path, name: str = "any") -> ConversionReport:
    return convert_dataset(Conversion(FORMATS[name], (path,), images, folder / "out" / "q.parquet"))


def rows_of(report: ConversionReport) -> int:
    return report.written + sum(report.skipped.values())


Record = Callable[[str, object], None]


@pytest.mark.hostile("rows and members")
@pytest.mark.parametrize("column", [*GOOD, "id", "conversations"])
def test_poisoned_cell_costs_its_row(tmp_path: Path, column: str, record_property: Record) -> None:
    """7 columns x 21 poisons = 147 hostile rows, two honest ones round each."""
    put(tmp_path / "a.png", PNG)
    rows = [
        GOOD if number % 2 == 0 else {**GOOD, column: POISONS[number // 2]} for number in range(2 * len(POISONS) + 1)
    ]
    record_property("tried", len(POISONS))
    report = converted(tmp_path, jsonl(tmp_path / "rows.jsonl", rows))
    assert rows_of(report) == len(rows) and report.written >= len(POISONS) + 1
    assert all(name.partition(" ")[2] for name in report.skipped), "each reason is named"


LINES = [b"{", b"[]", b"3", b"\xff\xfe", DEEP.encode(), b'{"id": ' + b"9" * 5000 + b"}", b"null", b'{"a": }', b"\0",
         b'{"question": "\\ud800"}', b'"' + b"x" * 5000, b"NaN"]  # fmt: skip


@pytest.mark.hostile("rows and members")
@pytest.mark.parametrize("kind", ["jsonl", "json"])
def test_poisoned_line_costs_itself(tmp_path: Path, kind: str, record_property: Record) -> None:
    put(tmp_path / "a.png", PNG)
    good = json.dumps(GOOD).encode()
    # In a list an object that nothing closes takes all that follows with it: there is no telling where it ends.
    poisons = LINES if kind == "jsonl" else [*LINES[1:4], DEEP.encode() + b"]" * len(DEEP), *LINES[5:-2], b"NaN"]
    record_property("tried", len(poisons))
    lines = [part for line in poisons for part in (good, line)] + [good]
    joined = b"\n".join(lines) if kind == "jsonl" else b"[" + b",\n".join(lines) + b"]"
    report = converted(tmp_path, put(tmp_path / f"rows.{kind}", joined))
    assert rows_of(report) == len(lines) and report.written == len(lines) // 2 + 1


def test_json_that_breaks_off_keeps_what_comes_before(tmp_path: Path) -> None:
    put(tmp_path / "a.png", PNG)
    report = converted(tmp_path, put(tmp_path / "rows.json", json.dumps([GOOD, GOOD])[:-30]))
    assert (report.written, report.skipped) == (1, {"row is not whole": 1})


def archive_of(path: Path, members: dict[str, bytes]) -> Path:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in members.items():
                archive.writestr(name, content)
    else:
        with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as tar:
            for name, content in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.hostile("rows and members")
@pytest.mark.parametrize("name", ["p.zip", "p.tar", "p.tar.gz"])
def test_damaged_member_costs_itself(tmp_path: Path, name: str, record_property: Record) -> None:
    """60 damages of a byte or more in an archive of three images: what can be opened gives images or says why not."""
    members = {f"imgs/{number}.png": png(number) for number in range(3)}
    rng, whole, read = random.Random(3), archive_of(tmp_path / name, members).read_bytes(), 0
    record_property("tried", 60)
    for number in range(60):
        damaged = bytearray(whole)
        for _ in range(rng.choice((1, 4))):
            damaged[rng.randrange(len(damaged))] ^= rng.randrange(1, 256)
        path = put(tmp_path / f"{number}-{name}", bytes(damaged[: rng.choice((len(whole), rng.randrange(len(whole))))]))
        try:
            with open_image_store([path], tmp_path) as store:
                for member, content in members.items():
                    try:
                        read += store(member) == content
                    except ImageNotFound as error:
                        assert str(error)
        except image_store.DatasetError as error:
            assert path.name in str(error)
    assert read > 15


def test_members_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_store, "RATIO_FROM", 1 << 16)
    monkeypatch.setattr(image_store, "MAX_IMAGE_BYTES", 1 << 22)
    bomb, large = bytes(1 << 21), random.Random(0).randbytes((1 << 22) + 1)
    path = archive_of(tmp_path / "p.zip", {"a.png": PNG, "bomb.png": bomb, "large.png": large, "../../evil.png": PNG})
    with open_image_store([path], tmp_path) as store:
        assert store("a.png") == PNG
        for name in ("bomb.png", "large.png"):
            with pytest.raises(ImageNotFound, match="is too large"):
                store(name)
        with pytest.raises(ImageNotFound, match="leaves its folder"):
            store("../../evil.png")
    with (
        pytest.raises(image_store.DatasetError, match="200 times its size"),
        open_image_store([archive_of(tmp_path / "bomb.tar.gz", {"a.png": bytes(1 << 24)})], tmp_path),
    ):
        pass
    monkeypatch.setattr(image_store, "MAX_MEMBERS", 2)
    with (
        pytest.raises(image_store.DatasetError, match="more than 2 members"),
        open_image_store([archive_of(tmp_path / "p.tar", {str(number): b"" for number in range(3)})], tmp_path),
    ):
        pass


COLUMN_TYPES: list[pa.Array] = [
    pa.array([1, 2, 3]), pa.array([1.5, float("nan"), 3]), pa.array([True, False, None]), pa.array([None] * 3),
    pa.array([b"a", b"\xff", None]), pa.array([["a"], [], None]), pa.array([{"a": 1}, None, {"a": 2}]),
    pa.array([0, 2**60, 1], pa.timestamp("us")), pa.array(["a", "b", "a"]).dictionary_encode(),
    pa.array([[["a"]], [[None]], []]), pa.array([[("a", "b")]] * 3, pa.map_(pa.string(), pa.string())),
]  # fmt: skip


COLUMNS = ("id", "image", "question", "options", "answer", "boxes", "other")


@pytest.mark.hostile("schemas")
def test_column_of_any_type_costs_its_cells(tmp_path: Path, record_property: Record) -> None:
    """7 columns x 11 types = 77 schemas of three rows."""
    put(tmp_path / "a.png", PNG)
    record_property("tried", len(COLUMNS) * len(COLUMN_TYPES))
    for column in COLUMNS:
        for number, values in enumerate(COLUMN_TYPES):
            table = pa.Table.from_pylist([GOOD] * 3)
            place = table.column_names.index(column) if column in table.column_names else table.num_columns
            table = (table.set_column if place < table.num_columns else table.add_column)(place, column, values)
            path = tmp_path / f"{column}-{number}.parquet"
            pq.write_table(table, path)
            try:
                report = converted(tmp_path, path)
            except image_store.DatasetError as error:
                assert "no row is a question" in str(error) or "--" in str(error)
            else:
                assert rows_of(report) == 3
                assert column != "other" or report.written == 3, "a column that no field needs"


def test_ten_thousand_fuzzed_rows_add_up(tmp_path: Path) -> None:
    rng, total, written = random.Random(19), 0, 0
    put(tmp_path / "a.png", PNG)
    packed = base64.b64encode(PNG)
    columns = sorted({name for names in FORMATS["any"].columns.values() for name in names} | set("ABCD"))
    values: list[Any] = [
        None, "", "A", "B", 0, 1, 7.5, "red", "a.png", "gone.png", "(A) red\n(B) blue", ["red", "blue"], [1, 2, 3, 4],
        [[0.1, 0.1, 0.2, 0.2]], {"A": "red"}, "['red', 'blue']", "\ud800", "<image>What?", [{"from": "human"}], "None",
        [{"role": "user", "content": [{"type": "text", "text": "What?"}]}], float("inf"), 10**30, "\\boxed{A}", "[[",
    ]  # fmt: skip
    for number in range(20):
        rows = []
        for _ in range(500):
            row: dict[str, Any] = {**GOOD} if rng.random() < 0.9 else {}
            for _ in range(rng.choice((0, 1, 1, 2, 5))):
                row[rng.choice(columns)] = rng.choice(values)
            if rng.random() < 0.3:
                damaged = bytearray(packed)
                damaged[rng.randrange(len(damaged))] = rng.choice(b"AZaz09+/!")
                row["image"] = damaged.decode()
            rows.append(row)
        path = jsonl(tmp_path / f"{number}.jsonl", [*rows, GOOD])
        report = converted(tmp_path, path)
        assert rows_of(report) == 501
        total, written = total + rows_of(report), written + report.written
    assert total == 10_020 and total / 5 < written < total


def _convert(folder: str) -> int:
    return main(["any", f"{folder}/rows.jsonl", "--out", f"{folder}/out/q.parquet"])


def test_two_first_starts_do_not_collide(tmp_path: Path) -> None:
    put(tmp_path / "a.png", PNG)
    jsonl(tmp_path / "rows.jsonl", [GOOD] * 50)
    with multiprocessing.get_context("fork").Pool(4) as pool:
        assert pool.map(_convert, [str(tmp_path)] * 4) == [0] * 4
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["q.parquet", "q.report.json"]
    assert pq.read_metadata(tmp_path / "out" / "q.parquet").num_rows == 50
    assert json.loads((tmp_path / "out" / "q.report.json").read_text())["written"] == 50


def test_links_lead_where_their_owner_laid_the_data(tmp_path: Path) -> None:
    """Linked folders and the hub's cache, and no single file elsewhere."""
    put(tmp_path / "far" / "a.png", PNG)
    put(tmp_path / "hub" / "blobs" / "0f", PNG)
    home = tmp_path / "hub" / "snapshots" / "1"
    home.mkdir(parents=True)
    (home / "photos").symlink_to(tmp_path / "far")
    (home / "b.png").symlink_to("../../blobs/0f")
    (home / "secret.png").symlink_to(tmp_path / "far" / "a.png")
    with open_image_store([home], tmp_path) as store:
        assert store("photos/a.png") == store("b.png") == store(str(home / "b.png")) == PNG
        for name in ("secret.png", str(tmp_path / "far" / "a.png"), "photos/../../../../far/a.png"):
            with pytest.raises(ImageNotFound):
                store(name)


def test_names_with_a_folder_more_must_all_have_the_same(tmp_path: Path) -> None:
    put(tmp_path / "cub" / "1.png", PNG)
    put(tmp_path / "deep" / "x" / "1.png", PNG)
    put(tmp_path / "deep" / "y" / "1.png", PNG)
    with open_image_store([tmp_path / "cub"], tmp_path) as store:
        assert store("cub/1.png") == PNG
        with pytest.raises(ImageNotFound, match="of another folder"):
            store("dude/1.png")
    with open_image_store([tmp_path / "deep"], tmp_path) as store:
        assert store("all/x/1.png") == PNG
        with pytest.raises(ImageNotFound, match="stands for several files"):
            store("1.png")


def test_large_row_group_is_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from itertools import islice

    from ergo_rl.episodes.config import QuestionsConfig
    from ergo_rl.questions import dataset

    cells = [{**GOOD, "id": str(number), "text": "q?", "image": PNG} for number in range(50)]
    pq.write_table(pa.Table.from_pylist(cells), tmp_path / "q.parquet", row_group_size=50)
    size = pq.read_metadata(tmp_path / "q.parquet").row_group(0).total_byte_size
    monkeypatch.setattr(dataset, "LARGE_GROUP", size - 1)
    monkeypatch.setattr(dataset, "PART", size // 7)
    stream = dataset.QuestionStream(QuestionsConfig([str(tmp_path)]))
    found = [one.id for one in islice(stream, 50)]
    assert sorted(found, key=int) == [str(number) for number in range(50)] != found
    again = dataset.QuestionStream(QuestionsConfig([str(tmp_path / "*.parquet")]))
    again.restore(dataset.Cursor(0, 23))
    assert [one.id for one in islice(again, 27)] == found[23:]


def test_damaged_row_group_of_training_data_costs_its_rows(tmp_path: Path) -> None:
    from ergo_rl.episodes.config import QuestionsConfig
    from ergo_rl.questions.dataset import QuestionStream

    cells = [{**GOOD, "id": str(number), "text": f"q{number}?", "image": PNG} for number in range(30)]
    path = tmp_path / "q.parquet"
    pq.write_table(pa.Table.from_pylist(cells), path, row_group_size=10, compression="none", use_dictionary=False)
    place = pq.read_metadata(path).row_group(1).column(4).data_page_offset
    content = bytearray(path.read_bytes())
    struct.pack_into("<Q", content, place, 2**64 - 1)
    path.write_bytes(content)
    stream = QuestionStream(QuestionsConfig([str(path)], shuffle=False))
    found = []
    while stream.cursor.position < 30:
        found.append(next(stream).id)
    assert found == [str(number) for number in (*range(10), *range(20, 30))] and stream.skipped == {"row group": 10}


def test_training_file_with_a_column_twice_is_refused_by_its_name(tmp_path: Path) -> None:
    plain = pa.table({"id": ["a"], "text": ["Which?"], "answer": ["red"], "image": [PNG], "options": [["red", "blue"]]})
    for name in plain.column_names:
        path = tmp_path / f"{name}.parquet"
        pq.write_table(plain.append_column(name, plain.column(name)), path)
        with pytest.raises(image_store.DatasetError, match=rf"{name}\.parquet has several columns '{name}'"):
            QuestionStream(QuestionsConfig([str(path)]))


def test_picture_that_several_rows_share_is_written_once(tmp_path: Path) -> None:
    """As HR-Bench has each of its pictures four times."""
    noise = io.BytesIO()
    Image.frombytes("RGB", (200, 200), random.Random(0).randbytes(120_000)).save(noise, "PNG")
    put(tmp_path / "a.png", noise.getvalue())
    assert converted(tmp_path, jsonl(tmp_path / "rows.jsonl", [GOOD] * 4)).written == 4
    assert 120_000 < (tmp_path / "out" / "q.parquet").stat().st_size < 140_000
