"""How many rollout workers a run has, by who waits for whom: ``rollout.workers: {min, max}``.

The learner waits while a step's groups are played (``time/rollout_s``); the workers wait while it learns. Both are
parts of a step of a synchronous run; with ``max_staleness`` the learner waits for what playing takes longer than
learning.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from ergo_rl.actors.rollout_pool import RolloutPool
from ergo_rl.cluster.config import Size
from ergo_rl.jobs.metrics import Metrics
from ergo_rl.jobs.view import View

logger = logging.getLogger(__name__)

WINDOW = 5
"""Steps of one decision, all with the same workers."""
GROW_ABOVE, SHRINK_BELOW = 0.6, 0.25
"""Shares of the step that the learner waits. Far enough apart: without one of two workers playing takes twice as long,
and a share of 0.25 becomes 2 x 0.25 / (1 + 0.25) = 0.4, not enough to have it back."""
LEAST_GAIN = 0.1
"""A further worker that does not make playing shorter by this share goes again: the machine has no more to give."""
SAY_EVERY_S = 30.0


class Decider:
    """The rule. Pure: what it saw is handed in, what it answers is done by ``Scaler``."""

    def __init__(self, size: Size) -> None:
        self._size, self._ceiling = size, size.max
        self._workers = 0
        self._seen: deque[tuple[float, float]] = deque(maxlen=WINDOW)
        self._before: float | None = None

    def saw(self, rollout_s: float, step_s: float, workers: int) -> int:
        """How many workers there should be, after a step of ``step_s`` with ``workers`` of which the learner waited
        ``rollout_s``. One more or one less at a time, and only after a window of steps with the same number."""
        if workers != self._workers:
            grown = self._workers and workers == self._workers + 1 and len(self._seen) == WINDOW
            self._before = self._played() if grown else None
            self._workers = workers
            self._seen.clear()
            return workers  # the first step has a share of both
        self._seen.append((rollout_s, step_s))
        if not self._size.min <= workers <= self._size.max:  # somebody asked for it with ``ergo-rl scale``
            return min(max(workers, self._size.min), self._size.max) if len(self._seen) == WINDOW else workers
        if len(self._seen) < WINDOW:
            return workers
        before, self._before = self._before, None
        if before is not None and self._played() > (1 - LEAST_GAIN) * before:
            self._ceiling = max(workers - 1, self._size.min)
            return self._ceiling
        share = self._played() / max(1e-9, sum(step for _, step in self._seen) / WINDOW)
        if share > GROW_ABOVE and workers < self._ceiling:
            return workers + 1
        if share < SHRINK_BELOW and workers > self._size.min:
            return workers - 1
        return workers

    def failed(self) -> None:
        """What was decided could not be had: the next window decides again."""
        self._seen.clear()

    def _played(self) -> float:
        return sum(rollout for rollout, _ in self._seen) / WINDOW


class Scaler:
    """Does what ``Decider`` says, beside the loop: new workers start, and removed ones end, while steps go on."""

    def __init__(self, rollouts: RolloutPool, view: View) -> None:
        self._rollouts, self._view = rollouts, view
        self._decider = Decider(rollouts.config.size)
        self._work: asyncio.Task[None] | None = None

    def saw(self, metrics: Metrics) -> None:
        """A step has ended."""
        if self._work is not None and not self._work.done():
            return
        workers = len(self._rollouts)
        wanted = self._decider.saw(metrics["time/rollout_s"], metrics["time/step_s"], workers)
        if wanted != workers:
            share = metrics["time/rollout_s"] / metrics["time/step_s"]
            self._say(f"{workers} -> {wanted} rollout workers: the learner waits {share:.0%} of the step")
            self._work = asyncio.create_task(self._resize(wanted))

    async def stop(self) -> None:
        if self._work is not None:
            self._work.cancel()
            await asyncio.gather(self._work, return_exceptions=True)

    async def _resize(self, wanted: int) -> None:
        """A worker that cannot be placed is waited for until the pool's deadline; it says so meanwhile."""
        resizing = asyncio.ensure_future(self._rollouts.resize(wanted))
        try:
            while not resizing.done():
                done, _ = await asyncio.wait({resizing}, timeout=SAY_EVERY_S)
                if not done:
                    self._say(f"still waiting for {wanted} rollout workers; {self._rollouts.free()}")
            resizing.result()
        except TimeoutError as error:
            self._decider.failed()
            self._say(str(error))
        finally:
            resizing.cancel()

    def _say(self, text: str) -> None:
        logger.warning("autoscale: %s", text)
        self._view.say(f"autoscale: {text}")


@asynccontextmanager
async def scaling(rollouts: RolloutPool, view: View) -> AsyncIterator[Scaler | None]:
    """None where the number of workers is fixed."""
    size = rollouts.config.size
    if size.min == size.max:
        yield None
        return
    scaler = Scaler(rollouts, view)
    try:
        yield scaler
    finally:
        await scaler.stop()
