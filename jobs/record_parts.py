"""The records of a run in its checkpoints: in parts that later checkpoints share as links, so that a long run's records
are on the disk once and not once for each checkpoint.

A part holds the bytes from START to END of a record: ``metrics.START-END.jsonl``. A new part takes in those before it
that are not larger, so a record of a hundred thousand steps has about a dozen.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from ergo_rl.jobs.checkpoint_store import CheckpointWriter, DamagedCheckpoint, read_manifest

logger = logging.getLogger(__name__)

_PART = re.compile(r"(\w+)\.(\d{15})-(\d{15})\.jsonl", re.ASCII)


def write_record(writer: CheckpointWriter, record: Path, earlier: Path | None) -> None:
    """Write what is in ``record`` so far, which has only grown since the checkpoint ``earlier``. Raises OSError."""
    entries = {} if earlier is None else _entries(earlier)
    parts, size = _parts(entries, record.name), record.stat().st_size
    start = parts[-1][1] if parts else 0
    if start > size or not _is_chain(parts):
        parts, start = [], 0
    while parts and start < size and parts[-1][1] - parts[-1][0] <= size - start:
        start = parts.pop()[0]
    for begin, end in parts:
        name = _name(record.name, begin, end)
        assert earlier is not None
        writer.share(name, earlier, entries[name])
    if start < size:
        with record.open("rb") as file, writer.create(_name(record.name, start, size)) as part:
            file.seek(start)
            while start < size and (piece := file.read(min(1 << 20, size - start))):
                start += len(piece)
                part.write(piece)


def read_record(checkpoint: Path, name: str) -> tuple[bytes, bool]:
    """Return the lines of a record as a checkpoint has it, and whether they are all there. A checkpoint of an older
    version has it whole in one file.

    Lines that are damaged are left out, and that is logged."""
    parts = _parts((path.name for path in checkpoint.iterdir()), name)
    paths = [checkpoint / _name(name, *part) for part in parts]
    content, problem = b"", ""
    for path in paths or [checkpoint / name]:
        try:
            content += path.read_bytes()
        except FileNotFoundError:
            continue  # nothing was recorded yet
        except OSError as error:
            problem = str(error)
    lines = content.splitlines(keepends=True)
    good = [line for line in lines if _is_record(line)]
    if len(good) < len(lines) or problem:
        logger.warning(
            "%s: %d lines of %s are damaged and left out %s", checkpoint, len(lines) - len(good), name, problem
        )
    return b"".join(good), len(good) == len(lines) and not problem and _is_chain(parts)


def _is_record(line: bytes) -> bool:
    try:
        return line.endswith(b"\n") and isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _parts(names: Iterable[str], record: str) -> list[tuple[int, int]]:
    """Return (start, end) of the parts of a record, in order."""
    matches = [match for match in map(_PART.fullmatch, names) if match is not None]
    return sorted((int(match[2]), int(match[3])) for match in matches if f"{match[1]}.jsonl" == record)


def _is_chain(parts: Sequence[tuple[int, int]]) -> bool:
    """Whether each part begins where the one before it ends, and the first at 0."""
    return all(begin == end for (begin, _), end in zip(parts, [0, *(end for _, end in parts)], strict=False))


def _name(record: str, begin: int, end: int) -> str:
    return f"{record.removesuffix('.jsonl')}.{begin:015d}-{end:015d}.jsonl"


def _entries(checkpoint: Path) -> dict[str, tuple[int, str]]:
    try:
        return read_manifest(checkpoint).files
    except DamagedCheckpoint:  # all is written anew
        return {}
