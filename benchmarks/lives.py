"""A training run as a process that can be watched and hurt, for the benchmarks of recovery and the system tests."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TRAIN = [sys.executable, "-m", "ergo_rl.jobs", "train", "configs/panels.yaml"]
GROUPS, G = 2, 4
"""Questions of a step, trajectories of a question."""
ENGINE = "VLLM::EngineCore"
LIVING: list[subprocess.Popen[bytes]] = []
"""Processes of ``living`` that have not ended, for whoever must end before they do."""


class LifeFailed(AssertionError):
    """The run did not do what was waited for; the message has what it said."""


def small_run(folder: Path, steps: int, rows: int = 24, **overrides: object) -> list[str]:
    """The panels recipe, small: two questions of four trajectories a step, from ``rows`` questions; nothing evaluated,
    proved at both ends only."""
    from ergo_rl.examples.panels.scenes import PanelsConfig, Split, question
    from ergo_rl.questions.dataset import write_questions

    data = folder / "questions.parquet"
    if not data.exists():
        write_questions(data, (question(PanelsConfig(), 0, Split.TRAIN, index) for index in range(rows)))
    settings = {
        "name": "run", "runs_dir": folder, "questions.paths": f"[{data}]", "embedded.panels": "null",
        "evaluation.paths": "[]", "samples_every": 0, "total_steps": steps, "groups_per_step": GROUPS,
        "rollout.group_size": G, "weight_check.every": 1000, "checkpoint.every": 2, **overrides,
    }  # fmt: skip
    return [f"{key}={value}" for key, value in settings.items()]


@dataclass
class Life:
    """One process of ``ergo-rl train``. log: what it says; run: its folder."""

    process: subprocess.Popen[bytes]
    log: Path
    run: Path
    hurt: list[int] = field(default_factory=list)
    left: list[tuple[int, str]] = field(default_factory=list)
    """Processes that outlived the driver by half a minute."""

    def steps(self) -> list[dict[str, Any]]:
        return lines_of(self.run / "metrics.jsonl")

    def wait_for(self, what: str, happened: Callable[[], bool], timeout_s: float, pause_s: float = 0.05) -> float:
        """Seconds it took. Raises LifeFailed where it does not happen, or the process ends before."""
        started = time.monotonic()
        while not happened():
            if self.process.poll() is not None:
                self.fail(f"the run ended with {self.process.returncode} before {what}")
            if time.monotonic() - started > timeout_s:
                self.fail(f"no {what} within {timeout_s:.0f} s")
            time.sleep(pause_s)
        return time.monotonic() - started

    def wait_for_steps(self, count: int, timeout_s: float = 240) -> float:
        return self.wait_for(f"{count} steps", lambda: len(self.steps()) >= count, timeout_s)

    def end(self, timeout_s: float = 420) -> int:
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.fail(f"the run did not end within {timeout_s:.0f} s")

    def fail(self, why: str) -> Any:
        said = self.log.read_text(errors="replace")[-4000:]
        logged = self.run / "run.log"
        log = logged.read_text(errors="replace")[-4000:] if logged.exists() else "none"
        processes = "\n".join(f"{pid} {command}" for pid, command in descendants(self.process.pid))
        raise LifeFailed(f"{why}\n--- output\n{said}\n--- run.log\n{log}\n--- processes\n{processes}")

    def kill(self, patience_s: float = 30.0) -> float:
        """As a machine that goes off. Seconds until everything below it was gone; what then is left is kept in
        ``left`` and killed."""
        family = descendants(self.process.pid)
        self.process.kill()
        self.process.wait()
        started = time.monotonic()
        while (left := still(family)) and time.monotonic() - started < patience_s:
            time.sleep(0.1)
        self.left += left
        for pid, _ in left:
            send(pid, signal.SIGKILL)
        return time.monotonic() - started

    def of_kind(self, title: str, below: str | None = None) -> int:
        """The first process whose command begins with ``title``, below the first that begins with ``below``."""
        root = self.process.pid if below is None else self.of_kind(below)
        found = of_kind(root, title, spawned=below is not None)
        return found[0] if found else self.fail(f"no process {title!r}" + (f" below {below!r}" if below else ""))

    def send(self, pid: int, number: int) -> None:
        self.hurt.append(pid)
        send(pid, number)


@contextmanager
def living(overrides: list[str], log: Path) -> Iterator[Life]:
    """Whatever happens inside, no process is left."""
    places = dict(one.partition("=")[::2] for one in overrides)
    command = [*TRAIN, *overrides]
    with log.open("ab") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
    life = Life(process, log, Path(places["runs_dir"]) / places["name"])
    LIVING.append(process)
    try:
        yield life
    finally:
        LIVING.remove(process)
        if process.poll() is None:
            life.kill()
        for pid in life.hurt:
            send(pid, signal.SIGKILL)


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file that may be being written."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def descendants(root: int) -> list[tuple[int, str]]:
    """(process id, command) of everything below ``root``, parents first."""
    children: dict[int, list[int]] = {}
    commands: dict[int, str] = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            commands[int(process.name)] = (process / "cmdline").read_text().replace("\0", " ").strip()
        except (OSError, ValueError):
            continue  # it has ended
        children.setdefault(parent, []).append(int(process.name))
    found, waiting = [], [root]
    while waiting:
        for child in children.get(waiting.pop(0), []):
            found.append((child, commands[child]))
            waiting.append(child)
    return found


def of_kind(root: int, title: str, spawned: bool = False) -> list[int]:
    """Processes below ``root`` whose command begins with ``title``. spawned: also those that Python's multiprocessing
    started: vLLM gives its processes titles only where setproctitle is installed."""
    family = descendants(root)
    return [pid for pid, command in family if command.startswith(title) or (spawned and "spawn_main" in command)]


def still(family: list[tuple[int, str]]) -> list[tuple[int, str]]:
    """Those that have not ended."""
    alive = []
    for pid, command in family:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if state != "Z":
            alive.append((pid, command[:60]))
    return alive


def send(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return
