"""Convert a published data set to one Parquet file of questions and a report of the rows that were skipped.

Converts row by row, so that memory does not grow with the data. The file is written aside and renamed when complete.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from ergo_rl.episodes.archives import open_pictures
from ergo_rl.episodes.layouts import Layout, Unusable, convert
from ergo_rl.episodes.questions import DatasetError, write_questions
from ergo_rl.episodes.records import Broken, read_records
from ergo_rl.episodes.types import Question

EXAMPLES = 20
"""How many rows the report names for each reason."""


@dataclass
class Report:
    """What became of the rows."""

    written: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    """Number of rows by the column that was wrong."""
    examples: dict[str, list[str]] = field(default_factory=dict)
    """The first of them, with file and row."""
    clipped_boxes: int = 0
    """Boxes that reached beyond their image and were clipped to it."""
    with_boxes: int = 0

    def skip(self, column: str, where: str) -> None:
        self.skipped[column] = self.skipped.get(column, 0) + 1
        if len(named := self.examples.setdefault(column, [])) < EXAMPLES:
            named.append(where)

    def lines(self) -> list[str]:
        said = [f"{self.written} questions, {self.with_boxes} of them with boxes"]
        if self.clipped_boxes:
            said.append(f"{self.clipped_boxes} boxes reached beyond their image and were clipped to it")
        for column, count in Counter(self.skipped).most_common():
            said.append(f"{count} rows skipped ({column}), the first: {self.examples[column][0]}")
        return said


@dataclass(frozen=True, slots=True)
class Conversion:
    """What to convert, and how."""

    layout: Layout
    files: tuple[Path, ...]
    """Files with the rows."""
    images: tuple[Path, ...]
    """Folders and archives with the images; the folder of the rows is searched after them."""
    out: Path
    limit: int | None = None
    """Read at most this many rows."""
    decode: bool = False
    """Decode every image completely, not only its header."""

    @property
    def report_path(self) -> Path:
        return self.out.with_suffix(".report.json")

    def settings(self) -> dict[str, Any]:
        """What the result depends on. Raises DatasetError for a file that does not exist."""
        stamps = {}
        for path in (*self.files, *self.images):
            if not path.exists():
                raise DatasetError(f"there is no {path}")
            stamps[str(path)] = [path.stat().st_size, path.stat().st_mtime_ns]
        columns = {name: list(names) for name, names in self.layout.columns.items()}
        how = [self.layout.title, self.layout.corners.value, self.layout.unit.value, self.limit, self.decode]
        return {"files": stamps, "columns": columns, "how": how}


def run(conversion: Conversion, console: Console | None = None) -> Report:
    """Write ``out`` and its report, unless both exist and were made from the same files in the same way.

    Raises DatasetError where a file cannot be read or no row is a question; then nothing is written."""
    settings = conversion.settings()
    if (known := _done(conversion, settings)) is not None:
        return known
    out, report = conversion.out, Report()
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(f".{out.name}.writing")
    try:
        write_questions(aside, _questions(conversion, report, console))
        if not report.written:
            raise DatasetError(f"no row is a question; {'; '.join(report.lines()[1:]) or 'there are no rows'}")
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        conversion.report_path.unlink(missing_ok=True)
        aside.replace(out)
    finally:
        aside.unlink(missing_ok=True)
    conversion.report_path.write_text(json.dumps({**asdict(report), "made": settings}, indent=2) + "\n")
    return report


def _done(conversion: Conversion, settings: dict[str, Any]) -> Report | None:
    if not conversion.out.is_file():
        return None
    try:
        found = json.loads(conversion.report_path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return Report(**found) if found.pop("made") == settings else None


def _questions(conversion: Conversion, report: Report, console: Console | None) -> Iterator[Question]:
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        for path in conversion.files:
            task = progress.add_task(path.name, total=1.0)
            places = (*conversion.images, path.parent)
            with open_pictures(places, conversion.out.parent) as pictures:
                for record in islice(read_records(path), _left(conversion, report)):
                    progress.update(task, completed=record.done, description=f"{path.name}: {report.written}")
                    if isinstance(record, Broken):
                        report.skip("row", f"{path}, row {record.number}: {record.reason}")
                        continue
                    try:
                        made = convert(
                            record.cells, conversion.layout, pictures, record.number, path.stem, conversion.decode
                        )
                    except Unusable as error:
                        report.skip(error.column, f"{path}, row {record.number}: {error}")
                        continue
                    report.written += 1
                    report.clipped_boxes += made.clipped
                    report.with_boxes += bool(made.question.boxes)
                    yield made.question
            progress.update(task, completed=1.0)


def _left(conversion: Conversion, report: Report) -> int | None:
    """Rows that may still be read; None for no limit."""
    return None if conversion.limit is None else conversion.limit - report.written - sum(report.skipped.values())


def summary(report: Report, files: Sequence[Path]) -> str:
    return "\n".join([", ".join(map(str, files)), *(f"  {line}" for line in report.lines())])
