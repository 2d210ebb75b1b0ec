"""What the set-up makes of the machine's nvidia-smi, whatever that says. It is a script on PATH: no GPU is needed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scripts import setup_env

Script = Callable[[str], None]
H100 = "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)"


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Script:
    """Puts a shell script of that name before everything else on PATH."""

    def write(body: str) -> None:
        script = tmp_path / "nvidia-smi"
        script.write_text(f"#!/bin/sh\n{body}\n")
        script.chmod(0o755)

    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(setup_env, "PROBE_S", 0.3)
    return write


def card(driver: str) -> str:
    return f'case "$*" in *driver_version*) echo "{driver}"; echo "{driver}";; *) echo "{H100}";; esac'


@pytest.mark.parametrize("driver", ["580.65.06", "590.44", "1000.1"])
def test_driver_that_is_new_enough_is_taken(driver: str, nvidia_smi: Script) -> None:
    nvidia_smi(card(driver))
    assert setup_env.choose_device("auto") == ("gpu", "nvidia-smi lists a GPU; DEVICE=cpu overrides")
    setup_env.check_driver()


@pytest.mark.parametrize("driver", ["579.99", "550.54.15", "535.183.01", "470.42.01"])
def test_driver_that_is_too_old_is_refused_with_both_versions(
    driver: str, nvidia_smi: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    nvidia_smi(card(driver))
    with pytest.raises(SystemExit) as ended:
        setup_env.check_machine("gpu")
    said = capsys.readouterr().err
    assert ended.value.code == 1 and f"driver here is {driver}; CUDA 13" in said and "needs 580 or newer" in said
    assert "DEVICE=cpu" in said


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("echo 'No devices were found'; exit 6", "fails with status 6: 'No devices were found'"),
        ("echo 'NVIDIA-SMI has failed because' >&2; exit 9", "fails with status 9: 'NVIDIA-SMI has failed because'"),
        ("exit 255", "fails with status 255: ''"),
        ("kill -9 $$", "fails with status -9: ''"),
        ("sleep 600", "does not end within 0.3 s"),
        ("sleep 600 & wait", "does not end within 0.3 s"),
        ("exec >&-; sleep 600", "does not end within 0.3 s"),
        ("yes GPU", "does not end within 0.3 s"),
        ("head -c 3000 /dev/urandom", "lists no GPU"),
        ("printf '\\377\\376\\000[/red]%%s'", "lists no GPU"),
        ("true", "lists no GPU"),
    ],
)
def test_broken_nvidia_smi_means_a_cpu_with_the_reason(body: str, reason: str, nvidia_smi: Script) -> None:
    nvidia_smi(body)
    began = time.monotonic()
    assert setup_env.choose_device("auto") == ("cpu", f"nvidia-smi is here but {reason}; DEVICE=gpu overrides")
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("answer", "trouble"),
    [
        ("echo N/A", "says 'N/A'"),
        ("echo 0x24455; echo '[Unknown Error]'", "says '0x24455'"),
        ("sleep 600", "does not end within 0.3 s"),
        ("echo lost >&2; exit 15", "fails with status 15: 'lost'"),
        ("true", "says ''"),
    ],
)
def test_unknown_driver_is_said_and_does_not_stop_the_set_up(
    answer: str, trouble: str, nvidia_smi: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    nvidia_smi(f'case "$*" in *driver_version*) {answer};; *) echo "{H100}";; esac')
    setup_env.check_driver()
    assert f"nvidia-smi {trouble}: the NVIDIA driver is not checked" in capsys.readouterr().out


@given(st.text() | st.from_regex(r"[0-9.\n ]{0,20}"))
def test_any_text_gives_a_version_or_none(text: str) -> None:
    found = setup_env.driver_in(text)
    assert found == "" or (found in text and int(found.partition(".")[0]) >= 0)


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("580.65.06\n580.65.06\n", "580.65.06"),
        (" 550.54 \r\n", "550.54"),
        ("Warning: persistence mode is off\n590.44\n", "590.44"),
        ("580", ""),
        ("CUDA 13.0", ""),
        ("٥٨٠.65", ""),  # other digits
    ],
)
def test_version_is_a_line_of_its_own(text: str, version: str) -> None:
    assert setup_env.driver_in(text) == version


def test_what_is_not_a_program_means_a_cpu(nvidia_smi: Script, tmp_path: Path) -> None:
    (tmp_path / "nvidia-smi").write_bytes(b"\x00\x01")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert setup_env.choose_device("auto")[0] == "cpu"


def test_set_up_with_an_old_driver_installs_nothing(nvidia_smi: Script, tmp_path: Path) -> None:
    """The script as ``make`` calls it."""
    nvidia_smi(card("550.54.15"))
    venv = tmp_path / "venv"
    ended = subprocess.run(
        [sys.executable, setup_env.__file__], capture_output=True, text=True, timeout=60,
        env=os.environ | {"ERGO_RL_VENV": str(venv)},
    )  # fmt: skip
    assert ended.returncode == 1 and "550.54.15" in ended.stderr and "580" in ended.stderr
    assert "Traceback" not in ended.stderr and not venv.exists()
