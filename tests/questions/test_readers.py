"""Rows of every kind of file with any strings in them, what is broken named and the rest read; images by name out of
folders, zips and tars."""

from __future__ import annotations

import csv
import io
import json
import math
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ergo_rl.questions import readers
from ergo_rl.questions.dataset import DatasetError
from ergo_rl.questions.image_store import ImageNotFound, open_image_store
from ergo_rl.questions.readers import Broken, Record, read_records

values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.text(max_size=60),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
rows = st.lists(st.dictionaries(st.text(max_size=8), values, max_size=4), max_size=6)


def cells_of(path: Path) -> list[dict[str, Any]]:
    found = list(read_records(path))
    assert all(isinstance(record, Record) for record in found), found
    assert all(0 < record.done <= 1 for record in found)
    return [record.cells for record in found if isinstance(record, Record)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rows")


@settings(max_examples=30)
@given(rows=rows, ascii_only=st.booleans())
def test_jsonl_rows_are_read_back(folder: Path, rows: list[dict[str, Any]], ascii_only: bool) -> None:
    path = folder / "a.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows), encoding="utf-8")
    assert cells_of(path) == rows


@settings(max_examples=50)
@given(rows=rows, indent=st.sampled_from([None, 0, 3]), ascii_only=st.booleans(), chunk=st.integers(1, 40))
def test_json_list_is_read_back_in_chunks_of_any_size(
    folder: Path, rows: list[dict[str, Any]], indent: int | None, ascii_only: bool, chunk: int
) -> None:
    path, before = folder / "a.json", readers.CHUNK
    path.write_text(json.dumps(rows, indent=indent, ensure_ascii=ascii_only), encoding="utf-8")
    readers.CHUNK = chunk
    try:
        assert cells_of(path) == rows
    finally:
        readers.CHUNK = before


def test_json_numbers_that_python_writes_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"a": float("nan")}, {"a": 2**70}]))
    first, second = cells_of(tmp_path / "a.json")
    assert math.isnan(first["a"]) and second == {"a": 2**70}


@settings(max_examples=30)
@given(
    table=st.lists(
        st.lists(st.text(st.characters(exclude_characters="\r\n\0", exclude_categories=("Cs",)), max_size=20),
                 min_size=2, max_size=2), max_size=6),
    kind=st.sampled_from([("a.tsv", "\t"), ("a.csv", ",")]),
)  # fmt: skip
def test_tables_are_read_back(folder: Path, table: list[list[str]], kind: tuple[str, str]) -> None:
    path = folder / kind[0]
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=kind[1]).writerows([["one", "two\nlines"], *table])
    assert cells_of(path) == [dict(zip(["one", "two\nlines"], cells, strict=True)) for cells in table]


def test_table_image_is_shared_by_the_index_of_its_row(tmp_path: Path) -> None:
    path, image = tmp_path / "a.tsv", "/9j/" + "A" * 300_000  # more than csv takes in one cell by default
    other = "/9j/" + "B" * 100
    lines = [f"7\t{image}\tx", "8\t7\ty", f'9\t{other}\t"two\nlines"', "10\t9\tz", "11\t12\tw", "12\t7\tv"]
    path.write_text("index\timage\tquestion\n" + "\n".join(lines), encoding="utf-8")
    found = list(read_records(path))
    images = [record.cells["image"] if isinstance(record, Record) else record.reason for record in found]
    assert images == [image, image, other, other, "shares an image that is not before it: of row 12", image]
    assert isinstance(found[3], Record) and found[3].cells["question"] == "z" and found[-1].done == 1.0


def test_parquet_rows_are_read_in_order(tmp_path: Path) -> None:
    table = pa.table({"n": list(range(20)), "image": [{"bytes": b"x", "path": None}] * 20})
    pq.write_table(table, tmp_path / "a.parquet")
    assert cells_of(tmp_path / "a.parquet")[19] == {"n": 19, "image": {"bytes": b"x", "path": None}}


def test_broken_rows_are_named_and_the_others_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\n\n[1]\n{"a": \n\xff\xfe\n{"a": 2}')
    found = list(read_records(tmp_path / "a.jsonl"))
    assert [record.number for record in found] == [1, 3, 4, 5, 6]
    assert [isinstance(record, Broken) for record in found] == [False, True, True, True, False]
    assert isinstance(found[1], Broken) and found[1].reason == "should be an object: is list"
    (tmp_path / "a.csv").write_text("a,b\n1,2\n3\n4,5\n")
    short = list(read_records(tmp_path / "a.csv"))
    assert isinstance(short[1], Broken) and short[1].reason == "has not one cell for each column: 1 for 2"
    assert isinstance(short[2], Record) and short[2].cells == {"a": "4", "b": "5"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.xml", b"<a/>", "from .jsonl, .json, .tsv, .csv, .parquet files only"),
        ("a.json", b'"a"', "is no list of objects"),
        ("a.parquet", b"PAR1 no", "is not a readable Parquet file"),
        ("a.csv", b"a,b,a\n1,2,3\n", "has several columns 'a'"),
    ],
)
def test_read_records_refuses_unreadable_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DatasetError, match=message):
        list(read_records(tmp_path / name))
    with pytest.raises(DatasetError, match="there is no file"):
        read_records(tmp_path / "none.jsonl")


# --- images ----------------------------------------------------------------------------------------------------------

MEMBERS = {"data/a/one.png": b"one of a", "data/b/one.png": b"one of b", "data/b/two.png": b"two"}


def make_tar(path: Path, mode: str) -> None:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, content in MEMBERS.items():
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def place(folder: Path, kind: str) -> Path:
    path = folder / f"images.{kind}"
    if kind == "folder":
        for name, content in MEMBERS.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(content)
    elif kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in MEMBERS.items():
                archive.writestr(name, content)
    else:
        make_tar(path, {"tar.gz": "w:gz", "tgz": "w:gz", "tar.bz2": "w:bz2", "tar.xz": "w:xz"}.get(kind, "w"))
    return path


@pytest.mark.parametrize("kind", ["folder", "zip", "tar", "tar.gz", "tar.bz2", "tar.xz", "tgz"])
def test_image_store_finds_images_by_name(tmp_path: Path, kind: str) -> None:
    path = place(tmp_path, kind)
    with open_image_store([path], tmp_path) as store:
        for name, content in MEMBERS.items():
            assert store(name) == content
        with pytest.raises(ImageNotFound, match=r"no 'data/c/one\.png' in .*images"):
            store("data/c/one.png")
        if kind != "folder":
            assert store("b/one.png") == b"one of b", "the archive has a folder more"
            assert store("all/data/b/two.png") == b"two", "the row has a folder more"
            with pytest.raises(ImageNotFound):
                store("one.png")  # of which there are two
        for name in ("../images.zip", "/etc/passwd", "data\\..\\..\\x", ""):
            with pytest.raises(ImageNotFound, match="leaves its folder"):
                store(name)
    assert sorted(path.name for path in tmp_path.iterdir()) == [path.name], "what was unpacked is gone"


def test_image_store_writes_tar_members_nowhere_but_to_scratch(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "images.tar.gz", "w:gz") as archive:
        for name in ("../evil.png", "good.png"):
            member = tarfile.TarInfo(name)
            member.size = 4
            archive.addfile(member, io.BytesIO(b"data"))
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    aside = tmp_path / "aside"
    aside.mkdir()
    with open_image_store([tmp_path / "images.tar.gz"], aside) as store:
        assert store("good.png") == b"data"
        with pytest.raises(ImageNotFound):
            store("link.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["aside", "images.tar.gz"]


def test_image_store_names_an_archive_member_that_is_damaged(tmp_path: Path) -> None:
    path = place(tmp_path, "zip")
    content = path.read_bytes()
    path.write_bytes(content.replace(b"one of b", b"ONE of b"))  # its checksum is wrong now
    with open_image_store([path], tmp_path) as store:
        assert store("data/a/one.png") == b"one of a"
        with pytest.raises(ImageNotFound, match=r"cannot be read: 'data/b/one\.png' in .*: BadZipFile: Bad CRC-32"):
            store("data/b/one.png")


def test_image_store_follows_no_link_out_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").symlink_to(tmp_path / "secret")
    with open_image_store([tmp_path / "images"], tmp_path) as store, pytest.raises(ImageNotFound):
        store("a.png")


@pytest.mark.parametrize("name", ["x" * 5_000, "a/" * 3_000 + "b", "a\0b", "loop"])
def test_image_store_does_not_find_impossible_names(tmp_path: Path, name: str) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with open_image_store([tmp_path], tmp_path) as store, pytest.raises(ImageNotFound):
        store(name)


def test_image_store_searches_places_in_order(tmp_path: Path) -> None:
    first = tmp_path / "first"
    first.mkdir()
    (first / "two.png").write_bytes(b"another two")
    with open_image_store([first, place(tmp_path, "zip")], tmp_path) as store:
        assert (store("two.png"), store("data/a/one.png")) == (b"another two", b"one of a")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [("none.zip", None, "there is no folder or archive"), ("part_00", b"part" * 200, "must be put together first"),
     ("a.tar", b"no tar" * 200, "cannot be read")],
)  # fmt: skip
def test_open_image_store_refuses_other_files(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DatasetError, match=message), open_image_store([tmp_path / name], tmp_path):
        pass
