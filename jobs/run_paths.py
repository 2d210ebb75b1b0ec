"""Names in the folder of a run, and how a small file in it is replaced. Imports little: looking at a run is quick."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

CONFIG = "config.yaml"
"""A recipe: ``load_config`` reads it."""
INPUTS = "inputs.json"
"""Fingerprints of the training files and models (``jobs.fingerprints``)."""
ENDED = "ended.json"
METRICS, EVALUATIONS, QUESTIONS = "metrics.jsonl", "evaluations.jsonl", "questions.jsonl"
RECORDS = (METRICS, EVALUATIONS, QUESTIONS)
"""Files with a line per step; a checkpoint notes how far each of them was."""
CHECKPOINTS = "checkpoints"
POLICY = "policy"
"""The policy after the last step, a Hugging Face folder."""
RECIPE = "ergo-rl.yaml"
"""In an exported folder: the run's configuration, with the prompts and budgets that the policy was trained with."""
SAMPLES = "samples"
GROUP, TRAJECTORIES, VIEW = "group.json", "trajectories.jsonl", "view.png"
"""In a folder of samples; ``GROUP`` is written last."""


def step_folder(step: int) -> str:
    """Name of a folder that belongs to a step, of checkpoints and of samples."""
    return f"step-{step:06d}"


def crop_name(sample: int) -> str:
    return f"crop-{sample:02d}.png"


def replace_file(path: Path, content: bytes) -> None:
    """Write a small file aside, force it to the disk and rename it: a full disk or a crash leaves the old or the new
    one, never a part. Raises OSError."""
    aside = path.with_name(f".{path.name}.new")
    try:
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
        sync_folder(path.parent)
    except OSError:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Force the names in ``folder`` to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
