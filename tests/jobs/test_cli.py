import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from ergo_rl.jobs import cli


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert listed == list(cli.COMMANDS)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Python 3.11 cannot print a default of a positional argument where options and positionals may be mixed."""
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    assert ended.value.code == 0
    assert f"usage: ergo-rl {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian", "seed=3"], "ergo-rl: unknown command `trian`; did you mean `train`?"),
        (["xyzzy"], "ergo-rl: unknown command `xyzzy`; There are: " + ", ".join(cli.COMMANDS) + "."),
    ],
)
def test_an_unknown_command_is_a_usage_error(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    assert capsys.readouterr().err.strip() == message


def test_no_command_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "usage: ergo-rl COMMAND" in capsys.readouterr().err


def test_a_command_gets_the_remaining_arguments_and_decides_the_exit_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "count_arguments.py").write_text("def main(argv: list[str]) -> int:\n    return len(argv)\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(cli.COMMANDS, "count", ("count_arguments", "Count"))
    assert cli.main(["count", "a=1", "--help", "b"]) == 3


@pytest.mark.parametrize("module", [module for module, _ in cli.COMMANDS.values()])
def test_every_command_has_its_module(module: str) -> None:
    assert importlib.util.find_spec(module) is not None


def test_help_imports_none_of_the_heavy_packages() -> None:
    code = (
        "import sys; from ergo_rl.jobs.cli import main; status = main(['--help']); "
        "sys.exit(status or any(name in sys.modules for name in ('torch', 'ray', 'vllm', 'deepspeed')))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60).returncode == 0
