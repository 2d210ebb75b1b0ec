"""``ergo-rl ablate``: the same run with other rewards and other seeds, as a table and a plot.

Every run is an ordinary ``ergo-rl train`` in a process of its own. A run that is done is not done again, so the command
goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from yaml import YAMLError

from ergo_rl.jobs.commands import EXPECTED
from ergo_rl.jobs.config import ConfigError, load_config
from ergo_rl.jobs.measuring.ablation_report import Curve, write_report
from ergo_rl.questions.prepare import prepare_embedded

DEFAULT_PLAN = "configs/ablations/panels.yaml"


@dataclass
class AblationPlan:
    """Which runs there are: every row with every seed."""

    recipe: str = MISSING
    """The recipe of every run."""
    overrides: list[str] = field(default_factory=list)
    """``key=value`` for every run."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    rows: dict[str, list[str]] = field(default_factory=dict)
    """Name of a row -> its ``key=value``."""


@dataclass(frozen=True, slots=True)
class AblationRun:
    """One row with one seed."""

    row: str
    seed: int
    recipe: str
    overrides: tuple[str, ...]
    folder: Path

    @property
    def result(self) -> Path:
        return self.folder / f"seed-{self.seed}.json"

    def settings(self) -> dict[str, object]:
        """What was given for this run: the recipe's own values under the overrides, so that an edited recipe is another
        run too, and a new key with its default is not."""
        given = OmegaConf.merge(OmegaConf.load(self.recipe), OmegaConf.from_dotlist(list(self.overrides)))
        return {"seed": self.seed, "given": OmegaConf.to_container(given)}

    def curve(self) -> Curve | None:
        """Its evaluations, where it is done with these settings."""
        try:
            found = json.loads(self.result.read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        if found["settings"] != self.settings():
            return None
        return Curve(self.seed, found["evaluations"], found["training_s"])

    def steps_done(self) -> int:
        metrics = self.folder / f"seed-{self.seed}" / "metrics.jsonl"
        return len(metrics.read_bytes().splitlines()) if metrics.exists() else 0


def load_plan(path: Path, overrides: Sequence[str]) -> AblationPlan:
    """Raises ConfigError naming what is wrong; every row's configuration is loaded once, so that a misspelt key is
    said before the first run and not before the last."""
    if not path.is_file():
        raise ConfigError(f"there is no plan {path}; configs/ablations/panels.yaml is an example")
    try:
        plan = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(AblationPlan), OmegaConf.load(path)))
    except (YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path}: {str(error).splitlines()[0]}") from error
    assert isinstance(plan, AblationPlan)
    plan.overrides += overrides
    if not plan.rows or not plan.seeds:
        raise ConfigError(f"{path}: rows and seeds must not be empty")
    for row, changes in plan.rows.items():
        try:
            load_config(Path(plan.recipe), [*plan.overrides, *changes])
        except ConfigError as error:
            raise ConfigError(f"{path}, row {row!r}: {error}") from error
    return plan


def runs_of(plan: AblationPlan, out: Path) -> list[AblationRun]:
    """Row by row, so that a part of the runs already has whole rows."""
    return [
        AblationRun(row, seed, plan.recipe, (*plan.overrides, *changes), out / slug(row))
        for row, changes in plan.rows.items()
        for seed in plan.seeds
    ]


def slug(row: str) -> str:
    """A folder name: lower case, hyphens for everything that is no letter or digit."""
    return "-".join("".join(letter if letter.isalnum() else " " for letter in row.lower()).split())


async def run_all(runs: Sequence[AblationRun], at_once: int, progress: Progress) -> list[AblationRun]:
    """Do what is not done yet; returns the runs that failed."""
    places = asyncio.Semaphore(at_once)
    failed: list[AblationRun] = []

    async def one(run: AblationRun) -> None:
        async with places:
            total = load_config(Path(run.recipe), run.overrides).total_steps
            task = progress.add_task(f"{run.row}, seed {run.seed}", total=total)
            if not await train(run, progress, task):
                failed.append(run)

    await asyncio.gather(*(one(run) for run in runs if run.curve() is None))
    return failed


async def train(run: AblationRun, progress: Progress, task: TaskID) -> bool:
    """One run in a process of its own, its output in a file beside its folder; one that was interrupted with these
    settings goes on. False where it failed."""
    folder, begun = run.folder / f"seed-{run.seed}", run.result.with_suffix(".begun.json")
    if not begun.exists() or json.loads(begun.read_text()) != run.settings():
        shutil.rmtree(folder, ignore_errors=True)
    run.folder.mkdir(parents=True, exist_ok=True)
    begun.write_text(json.dumps(run.settings()) + "\n")
    names = [f"name={folder.name}", f"runs_dir={run.folder}", f"seed={run.seed}"]
    command = [sys.executable, "-m", "ergo_rl.jobs", "train", run.recipe, *run.overrides, *names]
    with folder.with_suffix(".log").open("ab") as log:
        process = await asyncio.create_subprocess_exec(
            *command, stdout=log, stderr=asyncio.subprocess.STDOUT, start_new_session=True
        )
        try:
            while process.returncode is None:
                progress.update(task, completed=run.steps_done())
                try:
                    await asyncio.wait_for(process.wait(), timeout=1.0)
                except TimeoutError:
                    continue
        finally:
            if process.returncode is None:  # stopped by hand: the run ends as if it had been told so itself, once
                process.send_signal(signal.SIGINT)
                await process.wait()
    progress.update(task, completed=run.steps_done())
    if process.returncode:
        return False
    evaluations = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    spent = sum(step["time/step_s"] for step in steps)
    result = {"settings": run.settings(), "training_s": spent, "evaluations": evaluations}
    run.result.write_text(json.dumps(result, indent=1) + "\n")
    return True


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="ergo-rl ablate",
        description="Train every row of a plan with every seed, and write a table and a plot. Runs that are done are "
        "kept: call it again to go on, or with more rows or seeds.",
        epilog="example: ergo-rl ablate configs/ablations/panels.yaml --out runs/ablation total_steps=40",
    )
    parser.add_argument("plan", nargs="?", default=DEFAULT_PLAN, help=f"YAML plan (default: {DEFAULT_PLAN})")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values for every run")
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"), help="folder (default: %(default)s)")
    parser.add_argument("--at-once", type=int, default=1, help="runs at the same time (default: %(default)s)")
    parser.add_argument("--report-only", action="store_true", help="train nothing; write what is there")
    options = parser.parse_intermixed_args(argv)  # key=value may stand behind options, too
    if "=" in options.plan:
        options.plan, options.overrides = DEFAULT_PLAN, [options.plan, *options.overrides]
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    failed: list[AblationRun] = []
    try:
        plan = load_plan(Path(options.plan), options.overrides)
        runs = runs_of(plan, options.out)
        if not options.report_only:
            prepare_embedded(load_config(Path(plan.recipe), plan.overrides).embedded)
            with Progress(*columns, console=console) as progress:
                failed = asyncio.run(run_all(runs, max(1, options.at_once), progress))
    except EXPECTED as error:
        print(f"ergo-rl ablate: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("ergo-rl ablate: stopped by hand; the same command goes on", file=sys.stderr)
        return 130
    curves = {row: [curve for run in runs if run.row == row and (curve := run.curve())] for row in plan.rows}
    command = " ".join(["ergo-rl ablate", options.plan, *options.overrides])
    for path in write_report(options.out, command, plan.rows, curves, len(plan.seeds)):
        console.print(f"wrote {path}")
    for run in failed:
        log = run.folder / f"seed-{run.seed}.log"
        print(f"ergo-rl ablate: {run.row!r} with seed {run.seed} failed; its output is in {log}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
