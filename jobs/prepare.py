"""``ergo-rl prepare``: write a data set as Parquet, the embedded one (panels) or a published one (``jobs.convert``)."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ergo_rl.episodes.layouts import FIELDS, LAYOUTS, Corners, Unit
from ergo_rl.episodes.panels import GENERATOR, PanelsConfig, Split, question
from ergo_rl.episodes.questions import write_questions
from ergo_rl.episodes.types import Question
from ergo_rl.jobs.config import EmbeddedData
from ergo_rl.jobs.convert import Conversion, run, summary

MANIFEST = "manifest.json"


def prepare_panels(
    out: Path,
    train: int = 4096,
    heldout: int = 512,
    seed: int = 0,
    config: PanelsConfig | None = None,
    console: Console | None = None,
) -> list[Path]:
    """Write ``out/train.parquet`` and ``out/heldout.parquet`` unless they are there with the same settings.

    The same settings give the same rows. The manifest is written last: files without it are made again. Takes about
    8 ms and 10 KB a scene. Raises ValueError for counts below 1 or panels that do not fit, OSError."""
    if train < 1 or heldout < 1:
        raise ValueError(f"need at least one row in each split, got train {train}, heldout {heldout}")
    config = config or PanelsConfig()
    sizes = {Split.TRAIN: train, Split.HELDOUT: heldout}
    settings = {"generator": GENERATOR, "seed": seed, "rows": dict(sizes), "panels": asdict(config)}
    paths = [out / f"{split}.parquet" for split in sizes]
    if all(path.is_file() for path in paths) and _manifest(out) == settings:
        return paths
    out.mkdir(parents=True, exist_ok=True)
    (out / MANIFEST).unlink(missing_ok=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        for (split, rows), path in zip(sizes.items(), paths, strict=True):
            task = progress.add_task(f"panels, {split}", total=rows)

            def drawn(split: Split = split, rows: int = rows, task: Any = task) -> Iterator[Question]:
                for index in range(rows):
                    yield question(config, seed, split, index)
                    progress.advance(task)

            fresh = path.with_suffix(".new")
            write_questions(fresh, drawn())
            os.replace(fresh, path)
    (out / MANIFEST).write_text(json.dumps(settings, indent=2) + "\n")
    return paths


def prepare_embedded(config: EmbeddedData, console: Console | None = None) -> None:
    """Make the embedded data set where a recipe asks for it and it is absent."""
    if config.panels is not None:
        prepare_panels(Path(config.panels), config.train, config.heldout, config.seed, console=console)


def _manifest(out: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads((out / MANIFEST).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="ergo-rl prepare",
        description="Write a data set as the Parquet files that training reads. What is there, made from the same "
        "files with the same settings, stays as it is.",
        epilog="example: ergo-rl prepare vstar vstar_bench/test_questions.jsonl --out data/vstar.parquet",
    )
    kinds = parser.add_subparsers(dest="dataset", required=True, metavar="DATASET")
    _add_panels(kinds.add_parser("panels", help="the embedded data set, generated from the seed"))
    for name, layout in LAYOUTS.items():
        _add_conversion(kinds.add_parser(name, help=layout.title, description=f"{layout.title}. {layout.card}"))
    options = parser.parse_args(argv)
    try:
        if options.dataset == "panels":
            paths = prepare_panels(options.out, options.train, options.heldout, options.seed)
        else:
            conversion = _conversion(options)
            print(summary(run(conversion), conversion.files))
            paths = [conversion.out, conversion.report_path]
    except (ValueError, OSError) as error:
        print(f"ergo-rl prepare: {error}", file=sys.stderr)
        return 1
    for path in paths:
        print(f"{path}  {path.stat().st_size / 2**20:.1f} MB")
    return 0


def _add_panels(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=Path, default=Path("data/panels"), help="folder to write to (default: %(default)s)"
    )
    parser.add_argument("--train", type=int, default=4096, help="rows to train on (default: %(default)s)")
    parser.add_argument("--heldout", type=int, default=512, help="rows to evaluate on (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other scenes (default: %(default)s)")


def _add_conversion(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", type=Path, help="files with the rows: .jsonl .json .tsv .csv .parquet")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.parquet")
    parser.add_argument(
        "--images", type=Path, action="append", default=[], metavar="PLACE",
        help="folder, .zip or .tar of the pictures that rows name; may be given more than once (the folder of the rows "
        "is looked through in any case)",
    )  # fmt: skip
    parser.add_argument(
        "--map",
        action="append",
        default=[],
        metavar="FIELD=COLUMN",
        help=f"another column for one of {', '.join(FIELDS)}",
    )
    parser.add_argument("--corners", choices=list(Corners), help="what the four numbers of a box are")
    parser.add_argument("--unit", choices=list(Unit), help="of the numbers of a box")
    parser.add_argument("--limit", type=int, help="read only so many rows")
    parser.add_argument("--decode", action="store_true", help="decode every picture to its end, not its header only")


def _conversion(options: argparse.Namespace) -> Conversion:
    pairs = [one.partition("=") for one in options.map]
    if wrong := [name for name, equals, column in pairs if not (equals and column)]:
        raise ValueError(f"--map {wrong[0]}: write FIELD=COLUMN, e.g. --map text=question")
    if options.out.suffix != ".parquet":
        raise ValueError(f"--out {options.out}: its name must end in .parquet")
    if options.limit is not None and options.limit < 1:
        raise ValueError(f"--limit {options.limit}: at least 1")
    layout = LAYOUTS[options.dataset].renamed({name: column for name, _, column in pairs})
    layout = replace(layout, corners=Corners(options.corners or layout.corners), unit=Unit(options.unit or layout.unit))
    return Conversion(layout, tuple(options.files), tuple(options.images), options.out, options.limit, options.decode)


if __name__ == "__main__":
    raise SystemExit(main())
