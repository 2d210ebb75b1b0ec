"""Files out of a wheel on the package index, without the hundreds of megabytes around them: a wheel is a zip file,
whose directory is at its end, and indexes answer HTTP ranges."""

from __future__ import annotations

import io
import json
import os
import re
import ssl
import subprocess
import sys
import zipfile
from functools import cached_property
from pathlib import Path
from urllib.parse import urljoin
from urllib.request import Request, urlopen

from packaging.tags import sys_tags
from packaging.utils import parse_wheel_filename

from tests.conftest import ROOT

CACHE = ROOT / "build" / "wheels"
TIMEOUT_S = 20.0
BLOCK = 1 << 18


class WheelSources:
    """The text of files of one wheel. What was read once is in ``build/wheels``. Every method raises OSError where the
    index cannot be reached."""

    def __init__(self, package: str, version: str) -> None:
        self._package, self._version = package, version
        self._folder = CACHE / f"{package}-{version}"

    @cached_property
    def sums(self) -> dict[str, int]:
        """The CRC-32 of each file, by its path inside the wheel."""
        kept = self._folder / "sums.json"
        if not kept.exists():
            found = {entry.filename: entry.CRC for entry in self._zip.infolist()}
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(found))
        sums: dict[str, int] = json.loads(kept.read_text())
        return sums

    def read(self, path: str) -> str | None:
        """The text of a file; None where the wheel has none of this name."""
        if path not in self.sums:
            return None
        kept = self._folder / path
        if not kept.exists():
            text = self._zip.read(path)
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_bytes(text)
        return kept.read_text(encoding="utf-8")

    @cached_property
    def _zip(self) -> zipfile.ZipFile:
        return zipfile.ZipFile(io.BufferedReader(_RangeFile(_find(self._package, self._version)), BLOCK))


class _RangeFile(io.RawIOBase):
    """A file behind a URL, read in HTTP ranges."""

    def __init__(self, url: str) -> None:
        self._url, self._at = url, 0
        with _open(url, {"Range": "bytes=0-0"}) as answer:
            if answer.status != 206:
                raise OSError("the index answers no HTTP ranges")
            self._size = int(answer.headers["Content-Range"].rpartition("/")[2])

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        last = min(self._at + len(buffer), self._size) - 1
        if last < self._at:
            return 0
        with _open(self._url, {"Range": f"bytes={self._at}-{last}"}) as answer:
            data = answer.read()
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def _find(package: str, version: str) -> str:
    """The URL of the wheel for this machine. Raises OSError where the index has none."""
    page = f"{_index().rstrip('/')}/{package}/"
    with _open(page, {"Accept": "application/vnd.pypi.simple.v1+json, text/html;q=0.5"}) as answer:
        text = answer.read().decode()
        urls = [file["url"] for file in json.loads(text)["files"]] if text.startswith("{") else []
    tags = set(sys_tags())
    for url in urls or re.findall(r'href="([^"#]+)', text):
        name = url.rpartition("/")[2]
        if name.startswith(f"{package}-{version}-") and name.endswith(".whl") and parse_wheel_filename(name)[3] & tags:
            return urljoin(page, url)
    raise OSError(f"the index has no wheel of {package} {version} for this machine")


def _index() -> str:
    """The index that pip is configured to use."""
    if url := os.environ.get("PIP_INDEX_URL"):
        return url
    asked = subprocess.run([sys.executable, "-m", "pip", "config", "get", "global.index-url"], capture_output=True)
    if asked.returncode == 0:
        return asked.stdout.decode().strip()
    # Its default, which it tells nobody; in another process, because pip's import of distutils breaks setuptools' here.
    code = "from pip._internal.models.index import PyPI; print(PyPI.simple_url)"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def _open(url: str, headers: dict[str, str]) -> io.BufferedReader:
    trust = ssl.create_default_context(cafile=os.environ.get("PIP_CERT"))
    return urlopen(Request(url, headers=headers), timeout=TIMEOUT_S, context=trust)  # type: ignore[no-any-return]


class InstalledSources:
    """The same of an installed package, which is not imported."""

    def __init__(self, package: str) -> None:
        from importlib.util import find_spec

        spec = find_spec(package)
        assert spec is not None and spec.origin is not None
        self.root = Path(spec.origin).parent.parent

    def read(self, path: str) -> str | None:
        file = self.root / path
        return file.read_text(encoding="utf-8") if file.is_file() else None
