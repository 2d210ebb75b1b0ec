"""``ergo-rl plan CONFIG``: who runs on which GPU, what each needs there, where the time goes; refuses what cannot fit.

Weights, gradients and optimiser state are exact; activations, working memory and time are estimates, and say so.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from rich.console import Console
from rich.table import Table

from ergo_rl.episodes.families import UnknownFamily
from ergo_rl.jobs.commands import add_recipe, recipe_of
from ergo_rl.jobs.config import ConfigError, TrainConfig, load_config
from ergo_rl.jobs.planning.memory import (
    GIB,
    EngineNeeds,
    Part,
    at_rest,
    engine_needs,
    largest_picture,
    learner_host_parts,
    learner_parts,
    total,
    trajectory_tokens,
)  # fmt: skip
from ergo_rl.jobs.planning.pace import DECODE_SHARE, MFU, REPLY_SHARE, Pace, pace
from ergo_rl.jobs.planning.shapes import Shape, shape_of
from ergo_rl.rewards.config import Backend

DOES_NOT_FIT = 3
"""Exit status."""


@dataclass(frozen=True, slots=True)
class Process:
    """One actor: its role and number, the GPUs it asks for, what it needs on each, in bytes, and in main memory.
    resting: bytes on each GPU while it has nothing to do."""

    role: str
    number: int
    gpus: float
    parts: tuple[Part, ...]
    bytes: float
    resting: float = 0.0
    host_parts: tuple[Part, ...] = ()

    @property
    def title(self) -> str:
        return f"{self.role} {self.number}"


@dataclass
class Plan:
    """gpus: for each GPU of the cluster the processes on it; problems: why it cannot run, with the numbers."""

    config: TrainConfig
    processes: list[Process]
    gpus: list[list[Process]]
    pace: Pace
    engines: dict[str, EngineNeeds]
    problems: list[str] = field(default_factory=list)


def make_plan(config: TrainConfig) -> Plan:
    """Raises ConfigError where a model's size cannot be told."""
    hardware = config.hardware
    policy = shape_of(config.learner.model)
    judge = shape_of(config.reward.verifier.engine.model) if config.reward.verifier.backend is Backend.ENGINE else None
    processes, engines = _processes(config, policy, judge)
    plan = Plan(config, processes, [], pace(config, policy, judge), engines)
    plan.gpus, missing = place(processes, hardware.nodes, hardware.gpus_per_node)
    plan.problems += missing
    plan.problems += _engine_problems(config, engines)
    plan.problems += _gpu_problems(plan)
    plan.problems += _host_problems(plan)
    return plan


def _processes(config: TrainConfig, policy: Shape, judge: Shape | None) -> tuple[list[Process], dict[str, EngineNeeds]]:
    hardware, rollout, reward, learner = config.hardware, config.rollout, config.reward, config.learner
    memory = hardware.gpu_memory_gib * GIB
    found: list[Process] = []
    engines: dict[str, EngineNeeds] = {}

    def add_engines(role: str, count: int, gpus: float, needs: EngineNeeds) -> None:
        engines[role] = needs
        asleep = role == "rollout" and rollout.engine.sleep
        parts: tuple[Part, ...] = needs.parts
        size = sum(part.bytes for part in parts)
        host = parts
        if gpus:
            cache = Part("KV cache", max(0.0, needs.cache), "what gpu_memory_utilization leaves", resting=not asleep)
            parts, host = (*parts[:-1], cache), (_ENGINE_HOST,)
            size = max(needs.limit, size)
            if asleep:
                host += (replace(parts[0], name="weights of an engine that sleeps"),)
        resting = at_rest(parts) if asleep else size
        found.extend(Process(role, number, gpus, parts, size, resting, host) for number in range(count))

    picture = largest_picture(config.episode)
    gpus = rollout.resources.gpus
    needs = engine_needs(policy, rollout.engine, picture, memory if gpus else None)
    add_engines("rollout", rollout.size.max, gpus, needs)
    gpus = reward.resources.gpus
    if judge is not None:
        crop = min(config.episode.fine_tokens, reward.verifier.max_visual_tokens)
        needs = engine_needs(judge, reward.verifier.engine, crop, memory if gpus else None)
        add_engines("reward", reward.workers, gpus, needs)
    else:
        client = (Part("processes", GIB / 2, "allowance: a client of the URL"),)
        found += [Process("reward", number, gpus, (), 0.0, host_parts=client) for number in range(reward.workers)]
    parts = tuple(learner_parts(policy, config, bool(learner.resources.gpus)))
    host = tuple(learner_host_parts(policy, config)) if learner.resources.gpus else parts
    size, resting, gpus = total(parts), at_rest(parts), learner.resources.gpus
    found += [Process("learner", rank, gpus, parts, size, resting, host) for rank in range(learner.ranks)]
    return found, engines


_ENGINE_HOST = Part("processes", 6 * GIB, "allowance: vLLM's processes and pinned memory")


def place(processes: Sequence[Process], nodes: int, per_node: int) -> tuple[list[list[Process]], list[str]]:
    """In the order in which the run asks for them, as Ray does: shares of a GPU go where a share is taken already and
    enough is left, whole GPUs are taken empty and on one node. And what found no place, or a bad one."""
    gpus: list[list[Process]] = [[] for _ in range(nodes * per_node)]
    free = [1.0] * len(gpus)
    problems = []
    for one in processes:
        if not one.gpus:
            continue
        if one.gpus < 1:
            fits = [at for at in range(len(gpus)) if free[at] >= one.gpus - 1e-9]
            chosen = sorted(fits, key=lambda at: (free[at], at))[:1]
        else:
            starts = range(0, nodes * per_node, max(1, per_node))
            by_node = [[at for at in range(start, start + per_node) if free[at] == 1] for start in starts]
            chosen = next((empty[: int(one.gpus)] for empty in by_node if len(empty) >= one.gpus), [])
        if not chosen:
            left = ", ".join(f"{share:.2g}" for share in free) or "none"
            problems.append(f"no place for {one.title}, which asks for {one.gpus:g} GPUs; free then: {left}")
        for at in chosen:
            free[at] -= min(1.0, one.gpus)
            gpus[at].append(one)
    for at, there in enumerate(gpus):
        if (ranks := sum(one.role == "learner" for one in there)) > 1:
            problems.append(
                f"GPU {at} would hold {ranks} learner ranks, and NCCL needs a GPU for each: raise "
                "learner.resources.gpus above 0.5"
            )
    return gpus, problems


def _engine_problems(config: TrainConfig, engines: dict[str, EngineNeeds]) -> list[str]:
    problems = []
    rollout, reward = config.rollout, config.reward
    settings = {
        "rollout": (rollout.engine, rollout.resources, "rollout.engine"),
        "reward": (reward.verifier.engine, reward.resources, "reward.verifier.engine"),
    }
    for role, needs in engines.items():
        engine, resources, key = settings[role]
        if resources.gpus and engine.tensor_parallel_size > max(1, resources.gpus):
            problems.append(
                f"{key}.tensor_parallel_size is {engine.tensor_parallel_size}, but a {role} worker gets "
                f"{resources.gpus:g} GPUs"
            )
        least = sum(part.bytes for part in needs.parts)
        if resources.gpus and least > needs.limit:
            listed = ", ".join(f"{part.name} {gib(part.bytes)}" for part in needs.parts)
            problems.append(
                f"a {role} engine needs {gib(least)} GiB on each of its GPUs ({listed}), and "
                f"{key}.gpu_memory_utilization {engine.gpu_memory_utilization:g} of "
                f"{config.hardware.gpu_memory_gib:g} GiB gives it {gib(needs.limit)}"
            )
        elif needs.conversations < 1:
            problems.append(
                f"a {role} engine's KV cache holds less than one conversation of {engine.max_model_len} tokens"
            )
    return problems


def phases(config: TrainConfig, there: Sequence[Process]) -> list[list[float]]:
    """Bytes that each process on one GPU has there at its busiest. Where rollout engines sleep there are two such
    times, playing (a learner rests) and learning (they do); where they do not, everything counts at once."""
    if not config.rollout.engine.sleep:
        return [[one.bytes for one in there]]
    return [[one.resting if one.role == who else one.bytes for one in there] for who in ("learner", "rollout")]


def _gpu_problems(plan: Plan) -> list[str]:
    size = plan.config.hardware.gpu_memory_gib * GIB
    found: dict[str, list[int]] = {}
    for at, there in enumerate(plan.gpus):
        working = max(phases(plan.config, there), key=sum)
        if (needed := sum(working)) > size:
            listed = " + ".join(f"{one.role} {gib(bytes)}" for one, bytes in zip(there, working, strict=True))
            found.setdefault(f"{listed} = {gib(needed)} GiB, and a GPU has {size / GIB:g}", []).append(at)
    return [f"GPU {', '.join(map(str, numbers))}: {what}" for what, numbers in found.items()]


def _host_problems(plan: Plan) -> list[str]:
    """Taken as if processes were spread evenly over nodes."""
    hardware = plan.config.hardware
    needed, size = host_bytes(plan), hardware.nodes * hardware.memory_gib_per_node * GIB
    if needed <= size:
        return []
    there = f"{hardware.nodes} x {hardware.memory_gib_per_node:g}"
    return [f"main memory: {gib(needed)} GiB are needed, and {there} are there"]


def host_bytes(plan: Plan) -> float:
    """Of all nodes together: processes, the object store's two versions of the weights, the driver."""
    return sum(total(one.host_parts) for one in plan.processes) + _object_store(plan) + 2 * GIB


def _object_store(plan: Plan) -> float:
    width = 2 if plan.config.learner.dtype.value == "bfloat16" else 4
    return 2 * width * shape_of(plan.config.learner.model).parameters


def gib(size: float) -> str:
    return f"{size / GIB:.1f}"


# --- in words --------------------------------------------------------------------------------------------------------


def show(plan: Plan, console: Console) -> None:
    config, hardware = plan.config, plan.config.hardware
    console.print(
        f"{config.name}: {hardware.nodes} x {hardware.gpus_per_node} GPUs of {hardware.gpu_memory_gib:g} GiB, "
        f"{hardware.memory_gib_per_node:g} GiB of main memory a node; trajectories of at most "
        f"{trajectory_tokens(config):,} tokens, {config.groups_per_step} x {config.rollout.group_size} a step"
    )
    for role in dict.fromkeys(one.role for one in plan.processes):
        same = [one for one in plan.processes if one.role == role]
        if same[0].parts:
            console.print(_parts_table(role, same))
    for role, needs in plan.engines.items():
        cache = f"KV cache {gib(needs.cache)} GiB{' a GPU' if plan.gpus else ''}"
        console.print(f"{role} engine: {cache}, {needs.conversations:.1f} conversations of the full length at once")
    if plan.gpus:
        console.print(_gpu_table(plan))
    console.print(f"main memory, all nodes: {gib(host_bytes(plan))} GiB (estimate)")
    if any(one.gpus for one in plan.processes):
        console.print(_pace_line(plan.pace))
    for problem in plan.problems:
        console.print(f"[red]does not fit:[/red] {problem}", highlight=False)


def _parts_table(role: str, processes: Sequence[Process]) -> Table:
    first = processes[0]
    where = f"on each of {first.gpus:g} GPUs" if first.gpus >= 1 else "on its GPU" if first.gpus else "in main memory"
    table = Table(title=f"{role}: {len(processes)} x, each {where}", title_justify="left")
    for name, side in (("part", "left"), ("GiB", "right"), ("how", "left")):
        table.add_column(name, justify=side)  # type: ignore[arg-type]
    for part in first.parts:
        table.add_row(part.name, gib(part.bytes) if part.held else f"({gib(part.bytes)})", part.how)
    table.add_section()
    table.add_row("at most", gib(first.bytes), "")
    return table


def _gpu_table(plan: Plan) -> Table:
    per_node, size = plan.config.hardware.gpus_per_node, plan.config.hardware.gpu_memory_gib
    table = Table(title="placement", title_justify="left")
    for name in ("node", "GPU", "who", "GiB", "of"):
        table.add_column(name, justify="left" if name == "who" else "right")
    for at, there in enumerate(plan.gpus):
        for share in phases(plan.config, there):
            named = zip(there, share, strict=True)
            who = ", ".join(f"{one.title} ({gib(bytes)})" for one, bytes in named) or "-"
            table.add_row(str(at // per_node), str(at % per_node), who, gib(sum(share)), f"{size:g}")
    return table


def _pace_line(pace: Pace) -> str:
    phases = {"rollout": pace.rollout, "reward": pace.reward, "learn": pace.learn, "publish": pace.publish}
    shares = ", ".join(f"{name} {seconds:.1f} s ({seconds / pace.step:.0%})" for name, seconds in phases.items())
    together = "playing beside learning" if pace.overlapped else "one after the other, rewards beside rollouts"
    return (
        f"a step, a rough estimate: {pace.step:.1f} s; {shares}; {together}. Assumed: replies {REPLY_SHARE:.0%} of "
        f"their limits, passes at {MFU:.0%} of the peak, decoding at {DECODE_SHARE:.0%} of the bandwidth, weights at "
        "2 GB/s, a reward model behind a URL costs nothing"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="ergo-rl plan",
        description="Which role runs on which GPU, what each needs there, and where the time goes, before anything is "
        f"started. Exit status {DOES_NOT_FIT} where it cannot fit. The keys `hardware.*` say what there is.",
        epilog="example: ergo-rl plan configs/ergo-7b.yaml hardware.gpu_memory_gib=40",
    )
    add_recipe(parser)
    recipe, overrides = recipe_of(parser.parse_intermixed_args(argv))
    try:
        plan = make_plan(load_config(recipe, overrides))
    except (ConfigError, UnknownFamily, OSError) as error:
        print(f"ergo-rl plan: {error}", file=sys.stderr)
        return 1
    show(plan, Console(width=120, soft_wrap=True))
    return DOES_NOT_FIT if plan.problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
