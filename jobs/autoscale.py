"""Autoscaling of rollout workers, by who waits for whom: ``rollout.workers: {min, max}``.

The learner waits while the groups of a step are sampled (``time/rollout_s``); the workers wait while it learns. Both
are parts of a step of a synchronous run; with ``max_staleness`` the learner waits only for the time by which sampling
takes longer than learning.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from ergo_rl.actors.rollout_pool import RolloutPool
from ergo_rl.cluster.config import Size
from ergo_rl.jobs.console_display import ConsoleDisplay
from ergo_rl.jobs.metrics import Metrics

logger = logging.getLogger(__name__)

WINDOW = 5
"""Steps of one decision, all with the same workers."""
GROW_ABOVE, SHRINK_BELOW = 0.6, 0.25
"""Shares of the step that the learner waits. They are far enough apart not to oscillate: with one of two workers
sampling takes twice as long, and a share of 0.25 becomes 2 x 0.25 / (1 + 0.25) = 0.4, too little to grow again."""
MIN_GAIN = 0.1
"""Minimum relative speed-up for keeping an added worker."""
SAY_EVERY_S = 30.0


class AutoscalePolicy:
    """Decides how many workers there should be. Pure; ``Autoscaler`` carries it out."""

    def __init__(self, size: Size) -> None:
        self._size, self._ceiling = size, size.max
        self._workers = 0
        self._seen: deque[tuple[float, float]] = deque(maxlen=WINDOW)
        self._before: float | None = None

    def record_step(self, rollout_s: float, step_s: float, workers: int) -> int:
        """Return how many workers there should be after a step with ``workers``.

        rollout_s: how long the learner waited, of the ``step_s`` of the step. The number changes by one at a time, and
        only after a window of steps with the same number."""
        if workers != self._workers:
            grown = self._workers and workers == self._workers + 1 and len(self._seen) == WINDOW
            self._before = self._mean_rollout_s() if grown else None
            self._workers = workers
            self._seen.clear()
            return workers  # the first step was sampled partly with the old number
        self._seen.append((rollout_s, step_s))
        if not self._size.min <= workers <= self._size.max:  # set by `ergo-rl scale`
            return min(max(workers, self._size.min), self._size.max) if len(self._seen) == WINDOW else workers
        if len(self._seen) < WINDOW:
            return workers
        before, self._before = self._before, None
        if before is not None and self._mean_rollout_s() > (1 - MIN_GAIN) * before:
            self._ceiling = max(workers - 1, self._size.min)
            return self._ceiling
        share = self._mean_rollout_s() / max(1e-9, sum(step for _, step in self._seen) / WINDOW)
        if share > GROW_ABOVE and workers < self._ceiling:
            return workers + 1
        if share < SHRINK_BELOW and workers > self._size.min:
            return workers - 1
        return workers

    def failed(self) -> None:
        """Decide again after another window, because the workers could not be had."""
        self._seen.clear()

    def _mean_rollout_s(self) -> float:
        return sum(rollout for rollout, _ in self._seen) / WINDOW


class Autoscaler:
    """Resizes the pool as ``AutoscalePolicy`` says, in the background while training continues."""

    def __init__(self, rollouts: RolloutPool, console: ConsoleDisplay) -> None:
        self._rollouts, self._console = rollouts, console
        self._policy = AutoscalePolicy(rollouts.config.size)
        self._work: asyncio.Task[None] | None = None

    def record_step(self, metrics: Metrics) -> None:
        """Call it after each step."""
        if self._work is not None and not self._work.done():
            return
        workers = len(self._rollouts)
        wanted = self._policy.record_step(metrics["time/rollout_s"], metrics["time/step_s"], workers)
        if wanted != workers:
            share = metrics["time/rollout_s"] / metrics["time/step_s"]
            self._say(f"{workers} -> {wanted} rollout workers: the learner waits {share:.0%} of the step")
            self._work = asyncio.create_task(self._resize(wanted))

    async def stop(self) -> None:
        if self._work is not None:
            self._work.cancel()
            await asyncio.gather(self._work, return_exceptions=True)

    async def _resize(self, wanted: int) -> None:
        """Wait until the pool has ``wanted`` workers or its deadline has passed, and say so meanwhile."""
        resizing = asyncio.ensure_future(self._rollouts.resize(wanted))
        try:
            while not resizing.done():
                done, _ = await asyncio.wait({resizing}, timeout=SAY_EVERY_S)
                if not done:
                    self._say(f"still waiting for {wanted} rollout workers; {self._rollouts.free()}")
            resizing.result()
        except TimeoutError as error:
            self._policy.failed()
            self._say(str(error))
        finally:
            resizing.cancel()

    def _say(self, text: str) -> None:
        logger.warning("autoscale: %s", text)
        self._console.say(f"autoscale: {text}")


@asynccontextmanager
async def autoscaling(rollouts: RolloutPool, console: ConsoleDisplay) -> AsyncIterator[Autoscaler | None]:
    """Scale within the block; yields None where the number of workers is fixed."""
    size = rollouts.config.size
    if size.min == size.max:
        yield None
        return
    autoscaler = Autoscaler(rollouts, console)
    try:
        yield autoscaler
    finally:
        await autoscaler.stop()
