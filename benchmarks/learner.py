"""Padding and tokens per second of the learner: one padded batch, padded batches by token budget, rows end to end.

    python -m benchmarks.learner                  # two minutes on one core; prints JSON, and one line in words

Forward and backward passes of the tiny policy over the same random trajectories, mixed as in training: groups that
share a coarse view, crops of every size, replies of log-normal lengths, one trajectory in five without a second turn.
Lengths are the method's at ``--scale`` 1 (640 visual tokens a view), a quarter of them by default. The ways take turns;
their medians are compared, in CPU seconds of this process, so that other work on the machine counts little. "Tokens"
are never padding.

Then whole updates (passes, ZeRO-2 on one rank, AdamW) of our learner against the loop that one would write with
transformers and DeepSpeed alone on the same trajectories: rows in their order, as many in a padded micro-batch as our
token budget holds of the longest, every image of every row through the tower, logits of every position.

With ``--attention`` instead: the vision tower's attention, trained, at the depth and windows of Qwen2.5-VL-7B (random
weights, toy width): transformers' own, a call for each window and image, against ours, and the calls of a micro-batch.

Exit status 1 where the token budget leaves 10 % of padding, or the learner has less than 0.95 times the tokens per
second of the plain loop.
"""

from __future__ import annotations

import argparse
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from benchmarks.reporting import parser_of, report
from ergo_rl.episodes.families import ModelFamily, family_of, load_tokenizer
from ergo_rl.episodes.types import Box, Finish, Outcome, Trajectory, Turn, View
from ergo_rl.learners.batch import Batcher, ModelInput, Sample
from ergo_rl.learners.config import LearnerConfig, Packing
from ergo_rl.learners.model import PolicyModel

PADDING_LIMIT, LEAST_SPEED = 0.1, 0.95
WAYS = {
    "one_batch": (Packing.NONE, False),
    "budget": (Packing.NONE, True),
    "packed": (Packing.SEQUENCES, True),
}
"""Name -> (layout, whether the token budget holds)."""
TOWERS = {"by_sequence": "sdpa", "by_length": None}
"""Way of the tower's attention -> transformers' name of it; None: ours."""


@dataclass(frozen=True, slots=True)
class Mixture:
    """Lengths of a step, tokens. view: most visual tokens of a view; reply: median of a reply; longest: its limit."""

    view: int = 640
    prompt: int = 120
    reply: int = 120
    longest: int = 512

    def scaled(self, scale: float) -> Mixture:
        return Mixture(*(max(4, round(value * scale)) for value in (self.view, self.prompt, self.reply, self.longest)))

    def trajectories(
        self, family: ModelFamily, marks: tuple[int, int, int], groups: int, seed: int
    ) -> list[Trajectory]:
        """Eight trajectories for each group. marks: ids of the tokens around an image, and of its placeholder."""
        rng, found = np.random.default_rng(seed), []
        for group in range(groups):
            coarse = self._view(family, rng, 1.0)
            for sample in range(8):
                crop = self._view(family, rng, rng.uniform(0.05, 1.0))
                views = (coarse, crop) if rng.random() < 0.8 else (coarse,)
                found.append(self._played(f"q{group}", sample, views, family, marks, rng))
        return found

    def _view(self, family: ModelFamily, rng: np.random.Generator, share: float) -> View:
        """Of any shape, with about ``share`` of the budget."""
        ratio, budget = rng.uniform(0.5, 2.0), max(family.min_visual_tokens, round(self.view * share))
        side = (budget**0.5) * family.multiple
        width, height = family.fit(round(side * ratio**0.5), round(side / ratio**0.5), budget)
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        return View(Box(0, 0, width, height), pixels)

    def _played(
        self, name: str, sample: int, views: tuple[View, ...], family: ModelFamily,
        marks: tuple[int, int, int], rng: np.random.Generator,
    ) -> Trajectory:  # fmt: skip
        turns, length = [], 0
        for shown in views:
            text = rng.integers(0, 200, self.prompt).tolist()
            prompt = np.array([marks[0], marks[2], marks[1], *text], np.int32)
            count = int(np.clip(rng.lognormal(np.log(self.reply), 0.6), 4, self.longest))
            length += len(prompt) - 1 + family.visual_tokens(shown)
            reply = rng.integers(0, 200, count).astype(np.int32)
            turns.append(Turn(prompt, reply, np.full(count, -5.0, np.float32), "", Finish.STOP, length, 0))
            length += count
        outcome = Outcome.ANSWERED if len(turns) == 2 else Outcome.BAD_BOX
        return Trajectory(name, sample, views, tuple(turns), outcome, "ok")


def figures(passed: dict[str, int], seconds: dict[str, list[float]], tokens: int) -> dict[str, Any]:
    """passed: tokens through the model by way, padding included; seconds: of each repetition by way; tokens: real."""
    medians = {way: statistics.median(times) for way, times in seconds.items()}
    first = medians["one_batch"]
    return {
        "tokens": tokens,
        **{f"{way}/padding": round(1 - tokens / passed[way], 4) for way in passed},
        **{f"{way}/tokens_per_s": round(tokens / value, 1) for way, value in medians.items()},
        **{f"{way}/speedup": round(first / value, 3) for way, value in medians.items()},
    }


def against_plain(seconds: dict[str, list[float]], tokens: int) -> dict[str, float]:
    """seconds: of each whole update of ``learner`` and of ``plain``."""
    medians = {way: statistics.median(times) for way, times in seconds.items()}
    return {
        **{f"update/{way}/tokens_per_s": round(tokens / value, 1) for way, value in medians.items()},
        "update/learner/speedup": round(medians["plain"] / medians["learner"], 3),
    }


def verdict(found: dict[str, Any]) -> tuple[bool, str]:
    """Whether the token budget holds padding below the limit and the learner keeps up, and the line in words."""
    padding, speed = found["budget/padding"] < PADDING_LIMIT, found.get("update/learner/speedup")
    parts = [
        f"{way.replace('_', ' ')}: {found[f'{way}/padding']:.0%} padding, {found[f'{way}/tokens_per_s']:.0f} tokens/s "
        f"({found[f'{way}/speedup']:.2f} times)"
        for way in WAYS
    ]
    if speed is not None:
        parts.append(f"whole updates {speed:.2f} times the plain transformers + DeepSpeed loop (target {LEAST_SPEED})")
    said = [*(["TOO MUCH PADDING"] if not padding else []), *(["TOO SLOW"] if speed and speed < LEAST_SPEED else [])]
    return not said, f"{', '.join(said) or 'ok'}; {'; '.join(parts)}"


def prepared(
    arguments: argparse.Namespace, ways: Mapping[str, tuple[Packing, bool]] = WAYS
) -> tuple[dict[str, Callable[[], None]], dict[str, int], int]:
    """For each way a function that makes one step's passes; tokens passed by each; real tokens."""
    from transformers import AutoImageProcessor

    model, family = arguments.model, family_of(arguments.model)
    tokenizer = load_tokenizer(model)
    start, end, pad = map(tokenizer.convert_tokens_to_ids, ("<|vision_start|>", "<|vision_end|>", family.image_pad))
    mixture = Mixture().scaled(arguments.scale)
    played = mixture.trajectories(family, (start, end, pad), arguments.groups, arguments.seed)
    samples = [Sample(one, (1.0,)) for one in played]
    banned, steps, passed, tokens = family.banned_ids(tokenizer), {}, {}, 0
    for way, (packing, bounded) in ways.items():
        policy = PolicyModel(LearnerConfig(model=model, packing=packing, freeze_vision=arguments.freeze_vision))
        if TOWERS.get(way):
            policy.vlm.model.visual.config._attn_implementation = TOWERS[way]
        budget = round(arguments.budget * arguments.scale) if bounded else sys.maxsize
        batcher = Batcher(family, AutoImageProcessor.from_pretrained(model), pad, end, budget, packing)
        plan = batcher.plan(samples)
        passed[way], tokens = plan.passed_tokens, plan.real_tokens

        def step(policy: PolicyModel = policy, batcher: Batcher = batcher, plan: Any = plan) -> None:
            for batch in batcher.batches(plan):
                logprobs, _ = policy(batch, 1.0, banned)
                logprobs.sum().backward()

        warm = replace(plan, bins=((0,),))
        step(plan=warm)
        steps[way] = step
    return steps, passed, tokens


def updates(arguments: argparse.Namespace) -> tuple[dict[str, Callable[[], None]], int]:
    """For our learner and for the plain loop a function that makes one whole update; real tokens of it."""
    from ergo_rl.learners.batch import expand
    from ergo_rl.learners.learner import Learner, Rank

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    config = LearnerConfig(
        model=arguments.model, freeze_vision=arguments.freeze_vision, threads=arguments.threads,
        micro_batch_tokens=round(arguments.budget * arguments.scale),
    )  # fmt: skip
    learner = Learner(config, Rank(0, 1, "127.0.0.1", port))
    family, tokenizer = family_of(config.model), load_tokenizer(config.model)
    start, end, pad = map(tokenizer.convert_tokens_to_ids, ("<|vision_start|>", "<|vision_end|>", family.image_pad))
    mixture = Mixture().scaled(arguments.scale)
    played = mixture.trajectories(family, (start, end, pad), arguments.groups, arguments.seed)
    samples = [Sample(one, (0.5 if one.sample % 2 else -0.5,)) for one in played]
    rows = [expand(sample, family, pad) for sample in samples]
    plain = PlainLoop(config, rows, end)

    def ours() -> None:
        learner.update(samples)

    return {"learner": ours, "plain": plain.update}, sum(map(len, rows))


class PlainLoop:
    """transformers and DeepSpeed, and nothing of ours but the trajectories."""

    def __init__(self, config: LearnerConfig, rows: Sequence[ModelInput], pad: int) -> None:
        import deepspeed
        from transformers import AutoImageProcessor, AutoModelForImageTextToText

        model: Any = AutoModelForImageTextToText.from_pretrained(config.model, dtype=torch.float32)
        if config.freeze_vision:
            model.model.visual.requires_grad_(False)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=config.optimizer.lr, weight_decay=0.0)
        settings = {
            "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "gradient_clipping": 1.0,
            "zero_optimization": {"stage": 2}, "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }  # fmt: skip
        self._engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, dist_init_required=False, config=settings
        )
        self._images = AutoImageProcessor.from_pretrained(config.model)
        size = max(1, config.micro_batch_tokens // max(map(len, rows)))
        self._batches = [rows[first : first + size] for first in range(0, len(rows), size)]
        self._pad, self._tokens = pad, sum(int(row.loss_mask.sum()) for row in rows)

    def update(self) -> None:
        for place, rows in enumerate(self._batches):
            self._engine.set_gradient_accumulation_boundary(place == len(self._batches) - 1)
            self._engine.backward(self._loss(rows), scale_wrt_gas=False)
        self._engine.step()

    def _loss(self, rows: Sequence[ModelInput]) -> torch.Tensor:
        """PPO's clipped loss over the sampled tokens, from logits of every position."""

        def padded(values: Sequence[Any], fill: float) -> torch.Tensor:
            tensors = [torch.as_tensor(one) for one in values]
            return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=fill)

        ids = padded([row.token_ids for row in rows], self._pad)
        mask = padded([row.loss_mask for row in rows], 0).bool()[:, 1:]
        seen = self._images(images=[view.pixels for row in rows for view in row.views], return_tensors="pt")
        logits = self._engine(
            input_ids=ids,
            attention_mask=padded([torch.ones(len(row), dtype=torch.long) for row in rows], 0),
            mm_token_type_ids=padded([row.image_mask.astype(np.int64) for row in rows], 0),
            pixel_values=seen["pixel_values"],
            image_grid_thw=seen["image_grid_thw"],
            use_cache=False,
        ).logits[:, :-1]
        logprobs = torch.log_softmax(logits, -1).gather(-1, ids[:, 1:, None])[..., 0]
        ratio = (logprobs - padded([row.rollout_logprobs for row in rows], 0)[:, 1:]).exp()
        advantages = padded([row.advantages for row in rows], 0)[:, 1:]
        loss = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
        return (loss * mask).sum() / self._tokens


def attention(arguments: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second and attention calls of the trained tower by transformers' own way and by ours."""
    with tempfile.TemporaryDirectory() as folder:
        arguments.model, arguments.freeze_vision = deep_model(arguments.model, folder), False
        steps, _, tokens = prepared(arguments, dict.fromkeys(TOWERS, (Packing.SEQUENCES, True)))
        found: dict[str, Any] = {"tokens": tokens}
        for way, step in steps.items():
            with counted_attention() as counted:
                step()
            found[f"{way}/attention_calls"] = counted[0]
        medians = {way: statistics.median(seconds) for way, seconds in timed(steps, arguments.repeats).items()}
    found |= {f"{way}/tokens_per_s": round(tokens / value, 1) for way, value in medians.items()}
    return found | {"by_length/speedup": round(medians["by_sequence"] / medians["by_length"], 3)}


def deep_model(source: str, folder: str) -> str:
    """Make a model as wide as ``source``, with the 7B's depth of tower and windows, and the same tokenizer."""
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    config: Any = AutoConfig.from_pretrained(source)
    config.vision_config.depth, config.vision_config.fullatt_block_indexes = 32, [7, 15, 23, 31]
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    AutoProcessor.from_pretrained(source).save_pretrained(folder)
    return folder


@contextmanager
def counted_attention() -> Iterator[list[int]]:
    """Count the calls of torch's attention inside the block."""
    real, counted = torch.nn.functional.scaled_dot_product_attention, [0]

    def count(*tensors: Any, **options: Any) -> Any:
        counted[0] += 1
        return real(*tensors, **options)

    torch.nn.functional.scaled_dot_product_attention = count
    try:
        yield counted
    finally:
        torch.nn.functional.scaled_dot_product_attention = real


def timed(steps: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """CPU seconds of each repetition; the ways take turns."""
    seconds: dict[str, list[float]] = {way: [] for way in steps}
    for _ in range(repeats):
        for way, step in steps.items():
            started = time.process_time()
            step()
            seconds[way].append(time.process_time() - started)
    return seconds


def main() -> int:
    parser = parser_of(__doc__, "learner")
    parser.add_argument("--model", default="models/panels-policy", help="default models/panels-policy")
    parser.add_argument("--groups", type=int, default=4, help="of eight trajectories; default 4")
    parser.add_argument("--scale", type=float, default=0.25, help="of all lengths and of the budget; default 0.25")
    parser.add_argument("--budget", type=int, default=16384, help="tokens of a micro-batch at scale 1; default 16384")
    parser.add_argument("--repeats", type=int, default=3, help="default 3")
    parser.add_argument("--threads", type=int, default=1, help="default 1")
    parser.add_argument("--freeze-vision", action="store_true", help="no gradient for the vision tower")
    parser.add_argument("--attention", action="store_true", help="the vision tower's attention, and nothing else")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.attention:
        found = attention(arguments)
        line = "; ".join(f"{name} {value}" for name, value in found.items())
        return report(arguments, found, found["by_length/speedup"] >= LEAST_SPEED, line)
    steps, passed, tokens = prepared(arguments)
    found = figures(passed, timed(steps, arguments.repeats), tokens)
    whole, tokens = updates(arguments)
    for step in whole.values():
        step()
    found |= against_plain(timed(whole, arguments.repeats), tokens)
    good, line = verdict(found)
    return report(arguments, found, good, line.partition("; ")[2] if good else line)


if __name__ == "__main__":
    raise SystemExit(main())
