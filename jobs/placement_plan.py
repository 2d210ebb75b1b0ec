"""Plan a run: which process runs on which GPU, what it needs there, where the time goes, and what cannot fit.

Weights, gradients and optimiser state are exact; activations, working memory and time are estimates, labelled as such.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from rich.table import Table

from ergo_rl.console import PlainConsole, table
from ergo_rl.jobs.config import TrainConfig
from ergo_rl.jobs.cost_model import (
    DECODE_SHARE,
    GIB,
    MFU,
    REPLY_SHARE,
    EngineMemory,
    MemoryItem,
    ModelSpec,
    ThroughputEstimate,
    When,
    at_rest,
    engine_memory,
    estimate_throughput,
    largest_view,
    learner_host_parts,
    learner_parts,
    model_spec,
    received,
    total,
    trajectory_tokens,
)  # fmt: skip
from ergo_rl.rewards.config import Backend


@dataclass(frozen=True, slots=True)
class Process:
    """One Ray actor of the run."""

    role: str
    number: int
    gpus: float
    """GPUs that it asks Ray for."""
    parts: tuple[MemoryItem, ...]
    """What it holds on each of its GPUs, or in main memory where it has none."""
    bytes: float
    """The most that these take at once."""
    resting: float = 0.0
    """Bytes that stay on each GPU while it has nothing to do."""
    host_parts: tuple[MemoryItem, ...] = ()
    """What it holds in main memory."""

    @property
    def title(self) -> str:
        return f"{self.role} {self.number}"


@dataclass
class Plan:
    config: TrainConfig
    processes: list[Process]
    gpus: list[list[Process]]
    """The processes on each GPU of the cluster."""
    throughput: ThroughputEstimate
    engines: dict[str, EngineMemory]
    problems: list[str] = field(default_factory=list)
    """Why it cannot run, with the numbers; empty where it fits."""


def make_plan(config: TrainConfig) -> Plan:
    """Raises ConfigError where the size of a model cannot be found out, UnknownFamily where training would."""
    hardware = config.hardware
    policy, judge = model_spec(config.learner.model, config.learner.family), config.reward.verifier
    verifier = model_spec(judge.engine.model, judge.family) if judge.backend is Backend.ENGINE else None
    processes, engines = _processes(config, policy, verifier)
    plan = Plan(config, processes, [], estimate_throughput(config, policy, verifier), engines)
    plan.gpus, missing = place(processes, hardware.nodes, hardware.gpus_per_node)
    if policy.how_quantised:
        missing.append(
            f"{config.learner.model} is quantised ({policy.how_quantised}), and training needs whole weights: name the "
            "model that it was made from"
        )
    plan.problems = [*missing, *_engine_problems(config, engines), *_gpu_problems(plan), *_host_problems(plan)]
    return plan


def _processes(
    config: TrainConfig, policy: ModelSpec, verifier: ModelSpec | None
) -> tuple[list[Process], dict[str, EngineMemory]]:
    hardware, rollout, reward, learner = config.hardware, config.rollout, config.reward, config.learner
    memory = hardware.gpu_memory_gib * GIB
    processes: list[Process] = []
    engines: dict[str, EngineMemory] = {}

    def add_engines(role: str, count: int, gpus: float, needs: EngineMemory, beside: MemoryItem | None = None) -> None:
        engines[role] = needs
        asleep = role == "rollout" and rollout.engine.sleep
        parts: tuple[MemoryItem, ...] = needs.parts
        size = sum(part.bytes for part in parts)
        host = parts
        if gpus:
            how = "kv_cache_memory_bytes" if needs.fixed_cache else "what gpu_memory_utilization leaves"
            cache = MemoryItem("KV cache", max(0.0, needs.cache), how, When.WORKING if asleep else When.ALWAYS)
            parts, host = (*parts[:-1], cache), (_ENGINE_HOST, needs.images)
            size = max(needs.limit, size)
            if beside is not None:
                parts, size = (*parts, beside), size + beside.bytes
            if asleep:
                host += (replace(parts[0], name="weights of an engine that sleeps"),)
        resting = at_rest(parts) if asleep else size
        processes.extend(Process(role, number, gpus, parts, size, resting, host) for number in range(count))

    largest = largest_view(config.episode)
    gpus = rollout.resources.gpus
    needs = engine_memory(policy, rollout.engine, largest, memory if gpus else None)
    add_engines("rollout", rollout.size.max, gpus, needs, received(policy, config))
    gpus = reward.resources.gpus
    if verifier is not None:
        crop = min(config.episode.fine_tokens, reward.verifier.max_visual_tokens)
        needs = engine_memory(verifier, reward.verifier.engine, crop, memory if gpus else None)
        add_engines("reward", reward.workers, gpus, needs)
    else:
        client = (MemoryItem("processes", GIB / 2, "allowance: a client of the URL"),)
        processes += [Process("reward", number, gpus, (), 0.0, host_parts=client) for number in range(reward.workers)]
    parts = tuple(learner_parts(policy, config, bool(learner.resources.gpus)))
    host = tuple(learner_host_parts(policy, config)) if learner.resources.gpus else parts
    size, resting, gpus = total(parts), at_rest(parts), learner.resources.gpus
    processes += [Process("learner", rank, gpus, parts, size, resting, host) for rank in range(learner.ranks)]
    return processes, engines


_ENGINE_HOST = MemoryItem("processes", 6 * GIB, "allowance: vLLM's processes and pinned memory")


def place(processes: Sequence[Process], nodes: int, per_node: int) -> tuple[list[list[Process]], list[str]]:
    """Place processes as Ray does, in the order in which the run starts them: a share of a GPU goes to a GPU that is
    shared already and has enough left, whole GPUs are taken empty and on one node.

    Returns the processes on each GPU, and a sentence for each process that has no place or a bad one."""
    gpus: list[list[Process]] = [[] for _ in range(nodes * per_node)]
    free = [1.0] * len(gpus)
    problems = []
    for process in processes:
        if not process.gpus:
            continue
        if process.gpus < 1:
            fits = [at for at in range(len(gpus)) if free[at] >= process.gpus - 1e-9]
            chosen = sorted(fits, key=lambda at: (free[at], at))[:1]
        else:
            starts = range(0, nodes * per_node, max(1, per_node))
            by_node = [[at for at in range(start, start + per_node) if free[at] == 1] for start in starts]
            chosen = next((empty[: int(process.gpus)] for empty in by_node if len(empty) >= process.gpus), [])
        if not chosen:
            left = ", ".join(f"{share:.2g}" for share in free) or "none"
            problems.append(f"no place for {process.title}, which asks for {process.gpus:g} GPUs; free then: {left}")
        for at in chosen:
            free[at] -= min(1.0, process.gpus)
            gpus[at].append(process)
    for at, there in enumerate(gpus):
        if (ranks := sum(process.role == "learner" for process in there)) > 1:
            problems.append(
                f"GPU {at} would hold {ranks} learner ranks, and NCCL needs a GPU for each: raise "
                "learner.resources.gpus above 0.5"
            )
    return gpus, problems


def _engine_problems(config: TrainConfig, engines: dict[str, EngineMemory]) -> list[str]:
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
        if resources.gpus and least > needs.limit and not needs.fixed_cache:
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
    """Bytes of each process on one GPU in each phase of a step. Where rollout engines sleep there are two phases,
    rollout (the learner rests) and learning (the engines sleep); otherwise everything is there at once."""
    if not config.rollout.engine.sleep:
        return [[process.bytes for process in there]]
    return [
        [process.resting if process.role == idle else process.bytes for process in there]
        for idle in ("learner", "rollout")
    ]


def _gpu_problems(plan: Plan) -> list[str]:
    size = plan.config.hardware.gpu_memory_gib * GIB
    gpus_by_reason: dict[str, list[int]] = {}
    for at, there in enumerate(plan.gpus):
        working = max(phases(plan.config, there), key=sum)
        if (needed := sum(working)) > size:
            listed = " + ".join(f"{process.role} {gib(bytes)}" for process, bytes in zip(there, working, strict=True))
            gpus_by_reason.setdefault(f"{listed} = {gib(needed)} GiB, and a GPU has {size / GIB:g}", []).append(at)
    return [f"GPU {', '.join(map(str, numbers))}: {what}" for what, numbers in gpus_by_reason.items()]


def _host_problems(plan: Plan) -> list[str]:
    """Assumes that processes are spread evenly over the nodes."""
    hardware = plan.config.hardware
    needed, size = host_bytes(plan), hardware.nodes * hardware.memory_gib_per_node * GIB
    if needed <= size:
        return []
    there = f"{hardware.nodes} x {hardware.memory_gib_per_node:g}"
    return [f"main memory: {gib(needed)} GiB are needed, and {there} are there"]


def host_bytes(plan: Plan) -> float:
    """Main memory of all nodes: processes, two versions of the weights in the object store, the driver."""
    return sum(total(process.host_parts) for process in plan.processes) + _object_store(plan) + 2 * GIB


def _object_store(plan: Plan) -> float:
    width = 2 if plan.config.learner.dtype.value == "bfloat16" else 4
    return 2 * width * model_spec(plan.config.learner.model, plan.config.learner.family).parameters


def gib(size: float) -> str:
    return f"{size / GIB:.1f}"


# --- in words --------------------------------------------------------------------------------------------------------


def show(plan: Plan, console: PlainConsole) -> None:
    config, hardware = plan.config, plan.config.hardware
    console.print(
        f"{config.name}: {hardware.nodes} x {hardware.gpus_per_node} GPUs of {hardware.gpu_memory_gib:g} GiB, "
        f"{hardware.memory_gib_per_node:g} GiB of main memory a node; trajectories of at most "
        f"{trajectory_tokens(config):,} tokens, {config.groups_per_step} x {config.rollout.group_size} a step"
    )
    for role in dict.fromkeys(process.role for process in plan.processes):
        same = [process for process in plan.processes if process.role == role]
        if same[0].parts:
            console.print(_parts_table(role, same))
    for role, needs in plan.engines.items():
        cache = f"KV cache {gib(needs.cache)} GiB{' a GPU' if plan.gpus else ''}"
        console.print(f"{role} engine: {cache}, {needs.conversations:.1f} conversations of the full length at once")
    if plan.gpus:
        console.print(_gpu_table(plan))
    console.print(f"main memory, all nodes: {gib(host_bytes(plan))} GiB (estimate)")
    if any(process.gpus for process in plan.processes):
        console.print(_throughput_line(plan.throughput))
    for problem in plan.problems:
        console.say(("does not fit:", "red"), f" {problem}")


def _parts_table(role: str, processes: Sequence[Process]) -> Table:
    first = processes[0]
    where = f"on each of {first.gpus:g} GPUs" if first.gpus >= 1 else "on its GPU" if first.gpus else "in main memory"
    parts = table(f"{role}: {len(processes)} x, each {where}", title_justify="left")
    for name, side in (("part", "left"), ("GiB", "right"), ("how", "left")):
        parts.add_column(name, justify=side)  # type: ignore[arg-type]
    for part in first.parts:
        parts.add_row(part.name, gib(part.bytes) if part.when is not When.START else f"({gib(part.bytes)})", part.how)
    parts.add_section()
    parts.add_row("at most", gib(first.bytes), "")
    return parts


def _gpu_table(plan: Plan) -> Table:
    per_node, size = plan.config.hardware.gpus_per_node, plan.config.hardware.gpu_memory_gib
    places = table("placement", title_justify="left")
    for name in ("node", "GPU", "who", "GiB", "of"):
        places.add_column(name, justify="left" if name == "who" else "right")
    for at, there in enumerate(plan.gpus):
        for share in phases(plan.config, there):
            named = zip(there, share, strict=True)
            who = ", ".join(f"{process.title} ({gib(bytes)})" for process, bytes in named) or "-"
            places.add_row(str(at // per_node), str(at % per_node), who, gib(sum(share)), f"{size:g}")
    return places


def _throughput_line(pace: ThroughputEstimate) -> str:
    phases = {"rollout": pace.rollout, "reward": pace.reward, "learn": pace.learn, "publish": pace.publish}
    shares = ", ".join(f"{name} {seconds:.1f} s ({seconds / pace.step:.0%})" for name, seconds in phases.items())
    together = "rollouts beside learning" if pace.overlapped else "one after the other, rewards beside rollouts"
    return (
        f"a step, a rough estimate: {pace.step:.1f} s; {shares}; {together}. Assumed: replies {REPLY_SHARE:.0%} of "
        f"their limits, passes at {MFU:.0%} of the peak, decoding at {DECODE_SHARE:.0%} of the bandwidth, weights at "
        "2 GB/s, a verifier behind a URL costs nothing"
    )
