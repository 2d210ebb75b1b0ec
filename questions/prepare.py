"""What ``ergo-rl prepare`` does: a published data set -> one Parquet file of questions, and a report of what was left
out and why; and the embedded demo data set.

The rows are read twice: once to decide how the data set writes options, answers and boxes, and once to convert them,
one by one, so memory does not grow with the data. The file is written aside and renamed when it is whole.
"""

from __future__ import annotations

import importlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import pyarrow.parquet as pq
from rich.progress import BarColumn, TaskProgressColumn, TimeRemainingColumn

from ergo_rl.console import PlainConsole, progress_bar, text_column
from ergo_rl.episodes.types import Question
from ergo_rl.questions.conventions import SIZED_BOXES, Conventions, Survey, Told
from ergo_rl.questions.dataset import DatasetError, expand_paths, write_questions, written_aside
from ergo_rl.questions.formats import FIELDS, ConvertedRow, DatasetFormat, convert_row, see_row
from ergo_rl.questions.image_store import ImageStore, open_image_store
from ergo_rl.questions.readers import ROW_FILES, Broken, Record, read_records
from ergo_rl.questions.rows import BadCell, image_size, shorten

EXAMPLES = 20
"""Rows that the report names for each reason."""
MOST_REASONS = 100
"""Reasons that are counted by themselves; the others are counted together."""
_REPORT = b"ergo_rl.report"
"""Key of the report in the metadata of the Parquet file: file and report are renamed in one step."""


@dataclass
class ConversionReport:
    """What became of the rows."""

    written: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    """Rows that are no questions, by the column that is wrong and why."""
    examples: dict[str, list[str]] = field(default_factory=dict)
    """The first of them, with file and row."""
    clipped_boxes: int = 0
    """Boxes that left their image and were cut to it."""
    with_boxes: int = 0
    renamed: int = 0
    """Rows whose id an earlier row has, and that got another one."""
    conventions: dict[str, str] = field(default_factory=dict)
    """What the data set's options, answers and boxes were taken for."""
    sample: dict[str, str] = field(default_factory=dict)
    """For each field of a question: the column that it was found in, and its value in the first row."""
    notes: list[str] = field(default_factory=list)
    """What else is to be known: archives that break off."""

    def skip(self, reason: str, where: str) -> None:
        reason = reason if reason in self.skipped or len(self.skipped) < MOST_REASONS else "other reasons"
        self.skipped[reason] = self.skipped.get(reason, 0) + 1
        if len(named := self.examples.setdefault(reason, [])) < EXAMPLES:
            named.append(where)

    def lines(self) -> list[str]:
        """Return what a person wants to know, a line for each fact."""
        said = [f"{self.written} questions, {self.with_boxes} of them with boxes"]
        if self.clipped_boxes:
            said.append(f"{self.clipped_boxes} boxes left their image and were cut to it")
        if self.renamed:
            said.append(f"{self.renamed} ids were there before: these rows are called FILE/ROW: ID")
        said += self.notes
        for reason, count in Counter(self.skipped).most_common():
            said.append(f"{count} rows skipped ({reason}), the first: {self.examples[reason][0]}")
        return said

    def taken(self) -> list[str]:
        """Return the first question and what its columns were taken for, a line for each field."""
        how = ", ".join(f"{name} {value}" for name, value in self.conventions.items())
        return [f"{name:8} {value}" for name, value in self.sample.items()] + ([f"taken for: {how}"] if how else [])


@dataclass(frozen=True, slots=True)
class Conversion:
    """A data set to convert, and how."""

    dataset: DatasetFormat
    files: tuple[Path, ...]
    """With the rows: files, patterns, folders."""
    images: tuple[Path, ...]
    """Folders and archives that are searched in order; the folder of the rows is searched last."""
    out: Path
    limit: int | None = None
    """Read only so many rows."""
    decode: bool = False
    """Decode every image to its end, not its header only."""
    told: Told = field(default_factory=Told)
    """What the user says of options, answers and boxes."""

    @property
    def report_path(self) -> Path:
        return self.out.with_suffix(".report.json")

    def expanded(self) -> Conversion:
        """Return it with files only. Raises DatasetError where there is none."""
        files = (path for path in expand_paths(self.files, ROW_FILES) if path.resolve() != self.out.resolve())
        return replace(self, files=tuple(files))

    def settings(self) -> dict[str, Any]:
        """Return everything that the result depends on. Raises DatasetError for a file that is not there."""
        stamps = {}
        for path in (*self.files, *self.images):
            if not path.exists():
                raise DatasetError(f"there is no {path}")
            stamps[str(path)] = [path.stat().st_size, path.stat().st_mtime_ns]
        columns = {name: list(names) for name, names in self.dataset.columns.items()}
        how = [self.dataset.title, asdict(self.told), self.limit, self.decode, _FORMAT]
        return {"files": stamps, "columns": columns, "how": how}


_FORMAT = 2
"""Raise it where the same files lead to other questions than before."""


def convert_dataset(conversion: Conversion, console: PlainConsole | None = None) -> ConversionReport:
    """Write the Parquet file and its report, unless the file is there and was made from the same files in the same way.
    Of two processes that write the same file, the second waits and takes what the first one made.

    Raises DatasetError where a file cannot be read, the rows do not say how they are to be read, or no row is a
    question; then nothing is written."""
    conversion = conversion.expanded()
    settings = conversion.settings()
    out, report = conversion.out, ConversionReport()
    out.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(out) as aside:
        if (known := _known_report(out, settings)) is not None:
            report = known
        else:
            conventions = _decide(conversion)
            report.conventions = {name: str(value) for name, value in asdict(conventions).items()}
            write_questions(
                aside,
                _questions(conversion, conventions, report, console),
                metadata=lambda: {_REPORT.decode(): json.dumps({**asdict(report), "made": settings})},
            )
            if not report.written:
                raise DatasetError(f"no row is a question; {'; '.join(report.lines()[1:]) or 'there are no rows'}")
            with aside.open("rb") as file:
                os.fsync(file.fileno())
            aside.replace(out)
        # The file has the report, too. This copy is for people.
        beside = aside.with_name(f"{aside.name}.{os.getpid()}")
        beside.write_text(json.dumps({**asdict(report), "made": settings}, indent=2) + "\n")
        beside.replace(conversion.report_path)
    return report


def summary(report: ConversionReport, files: Sequence[Path]) -> str:
    """Return the report in words, for the terminal."""
    taken = [f"  the first question: {report.taken()[0]}", *(f"{'':22}{line}" for line in report.taken()[1:])]
    return "\n".join([", ".join(map(str, files)), *taken, *(f"  {line}" for line in report.lines())])


def _known_report(out: Path, settings: dict[str, Any]) -> ConversionReport | None:
    """The report of a file that is there, if it was made in the same way."""
    try:
        found = json.loads(pq.read_metadata(out).metadata[_REPORT])
        same = found.pop("made") == json.loads(json.dumps(settings))
        return ConversionReport(**found) if same else None
    except Exception:  # no file, no Parquet, another's or an older one: it is made again
        return None


# --- the two passes --------------------------------------------------------------------------------------------------


def _rows(conversion: Conversion, leave_out: Sequence[str] = ()) -> Iterator[tuple[Path, ImageStore, Record | Broken]]:
    """All rows up to the limit, each with its file and the images that it may name."""
    left = conversion.limit
    for path in conversion.files:
        with open_image_store((*conversion.images, path.parent), conversion.out.parent) as store:
            for record in islice(read_records(path, leave_out), left):
                left = None if left is None else left - 1
                yield path, store, record


def _decide(conversion: Conversion) -> Conventions:
    """Read the rows, without their images where possible, for how they are to be read."""
    dataset = conversion.dataset
    survey = Survey(conversion.told, Conventions(corners=dataset.corners, boxes=dataset.unit))
    _see_rows(conversion, survey, sizes=False)
    if survey.needs_sizes:
        _see_rows(conversion, survey, sizes=True)
    return survey.decide()


def _see_rows(conversion: Conversion, survey: Survey, sizes: bool) -> None:
    for _, store, record in _rows(conversion, () if sizes else conversion.dataset.image_columns):
        if isinstance(record, Record):
            try:
                see_row(record.cells, conversion.dataset, store, survey, sizes)
            except BadCell:
                continue  # it is skipped later, or what is wrong with it does not matter
        if sizes and survey.sized >= SIZED_BOXES:
            return


def _questions(
    conversion: Conversion, conventions: Conventions, report: ConversionReport, console: PlainConsole | None
) -> Iterator[Question]:
    columns = (text_column("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    met: set[str] = set()
    with progress_bar(*columns, console=console) as progress:
        task = progress.add_task("", total=float(len(conversion.files)))
        for path, store, record in _rows(conversion):
            done = conversion.files.index(path) + record.done
            progress.update(task, completed=done, description=f"{path.name}: {report.written}")
            if isinstance(record, Broken):
                report.skip(f"row {record.reason.partition(':')[0]}", f"{path}, row {record.number}: {record.reason}")
                continue
            try:
                row = convert_row(
                    record.cells, conversion.dataset, store, record.number, path.stem, conventions, conversion.decode
                )
            except BadCell as bad:
                report.skip(bad.kind, f"{path}, row {record.number}: {bad}")
                continue
            finally:
                report.notes += [note for note in store.notes if note not in report.notes]
            yield _counted(row, report, met, f"{path.stem}/{record.number}")


def _counted(row: ConvertedRow, report: ConversionReport, met: set[str], place: str) -> Question:
    question = row.question
    if question.id in met:
        report.renamed += 1
        question = replace(question, id=f"{place}: {question.id}")
        while question.id in met:  # files of one name in two folders
            question = replace(question, id=f"{question.id}'")
    met.add(question.id)
    if not report.written:
        report.sample = _sample(row)
    report.written += 1
    report.clipped_boxes += row.clipped
    report.with_boxes += bool(question.boxes)
    return question


def _sample(row: ConvertedRow) -> dict[str, str]:
    question = row.question
    shown = {name: shorten(getattr(question, name)) for name in FIELDS}
    shown["image"] = "{} x {}".format(*image_size(question.image))
    shown["options"] = shorten(list(question.options))
    shown["boxes"] = shorten([(box.x1, box.y1, box.x2, box.y2) for box in question.boxes])
    found = {name: column or ("columns A, B, ... or the text" if name == "options" else "none")
             for name, column in row.columns.items()}  # fmt: skip
    return {name: f"{value}  (from {found[name]})" for name, value in shown.items()}


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


def prepare_embedded(config: EmbeddedDataset, console: PlainConsole | None = None) -> None:
    """Make the embedded data set where a recipe asks for it and it is absent."""
    if config.panels is not None:
        prepare_panels(Path(config.panels), config.train, config.heldout, config.seed, console)


def prepare_panels(
    out: Path, train: int = 4096, heldout: int = 512, seed: int = 0, console: PlainConsole | None = None
) -> list[Path]:
    """Call ``examples.panels.dataset.prepare_panels``, which is looked up by name: no package imports the examples."""
    paths: list[Path] = importlib.import_module("ergo_rl.examples.panels.dataset").prepare_panels(
        out, train, heldout, seed, console=console
    )
    return paths
