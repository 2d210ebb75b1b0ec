"""``ergo-rl pretrain panels``: the tiny policy and the tiny reward model, from scratch, on a CPU.

Three stages: the vision tower with dense labels (shared by both), then the language part of each with the tower
frozen. docs/pretraining.md says what was tried.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from ergo_rl.cluster.compat import repair_torchvision
from ergo_rl.console import PlainConsole, progress_bar, text_column
from ergo_rl.episodes.families import Qwen25VL
from ergo_rl.examples.panels.batches import (
    EDGE_BINS,
    TEXTS,
    ReplyTask,
    SceneBatches,
    SceneFeatures,
    TowerTask,
    compute_features,
    stream,
)
from ergo_rl.examples.panels.scenes import COLOURS, MARKS
from ergo_rl.examples.panels.scores import policy_scores, reward_scores
from ergo_rl.examples.panels.supervised import DenseTower, GroundedModel, TrainingSchedule, fit, is_finished
from ergo_rl.examples.panels.targets import Pointing
from ergo_rl.examples.panels.tiny_model import TinyConfig, make_model, make_processor, make_tokenizer, save_folder


@dataclass
class PretrainConfig:
    """Everything that decides the weights."""

    seed: int = 0
    """Of the fresh weights, the scenes and the order of the tasks."""
    tower: TrainingSchedule = field(default_factory=lambda: TrainingSchedule(steps=1600, rate=1.5e-3))
    """The vision tower."""
    policy: TrainingSchedule = field(default_factory=lambda: TrainingSchedule(steps=2000, rate=2e-3))
    """The policy's language part."""
    reward: TrainingSchedule = field(default_factory=lambda: TrainingSchedule(steps=2500, rate=2e-3))
    """The reward model's language part."""
    scene_batches: int = 1200
    """Batches of eight scenes that both language parts learn from."""
    looks: int = 40
    """Conversations that teach to point, in each of the policy's batches."""
    reads: int = 16
    """Conversations that teach to read, in each of the policy's batches."""
    verifies: int = 48
    """Conversations in each of the reward model's batches."""
    pointing: Pointing = field(default_factory=lambda: Pointing(inset=23.0))
    """How badly the policy is taught to point."""
    questions: int = 512
    """Held-out scenes that the scores are measured on."""

    def scaled(self, factor: float) -> PretrainConfig:
        def fewer(schedule: TrainingSchedule) -> TrainingSchedule:
            return replace(schedule, steps=max(1, round(schedule.steps * factor)))

        batches = max(8, round(self.scene_batches * min(1.0, factor)))
        return replace(
            self, tower=fewer(self.tower), policy=fewer(self.policy), reward=fewer(self.reward), scene_batches=batches
        )


class Pretraining:
    """The stages in order, each resumable from its own checkpoint in ``work``."""

    def __init__(self, config: PretrainConfig, work: Path, console: PlainConsole) -> None:
        repair_torchvision()
        self.config, self.work, self.console = config, work, console
        self.family = Qwen25VL()
        self.tokenizer = make_tokenizer(TEXTS, self.family)
        self.processor = make_processor(self.tokenizer)
        self._features: list[SceneFeatures] | None = None

    def tower(self) -> tuple[Any, float]:
        """Train the vision tower; return it and the seconds it took."""
        model = make_model(self.tokenizer, TinyConfig(), self.config.seed)
        visual = model.model.visual
        dense = DenseTower(visual, TinyConfig().hidden, len(COLOURS), len(MARKS), EDGE_BINS)
        task = TowerTask(self.family, self.processor.image_processor, self.config.seed)
        seconds = self._fit("vision tower", dense, dense.loss, task, self.config.tower, "tower.pt")
        visual.requires_grad_(False)
        return visual, seconds

    def language(self, role: str, visual: Any) -> tuple[Any, float]:
        """Train a language part on the replies of ``role`` with the tower frozen; return the model and the seconds."""
        config = self.config
        model = make_model(self.tokenizer, TinyConfig(), config.seed + 1)
        model.model.visual.load_state_dict(visual.state_dict())
        model.model.visual.requires_grad_(False)
        # Before the features, whose data loader draws from torch's generator too: the seed decides the weights.
        grounded = GroundedModel(model, TinyConfig().hidden, EDGE_BINS)
        schedule: TrainingSchedule = getattr(config, role)
        mix = {"looks": config.looks, "reads": config.reads} if role == "policy" else {"verifies": config.verifies}
        finished = is_finished(self.work / f"{role}.pt", schedule)  # then no features are needed
        task = ReplyTask(
            [] if finished else self.features(visual),
            self.tokenizer,
            self.family,
            config.seed,
            schedule.steps,
            config.pointing,
            **mix,
        )
        seconds = self._fit(role, grounded, grounded.loss, task, schedule, f"{role}.pt")
        return model, seconds

    def features(self, visual: Any) -> list[SceneFeatures]:
        """Return the tower's features of all scenes, computed once for both models."""
        if self._features is None:
            seed, count = self.config.seed, self.config.scene_batches
            batches = SceneBatches(self.family, self.processor.image_processor, seed, count)
            with self._progress() as progress:
                task = progress.add_task("features of scenes", total=count, figures="")
                self._features = compute_features(visual, batches, lambda done: progress.update(task, completed=done))
        return self._features

    def _fit(
        self, name: str, module: Any, loss: Any, make: Callable[[int], Any], schedule: TrainingSchedule, file: str
    ) -> float:
        log = self.work / f"{name.replace(' ', '_')}.jsonl"
        with self._progress() as progress, log.open("a") as lines:
            task = progress.add_task(name, total=schedule.steps, figures="")

            def report(step: int, figures: Mapping[str, float]) -> None:
                text = " ".join(f"{key} {value:.3f}" for key, value in figures.items())
                progress.update(task, completed=step, figures=text)
                if step % 25 == 0:
                    lines.write(json.dumps({"step": step, **figures}) + "\n")
                    lines.flush()

            checkpoint = self.work / file
            seconds = fit(module, loss, lambda step: stream(make, step, schedule.steps), schedule, checkpoint, report)
            progress.update(task, completed=schedule.steps)
            return seconds

    def _progress(self) -> Progress:
        return progress_bar(
            text_column("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            text_column("{task.fields[figures]}"),
            console=self.console,
        )


def model_card(role: str, command: str, seconds: Mapping[str, float], scores: Mapping[str, float]) -> str:
    """Write the README.md of a model's folder."""
    title = {"policy": "panels-policy", "reward": "panels-reward"}[role]
    what = {
        "policy": "The policy before reinforcement learning: it knows where a panel is, but points badly (boxes too "
        "tight and jittered), so that there is something left to learn.",
        "reward": "The frozen reward model: reads the mark on the asked panel from a crop; guesses where it cannot.",
    }[role]
    rows = "\n".join(f"| {name} | {value:.3f} |" for name, value in scores.items() if name != "questions")
    minutes = ", ".join(f"{name} {value / 60:.1f} min" for name, value in seconds.items())
    return f"""---
license: apache-2.0
pipeline_tag: image-text-to-text
---
# {title}

{what} A tiny Qwen2.5-VL (1.3 million parameters, float32, untied head) trained from scratch on the generated *panels*
scenes; it knows nothing else.

Made by `{command}` on one CPU thread: {minutes}. Loads with `AutoModelForImageTextToText`, `AutoProcessor` and
`vllm serve`.

Measured with greedy decoding on {int(scores["questions"])} held-out scenes (`scores.json`; chance of a mark is 0.25):

| what | share |
|---|---|
{rows}
"""


def _continues(work: Path, config: PretrainConfig, resume: bool) -> bool:
    """Prepare the work folder: as it is where a run is resumed, else empty. False where its run had other settings."""
    settings, kept = json.loads(json.dumps(asdict(config))), work / "settings.json"
    if resume and kept.exists():
        return bool(json.loads(kept.read_text()) == settings)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    kept.write_text(json.dumps(settings, indent=2) + "\n")
    return True


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="ergo-rl pretrain", description=__doc__.split("\n\n")[0])
    parser.add_argument("recipe", choices=["panels"])
    parser.add_argument("--out", type=Path, default=Path("models"), help="where the two folders go (default: models)")
    parser.add_argument("--only", choices=["policy", "reward"], help="make only one of the two models")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--steps-scale", type=float, default=1.0, help="multiplies the steps of every stage (default: 1)"
    )
    parser.add_argument("--questions", type=int, default=512, help="held-out scenes to measure on (default: 512)")
    parser.add_argument("--resume", action="store_true", help="resume an interrupted run")
    parser.add_argument("--work", type=Path, help="checkpoints and logs (default: <out>/.pretrain-<seed>)")
    options = parser.parse_args(argv)
    if options.steps_scale <= 0:
        parser.error("--steps-scale must be above 0")
    config = replace(PretrainConfig(), seed=options.seed, questions=options.questions).scaled(options.steps_scale)
    work = options.work or options.out / f".pretrain-{options.seed}"
    if not _continues(work, config, options.resume):
        print(f"ergo-rl pretrain: {work} holds a run with other settings; leave out --resume", file=sys.stderr)
        return 1
    command = f"ergo-rl pretrain panels --seed {options.seed}"
    if options.steps_scale != 1:
        command += f" --steps-scale {options.steps_scale:g}"
    torch.set_num_threads(1)  # the matrices are small: a second thread waits more than it works, and sums vary
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    console = PlainConsole()
    stages = Pretraining(config, work, console)
    visual, tower_seconds = stages.tower()
    for role, measure in (("policy", policy_scores), ("reward", reward_scores)):
        if options.only not in (None, role):
            continue
        model, seconds = stages.language(role, visual)
        console.print(f"measuring the {role} on {config.questions} held-out scenes")
        model.eval()
        started = time.monotonic()
        scores = measure(model, stages.tokenizer, stages.family, stages.processor.image_processor, config.questions)
        console.print({name: round(value, 3) for name, value in scores.items()})
        spent = {"tower": tower_seconds, "language part": seconds, "scores": time.monotonic() - started}
        folder = options.out / f"panels-{role}"
        card = model_card(role, command, spent, scores)
        record = {
            "command": command,
            "seed": options.seed,
            "seconds": {k: round(v) for k, v in spent.items()},
            "scores": scores,
        }
        save_folder(
            model, stages.processor, folder, {"README.md": card, "scores.json": json.dumps(record, indent=2) + "\n"}
        )
        console.print(f"wrote {folder}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
