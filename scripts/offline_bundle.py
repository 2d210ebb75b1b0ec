"""Make a bundle that installs ergo-rl where there is no package index: wheels of everything pinned, in parts.

    make setup DEVICE=cpu                                # pip of .venv fetches and builds; no GPU is needed for `gpu`
    .venv/bin/python scripts/offline_bundle.py gpu       # build/offline-gpu: parts, SHA256SUMS, install.py
    python3 install.py ergo-rl-venv                      # there, beside the parts

The bundle is for the Python version and the platform of .venv. Standard library only, as the set-up.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from pathlib import Path
from typing import IO

import setup_env
from setup_env import ROOT, stop

INSTALLER = ROOT / "scripts" / "offline_install.py"
MB = 10**6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("device", choices=("cpu", "gpu"), help="which engine: the extra of pyproject.toml")
    parser.add_argument("--dev", action="store_true", help="also the tools of `make test` and `make lint`")
    parser.add_argument("--out", type=Path, metavar="DIR", help="a new folder; default build/offline-DEVICE")
    parser.add_argument(
        "--part-mb", type=int, default=1900, metavar="N", help="largest part, 10^6 bytes (default 1900)"
    )
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="take the wheels that are here, fetch nothing")
    arguments = parser.parse_args()
    out = arguments.out or ROOT / "build" / f"offline-{arguments.device}"
    if arguments.part_mb < 1:
        parser.error(f"--part-mb is {arguments.part_mb}; it must be at least 1")
    if out.exists():
        stop(f"{out} exists already.", "Remove it, or name another folder with --out.")
    extras = f"{arguments.device},dev" if arguments.dev else arguments.device
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f"{out.name}-") as folder:
            work = Path(folder)
            wheels = arguments.wheels or fetch(work, arguments.device, arguments.dev, extras)
            sums = write(work / "bundle", wheels, extras, arguments.part_mb * MB)
            (work / "bundle").rename(out)
    except OSError as error:
        stop(
            f"The bundle could not be written: {error}.",
            f"Nothing is left of it. Free some space at {out.parent}, or name another folder with --out.",
        )
    size = sum((out / name).stat().st_size for name in sums)
    print(
        f"{out}: {size / MB:,.0f} MB in {len(sums) - 2} parts. Copy the folder, then: python3 install.py ergo-rl-venv"
    )
    return 0


def fetch(work: Path, device: str, dev: bool, extras: str) -> Path:
    """Wheels of everything pinned, this project's among them; what the index has as source only is built."""
    if Path(sys.prefix).resolve() != setup_env.VENV.resolve():
        stop(
            f"This Python is {sys.executable}; the bundle is made by the pip of {setup_env.VENV}, for its Python.",
            f"Run: make setup DEVICE=cpu; {setup_env.VENV_PYTHON} {' '.join(sys.argv)}",
        )
    files, wheels = setup_env.constraint_files(device, dev), work / "wheels"
    words = [word for path in files for word in ("--constraint", str(path), "--build-constraint", str(path))]
    words += setup_env.cpu_index(files[0]) if device == "cpu" else []
    wanted = f"{tracked_files(work / 'source')}[{extras}]"
    setup_env.pip(f"wheels of [{extras}]", "wheel", "--wheel-dir", str(wheels), *words, wanted, "pip", "setuptools")
    return wheels


def tracked_files(folder: Path) -> Path:
    """A copy of the project without what lies in a checkout beside it: setuptools would pack old files of build/."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        stop(f"{ROOT} is no git checkout: {setup_env.first_line(listed.stderr)}", "Clone the repository with git.")
    for name in filter(None, listed.stdout.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)
    return folder


def write(bundle: Path, wheels: Path, extras: str, part_bytes: int) -> dict[str, str]:
    """Returns the SHA-256 of every file of the bundle by its name."""
    files = sorted(wheels.glob("*.whl"))
    own = [path.name.split("-")[1] for path in files if path.name.startswith("ergo_rl-")]
    if len(own) != 1:
        stop(f"{wheels} has {len(own)} wheels of ergo-rl; a bundle needs one.", "Name a folder that pip wheel filled.")
    bundle.mkdir()
    sums = pack(files, bundle, part_bytes)
    about = {
        "requirement": f"ergo-rl[{extras}]=={own[0]}",
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "platform": sysconfig.get_platform(),
    }
    (bundle / "bundle.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(INSTALLER, bundle / "install.py")
    for name in ("bundle.json", "install.py"):
        sums[name] = hashlib.sha256((bundle / name).read_bytes()).hexdigest()
    lines = "".join(f"{digest}  {name}\n" for name, digest in sums.items())
    (bundle / "SHA256SUMS").write_text(lines, encoding="utf-8")
    return sums


def pack(files: list[Path], bundle: Path, part_bytes: int) -> dict[str, str]:
    """A tar of the files, cut into parts that say how many there are; the same files give the same bytes."""

    def plain(entry: tarfile.TarInfo) -> tarfile.TarInfo:
        entry.uid = entry.gid = entry.mtime = 0
        entry.uname = entry.gname = ""
        entry.mode = 0o644
        return entry

    with Parts(bundle, part_bytes) as parts, tarfile.open(fileobj=parts, mode="w|", bufsize=MB) as tar:  # type: ignore[call-overload]
        for path in files:
            tar.add(path, path.name, filter=plain)
    count = len(parts.sums)
    names = [f"part-{number:03d}-of-{count:03d}" for number in range(1, count + 1)]
    for number, name in enumerate(names):
        parts.path(number).rename(bundle / name)
    return dict(zip(names, parts.sums, strict=True))


class Parts:
    """A file to write to that is cut into files of ``size`` bytes."""

    def __init__(self, folder: Path, size: int) -> None:
        self._folder, self._size, self._left = folder, size, 0
        self._file: IO[bytes] | None = None
        self._sum = hashlib.sha256()
        self.sums: list[str] = []

    def __enter__(self) -> Parts:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def path(self, number: int) -> Path:
        return self._folder / f"unfinished-{number}"

    def write(self, data: bytes) -> int:
        rest = memoryview(data)
        while rest:
            if not self._left:
                self._end()
                self._file, self._left = self.path(len(self.sums)).open("wb"), self._size
            assert self._file is not None
            piece, rest = rest[: self._left], rest[self._left :]
            self._file.write(piece)
            self._sum.update(piece)
            self._left -= len(piece)
        return len(data)

    def _end(self) -> None:
        if self._file is not None:
            self._file.close()
            self.sums.append(self._sum.hexdigest())
        self._file, self._sum = None, hashlib.sha256()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\nInterrupted; nothing is left of the bundle.", file=sys.stderr)
        sys.exit(130)
