"""The console of every command. What is shown is text, never markup: messages hold paths, replies of models and errors
of other programs, and rich takes ``[/INST]`` in them for a closing tag, and raises. All use of rich starts here."""

from __future__ import annotations

import os
import re
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

Part = str | tuple[str, str]
"""Text, or text and its style."""
_STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


class PlainConsole(Console):
    """Shows every text as it is. A closed stdout or a terminal that is gone ends the output, not the process."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, highlight=False, emoji=False, **options)
        self.closed = False

    def say(self, *parts: Part) -> None:
        """Print one message on lines as long as they are."""
        try:
            self.print(plain(*parts), soft_wrap=True)
        except OSError:  # a broken pipe comes to on_broken_pipe; EIO where the terminal is gone
            self.on_broken_pipe()

    def on_broken_pipe(self) -> None:
        """Called by rich. Later output of anybody to this file goes nowhere, instead of raising at the next print."""
        self.quiet = self.closed = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, self.file.fileno())
        except (OSError, ValueError):
            return  # no file of the system's
        finally:
            os.close(nowhere)


def plain(*parts: Part) -> Text:
    """Join texts; control characters, which could steer the terminal, and lone surrogates are shown as U+FFFD."""
    return Text.assemble(
        *((_visible(part), "") if isinstance(part, str) else (_visible(part[0]), part[1]) for part in parts)
    )


def _visible(text: str) -> str:
    return _STEERING.sub("\N{REPLACEMENT CHARACTER}", text)


def text_column(template: str, style: str = "none") -> TextColumn:
    return TextColumn(template, style=style, markup=False)


def progress_bar(*columns: ProgressColumn, console: PlainConsole | None = None) -> Progress:
    """columns: by default the description, a bar, how many of how many, and the time that is left."""
    usual = (text_column("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*(columns or usual), console=console or PlainConsole())


def panel(body: Any, title: str, subtitle: str) -> Panel:
    return Panel(body, title=plain(title), subtitle=plain(subtitle))


def table(title: str = "", **options: Any) -> Table:
    """Cells that are ``str`` are text on a ``PlainConsole``."""
    return Table(title=plain(title) if title else None, **options)
