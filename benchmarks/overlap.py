"""Step time against the larger of rollout time and learning time, for staleness 0, 1, 2.

    python -m benchmarks.overlap                  # a few minutes on two cores, after the start of the engines

One crew (rollout worker, reward worker, learner) of a recipe plays the training loop's steps, in blocks of each
staleness that take turns. Rollout and learning time are those of the blocks of staleness 0, where nothing overlaps;
from each block the steps in which the pipeline fills are left out. Target: a step at staleness 1 takes at most 1.10
times the larger of the two.

Beside it is the CPU time that a step takes in all processes, divided by the cores of this machine: no schedule can be
faster than that here, where rollouts, reward model and learner share the cores (with a GPU for each role it is no
limit). Where a step at staleness 1 is close to it, the machine is what is missing.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.reporting import cpu_seconds, parser_of, report, spread
from ergo_rl.cluster.placement import Cluster
from ergo_rl.cluster.weight_sync import WeightChannel
from ergo_rl.episodes.config import OnBadRow
from ergo_rl.jobs.advantage_estimator import AdvantageEstimator
from ergo_rl.jobs.cli import DEFAULT_RECIPE
from ergo_rl.jobs.config import TrainConfig, load_config
from ergo_rl.jobs.evaluation import launch_workers
from ergo_rl.jobs.rollout_scheduler import RolloutScheduler
from ergo_rl.learners.learner_group import LearnerGroup
from ergo_rl.questions.dataset import QuestionStream
from ergo_rl.questions.prepare import prepare_embedded
from ergo_rl.rewards.terms import term_weights

TARGET = 1.10


class Loop:
    """The training loop's step without its records."""

    def __init__(self, config: TrainConfig, rollouts: Any, rewards: Any, learners: LearnerGroup) -> None:
        self._config, self._rollouts, self._rewards, self._learners = config, rollouts, rewards, learners
        self._credit = AdvantageEstimator(config.learner, term_weights(config.reward))
        self._weights = WeightChannel(learners, rollouts)
        self._version, self._questions = 0, QuestionStream(config.questions)

    async def block(self, staleness: int, steps: int) -> list[dict[str, float]]:
        """Seconds of each step and its phases, and CPU seconds of all processes."""
        await self._weights.publish(self._version)
        flow = RolloutScheduler(self._questions, self._rollouts, self._rewards, self._version, OnBadRow.SKIP)
        count, found = self._config.groups_per_step, []
        async with flow:
            for _ in range(steps):
                times, cpu = [time.perf_counter()], cpu_seconds()
                flow.keep_ahead(count * (1 + staleness))
                groups = await flow.take(count, self._version - staleness, lambda _: True, 0)
                times.append(time.perf_counter())
                await self._learners.update(self._credit.batch(groups))
                times.append(time.perf_counter())
                self._version += 1
                await self._weights.publish(self._version, wait=staleness == 0)
                times.append(time.perf_counter())
                phases = [later - earlier for earlier, later in pairwise(times)]
                found.append(dict(zip(("rollout", "learn", "publish"), phases, strict=True)))
                found[-1] |= {"step": times[-1] - times[0], "cpu": cpu_seconds() - cpu}
        return found


async def measure(config: TrainConfig, cluster: Cluster, arguments: argparse.Namespace) -> dict[int, list[Any]]:
    rollouts, rewards = launch_workers(cluster, config)
    learners = await LearnerGroup.launch(cluster, config.learner)
    await asyncio.gather(rollouts.ready(config.start_deadline_s), rewards.ready(config.start_deadline_s))
    loop = Loop(config, rollouts, rewards, learners)
    await loop.block(0, 2)  # engines warm up
    found: dict[int, list[Any]] = {staleness: [] for staleness in arguments.staleness}
    for _ in range(arguments.repeats):
        for staleness in arguments.staleness:
            steps = await loop.block(staleness, 1 + staleness + arguments.steps)
            found[staleness] += steps[1 + staleness :]
    return found


def figures(steps: dict[int, list[dict[str, float]]], cores: int) -> dict[str, Any]:
    """steps: of each staleness, seconds by phase."""
    rollout, learn = (spread([step[name] for step in steps[0]])["median"] for name in ("rollout", "learn"))
    larger = max(rollout, learn)
    found: dict[str, Any] = {"rollout_s": rollout, "learn_s": learn, "larger_s": larger, "staleness": {}}
    for staleness, measured in steps.items():
        step = spread([one["step"] for one in measured])
        found["staleness"][staleness] = {
            "step_s": step,
            "publish_s": spread([one["publish"] for one in measured])["median"],
            "waiting_for_rollouts_s": spread([one["rollout"] for one in measured])["median"],
            "learn_s": spread([one["learn"] for one in measured])["median"],
            "cpu_s_per_core": spread([one["cpu"] / cores for one in measured])["median"],
            "step/larger": step["median"] / larger,
        }
    return found


def verdict(found: dict[str, Any]) -> tuple[bool, str]:
    one = found["staleness"][1]
    parts = [f"{staleness}: {each['step/larger']:.2f}" for staleness, each in found["staleness"].items()]
    line = (
        f"step / max(rollout {found['rollout_s']:.2f} s, learn {found['learn_s']:.2f} s) by staleness: "
        f"{', '.join(parts)} (target {TARGET} at 1); a step at staleness 1 takes {one['step_s']['median']:.2f} s, its "
        f"CPU time on these cores alone {one['cpu_s_per_core']:.2f} s"
    )
    return one["step/larger"] <= TARGET, line


def main() -> int:
    parser = parser_of(__doc__, "overlap")
    parser.add_argument("recipe", nargs="?", default=DEFAULT_RECIPE, help="YAML recipe (default: %(default)s)")
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value", help="values that override the recipe's")
    parser.add_argument("--staleness", type=int, nargs="+", default=[0, 1, 2], help="default 0 1 2; 0 and 1 are needed")
    parser.add_argument("--steps", type=int, default=4, help="of a block that count; default 4")
    parser.add_argument("--repeats", type=int, default=3, help="blocks of each staleness; default 3")
    arguments = parser.parse_args()
    if not {0, 1} <= set(arguments.staleness):
        parser.error("--staleness needs 0 (for the times of rollout and learning) and 1 (for the target)")
    config = load_config(Path(arguments.recipe), arguments.set)
    prepare_embedded(config.embedded)
    with Cluster.connect(config.cluster) as cluster:
        steps = asyncio.run(measure(config, cluster, arguments))
    found = figures(steps, os.cpu_count() or 1)
    good, line = verdict(found)
    return report(arguments, found, good, line)


if __name__ == "__main__":
    raise SystemExit(main())
