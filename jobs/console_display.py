"""What a run shows on the console: what it waits for, the curves, the time of each phase."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from ergo_rl.console import Part, PlainConsole, panel, plain, progress_bar, table, text_column
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
        self.console = PlainConsole()
        self.on_closed: Callable[[], object] = lambda: None
        """Called once where nobody can read the output any more."""
        self._is_live = live and self.console.is_terminal
        self._name, self._folder = name, folder
        self._history: dict[str, list[float]] = {}
        self._latest: Metrics = {}
        self._warnings: Mapping[str, str] = {}
        self._progress = progress_bar(
            text_column("{task.description}", style="bold"),
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

    def say(self, *parts: Part) -> None:
        """Show one message. What it is made of is text, never markup."""
        was_closed = self.console.closed
        self.console.say(*parts)
        if self.console.closed and not was_closed:
            self.on_closed()

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Say what the block waits for, and how long it took."""
        self.say(("…", "cyan"), f" {what}")
        started = self._progress.get_time()
        yield
        self.say(("✓", "green"), f" {what} ", (f"({self._progress.get_time() - started:.1f} s)", "dim"))

    def warn(self, sentences: Mapping[str, str]) -> None:
        """Show what is wrong now, a sentence by name; empty where nothing is."""
        if not self._is_live:
            for name in sentences.keys() - self._warnings.keys():
                self.say(("alarm:", "bold red"), f" {sentences[name]}")
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
        curves = table(box=None, padding=(0, 2), show_header=False)
        for label, name in _SHOWN:
            if name in self._history:
                values = self._history[name]
                curves.add_row(label, f"{values[-1]:.4g}", Text(sparkline(values), style="green"))
        times = "  ".join(
            f"{name.removeprefix('time/').removesuffix('_s')} {value:.2f} s"
            for name, value in self._latest.items()
            if name.startswith("time/") and "slowest" not in name
        )
        replaced = sum(self._latest.get(f"count/{role}_restarts", 0.0) for role in ("rollout", "reward"))
        if replaced:
            times += f"  workers replaced: {replaced:.0f}"
        warnings = [plain((f"! {sentence}", "bold red")) for sentence in self._warnings.values()]
        body = Group(curves, Text(times, style="dim"), *warnings) if self._history else Text("starting", style="dim")
        return Group(panel(body, f"ERGO · {self._name}", str(self._folder)), self._progress)
