"""What all benchmarks say the same way: JSON on stdout and in a file, one line in words, an exit status.

Other work on the machine makes absolute times worthless, so what is compared takes turns within one run, medians are
compared, and the machine's load is part of the report."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def parser_of(doc: str | None, name: str) -> argparse.ArgumentParser:
    """With ``--out``: where the JSON goes, ``benchmarks/results/NAME.json`` unless told otherwise."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / f"{name}.json", help="JSON file; default %(default)s")
    return parser


def report(arguments: argparse.Namespace, found: Mapping[str, Any], good: bool, line: str) -> int:
    """Print and write; the exit status is 1 where a target was missed."""
    verdict = f"{'ok' if good else 'MISSED'}: {line}"
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()}
    said = {"settings": settings, "machine": machine(), "found": rounded(found), "verdict": verdict}
    text = json.dumps(said, indent=2)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(text + "\n")
    print(text)
    print(verdict, file=sys.stderr)
    return 0 if good else 1


def machine() -> dict[str, Any]:
    """Cores, and how many processes wanted one during the last minute: far above what the benchmark itself starts, and
    the figures are of a busy machine."""
    return {"cores": os.cpu_count(), "load_1min": round(os.getloadavg()[0], 1)}


def rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, Mapping):
        return {name: rounded(one) for name, one in value.items()}
    return [rounded(one) for one in value] if isinstance(value, list | tuple) else value


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def cpu_seconds(root: int | None = None) -> float:
    """User and system time so far of this process and all that live below it (Linux; those that ended are left out)."""
    parents, used = {}, {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            cells = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has ended
        parents[int(entry.name)], used[int(entry.name)] = int(cells[1]), int(cells[11]) + int(cells[12])
    family, grown = {root or os.getpid()}, True
    while grown:
        more = {pid for pid, parent in parents.items() if parent in family} - family
        family |= more
        grown = bool(more)
    return sum(used.get(pid, 0) for pid in family) / os.sysconf("SC_CLK_TCK")
