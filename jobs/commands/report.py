"""``ergo-rl report``: one self-contained HTML page of a run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ergo_rl.jobs.cli import STOPPED_BY_HAND, command
from ergo_rl.jobs.report import build, follow


@command("report")
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="ergo-rl report",
        description="Write one self-contained HTML page of a run: rewards, coverage, area, mismatch, times and "
        "throughput as curves, and the groups that the run wrote down: coarse view with every box, crops, replies, "
        "reward parts, advantages. It opens from the file, without a server.",
        epilog="example: ergo-rl report runs/panels --follow",
    )
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("--out", type=Path, help="the page (default: report.html in the run's folder)")
    parser.add_argument("--groups", type=_positive, default=120, help="most groups to show (default: %(default)s)")
    parser.add_argument("--follow", action="store_true", help="rebuild it while the run lasts")
    parser.add_argument("--every", type=_positive, default=15, help="with --follow: seconds (default: %(default)s)")
    options = parser.parse_args(argv)
    out = options.out or options.run / "report.html"
    try:
        if options.follow:
            follow(options.run, out, options.groups, options.every)
        else:
            build(options.run, out, options.groups)
    except KeyboardInterrupt:
        if not out.exists():
            return STOPPED_BY_HAND  # before the first page; the usual end of --follow leaves one
    print(f"{out} ({out.stat().st_size / 2**20:.1f} MiB); open it in a browser")
    return 0


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


if __name__ == "__main__":
    raise SystemExit(main())
