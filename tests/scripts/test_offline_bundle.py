"""A bundle of a tiny wheel of the project's name and of pip: made, carried, damaged, installed without a network."""

from __future__ import annotations

import ensurepip
import hashlib
import random
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT

PART = 10**6
CANNOT_CONNECT = ["unshare", "--user", "--map-root-user", "--net"]
"""No network is there at all in what this starts."""


def without_network() -> list[str]:
    works = shutil.which("unshare") and not subprocess.run([*CANNOT_CONNECT, "true"], capture_output=True).returncode
    return CANNOT_CONNECT if works else []


def write_wheel(folder: Path, name: str, version: str, files: dict[str, bytes], metadata: str = "") -> None:
    info = f"{name}-{version}.dist-info"
    files = files | {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{metadata}".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"]).encode()
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        for path, text in files.items():
            wheel.writestr(path, text)


def make(wheels: Path, out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "scripts/offline_bundle.py", "cpu", "--out", str(out), "--part-mb", "1", *options]
    return subprocess.run([*command, "--wheels", str(wheels)], cwd=ROOT, capture_output=True, text=True, timeout=60)


def install(bundle: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [*without_network(), sys.executable, str(bundle / "install.py"), *words]
    done = subprocess.run(command, cwd=bundle.parent, capture_output=True, text=True, timeout=60)
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's extra needs one other wheel; that has a torchvision which cannot be imported, and 3 MB."""
    folder = tmp_path_factory.mktemp("wheels")
    extra = "Provides-Extra: cpu\nRequires-Dist: needed; extra == 'cpu'\n"
    repair = (
        b"def repair_torchvision():\n    import sys, types\n    sys.modules['torchvision'] = types.ModuleType('x')\n"
    )
    own = {"ergo_rl/__init__.py": b"answer = 42\n", "ergo_rl/cluster/torchvision_repair.py": repair}
    write_wheel(folder, "ergo_rl", "9.1", own, extra)
    broken = {"torchvision.py": b"raise RuntimeError\n", "torchcodec.py": b"raise OSError\n"}
    needed = {"needed.bin": random.Random(0).randbytes(3 * PART), "torchvision.py": broken["torchvision.py"]}
    write_wheel(folder, "needed", "1.0", needed, "Requires-Dist: torchcodec\n")
    write_wheel(folder, "torchcodec", "1.0", {"torchcodec.py": broken["torchcodec.py"]})
    (pip,) = (Path(ensurepip.__file__).parent / "_bundled").glob("pip-*.whl")
    shutil.copy(pip, folder)
    return folder


@pytest.fixture(scope="module")
def made(wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "bundle"
    done = make(wheels, out)
    assert done.returncode == 0, done.stderr
    assert list(out.parent.iterdir()) == [out], "nothing else is left"
    return out


@pytest.fixture
def bundle(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "bundle")


def parts(bundle: Path) -> list[Path]:
    return sorted(bundle.glob("part-*"))


def test_bundle_when_made_then_parts_have_the_size_and_the_sums_that_it_says(made: Path, wheels: Path) -> None:
    sizes = [path.stat().st_size for path in parts(made)]
    assert set(sizes[:-1]) == {PART} and 0 < sizes[-1] <= PART
    assert sum(sizes) > sum(path.stat().st_size for path in wheels.iterdir()) > 3 * PART
    assert [path.name for path in parts(made)] == [
        f"part-{n:03d}-of-{len(sizes):03d}" for n in range(1, 1 + len(sizes))
    ]
    said = [line.split("  ") for line in (made / "SHA256SUMS").read_text().splitlines()]
    assert {name for _, name in said} == {path.name for path in made.iterdir()} - {"SHA256SUMS"}
    assert all(hashlib.sha256((made / name).read_bytes()).hexdigest() == digest for digest, name in said)


def test_bundle_when_made_again_then_the_bytes_are_the_same_and_the_first_is_not_overwritten(
    made: Path, wheels: Path, tmp_path: Path
) -> None:
    assert make(wheels, tmp_path / "again").returncode == 0
    assert (tmp_path / "again" / "SHA256SUMS").read_bytes() == (made / "SHA256SUMS").read_bytes()
    refused = make(wheels, made)
    assert refused.returncode == 1 and f"{made} exists already" in refused.stderr


def test_wheels_when_joined_then_they_are_those_that_went_in(bundle: Path, wheels: Path, tmp_path: Path) -> None:
    done = install(bundle, "--wheels", str(tmp_path / "joined"))
    assert done.returncode == 0 and "'ergo-rl[cpu]==9.1'" in done.stdout
    joined = {path.name: path.read_bytes() for path in (tmp_path / "joined").iterdir()}
    assert joined == {path.name: path.read_bytes() for path in wheels.iterdir()}


def test_bundle_when_installed_without_a_network_then_the_extra_imports(bundle: Path, tmp_path: Path) -> None:
    """What does not import is removed or mended, as by the set-up."""
    done = install(bundle, str(tmp_path / "venv"))
    assert done.returncode == 0, done.stderr
    code = "import ergo_rl, torchvision, importlib.util as u; print(ergo_rl.answer, u.find_spec('torchcodec'))"
    asked = [str(tmp_path / "venv" / "bin" / "python"), "-I", "-c", code]
    assert subprocess.run(asked, capture_output=True, text=True, timeout=60).stdout == "42 None\n"
    assert {path.name for path in tmp_path.iterdir()} == {"bundle", "venv"}, "no wheels are left"


def test_parts_when_missing_or_damaged_then_each_is_named_and_nothing_is_installed(
    bundle: Path, tmp_path: Path
) -> None:
    first, second, third, *_ = parts(bundle)
    first.unlink()
    data = bytearray(second.read_bytes())
    data[PART // 2] ^= 1
    second.write_bytes(data)
    third.write_bytes(third.read_bytes()[:-1])
    (bundle / "bundle.json").write_text("{}")
    done = install(bundle, str(tmp_path / "venv"))
    assert done.returncode == 1 and "Copy them again" in done.stderr
    assert [line.strip() for line in done.stderr.splitlines() if line.startswith("  ")] == [
        f"{first.name} is missing",
        f"{second.name} is damaged (its SHA-256 differs)",
        f"{third.name} is damaged (its SHA-256 differs)",
        "bundle.json is damaged (its SHA-256 differs)",
    ]
    assert not (tmp_path / "venv").exists()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda lines: lines[1:], "lines are missing"),
        (lambda lines: [lines[0], *lines[2:]], "lines are missing"),
        (lambda lines: [line for line in lines if not line.endswith("install.py")], "lines are missing"),
        (lambda lines: [], "lines are missing"),
        (lambda lines: [lines[0][:70], *lines[1:]], "line 1 is no checksum of a part"),
        (lambda lines: [f"{'0' * 64}  ../../etc/passwd", *lines], "line 1 is no checksum of a part"),
        (lambda lines: ["<html>not found</html>"], "line 1 is no checksum of a part"),
    ],
)
def test_sums_when_damaged_then_the_bundle_is_refused(damage: object, said: str, bundle: Path) -> None:
    sums = bundle / "SHA256SUMS"
    sums.write_text("\n".join(damage(sums.read_text().splitlines())))  # type: ignore[operator]
    done = install(bundle, "venv")
    assert done.returncode == 1 and f"SHA256SUMS is damaged: {said}" in done.stderr


def test_installer_when_the_folder_is_something_else_then_it_is_left_alone(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    done = install(bundle, str(tmp_path / "mine"))
    assert done.returncode == 1 and "exists and is no virtual environment" in done.stderr
    assert not list((tmp_path / "mine").iterdir())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--part-mb", "0"), "--part-mb is 0; it must be at least 1"),
        ((), "has 0 wheels of ergo-rl; a bundle needs one"),
    ],
)
def test_maker_when_it_cannot_make_a_bundle_then_it_says_why(
    options: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    done = make(tmp_path, tmp_path / "out", *options)
    assert done.returncode in (1, 2) and said in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
