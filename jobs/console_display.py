"""What a run shows on the console: what it waits for, the curves, the time of each phase."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from ergo_rl.jobs.metrics import Metrics

_BARS = "▁▂▃▄▅▆▇█"
_SHOWN = (
    ("reward", "reward/total"),
    ("region", "reward/region"),
    ("box", "reward/box"),
    ("accuracy", "reward/accuracy"),
    ("format", "reward/format"),
    ("coverage", "rollout/coverage"),
    ("area", "rollout/area_ratio"),
    ("bad boxes", "rollout/bad_box_rate"),
    ("whole image", "rollout/full_image_rate"),
    ("held-out coverage", "eval/coverage"),
    ("held-out accuracy", "eval/accuracy"),
    ("entropy", "learner/entropy"),
    ("mismatch", "proof/mismatch_mean"),
    ("step s", "time/step_s"),
)


def sparkline(values: list[float], width: int = 40) -> str:
    """Draw the last ``width`` values as bars, scaled between their minimum and maximum."""
    shown = values[-width:]
    low, high = min(shown), max(shown)
    span = (high - low) or 1.0
    return "".join(_BARS[round((value - low) / span * (len(_BARS) - 1))] for value in shown)


class ConsoleDisplay:
    """A line per step; or, with ``live`` on a terminal, one panel that renews itself."""

    def __init__(self, name: str, total_steps: int, folder: Path, live: bool = False) -> None:
        self.console = Console()
        self._is_live = live and self.console.is_terminal
        self._name, self._folder = name, folder
        self._history: dict[str, list[float]] = {}
        self._latest: Metrics = {}
        self._warnings: Mapping[str, str] = {}
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
        )
        self._task = self._progress.add_task(f"{name}: steps", total=total_steps)
        self._live = Live(console=self.console, refresh_per_second=4, get_renderable=self._render)

    def __enter__(self) -> Self:
        if self._is_live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the terminal back."""
        if self._is_live:
            self._live.stop()

    def say(self, message: str) -> None:
        self.console.print(message, highlight=False, soft_wrap=True)

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Say what the block waits for, and how long it took."""
        self.say(f"[cyan]…[/cyan] {what}")
        started = self._progress.get_time()
        yield
        self.say(f"[green]✓[/green] {what} [dim]({self._progress.get_time() - started:.1f} s)[/dim]")

    def warn(self, sentences: Mapping[str, str]) -> None:
        """Show what is wrong now, a sentence by name; empty where nothing is."""
        if not self._is_live:
            for name in sentences.keys() - self._warnings.keys():
                self.say(f"[bold red]alarm:[/bold red] {sentences[name]}")
        self._warnings = sentences

    def rewind(self, step: int, metrics: Sequence[Metrics], evaluations: Sequence[Metrics]) -> None:
        """Show the curves as they were after ``step`` steps."""
        self._history = {}
        for record in (*metrics, *evaluations):
            for _, name in _SHOWN:
                if name in record:
                    self._history.setdefault(name, []).append(record[name])
        self._progress.update(self._task, completed=step)

    def show(self, step: int, metrics: Metrics) -> None:
        self._latest = metrics
        for _, name in _SHOWN:
            if name in metrics:
                self._history.setdefault(name, []).append(metrics[name])
        self._progress.update(self._task, completed=step + 1)
        if not self._is_live:
            shown = [f"{label} {metrics[name]:.3g}" for label, name in _SHOWN if name in metrics]
            self.say(f"step {step + 1:4d}  " + "  ".join(shown))

    def show_evaluation(self, step: int, metrics: Metrics) -> None:
        for label, name in (("held-out coverage", "eval/coverage"), ("held-out accuracy", "eval/accuracy")):
            if name in metrics:
                self._history.setdefault(name, []).append(metrics[name])
                if not self._is_live:
                    self.say(f"after {step} steps: {label} {metrics[name]:.1%}")

    def _render(self) -> Group:
        table = Table(box=None, padding=(0, 2), show_header=False)
        for label, name in _SHOWN:
            if name in self._history:
                values = self._history[name]
                table.add_row(label, f"{values[-1]:.4g}", Text(sparkline(values), style="green"))
        times = "  ".join(
            f"{name.removeprefix('time/').removesuffix('_s')} {value:.2f} s"
            for name, value in self._latest.items()
            if name.startswith("time/") and "slowest" not in name
        )
        replaced = sum(self._latest.get(f"count/{role}_restarts", 0.0) for role in ("rollout", "reward"))
        if replaced:
            times += f"  workers replaced: {replaced:.0f}"
        warnings = [Text(f"! {sentence}", style="bold red") for sentence in self._warnings.values()]
        body = Group(table, Text(times, style="dim"), *warnings) if self._history else Text("starting", style="dim")
        return Group(Panel(body, title=f"ERGO · {self._name}", subtitle=str(self._folder)), self._progress)
