"""The console command, the handling of expected errors, and overrides among other arguments."""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ergo_rl.errors import ErgoError
from ergo_rl.jobs import cli
from ergo_rl.jobs.cli import add_recipe, command, explain, parse_with_overrides, recipe_of
from tests.conftest import ROOT


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


@pytest.mark.parametrize("path", ["/usr/bin:/bin", None])
def test_a_command_called_by_its_path_finds_the_programs_beside_it(
    path: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``.venv/bin/ergo-rl`` with .venv/bin not on PATH, or without any PATH: DeepSpeed's compiler looks for ninja."""
    (tmp_path / "look.py").write_text("def main(argv): return 0")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(cli.COMMANDS, "look", ("look", "Look"))
    monkeypatch.setenv("PATH", path or "")
    if path is None:
        monkeypatch.delenv("PATH")
    for _ in range(2):  # once is enough
        assert cli.main(["look"]) == 0
    tools, *rest = os.environ["PATH"].split(os.pathsep)
    assert Path(tools) == Path(sys.executable).parent and tools not in rest
    assert os.pathsep.join(rest) == (path or os.defpath)


@pytest.mark.parametrize("module", [module for module, _ in cli.COMMANDS.values()])
def test_every_command_has_its_module(module: str) -> None:
    assert importlib.util.find_spec(module) is not None


def test_help_imports_none_of_the_heavy_packages() -> None:
    code = (
        "import sys; from ergo_rl.jobs.cli import main; status = main(['--help']); "
        "sys.exit(status or any(name in sys.modules for name in ('torch', 'ray', 'vllm', 'deepspeed')))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60).returncode == 0


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser()
    add_recipe(made)
    made.add_argument("--modes", nargs="+", default=[])
    made.add_argument("--budgets", nargs="+", type=int, default=[])
    made.add_argument("--env", action="append", default=[])
    made.add_argument("--quick", action="store_true")
    return made


def test_overrides_stand_anywhere_and_keep_their_order() -> None:
    given = ["a=1", "--modes", "direct", "b=2", "two-stage", "--budgets", "16", "a=3", "--quick", "c.d[0]=4"]
    options = parse_with_overrides(parser(), given)
    assert recipe_of(options) == (Path("configs/panels.yaml"), ["a=1", "b=2", "a=3", "c.d[0]=4"])
    assert (options.modes, options.budgets, options.quick) == (["direct", "two-stage"], [16], True)


def test_values_of_single_options_and_paths_are_not_overrides() -> None:
    given = ["runs/a=b/config.yaml", "--env", "NAME=VALUE", "--env=OTHER=1", "seed=3", "--en", "THIRD=2"]
    options = parse_with_overrides(parser(), given)
    assert recipe_of(options) == (Path("runs/a=b/config.yaml"), ["seed=3"]) and options.env == [
        "NAME=VALUE", "OTHER=1", "THIRD=2",
    ]  # fmt: skip
    assert recipe_of(parse_with_overrides(parser(), ["my.yaml", "seed", "3"]))[1] == ["seed", "3"], "refused by name"


keys = st.text("abc._[0]-", min_size=1, max_size=6).filter(lambda key: key[0] not in "-[")
overrides = st.builds("{}={}".format, keys, st.text("xyz=/ -[],1", max_size=6))


@given(st.lists(overrides, max_size=5), st.sampled_from([[], ["--modes", "x", "y"], ["--budgets", "1"], ["--quick"]]))
def test_no_option_swallows_an_override(given: list[str], option: list[str]) -> None:
    for place in range(len(given) + 1):
        options = parse_with_overrides(parser(), [*given[:place], *option, *given[place:]])
        assert options.overrides == given


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (ErgoError("the recipe is wrong"), 1, "ergo-rl try: the recipe is wrong\n"),
        (TimeoutError(), 1, "ergo-rl try: TimeoutError\n"),
        (FileNotFoundError(2, "No such file", "x"), 1, "ergo-rl try: [Errno 2] No such file: 'x'\n"),
        (ZeroDivisionError("also"), 1, "ergo-rl try: also\n"),
        (KeyboardInterrupt(), 130, "ergo-rl try: stopped; continue with it\n"),
        (None, 3, ""),
    ],
)
def test_a_command_turns_expected_errors_into_a_line_and_a_status(
    error: BaseException | None, status: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    @command("try", stopped="stopped; continue with it", also=(ZeroDivisionError,))
    def main(argv: Sequence[str] | None = None) -> int:
        if error is not None:
            raise error
        return 3

    assert main([]) == status
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signal_that_no_command_handles_closes_what_is_open(
    number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    """As before the handlers of a run are set: while its data is read, or Ray starts."""
    before = signal.signal(number, signal.SIG_DFL)  # under nohup SIGHUP is ignored, and stays so
    closed = []

    @command("try", stopped="stopped by hand before anything could be saved")
    def main(argv: Sequence[str] | None = None) -> int:
        try:
            os.kill(os.getpid(), number)
            time.sleep(10)
        except Exception:  # which must not take it for an error of its own
            return 1
        finally:
            closed.append(signal.getsignal(number))
        return 0

    assert main([]) == 128 + number
    assert capsys.readouterr().err == f"ergo-rl try: stopped by {number.name} before anything could be saved\n"
    assert closed == [signal.SIG_DFL], "the second one ends the process at once"
    assert signal.signal(number, before) is signal.SIG_DFL


def test_signal_to_a_fork_of_a_command_ends_the_fork_alone() -> None:
    @command("try")
    def main(argv: Sequence[str] | None = None) -> int:
        if (child := os.fork()) == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
        return os.waitpid(child, 0)[1]

    assert main([]) == signal.SIGTERM, "it was ended by the signal"


def test_ignored_hangup_stays_ignored() -> None:
    @command("try")
    def main(argv: Sequence[str] | None = None) -> int:
        os.kill(os.getpid(), signal.SIGHUP)
        return 3

    usual = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert main([]) == 3
    finally:
        signal.signal(signal.SIGHUP, usual)


def test_a_bug_keeps_its_traceback() -> None:
    @command("try")
    def main(argv: Sequence[str] | None = None) -> int:
        return len(argv[0])  # type: ignore[index]

    with pytest.raises(TypeError):
        main(None)


def test_explain_adds_notes_of_one_line() -> None:
    error = ErgoError("it failed")
    error.add_note("saved at step 3")
    error.add_note("Traceback\n  of Ray")
    assert explain(error) == "it failed; saved at step 3"


def test_errors_for_users_derive_from_ergo_error() -> None:
    """Whatever a command may meet by the fault of a recipe, a machine or the data; ``EXPECTED`` has no other list."""
    wanted = {
        "ConfigError", "DamagedCheckpoint", "DatasetError", "EpisodeError", "LearnerFailed", "NotARunFolder",
        "PoolExhausted", "RewardsUnavailable", "SubmitError", "UnknownFamily", "UnreadableImage",
        "VerifierUnavailable", "WeightsDiffer",
    }  # fmt: skip
    found = {}
    for package in ("actors", "cluster", "episodes", "jobs", "learners", "questions", "rewards"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ClassDef) and node.name in wanted:
                    module = ".".join(["ergo_rl", *path.relative_to(ROOT).with_suffix("").parts])
                    found[node.name] = getattr(importlib.import_module(module), node.name)
    assert found.keys() == wanted and all(issubclass(error, ErgoError) for error in found.values())


def test_only_the_commands_know_argparse() -> None:
    """Whatever stands behind them can be called from Python."""
    folder = ROOT / "jobs"
    elsewhere = [path for path in folder.rglob("*.py") if "commands" not in path.relative_to(folder).parts]
    knowing = {path.name for path in elsewhere if "argparse" in path.read_text()}
    assert knowing == {"cli.py"}
