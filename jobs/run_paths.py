"""Names in the folder of a run. Imports nothing, so that looking at a run is quick."""

from __future__ import annotations

CONFIG = "config.yaml"
"""A recipe: ``load_config`` reads it."""
ENDED = "ended.json"
METRICS, EVALUATIONS, QUESTIONS = "metrics.jsonl", "evaluations.jsonl", "questions.jsonl"
RECORDS = (METRICS, EVALUATIONS, QUESTIONS)
"""Files with a line per step; a checkpoint holds a copy of each."""
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
