"""SIMULATION: what driver and store cost per trajectory, with 1 to 256 rollout workers whose engines are timers.

    python -m benchmarks.driver                   # two to three minutes on two cores

Everything on the driver's side is real: the flow of questions, both pools with their Ray calls, the trajectory store,
credit and metrics. Rollout workers and the reward model are timers in a few Ray actor processes (``--processes``): one
group takes ``--seconds``, a worker plays one at a time, and the learner takes no time at all. So the ideal rate is
workers / seconds, and what is missing is the driver's. Overhead is the driver's CPU time per trajectory, without what
its process uses while nothing is played (Ray's threads; ``idle_ms_per_s``, measured first). Targets: at most 1 ms, and
at least 95 % of linear with the most workers.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import ray

from benchmarks.reporting import parser_of, report
from ergo_rl.actors.config import RolloutConfig
from ergo_rl.actors.rollout_pool import RolloutPool
from ergo_rl.actors.rollout_worker import GroupResult, summarize
from ergo_rl.cluster.config import ClusterConfig
from ergo_rl.cluster.placement import Cluster
from ergo_rl.cluster.worker_pool import Faults, WorkerPool
from ergo_rl.episodes.config import OnBadRow
from ergo_rl.episodes.types import Box, Finish, Outcome, Question, Score, Trajectory, Turn, View
from ergo_rl.jobs.advantage_estimator import AdvantageEstimator
from ergo_rl.jobs.config import MetricsConfig
from ergo_rl.jobs.metrics import reward_metrics, rollout_metrics
from ergo_rl.jobs.rollout_scheduler import RolloutScheduler
from ergo_rl.learners.config import LearnerConfig
from ergo_rl.questions.dataset import Cursor
from ergo_rl.rewards.config import RewardConfig
from ergo_rl.rewards.pool import RewardPool

MOST_MS, LEAST_LINEAR = 1.0, 0.95
LEARNER = AdvantageEstimator(LearnerConfig(), {"region": 1.0, "box": 0.5})


class Timers:
    """A process that is many workers: each plays one group at a time, in so many seconds."""

    def __init__(self, seconds: float, tokens: int) -> None:
        self._seconds, self._tokens = seconds, tokens
        self._busy: dict[int, asyncio.Lock] = {}

    async def start(self) -> None:
        return None

    async def rollout(self, worker: int, question: Question, samples: tuple[int, ...], *_: Any) -> Any:
        async with self._busy.setdefault(worker, asyncio.Lock()):
            await asyncio.sleep(self._seconds)
        trajectories = tuple(self._trajectory(question.id, sample) for sample in samples)
        return GroupResult(question.id, tuple(map(summarize, trajectories))), trajectories

    async def score(self, _: int, question: Question, trajectories: tuple[Trajectory, ...]) -> tuple[Score, ...]:
        return tuple(Score(float(one.sample % 2), {"region": float(one.sample % 2)}) for one in trajectories)

    def _trajectory(self, name: str, sample: int) -> Trajectory:
        ids = np.zeros(self._tokens, np.int32)
        turn = Turn(ids, ids, np.zeros(self._tokens, np.float32), "", Finish.STOP, self._tokens, 0)
        view = View(Box(0, 0, 28, 28), np.zeros((28, 28, 3), np.uint8))
        return Trajectory(name, sample, (view,), (turn,), Outcome.BAD_BOX, "no_tag")


class Handle:
    """One worker of a process that is many; it is called as any Ray actor is."""

    def __init__(self, process: Any, worker: int) -> None:
        self._process, self._worker = process, worker

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._process, name)
        return Call(method, (self._worker,) if name in ("rollout", "score") else ())


class Call:
    def __init__(self, method: Any, first: tuple[int, ...]) -> None:
        self._method, self._first = method, first

    def options(self, **options: Any) -> Call:
        return Call(self._method.options(**options), self._first)

    def remote(self, *arguments: Any) -> Any:
        return self._method.remote(*self._first, *arguments)


class Questions:
    """Without end and without files."""

    def __init__(self) -> None:
        self.cursor = Cursor()
        self.skipped: Any = type("Skipped", (), {"total": staticmethod(lambda: 0)})

    def restore(self, cursor: Cursor) -> None:
        self.cursor = cursor

    def __iter__(self) -> Iterator[Question]:
        return self

    def __next__(self) -> Question:
        self.cursor = Cursor(0, self.cursor.position + 1)
        return Question(f"q{self.cursor.position}", b"", "?", "ring")


async def measure(processes: list[Any], workers: int, arguments: argparse.Namespace) -> dict[str, float]:
    """Groups of ``workers`` x ``--rounds``, one step for each round, after a round that is not counted."""

    def pool(size: int, name: str) -> WorkerPool:
        return WorkerPool(lambda index: Handle(processes[index % len(processes)], index), size, Faults(0), name)

    config = RolloutConfig(group_size=arguments.group_size)
    rollouts = RolloutPool(pool(workers, "timers"), config, Cluster(ClusterConfig()))
    rewards = RewardPool(pool(1, "judges"), RewardConfig())
    await asyncio.gather(rollouts.ready(120), rewards.ready(120))
    idle = time.process_time()
    await asyncio.sleep(arguments.seconds)
    idle = (time.process_time() - idle) / arguments.seconds
    questions: Any = Questions()
    flow = RolloutScheduler(questions, rollouts, rewards, 0, OnBadRow.SKIP)
    started, cpu = 0.0, 0.0
    for step in range(arguments.rounds + 1):
        if step == 1:
            started, cpu = time.perf_counter(), time.process_time()
        flow.keep_ahead(2 * workers)
        groups = await flow.take(workers, oldest=0, wanted=LEARNER.has_signal, spare=0)
        rollout_metrics(groups, MetricsConfig()), reward_metrics(groups)
        LEARNER.batch(groups)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    await flow.stop()
    trajectories = arguments.rounds * workers * arguments.group_size
    return {
        "trajectories": trajectories,
        "overhead_ms": 1000 * max(0.0, cpu - idle * seconds) / trajectories,
        "idle_ms_per_s": 1000 * idle,
        "trajectories_per_s": trajectories / seconds,
        "linear": arguments.rounds * arguments.seconds / seconds,
    }


def figures(by_workers: dict[int, dict[str, float]]) -> tuple[bool, str]:
    """Whether both targets are met, by the worst overhead and by the most workers; and the line in words."""
    most = max(by_workers)
    overhead = max(one["overhead_ms"] for one in by_workers.values())
    linear = by_workers[most]["linear"]
    line = (
        f"simulation: the driver takes {overhead:.2f} ms of CPU per trajectory at most (target {MOST_MS}); "
        f"{most} workers reach {linear:.1%} of linear (target {LEAST_LINEAR:.0%}), "
        f"{by_workers[most]['trajectories_per_s']:.0f} trajectories/s"
    )
    return overhead <= MOST_MS and linear >= LEAST_LINEAR, line


def main() -> int:
    parser = parser_of(__doc__, "driver")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 16, 64, 256], help="default 1 16 64 256")
    parser.add_argument("--group-size", type=int, default=8, help="trajectories of a group; default 8")
    parser.add_argument("--seconds", type=float, default=8.0, help="that a group is played; default 8")
    parser.add_argument("--rounds", type=int, default=3, help="groups that each worker plays; default 3")
    parser.add_argument("--tokens", type=int, default=200, help="of a trajectory; default 200")
    parser.add_argument("--processes", type=int, default=2, help="in which the timers run; default 2")
    arguments = parser.parse_args()
    found: dict[int, dict[str, float]] = {}
    with Cluster.connect(ClusterConfig(object_store_gib=0.5)):
        actor = ray.remote(Timers).options(num_cpus=0, max_concurrency=10_000)
        processes = [actor.remote(arguments.seconds, arguments.tokens) for _ in range(arguments.processes)]
        for workers in arguments.workers:
            found[workers] = asyncio.run(measure(processes, workers, arguments))
    good, line = figures(found)
    kind = "SIMULATION: engines are timers, all else on the driver is real"
    return report(arguments, {"kind": kind, "driver_pid": os.getpid(), "workers": found}, good, line)


if __name__ == "__main__":
    raise SystemExit(main())
