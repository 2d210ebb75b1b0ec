"""One self-contained HTML page of a run: curves, and groups with every box; also while the run lasts.

Images are data URLs and a small script in the page draws the plots, so the file opens without a server. Text from the
data is never markup: see ``as_json``.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import logging
import math
import os
import statistics
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup
from PIL import Image

from ergo_rl.episodes.probe import Replacement
from ergo_rl.errors import ErgoError, first_line
from ergo_rl.jobs.run_paths import CONFIG, ENDED, EVALUATIONS, GROUP, METRICS, SAMPLES, TRAJECTORIES, VIEW, crop_name

logger = logging.getLogger(__name__)
Metrics = Mapping[str, Any]

_MOST_POINTS = 600
"""Most points of a curve; more are averaged in equal bins."""
_IMAGE_BYTES = 48 * 1024
"""An image file of at most this size is embedded as it is; a larger one is scaled down."""
_IMAGE_SIDE = 640
"""Longest side of an image that is scaled down, in pixels."""


class NotARunFolder(ErgoError, ValueError):
    """The folder holds no run; the message says what is missing."""


@dataclass(frozen=True, slots=True)
class PlotCurve:
    name: str
    points: Sequence[tuple[float, float]]
    """(step, value) in order of the steps."""
    dots: bool = False
    """Mark the points: measured only at some steps, as evaluations are."""


@dataclass(frozen=True, slots=True)
class Plot:
    title: str
    unit: str
    """``%`` for shares, ``s``, ``/s``, or words."""
    about: str
    curves: Sequence[PlotCurve]
    log: bool = False
    """Whether the axis is logarithmic."""


@dataclass(frozen=True, slots=True)
class TrajectoryReport:
    """One trajectory of a group. The script of the page reads these names."""

    sample: int
    outcome: str
    box_outcome: str
    crop: Sequence[int] | None
    """Corners in pixels of the original."""
    picture: str
    """The crop as a data URL."""
    replies: Sequence[str]
    total: float | None
    parts: Mapping[str, float]
    """Each reward term before its weight."""
    unscored: str
    advantages: Sequence[float | None]
    """Of each turn, or one for all turns; None where it was left out of the loss; empty where the run has none."""
    area_ratio: float | None


@dataclass(frozen=True, slots=True)
class GroupReport:
    """All trajectories of one question at one step. The script of the page reads these names."""

    step: int
    question: str
    options: Sequence[str]
    answer: str
    targets: Sequence[Sequence[int]]
    size: Sequence[int] | None
    """Width and height of the original, in whose pixels boxes are; None for older runs, which drew them in the view."""
    view: str
    """The coarse view as a data URL."""
    attempts: Sequence[TrajectoryReport]


@dataclass(frozen=True, slots=True)
class ProbeTable:
    """Whether the crop is used: a row per figure, a column per replacement of the crop."""

    title: str
    note: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, slots=True)
class RunReport:
    name: str
    state: str
    steps: int
    total_steps: int
    figures: Sequence[tuple[str, str]]
    """(name, value) in the head of the page."""
    plots: Sequence[Plot]
    probe: ProbeTable | None
    """Of the last evaluation that has one."""
    groups: Sequence[GroupReport]
    """At most as many as asked for, spread evenly over the run."""
    groups_there: int
    """How many groups the run has written."""
    config: str = field(repr=False)


def read_run(folder: Path, most_groups: int) -> RunReport:
    """Read everything that the page shows; what is damaged of it is left out, and named in the log. Raises
    NotARunFolder, and OSError where a file cannot be read."""
    if not (folder / METRICS).is_file():
        raise NotARunFolder(f"{folder} is not a run's folder: it has no {METRICS}")
    metrics, evaluations = _figures_in(folder / METRICS), _figures_in(folder / EVALUATIONS)
    config = (folder / CONFIG).read_text(encoding="utf-8", errors="replace") if (folder / CONFIG).is_file() else ""
    settings = _settings(config)
    total_steps = settings.get("total_steps")
    groups = _folders(folder / SAMPLES)
    return RunReport(
        name=str(settings.get("name", folder.resolve().name)),
        state=_state(folder),
        steps=len(metrics),
        total_steps=total_steps if isinstance(total_steps, int) else len(metrics),
        figures=_figures(metrics, evaluations),
        plots=_plots(metrics, evaluations),
        probe=_last_probe(evaluations),
        groups=[group for path in _spread(groups, most_groups) if (group := _group(path)) is not None],
        groups_there=len(groups),
        config=config,
    )


def _settings(config: str) -> dict[str, Any]:
    try:
        found = yaml.safe_load(config)
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _group(folder: Path) -> GroupReport | None:
    """As ``read_group``; None also where its files are damaged, by a full disk or by hand: that costs it alone."""
    try:
        return read_group(folder)
    except Exception as error:  # JSON of any shape, and images
        logger.warning("%s cannot be read and is left out: %s", folder, first_line(error))
        return None


def read_group(folder: Path) -> GroupReport | None:
    """The group in a folder of ``samples/``; None where it is still being written."""
    rows = read_lines(folder / TRAJECTORIES)
    about: dict[str, Any] = {}
    if (folder / GROUP).is_file():
        about = _read_json(folder / GROUP)
        if not isinstance(about.get("question"), dict):  # cut by a full disk
            return None
    elif (folder / VIEW).is_file() or not rows:
        return None
    question = about.get("question") or {"text": rows[0]["question"], "answer": rows[0]["answer"], "options": []}
    return GroupReport(
        step=int(folder.name.rpartition("-")[2]),
        question=question["text"],
        options=question["options"],
        answer=question["answer"],
        targets=[_corners(box) for box in about.get("boxes", [])],
        size=about.get("original"),
        view=_image(folder / (VIEW if about else "coarse.png")),
        attempts=[_trajectory(folder, row) for row in rows],
    )


def _trajectory(folder: Path, row: Mapping[str, Any]) -> TrajectoryReport:
    crop = row["crop"]
    return TrajectoryReport(
        sample=row["sample"],
        outcome=row["outcome"],
        box_outcome=row["box_outcome"],
        crop=None if crop is None else _corners(crop),
        picture="" if crop is None else _image(folder / crop_name(row["sample"])),
        replies=row["replies"],
        total=row["total"],
        parts={name: value for name, value in (row["parts"] or {}).items() if value is not None},
        unscored=row["unscored"] or "",
        advantages=row.get("advantages", []),
        area_ratio=row["area_ratio"],
    )


def _corners(box: Mapping[str, int]) -> list[int]:
    return [box["x1"], box["y1"], box["x2"], box["y2"]]


def _image(path: Path) -> str:
    """The image as a data URL: the file itself where it is small, else a scaled-down WebP."""
    content, kind = path.read_bytes(), "png"
    if len(content) > _IMAGE_BYTES:
        with Image.open(io.BytesIO(content)) as image:
            image.thumbnail((_IMAGE_SIDE, _IMAGE_SIDE))
            buffer = io.BytesIO()
            image.save(buffer, "WEBP", quality=80)
        content, kind = buffer.getvalue(), "webp"
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"


def _folders(samples: Path) -> list[Path]:
    return sorted(path for path in samples.glob("step-*") if (path / TRAJECTORIES).is_file())


def _spread(folders: Sequence[Path], most: int) -> list[Path]:
    """At most ``most`` of the folders, evenly spread, with the first and the last."""
    if len(folders) <= most:
        return list(folders)
    if most <= 1:
        return list(folders[-most:]) if most else []
    return [folders[round(place * (len(folders) - 1) / (most - 1))] for place in range(most)]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON lines of a file that may be growing; a last line without its end is ignored, and one that is no object
    is left out, with a warning."""
    if not path.is_file():
        return []
    whole, _, _ = path.read_bytes().rpartition(b"\n")
    lines = [(number, _object(line)) for number, line in enumerate(whole.split(b"\n"), start=1) if line.strip()]
    for number in [number for number, line in lines if not line]:
        logger.warning("%s, line %d is damaged and left out", path, number)
    return [line for _, line in lines if line]


def _figures_in(path: Path) -> list[dict[str, float]]:
    """The lines that say their step, with what in them is a finite number."""
    lines = [{name: value for name, value in line.items() if _is_finite(value)} for line in read_lines(path)]
    return [line for line in lines if "step" in line]


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and -1e300 < value < 1e300  # a whole number of JSON has any length


def _state(folder: Path) -> str:
    if not (folder / ENDED).is_file():
        return "running, or cut off"
    ended = _read_json(folder / ENDED)
    if "done" not in ended:
        return f"ended; {ENDED} cannot be read"
    return "done" if ended["done"] else f"ended: {ended.get('why', '')}"


def _read_json(path: Path) -> dict[str, Any]:
    """A small file of state; empty where it holds no object."""
    try:
        return _object(path.read_bytes())
    except OSError:
        return {}


def _finite(digits: str) -> float | None:
    number = float(digits)
    return number if math.isfinite(number) else None


def _object(content: bytes) -> dict[str, Any]:
    """The JSON object; empty where it is none. What is infinite or no number is None in it, as JSON has it."""
    try:
        found = json.loads(content, parse_constant=lambda _: None, parse_float=_finite)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


# --- figures and plots ------------------------------------------------------------------------------------------------

_HEAD = (("held-out coverage", "coverage"), ("held-out accuracy", "accuracy"), ("mean crop area", "area_ratio"))


def _figures(metrics: Sequence[Metrics], evaluations: Sequence[Metrics]) -> list[tuple[str, str]]:
    figures = []
    for title, name in _HEAD:
        values = [line[f"eval/{name}"] for line in evaluations if f"eval/{name}" in line]
        if values:
            figures.append((title, f"{values[0]:.1%} → {values[-1]:.1%}" if len(values) > 1 else f"{values[0]:.1%}"))
    rewards = [line["reward/total"] for line in metrics if "reward/total" in line]
    if rewards:
        figures.append(("mean reward, last 10 steps", f"{statistics.mean(rewards[-10:]):.2f}"))
    seconds = [line["time/step_s"] for line in metrics if "time/step_s" in line]
    if seconds:
        figures += [
            ("median step", f"{statistics.median(seconds):.2f} s"),
            ("all steps", f"{sum(seconds) / 60:.1f} min"),
        ]
    return figures


_PLOTS: tuple[tuple[str, str, str, bool, tuple[tuple[str, str], ...]], ...] = (
    ("Reward", "", "Mean weighted sum of its parts, over what was scored.", False, (("total", "reward/total"),)),
    (
        "Reward parts",
        "%",
        "Each part before its weight: 1 where it is earned.",
        False,
        tuple((part, f"reward/{part}") for part in ("region", "box", "soft_box", "accuracy", "format")),
    ),
    (
        "Coverage",
        "%",
        "Crops that hold the whole target, of questions that say where it is; dots: held-out questions, greedy.",
        False,
        (("training", "rollout/coverage"), ("held out", "eval/coverage"), ("held-out accuracy", "eval/accuracy")),
    ),
    (
        "Region reward against coverage",
        "%",
        "Precision: paid crops that hold the target. Recall: crops with the target that are paid.",
        False,
        (("precision", "reward/region_precision"), ("recall", "reward/region_recall")),
    ),
    (
        "Is the crop used?",
        "%",
        "Held out. Gain: wrong without the crop, right with it; harm: the other way round. Reliance: answers that "
        "change when it is replaced.",
        False,
        (
            ("gain", "eval/probe_none_gain"),
            ("harm", "eval/probe_none_harm"),
            ("reliance, by noise", "eval/probe_noise_reliance"),
            ("reliance, by another's", "eval/probe_other_reliance"),
            ("accuracy without", "eval/probe_none_accuracy"),
        ),
    ),
    (
        "Area",
        "%",
        "Mean area of the crop as a share of the image; dots: held out.",
        False,
        (("training", "rollout/area_ratio"), ("held out", "eval/area_ratio")),
    ),
    (
        "Boxes gone wrong",
        "%",
        "Shares of all trajectories: no usable box, (nearly) the whole image, tiny.",
        False,
        (
            ("bad box", "rollout/bad_box_rate"),
            ("whole image", "rollout/full_image_rate"),
            ("tiny", "rollout/tiny_box_rate"),
            ("cut off", "rollout/truncated_rate"),
        ),
    ),
    (
        "Mismatch",
        "nats",
        "Between the engine's and the learner's log-probs of the sampled tokens.",
        True,
        (
            ("mean", "learner/mismatch_mean"),
            ("99th percentile", "learner/mismatch_p99"),
            ("largest", "learner/mismatch_max"),
            ("proof of a publish", "proof/mismatch_mean"),
        ),
    ),
    (
        "Times",
        "s",
        "Of each phase of a step; rollout is what the learner waits for.",
        False,
        (
            ("step", "time/step_s"),
            ("rollout", "time/rollout_s"),
            ("learn", "time/learn_s"),
            ("publish", "time/publish_s"),
            ("proof", "time/proof_s"),
        ),
    ),
    (
        "Entropy",
        "nats",
        "Of the policy at the sampled tokens.",
        False,
        (("turn 1", "learner/turn1_entropy"), ("turn 2", "learner/turn2_entropy")),
    ),
    (
        "Update",
        "",
        "Norm of the gradient before clipping, and the share of tokens that the objective clipped.",
        False,
        (("gradient norm", "learner/grad_norm"), ("clipped", "learner/clip_share")),
    ),
    (
        "Groups without signal",
        "%",
        "Share of groups whose trajectories all earned the same.",
        False,
        (("equal groups", "reward/equal_groups"),),
    ),
)

_REPLACEMENTS = {
    Replacement.NOISE: "noise",
    Replacement.OTHER: "another question's",
    Replacement.ORACLE: "the oracle's",
    Replacement.NONE: "none",
}
_SHARES = ("accuracy", "gain", "harm", "reliance")
_COUNTS = {"replaced": "crops replaced", "failed": "failed (counted as wrong)", "left_out": "left out"}
COSTS = {
    "visual_tokens": ("visual tokens a question", ".1f"),
    "looks": ("looks a question", ".2f"),
    "seconds_median": ("latency (median), s", ".2f"),
}
"""Figure -> (title, format)."""
_PROBE_NOTE = (
    "Turn 2 again, with the policy's crop replaced. Gain: wrong so, right with its own crop; harm: right so, wrong "
    "with its own. Reliance: answers that change, of the crops replaced. Left out: no target box is known, no other "
    "image."
)


def probe_table(metrics: Metrics, title: str) -> ProbeTable:
    """The figures of a probe (``jobs.probe``), each with its interval where ``metrics`` has it; what a question costs
    is of the policy's own crop."""
    names = [f"eval/probe_{how}" for how in _REPLACEMENTS]
    own = {"accuracy": share(metrics, "eval/accuracy"), "failed": number(metrics, "eval/failed")}
    shares = [[figure, own.get(figure, ""), *(share(metrics, f"{name}_{figure}") for name in names)]
              for figure in _SHARES]  # fmt: skip
    counts = [[title, own.get(figure, ""), *(number(metrics, f"{name}_{figure}") for name in names)]
              for figure, title in _COUNTS.items()]  # fmt: skip
    costs = [[title, number(metrics, f"eval/{figure}", form), *([""] * len(names))]
             for figure, (title, form) in COSTS.items()]  # fmt: skip
    rows = [*shares, *counts, *costs]
    return ProbeTable(title, _PROBE_NOTE, ["crop", "its own", *_REPLACEMENTS.values()], rows)


def share(metrics: Metrics, name: str) -> str:
    """A share with its interval, where there is one; a dash where there is none of that name."""
    if name not in metrics:
        return "-"
    low, high = metrics.get(f"{name}_low"), metrics.get(f"{name}_high")
    return f"{metrics[name]:.1%}" + ("" if low is None or high is None else f" [{low:.1%} - {high:.1%}]")


def number(metrics: Metrics, name: str, form: str = ".0f") -> str:
    return format(metrics[name], form) if name in metrics else "-"


def _last_probe(evaluations: Sequence[Metrics]) -> ProbeTable | None:
    probed = [line for line in evaluations if any(name.startswith("eval/probe_") for name in line)]
    if not probed:
        return None
    last = probed[-1]
    count = number(last, "eval/questions")
    return probe_table(last, f"{count} held-out questions after {last['step']} steps; with 95 % intervals")


def _plots(metrics: Sequence[Metrics], evaluations: Sequence[Metrics]) -> list[Plot]:
    """The plots that have any curve; the throughput follows the times."""
    plots = []
    for title, unit, about, log, wanted in _PLOTS:
        curves = [_curve(label, name, metrics, evaluations) for label, name in wanted]
        plots.append(Plot(title, unit, about, [curve for curve in curves if curve.points], log))
        if title == "Times":
            plots.append(_throughput(metrics))
    return [plot for plot in plots if plot.curves]


def _curve(label: str, name: str, metrics: Sequence[Metrics], evaluations: Sequence[Metrics]) -> PlotCurve:
    dots = name.startswith("eval/")
    lines = evaluations if dots else metrics
    return PlotCurve(label, _points((line["step"], line[name]) for line in lines if name in line), dots)


def _throughput(metrics: Sequence[Metrics]) -> Plot:
    """Throughput over whole steps, so waiting and publishing count."""
    curves = []
    for label, name in (("trajectories", "rollout/trajectories"), ("sampled tokens / 100", "learner/tokens")):
        scale = 100 if "100" in label else 1
        pairs = [(line["step"], line[name] / scale / line["time/step_s"]) for line in metrics if line.get("time/step_s")
                 and name in line]  # fmt: skip
        curves.append(PlotCurve(label, _points(pairs)))
    about = "Finished per second of a whole step, waiting and publishing included."
    return Plot("Throughput", "/s", about, [curve for curve in curves if curve.points])


def _points(pairs: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    finite = [(step, value) for step, value in pairs if math.isfinite(value)]
    size = math.ceil(len(finite) / _MOST_POINTS) or 1
    bins = [finite[start : start + size] for start in range(0, len(finite), size)]
    return [(statistics.mean(s for s, _ in pairs), statistics.mean(v for _, v in pairs)) for pairs in bins]


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
