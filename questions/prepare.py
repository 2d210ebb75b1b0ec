"""What ``ergo-rl prepare`` does: a published data set -> one Parquet file of questions, and a report of what was left
out and why; and the embedded demo data set.

Rows are converted one by one, so memory does not grow with the data. The file is written aside and renamed when it is
whole.
"""

from __future__ import annotations

import importlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from ergo_rl.episodes.types import Question
from ergo_rl.questions.dataset import DatasetError, write_questions
from ergo_rl.questions.formats import DatasetFormat, convert_row
from ergo_rl.questions.readers import Broken, open_image_store, read_records
from ergo_rl.questions.rows import BadCell

EXAMPLES = 20
"""Rows that the report names for each reason."""


@dataclass
class ConversionReport:
    """What became of the rows."""

    written: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    """Rows that are no questions, by the column that is wrong."""
    examples: dict[str, list[str]] = field(default_factory=dict)
    """The first of them, with file and row."""
    clipped_boxes: int = 0
    """Boxes that left their image and were cut to it."""
    with_boxes: int = 0

    def skip(self, column: str, where: str) -> None:
        self.skipped[column] = self.skipped.get(column, 0) + 1
        if len(named := self.examples.setdefault(column, [])) < EXAMPLES:
            named.append(where)

    def lines(self) -> list[str]:
        """Return what a person wants to know, a line for each fact."""
        said = [f"{self.written} questions, {self.with_boxes} of them with boxes"]
        if self.clipped_boxes:
            said.append(f"{self.clipped_boxes} boxes left their image and were cut to it")
        for column, count in Counter(self.skipped).most_common():
            said.append(f"{count} rows skipped ({column}), the first: {self.examples[column][0]}")
        return said


@dataclass(frozen=True, slots=True)
class Conversion:
    """A data set to convert, and how."""

    dataset: DatasetFormat
    files: tuple[Path, ...]
    """With the rows."""
    images: tuple[Path, ...]
    """Folders and archives that are searched in order; the folder of the rows is searched last."""
    out: Path
    limit: int | None = None
    """Read only so many rows."""
    decode: bool = False
    """Decode every image to its end, not its header only."""

    @property
    def report_path(self) -> Path:
        return self.out.with_suffix(".report.json")

    def settings(self) -> dict[str, Any]:
        """Return everything that the result depends on. Raises DatasetError for a file that is not there."""
        stamps = {}
        for path in (*self.files, *self.images):
            if not path.exists():
                raise DatasetError(f"there is no {path}")
            stamps[str(path)] = [path.stat().st_size, path.stat().st_mtime_ns]
        columns = {name: list(names) for name, names in self.dataset.columns.items()}
        how = [self.dataset.title, self.dataset.corners.value, self.dataset.unit.value, self.limit, self.decode]
        return {"files": stamps, "columns": columns, "how": how}


def convert_dataset(conversion: Conversion, console: Console | None = None) -> ConversionReport:
    """Write the Parquet file and its report, unless both are there and were made from the same files in the same way.

    Raises DatasetError where a file cannot be read or no row is a question; then nothing is written."""
    settings = conversion.settings()
    if (known := _known_report(conversion, settings)) is not None:
        return known
    out, report = conversion.out, ConversionReport()
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(f".{out.name}.writing")
    try:
        write_questions(aside, _questions(conversion, report, console))
        if not report.written:
            raise DatasetError(f"no row is a question; {'; '.join(report.lines()[1:]) or 'there are no rows'}")
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        # The old report goes first: a report never stands beside a file that it does not describe.
        conversion.report_path.unlink(missing_ok=True)
        aside.replace(out)
    finally:
        aside.unlink(missing_ok=True)
    conversion.report_path.write_text(json.dumps({**asdict(report), "made": settings}, indent=2) + "\n")
    return report


def summary(report: ConversionReport, files: Sequence[Path]) -> str:
    """Return the report in words, for the terminal."""
    return "\n".join([", ".join(map(str, files)), *(f"  {line}" for line in report.lines())])


def _known_report(conversion: Conversion, settings: dict[str, Any]) -> ConversionReport | None:
    if not conversion.out.is_file():
        return None
    try:
        found = json.loads(conversion.report_path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return ConversionReport(**found) if found.pop("made") == settings else None


def _questions(conversion: Conversion, report: ConversionReport, console: Console | None) -> Iterator[Question]:
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    dataset, decode = conversion.dataset, conversion.decode
    with Progress(*columns, console=console) as progress:
        for path in conversion.files:
            task = progress.add_task(path.name, total=1.0)
            with open_image_store((*conversion.images, path.parent), conversion.out.parent) as store:
                for record in islice(read_records(path), _rows_left(conversion, report)):
                    progress.update(task, completed=record.done, description=f"{path.name}: {report.written}")
                    if isinstance(record, Broken):
                        report.skip("row", f"{path}, row {record.number}: {record.reason}")
                        continue
                    try:
                        row = convert_row(record.cells, dataset, store, record.number, path.stem, decode)
                    except BadCell as bad:
                        report.skip(bad.column, f"{path}, row {record.number}: {bad}")
                        continue
                    report.written += 1
                    report.clipped_boxes += row.clipped
                    report.with_boxes += bool(row.question.boxes)
                    yield row.question
            progress.update(task, completed=1.0)


def _rows_left(conversion: Conversion, report: ConversionReport) -> int | None:
    return None if conversion.limit is None else conversion.limit - report.written - sum(report.skipped.values())


# --- the embedded demo data set --------------------------------------------------------------------------------------


class EmbeddedDataset(Protocol):
    """What a recipe says about it (``embedded``)."""

    @property
    def panels(self) -> str | None: ...
    @property
    def train(self) -> int: ...
    @property
    def heldout(self) -> int: ...
    @property
    def seed(self) -> int: ...


def prepare_embedded(config: EmbeddedDataset, console: Console | None = None) -> None:
    """Make the embedded data set where a recipe asks for it and it is absent."""
    if config.panels is not None:
        prepare_panels(Path(config.panels), config.train, config.heldout, config.seed, console)


def prepare_panels(
    out: Path, train: int = 4096, heldout: int = 512, seed: int = 0, console: Console | None = None
) -> list[Path]:
    """Call ``examples.panels.dataset.prepare_panels``, which is looked up by name: no package imports the examples."""
    paths: list[Path] = importlib.import_module("ergo_rl.examples.panels.dataset").prepare_panels(
        out, train, heldout, seed, console=console
    )
    return paths
