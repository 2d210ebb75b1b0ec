"""Build one self-contained HTML page of a run: curves, and groups with every box.

Images are data URLs and a small script in the page draws the plots, so the file opens without a server. Text from the
data is never markup: see ``as_json``.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import tempfile
import time
from dataclasses import asdict
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from ergo_rl.jobs.report_data import RunReport, read_run
from ergo_rl.jobs.run_paths import ENDED

_TEMPLATES = files("ergo_rl.jobs") / "templates"


def build(folder: Path, out: Path, most_groups: int, renew_s: float = 0.0) -> RunReport:
    """Write the page of the run in ``folder`` to ``out``, which is replaced atomically: a browser never sees half.

    renew_s: seconds after which the page reloads itself; 0: never. Raises NotARunFolder, OSError."""
    run = read_run(folder, most_groups)
    _replace(out, page(run, renew_s))
    return run


def page(run: RunReport, renew_s: float = 0.0) -> str:
    """The page as text. Its Content-Security-Policy allows one script, its own, by the hash."""
    style, script = ((_TEMPLATES / f"report.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    template = environment.from_string((_TEMPLATES / "report.html.jinja").read_text(encoding="utf-8"))
    data = {"plots": [asdict(plot) for plot in run.plots], "groups": [asdict(group) for group in run.groups]}
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
    """JSON that is safe inside a script element: no text of a question or reply can begin or end a tag in it."""
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
    """Rebuild the page every ``every_s`` seconds while the run lasts; the last page, after its end, does not reload."""
    while True:
        over = (folder / ENDED).exists()
        run = build(folder, out, most_groups, 0.0 if over else every_s)
        print(f"{out}: {run.steps} of {run.total_steps} steps, {run.state}", flush=True)
        if over:
            return
        time.sleep(every_s)
