"""Environments as users have them: this one's dependencies, and the project as a wheel, or not installed at all."""

from __future__ import annotations

import atexit
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
from functools import cache
from pathlib import Path

from tests.conftest import ROOT


def dependencies_only(folder: Path) -> Path:
    """Make a virtual environment that has this one's packages without this project; returns its interpreter."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=120)
    packages = Path(sysconfig.get_path("purelib"))
    lines = [str(packages)]  # a path added like this has its .pth files left unread: no editable install
    if (packages / "ergo_rl_torchvision.pth").exists():
        lines.append((packages / "ergo_rl_torchvision.pth").read_text(encoding="utf-8"))
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text("\n".join(lines), encoding="utf-8")
    return folder / "bin" / "python"


def build_wheel() -> Path:
    """The wheel, built once, from the tracked files alone, as a release does."""
    with _BUILDING:
        return _built_wheel()


_BUILDING = threading.Lock()


@cache
def _built_wheel() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="ergo-rl-wheel-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    source = folder / "source"
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, tracked.split("\0")):
        if (ROOT / name).exists() or (ROOT / name).is_symlink():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, source / name, follow_symlinks=False)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", str(folder), str(source)], check=True, timeout=300)
    (wheel,) = folder.glob("*.whl")
    return wheel


def install(python: Path, wheel: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*pip, str(wheel)], check=True, timeout=120)
