"""What is shown is text: no message is read as markup, whatever it holds; nothing in the package goes around that."""

from __future__ import annotations

import ast
import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ergo_rl.console import PlainConsole, panel, plain, progress_bar, table
from ergo_rl.jobs.commands.evaluate import as_table
from ergo_rl.jobs.console_display import ConsoleDisplay
from tests.conftest import ROOT

HOSTILE = (
    "status 400: '[/INST]'",
    "[/p] [bold",
    "[127.0.0.1]:[/tmp/x] timed out",
    "[link=http://x]a[/link]",
    ":smile: [red]",
)
PACKAGES = ("actors", "cluster", "episodes", "examples", "jobs", "learners", "questions", "rewards", "ergo_rl")
OURS = "ergo_rl/console.py"
MAKERS = {
    "Console",
    "Table",
    "Panel",
    "Progress",
    "TextColumn",
    "Prompt",
    "from_markup",
    "get_console",
    "rprint",
    "print_json",
}


SAYING = {"say", "print", "add_row", "add_task", "add_column", "warn"}


def sources() -> list[Path]:
    return [path for name in PACKAGES for path in sorted((ROOT / name).glob("**/*.py")) if not path.is_symlink()]


def called(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def test_whole_package_uses_rich_through_the_plain_console_only() -> None:
    wrong, seen = [], 0
    for path in sources():
        where = path.relative_to(ROOT).as_posix()
        if where == OURS or (where.startswith("ergo_rl/") and where.count("/") > 1):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        makers, rich = MAKERS, "rich" in path.read_text(encoding="utf-8")
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rich.markup"):
                wrong.append(f"{where}:{node.lineno} imports rich.markup")
            if isinstance(node, ast.ImportFrom) and node.module == "rich":
                wrong.append(f"{where}:{node.lineno} imports from rich itself")
            if isinstance(node, ast.Call) and rich and called(node) in makers and where != "examples/panels/scenes.py":
                wrong.append(f"{where}:{node.lineno} calls {called(node)}")
            if isinstance(node, ast.Call) and called(node) in (
                "say",
                "print",
                "add_row",
                "add_task",
                "add_column",
                "warn",
            ):
                seen += 1
                texts = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant)]
                wrong += [f"{where}:{node.lineno} writes markup: {text!r}" for text in texts if "[/" in str(text)]
    assert not wrong
    assert seen > 40, "the walk finds what it looks for"


def test_plain_console_and_its_parts_set_markup_off() -> None:
    """The one file that the walk leaves out."""
    calls = [node for node in ast.walk(ast.parse((ROOT / OURS).read_text())) if isinstance(node, ast.Call)]
    words = [(called(node), word.arg, ast.unparse(word.value)) for node in calls for word in node.keywords]
    off = {name for name, argument, value in words if (argument, value) == ("markup", "False")}
    assert {"__init__", "TextColumn"} <= off
    assert "from_markup" not in {called(node) for node in calls}


def shown(*renderables: object, width: int = 200) -> str:
    console = PlainConsole(file=io.StringIO(), width=width)
    for one in renderables:
        console.print(one)
    return str(console.file.getvalue())  # type: ignore[attr-defined]


@pytest.mark.parametrize("text", HOSTILE)
def test_text_from_outside_is_shown_letter_by_letter(text: str) -> None:
    console = PlainConsole(file=io.StringIO(), width=200)
    console.say(text)
    console.say((text, "bold red"), " end")
    assert console.file.getvalue() == f"{text}\n{text} end\n"  # type: ignore[attr-defined]
    rows = table(text)
    rows.add_column(text)
    rows.add_row(text)
    assert shown(rows).count(text) == 3
    found = shown(panel("body", text, text))
    assert found.count(text) == 2
    with progress_bar(console=PlainConsole(file=io.StringIO(), width=200, force_terminal=True)) as progress:
        progress.add_task(text, total=1)
        progress.refresh()
        assert text in progress.console.file.getvalue()  # type: ignore[attr-defined]
    assert text in shown(as_table({text: {"eval/accuracy": 0.5}}, text))


UTF_8 = PlainConsole(file=io.TextIOWrapper(io.BytesIO(), encoding="utf-8"), width=80)


@settings(max_examples=50)
@given(st.text())
def test_any_text_is_shown_and_steers_no_terminal(text: str) -> None:
    UTF_8.say(text)
    assert "\x1b" not in plain(text).plain and len(plain(text).plain) == len(text)


@pytest.mark.parametrize("text", HOSTILE)
def test_display_of_a_run_shows_messages_warnings_and_names_as_they_are(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with ConsoleDisplay(text, 3, tmp_path) as display:
        display.say(f"scale: {text}")
        display.warn({"rewards": f"paused: {text}"})
        with display.waiting(text):
            pass
        display.show(0, {"reward/total": 1.0})
        live = shown(display._render())
    said = capsys.readouterr().out
    assert f"scale: {text}\n" in said and f"alarm: paused: {text}\n" in said and said.count(text) == 4
    assert f"! paused: {text}" in live and f"ERGO · {text}" in live and f"{text}: steps" in live


CLOSED = """
import asyncio, sys
from pathlib import Path
from ergo_rl.jobs.console_display import ConsoleDisplay
from ergo_rl.jobs.shutdown import GracefulShutdown, Stopped
async def main():
    with ConsoleDisplay("x", 1, Path()) as console, GracefulShutdown.on_signals(console) as shutdown:
        console.say("up")
        async def work():
            while True:
                await asyncio.sleep(0.05)
                if sys.argv[1] == "talks":
                    console.say("still here")
        try:
            await shutdown.run_or_stop(work())
        except Stopped as stopped:
            await asyncio.sleep(0.2)
            console.say("saved")
            print("and said by others")
            Path(sys.argv[2]).write_text(str(stopped))
            sys.exit(stopped.exit_status)
asyncio.run(main())
"""


@pytest.mark.parametrize(("how", "status"), [("talks", 128 + signal.SIGPIPE), ("hears", 128 + signal.SIGHUP)])
def test_run_ends_saved_when_its_reader_or_its_terminal_goes(how: str, status: int, tmp_path: Path) -> None:
    """Of `ergo-rl train | head`, and of a terminal that is closed: SIGHUP comes to the whole group, here thrice."""
    command = [sys.executable, "-c", CLOSED, how, str(tmp_path / "saved")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "up\n"
    process.stdout.close()
    if how == "hears":
        for _ in range(3):
            process.send_signal(signal.SIGHUP)
    assert process.wait(30) == status
    assert (tmp_path / "saved").read_text() == f"stopped by {signal.Signals(status - 128).name}"
    assert process.stderr is not None and process.stderr.read() == ""
