"""``ergo-rl report``: one self-contained HTML page of a run: curves, groups with every box, winners and losers.

Everything is in the one file (pictures as data URLs, plots drawn by a small script in it), so it opens without a
server and can be sent to someone. Text from the data is never markup: see ``as_json``.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from ergo_rl.jobs.layout import ENDED
from ergo_rl.jobs.pages.report_data import NoRun, RunShown, read_run

_PAGE = files("ergo_rl.jobs.pages") / "page"


def build(folder: Path, out: Path, most_groups: int, renew_s: float = 0.0) -> RunShown:
    """Write the page of the run in ``folder`` to ``out``, which is replaced as a whole: a browser never sees half.

    renew_s: the page reloads itself so often, in seconds; 0: never. Raises NoRun, OSError."""
    run = read_run(folder, most_groups)
    _replace(out, page(run, renew_s))
    return run


def page(run: RunShown, renew_s: float = 0.0) -> str:
    """The page as text. Only its own script may run: the policy names it by its hash."""
    style, script = ((_PAGE / f"report.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    template = environment.from_string((_PAGE / "report.html").read_text(encoding="utf-8"))
    data = {"plots": [asdict(one) for one in run.plots], "groups": [asdict(one) for one in run.groups]}
    return template.render(
        run=run,
        made=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S %Z"),
        every=f"{renew_s:g}",
        style=Markup(style),
        script=Markup(script),
        script_hash=Markup(f"sha256-{digest}"),
        data=Markup(as_json({**data, "renew_s": renew_s})),
    )


def as_json(value: Any) -> str:
    """JSON that is safe inside a script element: whatever a question or a reply says, no tag begins or ends in it."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def _replace(out: Path, text: str) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=out.parent, prefix=f".{out.name}-", delete=False) as f:
        f.write(text)
    os.chmod(f.name, 0o644)
    os.replace(f.name, out)


def follow(folder: Path, out: Path, most_groups: int, every_s: float) -> None:
    """Build the page anew while the run goes on, and once more, without renewing itself, when it has ended."""
    while True:
        over = (folder / ENDED).exists()
        run = build(folder, out, most_groups, 0.0 if over else every_s)
        print(f"{out}: {run.steps} of {run.total_steps} steps, {run.state}", flush=True)
        if over:
            return
        time.sleep(every_s)


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
    parser.add_argument("--follow", action="store_true", help="build it anew while the run goes on")
    parser.add_argument("--every", type=_positive, default=15, help="with --follow: seconds (default: %(default)s)")
    options = parser.parse_args(argv)
    out = options.out or options.run / "report.html"
    try:
        if options.follow:
            follow(options.run, out, options.groups, options.every)
        else:
            build(options.run, out, options.groups)
    except (NoRun, OSError) as error:
        print(f"ergo-rl report: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if not out.exists():
            return 130  # of --follow, before the first page; after it the last page stays
    print(f"{out} ({out.stat().st_size / 2**20:.1f} MiB); open it in a browser")
    return 0


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


if __name__ == "__main__":
    raise SystemExit(main())
