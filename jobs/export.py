"""Export the policy of a run as a Hugging Face folder with a model card, which ``vllm serve`` loads."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import yaml

from ergo_rl.jobs.checkpoint_store import CheckpointStore, read_manifest, step_of, verify_checkpoint
from ergo_rl.jobs.config import ConfigError, TrainConfig, load_config
from ergo_rl.jobs.evaluation import wilson
from ergo_rl.jobs.metrics import Metrics
from ergo_rl.jobs.report import NotARunFolder, read_lines
from ergo_rl.jobs.run_paths import CHECKPOINTS, CONFIG, EVALUATIONS, POLICY, RECIPE
from ergo_rl.learners.checkpoint import export_state
from ergo_rl.model_names import split_revision

_SCORES = (
    ("target coverage", "coverage", False),
    ("accuracy", "accuracy", True),
    ("mean crop area", "area_ratio", False),
    ("whole image", "full_image_rate", True),
    ("bad box", "bad_box_rate", True),
)
"""Title, name in an evaluation, whether it is a share of all questions (coverage is a share of those with boxes)."""
_TEMPLATE = files("ergo_rl.jobs") / "templates" / "model_card.md.jinja"


def export(run: Path, out: Path, which: str = "") -> int:
    """Write the policy of ``run`` to ``out``, whole or not at all; returns the number of steps it was trained for.

    which: a checkpoint (``latest``, ``best``, ``step-000050``); empty: the finished policy, or else the newest
    checkpoint. Raises NotARunFolder, ConfigError, DamagedCheckpoint, OSError."""
    if not (run / CONFIG).is_file():
        raise NotARunFolder(f"{run} is not a run's folder: it has no {CONFIG}")
    if out.exists():
        raise ConfigError(f"{out} already exists; name another folder with --out, or remove it")
    config = load_config(run / CONFIG)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as aside:
        draft = Path(aside) / "folder"
        if not which and (run / POLICY).is_dir():
            shutil.copytree(run / POLICY, draft)
            step = config.total_steps
        else:
            checkpoint = find_checkpoint(run, which or "latest")
            step = step_of(checkpoint.name)
            # The checkpoint's own configuration: the run may have been resumed with another one since.
            learner = load_config(checkpoint / CONFIG).learner
            export_state(learner, sorted(checkpoint.glob("learner-*.safetensors")), draft)
        shutil.copyfile(run / CONFIG, draft / RECIPE)
        evaluations = read_lines(run / EVALUATIONS)
        (draft / "README.md").write_text(model_card(config, step, evaluations), encoding="utf-8")
        for path in draft.iterdir():
            path.chmod(0o644)  # safetensors writes files for their owner only
        draft.rename(out)
    return step


def find_checkpoint(run: Path, which: str) -> Path:
    """The path of a checkpoint, verified. Raises NotARunFolder where none has that name, DamagedCheckpoint."""
    shelf = CheckpointStore(run / CHECKPOINTS)
    names = sorted(shelf.names())
    if which == "latest":
        path = shelf.newest()
    elif which == "best":
        scores = {name: score for name in names if (score := read_manifest(shelf.folder / name).score) is not None}
        path = shelf.folder / max(scores, key=lambda name: (scores[name], step_of(name))) if scores else None
    else:
        path = shelf.folder / which if which in names else None
    if path is None:
        raise NotARunFolder(f"{run} has no checkpoint {which!r}; it has: {', '.join(names) or 'none'}")
    verify_checkpoint(path)
    return path


def model_card(config: TrainConfig, step: int, evaluations: Sequence[Metrics]) -> str:
    """Markdown with the front matter that model hubs read. Text of the configuration cannot add markup."""
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    environment.filters |= {"cell": _cell, "code": _code, "block": _block}
    prompts, verifier, base = config.episode.prompts, config.reward.verifier, config.learner.model
    front: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["ergo", "visual-grounding", "reinforcement-learning", "grpo"],
    }
    hub_name, _ = split_revision(base)
    if not Path(base).exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", hub_name):
        front["base_model"] = hub_name  # only hub names: a hub refuses a path
    before = next((line for line in evaluations if line["step"] == 0), {})
    after = next((line for line in evaluations if line["step"] == step), {})
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        front=f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        name=re.sub(r"[^\w .,()+-]", "_", config.name),
        version=_version(),
        base=base,
        step=step,
        total_steps=config.total_steps,
        trajectories=config.groups_per_step * config.rollout.group_size,
        coarse_tokens=config.episode.coarse_tokens,
        fine_tokens=config.episode.fine_tokens,
        questions=config.questions.paths,
        heldout=config.evaluation.paths,
        verifier=verifier.engine.model if verifier.backend == "engine" else verifier.endpoint.model,
        cases=int(after.get("eval/questions", after.get("eval/trajectories", 0))),
        scores=_scores(before, after),
        max_model_len=config.rollout.engine.max_model_len,
        dtype=config.rollout.engine.dtype,
        system=prompts.system,
        coarse=prompts.coarse,
        fine=prompts.fine,
        recipe=RECIPE,
        config=yaml.safe_dump(_settings(config), sort_keys=False, allow_unicode=True),
    )


def _scores(before: Metrics, after: Metrics) -> list[tuple[str, str, str]]:
    return [
        (title, _figure(before, f"eval/{name}", share), _figure(after, f"eval/{name}", share))
        for title, name, share in _SCORES
        if f"eval/{name}" in after
    ]


def _figure(metrics: Metrics, name: str, share: bool) -> str:
    if name not in metrics:
        return "-"
    played = count = int(metrics["eval/trajectories"])
    if name == "eval/accuracy":  # of all rows; older versions counted what was scored
        count = int(metrics.get("eval/questions", played - metrics.get("eval/unscored", 0.0)))
    low, high = wilson(metrics[name] * count, count)
    return f"{metrics[name]:.1%}" + (f" ({low:.1%} to {high:.1%})" if share else "")


def _settings(config: TrainConfig) -> Any:
    from omegaconf import OmegaConf

    return OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)


def _cell(text: str) -> str:
    return _code(" ".join(text.split())).replace("|", "\\|")


def _code(text: str) -> str:
    """Inline code in Markdown, for text with any backticks and line ends."""
    shown = text.replace("\n", "\\n")
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", shown)), default=0))
    pad = " " if "`" in shown or not shown else ""
    return f"{ticks}{pad}{shown}{pad}{ticks}"


def _block(text: str) -> str:
    ticks = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{ticks}yaml\n{text}{ticks}"


def _version() -> str:
    try:
        return version("ergo-rl")
    except PackageNotFoundError:  # run from a checkout that Ray shipped
        return "(not installed)"
