"""What ``benchmarks.gpu_check`` measures, each job in a process of its own: panels, learner, both roles on one device,
latency. A job says what it has found as it goes, so that a failure or a deadline loses only the rest."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import math
import os
import resource
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.gpu_models import Notes, Sizes, models, question
from ergo_rl.actors.rollout_worker import EvalMode
from ergo_rl.episodes.types import Box
from ergo_rl.jobs.config import TrainConfig, WeightCheckConfig, load_config
from ergo_rl.jobs.cost_model import GIB, learner_parts, model_spec, total
from ergo_rl.jobs.placement_plan import make_plan

STEPS = 2
UNBOUNDED = 1e9
"""Nats."""


# --- panels, end to end ----------------------------------------------------------------------------------------------


def panels_overrides(folder: Path) -> list[str]:
    """Short, and with nothing outside of ``folder``: a fresh clone has no data."""
    data = folder / "panels"
    return [
        "name=panels", f"runs_dir={folder}/runs", f"total_steps={STEPS + 1}", "groups_per_step=4",
        "weight_check.every=1", "evaluation.every=0", "checkpoint.every=0", "samples_every=0",
        "embedded.train=64", "embedded.heldout=8",
        f"embedded.panels={data}", f"questions.paths=[{data}/train.parquet]",
        f"evaluation.paths=[{data}/heldout.parquet]", "weights.transport=ipc",
    ]  # fmt: skip


def panels(sizes: Sizes, folder: Path, note: Notes) -> None:
    """A few steps of ``ergo-rl train`` on the recipe of the panels, each publish proved."""
    from ergo_rl.jobs.commands.train import main as train

    flash = sizes.gpu and importlib.util.find_spec("flash_attn") is not None
    overrides = panels_overrides(folder) + (["learner.attention=FLASH"] if flash else [])
    config = load_config(Path(sizes.panels), overrides)
    note(
        "panels", wanted=config.total_steps, tolerance=config.weight_check.tolerance, dtype=config.learner.dtype.value,
        attention="flash-attn, varlen" if flash else "torch's sdpa, row by row", weights="ipc",
    )  # fmt: skip
    if status := train([sizes.panels, *overrides]):
        raise RuntimeError(f"ergo-rl train ended with exit status {status}")
    lines = [json.loads(line) for line in (folder / "runs/panels/metrics.jsonl").read_text().splitlines()]
    note(
        "panels",
        steps=len(lines),
        undelivered=(folder / "runs/panels/run.log").read_text().count("did not arrive by ipc"),
        mismatch_mean=max(line["proof/mismatch_mean"] for line in lines),
        grad_norm=[line["learner/grad_norm"] for line in lines],
        **{f"{phase}_s": [line[f"time/{phase}_s"] for line in lines] for phase in ("rollout", "learn", "publish")},
    )


# --- the learner, and both roles on one device -----------------------------------------------------------------------


def recipe(sizes: Sizes, folder: Path, *more: str) -> TrainConfig:
    """``configs/ergo-3b.yaml`` with the random model; on a CPU with small numbers and nothing on a GPU."""
    model = folder / "policy"
    changes = [f"learner.model={model}", f"rollout.engine.model={model}", "rollout.engine.enforce_eager=true"]
    changes += [f"rollout.sampling.{turn}_max_tokens={sizes.reply}" for turn in ("coarse", "fine")]
    if sizes.gpu:
        import torch

        changes.append(f"hardware.gpu_memory_gib={torch.cuda.get_device_properties(0).total_memory / GIB:.2f}")
        changes.append(f"hardware.cpus_per_node={os.cpu_count()}")
    else:
        changes += [
            "learner.dtype=FLOAT32", "rollout.engine.dtype=float32", "hardware.gpus_per_node=0", "rollout.group_size=4",
            "rollout.resources={cpus: 0.25, gpus: 0}", "learner.resources={cpus: 0.25, gpus: 0}", "learner.threads=1",
            "rollout.engine.threads=1", "rollout.engine.max_model_len=512", "rollout.engine.max_num_seqs=8",
            f"episode.coarse_tokens={sizes.small}", f"episode.fine_tokens={sizes.small}",
            "rollout.engine.extra.kv_cache_memory_bytes=null", "learner.offload_optimizer=false",
            "learner.micro_batch_tokens=1024", "cluster.object_store_gib=0.5",
        ]  # fmt: skip
    return with_short_prompts(load_config(Path("configs/ergo-3b.yaml"), [*changes, *more]))


def with_short_prompts(config: TrainConfig) -> TrainConfig:
    """The small tokenizer would take five times as many tokens as Qwen's for the usual prompts."""
    prompts = load_config(Path("configs/panels.yaml")).episode.prompts
    return replace(config, episode=replace(config.episode, prompts=prompts))


def memory() -> dict[str, float]:
    """GiB. host: the most of this process's main memory; on a GPU also the most that torch has handed out (allocated)
    and taken (reserved), and all that is used of the device now, by whomever."""
    import torch

    found = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB}
    if torch.cuda.is_available():
        free, everything = torch.cuda.mem_get_info()
        found |= {
            "allocated": torch.cuda.max_memory_allocated() / GIB,
            "reserved": torch.cuda.max_memory_reserved() / GIB,
            "device": (everything - free) / GIB,
        }
    return found


def learner(sizes: Sizes, folder: Path, note: Notes) -> None:
    """Two updates of the learner alone on made-up trajectories of the method's lengths; needs no engine."""
    from benchmarks.learner import Mixture
    from ergo_rl.episodes.families import family_of, load_tokenizer
    from ergo_rl.learners.batch import Sample
    from ergo_rl.learners.learner import Learner, Rank

    # engines did not sample these trajectories: their log-probs are made up, and no token may leave the loss for it
    config = recipe(sizes, folder, "learner.loss.mismatch_low=0", "learner.loss.mismatch_high=.inf")
    parts = learner_parts(model_spec(config.learner.model), config, sizes.gpu)
    note("learner", planned={part.name: part.bytes / GIB for part in parts}, planned_gib=total(parts) / GIB)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = int(probe.getsockname()[1])
    started = time.monotonic()
    one = Learner(config.learner, Rank(0, 1, "127.0.0.1", port))
    note("learner", load_s=time.monotonic() - started, loaded_gib=memory())
    family, tokenizer = family_of(config.learner.model), load_tokenizer(config.learner.model)
    start, end, pad = map(tokenizer.convert_tokens_to_ids, ("<|vision_start|>", "<|vision_end|>", family.image_pad))
    played = Mixture().scaled(sizes.scale).trajectories(family, (start, end, pad), sizes.questions, seed=0)
    samples = [Sample(each, (0.5 if each.sample % 2 else -0.5,)) for each in played]
    reports = [one.update(samples) for _ in range(STEPS)]
    note(
        "learner", steps=len(reports), seconds=[each.seconds for each in reports], peak_gib=memory(),
        grad_norm=[each.grad_norm for each in reports], micro_batches=reports[0].micro_batches,
    )  # fmt: skip
    one.close()


def colocated(sizes: Sizes, folder: Path, note: Notes) -> None:
    from ergo_rl.cluster.placement import Cluster

    config = recipe(sizes, folder)
    plan = make_plan(config)
    planned = {one.role: one.bytes / GIB for one in plan.processes}
    note("colocated", planned_gib=planned, problems=plan.problems, gpu_gib=config.hardware.gpu_memory_gib)
    with Cluster.connect(config.cluster) as cluster:
        asyncio.run(_colocated(cluster, config, sizes, folder, note))


async def _colocated(cluster: Any, config: TrainConfig, sizes: Sizes, folder: Path, note: Notes) -> None:
    """An engine and a learner take turns on one device for two steps, all but the reward real. A random policy writes
    on until its reply is cut off, so trajectories have one turn. The engine starts first: vLLM sizes its working memory
    by what is free, and takes it that nobody else allocates meanwhile."""
    from ergo_rl.actors.rollout_pool import Rollout, RolloutPool
    from ergo_rl.cluster.weight_sync import WeightChannel
    from ergo_rl.jobs.weight_check import WeightCheck
    from ergo_rl.learners.learner_group import LearnerGroup, TrainingGroup

    rollouts = RolloutPool.launch(cluster, config.rollout, config.episode)
    await rollouts.ready(config.start_deadline_s)
    learners = await LearnerGroup.launch(cluster, config.learner)
    channel, sides = WeightChannel(learners, rollouts), math.isqrt(sizes.small) * 40
    size = sum(file.stat().st_size for file in (folder / "policy").glob("*.safetensors"))
    measured = WeightCheckConfig(tolerance=UNBOUNDED)  # the verdict is ours: a publish that is off has figures, too
    proof = await WeightCheck.prepare(rollouts, learners, [question(0, sides)], measured)
    published, means, most, steps = [], [], [], []

    async def publish(version: int) -> None:
        done = await channel.publish(version)
        assert done.load_s is not None, "waited for"
        published.append({"gather_s": done.gather_s, "load_s": done.load_s})
        note("publish", bytes=size, publications=published)
        found = await proof.measure(version)
        means.append(found["proof/mismatch_mean"])
        most.append(found["proof/mismatch_max"])
        note("mismatch", dtype=sizes.dtype, tolerance=config.weight_check.tolerance, means=means, most=most)

    await publish(0)
    asked = [question(number, sides) for number in range(sizes.questions)]
    for step in range(1, STEPS + 1):
        started = time.monotonic()
        played = await asyncio.gather(*(rollouts.rollout(one, seed=step) for one in asked))
        groups = []
        for one in played:
            if not isinstance(one, Rollout):
                raise RuntimeError(f"{one.question_id} could not be played: {one.reason}")
            tokens = tuple(facts.prompt_tokens + sum(facts.reply_tokens) for facts in one.result.summaries)
            advantages = tuple((0.5 if place % 2 else -0.5,) for place in range(len(tokens)))
            groups.append(TrainingGroup(one.result.question_id, one.trajectories, advantages, tokens))
        rollout_s = time.monotonic() - started
        metrics = await learners.update(groups)
        learn_s = time.monotonic() - started - rollout_s
        kept = {name: metrics[f"learner/{name}"] for name in ("grad_norm", "tokens", "micro_batches", "mismatch_mean")}
        steps.append({"rollout_s": rollout_s, "learn_s": learn_s} | kept)
        note("colocated", steps=steps)
        await publish(step)
    peak = await learners._actors[0].__ray_call__.remote(lambda _: memory())
    note("colocated", peak_gib=peak)
    await learners.close()
    await rollouts.close()


# --- latency ---------------------------------------------------------------------------------------------------------


def latency(sizes: Sizes, folder: Path, note: Notes) -> None:
    """Two stages at few visual tokens against one look at few and at many; one question at a time, greedy. The crop is
    the whole image, whatever turn 1 wrote: all visual tokens of the budget are read twice."""
    asyncio.run(_latency(latency_config(sizes, folder), sizes, note))


def latency_config(sizes: Sizes, folder: Path) -> TrainConfig:
    """``configs/ergo-7b.yaml`` with dummy weights, eager: capturing its graphs takes longer than what is measured."""
    model, limit = folder / "latency", sizes.large + 1024 + 3 * sizes.reply
    changes = [
        f"learner.model={model}", f"rollout.engine.model={model}", f"rollout.engine.dtype={sizes.dtype}",
        f"rollout.engine.max_model_len={limit}", "rollout.engine.enforce_eager=true",
        f"rollout.engine.threads={4 if sizes.gpu else 1}", f"episode.coarse_tokens={sizes.small}",
        f"episode.fine_tokens={sizes.small}", "rollout.engine.extra={load_format: dummy}",
    ]  # fmt: skip
    changes += [f"rollout.sampling.{turn}_max_tokens={sizes.reply}" for turn in ("coarse", "fine")]
    return with_short_prompts(load_config(Path("configs/ergo-7b.yaml"), changes))


async def _latency(config: TrainConfig, sizes: Sizes, note: Notes) -> None:
    from ergo_rl.episodes.families import family_of
    from ergo_rl.jobs.policy_clients import EngineClient

    family = family_of(config.rollout.engine.model)
    client = await EngineClient.start(config, family)
    side = math.isqrt(sizes.large) * family.multiple
    ways = {
        "two_stage_small": EvalMode(sizes.small),
        "direct_small": EvalMode(sizes.small, direct=True),
        "direct_large": EvalMode(sizes.large, direct=True),
    }
    found: dict[str, dict[str, Any]] = {way: {"seconds": []} for way in ways}
    for repeat in range(sizes.repeats + 1):
        for place, (way, manner) in enumerate(ways.items()):
            asked = question(1 + repeat * len(ways) + place, side)
            result = await client.run_episode(asked, manner, Box(0, 0, side, side))
            if repeat:  # the first round warms up
                found[way]["seconds"].append(result.seconds)
                last = len(result.trajectory.turns[-1].completion_ids)
                found[way] |= {"visual_tokens": result.visual_tokens(family), "last_reply_tokens": last}
                note("latency", small=sizes.small, large=sizes.large, reply=sizes.reply, ways=found)
    await client.close()


MEASURES: dict[str, Callable[[Sizes, Path, Notes], None]] = {
    "models": models, "panels": panels, "learner": learner, "colocated": colocated, "latency": latency,
}  # fmt: skip
