"""Install ergo-rl from the parts beside this file into a virtual environment, without a network.

    python3 install.py ergo-rl-venv            # then: ergo-rl-venv/bin/ergo-rl --help
    python3 install.py --wheels wheels         # only put the wheels together, for pip in an environment of your own

Checks every part first and names those to copy again. Standard library only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, NoReturn

BUNDLE = Path(__file__).resolve().parent
BLOCK = 1 << 20
# Optional for vLLM and transformers, which only ask whether they are installed and then fail on a broken one.
OPTIONAL = ("torchaudio", "torchcodec")
HOOK = "import ergo_rl_torchvision; ergo_rl_torchvision.repair_torchvision()\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("venv", nargs="?", type=Path, help="folder of the environment; made where it does not exist")
    where.add_argument("--wheels", type=Path, metavar="DIR", help="put the wheels into this folder, install nothing")
    arguments = parser.parse_args()
    parts = check(BUNDLE)
    about = json.loads((BUNDLE / "bundle.json").read_text(encoding="utf-8"))
    try:
        if arguments.wheels:
            print(f"{unpack(parts, arguments.wheels)} wheels are in {arguments.wheels}. With pip there: "
                  f"pip install --no-index --find-links {arguments.wheels} '{about['requirement']}'")  # fmt: skip
            return 0
        check_python(about)
        check_venv(arguments.venv)
        arguments.venv.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=arguments.venv.parent, prefix="ergo-rl-wheels-") as folder:
            install(arguments.venv, parts, Path(folder), about["requirement"])
    except (OSError, tarfile.TarError) as error:
        stop(f"Installing failed: {error}.", "Mend that (free some space?), then run the same command again.")
    print(f"{about['requirement']} is in {arguments.venv}. Try: {arguments.venv / 'bin' / 'ergo-rl'} --help")
    return 0


def check(bundle: Path) -> list[Path]:
    """The parts in their order. Ends the program where one is missing or is not what SHA256SUMS says."""
    try:
        lines = (bundle / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        stop(f"SHA256SUMS cannot be read: {error}.", f"Copy it again into {bundle}.")
    sums: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        entry = re.fullmatch(r"([0-9a-f]{64})  (part-\d{3,}-of-\d{3,}|bundle\.json|install\.py)", line)
        if entry is None:
            stop(f"SHA256SUMS is damaged: line {number} is no checksum of a part.", f"Copy it again into {bundle}.")
        sums[entry[2]] = entry[1]
    names = [name for name in sums if name.startswith("part-")]
    count = int(names[0].rpartition("-")[2]) if names else 0
    expected = [f"part-{number:03d}-of-{count:03d}" for number in range(1, count + 1)]
    if not names or names != expected or not {"bundle.json", "install.py"} <= sums.keys():
        stop("SHA256SUMS is damaged: lines are missing.", f"Copy it again into {bundle}.")
    print(f"Checking {count} part{'s' * (count > 1)} ...", flush=True)
    wrong = [f"{name} {trouble}" for name, wanted in sums.items() if (trouble := trouble_of(bundle / name, wanted))]
    if wrong:
        stop("These files of the bundle are not what was made:\n  " + "\n  ".join(wrong),
             f"Copy them again into {bundle}, then run the same command.")  # fmt: skip
    return [bundle / name for name in names]


def trouble_of(path: Path, wanted: str) -> str:
    found = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(BLOCK):
                found.update(block)
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
    return "" if found.hexdigest() == wanted else "is damaged (its SHA-256 differs)"


def check_python(about: dict[str, str]) -> None:
    here = {"python": f"{sys.version_info.major}.{sys.version_info.minor}", "platform": sysconfig.get_platform()}
    if any(about[key] != here[key] for key in here):
        stop(
            f"This bundle is for Python {about['python']} on {about['platform']}; "
            f"{sys.executable} is Python {here['python']} on {here['platform']}.",
            f"Run it with python{about['python']}, or make a bundle with the Python that is here.",
        )


def check_venv(venv: Path) -> None:
    if venv.exists() and not (venv / "pyvenv.cfg").exists():
        stop(f"{venv} exists and is no virtual environment.", "Name another folder, or remove it.")


class Joined:
    """The parts as one file to read from."""

    def __init__(self, parts: Sequence[Path]) -> None:
        self._blocks = self._read(parts)

    def read(self, size: int) -> bytes:
        return next(self._blocks, b"")

    def _read(self, parts: Sequence[Path]) -> Iterator[bytes]:
        for path in parts:
            with path.open("rb") as file:
                while block := file.read(BLOCK):
                    yield block


def unpack(parts: Sequence[Path], wheels: Path) -> int:
    """Writes the wheels of the parts; returns how many there are."""
    wheels.mkdir(parents=True, exist_ok=True)
    count = 0
    with tarfile.open(fileobj=Joined(parts), mode="r|", bufsize=BLOCK) as tar:  # type: ignore[call-overload]
        for entry in tar:
            source: IO[bytes] | None = tar.extractfile(entry)
            if source is None or not re.fullmatch(r"[\w.!+-]+\.whl", entry.name):
                stop(f"The bundle holds {entry.name!r}, which is no wheel.", "It was not made by offline_bundle.py.")
            with (wheels / entry.name).open("wb") as file:
                shutil.copyfileobj(source, file, BLOCK)
            count += 1
    return count


def install(venv: Path, parts: Sequence[Path], wheels: Path, requirement: str) -> None:
    print(f"Installing {unpack(parts, wheels)} wheels into {venv} ...", flush=True)
    python = venv / "bin" / "python"
    if not python.exists():  # without pip: a Linux distribution may leave ensurepip out, and the bundle has its own
        run([sys.executable, "-m", "venv", "--without-pip", str(venv)], "The virtual environment could not be made")
    (pip,) = wheels.glob("pip-*.whl")
    find = ["--no-index", "--find-links", str(wheels), "--no-input", "--disable-pip-version-check", "--quiet"]
    run([str(python), "-I", str(pip / "pip"), "--isolated", "install", *find, "pip", requirement], "pip failed")
    repair(python)


def repair(python: Path) -> None:
    """As the set-up does: remove or mend what an index only has as a build for another torch."""
    for package in filter(lambda package: is_broken(python, package), OPTIONAL):
        run(
            [str(python), "-m", "pip", "--isolated", "uninstall", "--yes", "--quiet", package],
            "pip could not remove it",
        )
    if is_broken(python, "torchvision"):
        (packages,) = python.parent.parent.glob("lib/python*/site-packages")
        source = packages / "ergo_rl" / "cluster" / "torchvision_repair.py"
        shutil.copyfile(source, packages / "ergo_rl_torchvision.py")
        (packages / "ergo_rl_torchvision.pth").write_text(HOOK, encoding="utf-8")


def is_broken(python: Path, package: str) -> bool:
    """Whether it is installed and cannot be imported."""
    code = f"import importlib.util; importlib.util.find_spec('{package}') and __import__('{package}')"
    return subprocess.run([python, "-I", "-c", code], capture_output=True).returncode != 0


def run(command: Sequence[str], failed: str) -> None:
    if status := subprocess.run(command).returncode:
        stop(f"{failed} (status {status}); what it said is above.", "Mend that, then run the same command again.")


def stop(what: str, remedy: str) -> NoReturn:
    print(f"\n{what}\n{remedy}", file=sys.stderr)
    sys.exit(1)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\nInterrupted. Run the same command again.", file=sys.stderr)
        sys.exit(130)
