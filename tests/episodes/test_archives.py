"""Pictures out of folders, zips and tars by the names that rows give."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path

import pytest

from ergo_rl.episodes.archives import NoPicture, open_pictures
from ergo_rl.episodes.questions import DatasetError

MEMBERS = {"data/a/one.png": b"one of a", "data/b/one.png": b"one of b", "data/b/two.png": b"two"}


def make_tar(path: Path, mode: str) -> None:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, content in MEMBERS.items():
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def place(folder: Path, kind: str) -> Path:
    path = folder / f"pictures.{kind}"
    if kind == "folder":
        for name, content in MEMBERS.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(content)
    elif kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in MEMBERS.items():
                archive.writestr(name, content)
    else:
        make_tar(path, "w:gz" if kind == "tar.gz" else "w")
    return path


@pytest.mark.parametrize("kind", ["folder", "zip", "tar", "tar.gz"])
def test_by_name(tmp_path: Path, kind: str) -> None:
    path = place(tmp_path, kind)
    with open_pictures([path], tmp_path) as pictures:
        for name, content in MEMBERS.items():
            assert pictures(name) == content
        with pytest.raises(NoPicture, match=r"no 'data/c/one\.png' in .*pictures"):
            pictures("data/c/one.png")
        if kind != "folder":
            assert pictures("b/one.png") == b"one of b", "the archive has a folder more"
            assert pictures("all/data/b/two.png") == b"two", "the row has a folder more"
            with pytest.raises(NoPicture):
                pictures("one.png")  # of which there are two
        for name in ("../pictures.zip", "/etc/passwd", "data\\..\\..\\x", ""):
            with pytest.raises(NoPicture, match="leaves its folder"):
                pictures(name)
    assert sorted(one.name for one in tmp_path.iterdir()) == [path.name], "what was unpacked is gone"


def test_a_member_of_a_tar_is_written_nowhere_but_aside(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "pictures.tar.gz", "w:gz") as archive:
        for name in ("../evil.png", "good.png"):
            member = tarfile.TarInfo(name)
            member.size = 4
            archive.addfile(member, io.BytesIO(b"data"))
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    aside = tmp_path / "aside"
    aside.mkdir()
    with open_pictures([tmp_path / "pictures.tar.gz"], aside) as pictures:
        assert pictures("good.png") == b"data"
        with pytest.raises(NoPicture):
            pictures("link.png")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["aside", "pictures.tar.gz"]


def test_a_link_out_of_a_folder_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").symlink_to(tmp_path / "secret")
    with open_pictures([tmp_path / "pictures"], tmp_path) as pictures, pytest.raises(NoPicture):
        pictures("a.png")


def test_places_are_looked_through_in_their_order(tmp_path: Path) -> None:
    first = tmp_path / "first"
    first.mkdir()
    (first / "two.png").write_bytes(b"another two")
    with open_pictures([first, place(tmp_path, "zip")], tmp_path) as pictures:
        assert (pictures("two.png"), pictures("data/a/one.png")) == (b"another two", b"one of a")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [("none.zip", None, "there is no folder or archive"), ("part_00", b"part" * 200, "must be put together first"),
     ("a.tar", b"no tar" * 200, "cannot be read")],
)  # fmt: skip
def test_what_is_no_place(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DatasetError, match=message), open_pictures([tmp_path / name], tmp_path):
        pass
