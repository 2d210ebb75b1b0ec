"""Between two steps: what is saved when, and what happens when the learner dies."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from ergo_rl.actors.trajectory_store import Group
from ergo_rl.cluster.placement import Cluster
from ergo_rl.jobs.config import RecoveryConfig, TrainConfig
from ergo_rl.jobs.flow import Flow
from ergo_rl.jobs.run import Run
from ergo_rl.jobs.saving.state import RunState
from ergo_rl.learners.learner_group import ROLE, LearnerFailed, LearnerGroup

logger = logging.getLogger(__name__)


class Keeper:
    """Knows the last place between two steps at which learner and flow fit together, and saves it.

    That place is right behind an update: its groups are done with, all others are still to be used."""

    def __init__(self, run: Run, learners: LearnerGroup, state: RunState) -> None:
        self._run, self._learners, self._state = run, learners, state
        self._saved = state.step

    @property
    def step(self) -> int:
        return self._state.step

    def reached(self, step: int, flow: Flow, groups: Sequence[Group]) -> None:
        """The learner has learned from ``groups``: from here on whatever happens is after ``step`` updates."""
        self._state = RunState(step, self._state.rows, flow.state())
        self._run.log_questions(step - 1, groups)

    async def save(self) -> None:
        """Nothing is written twice, and nothing where there is nothing to lose."""
        if self._state.step > self._saved:
            with self._run.view.waiting(f"saving after step {self._state.step}"):
                await self._run.save(self._state, self._learners)
            self._saved = self._state.step

    @asynccontextmanager
    async def kept(self) -> AsyncIterator[None]:
        """Whatever ends the block, but a dead learner, finds the run saved; the error has a note of it."""
        try:
            yield
        except LearnerFailed:
            raise  # there is nobody to ask; the last checkpoint counts
        except Exception as error:
            try:
                await self.save()
            except Exception as failed:
                error.add_note(f"it could not be saved: {type(failed).__name__}: {failed}")
            raise


class Revival:
    """A budget of fresh learners for one run."""

    def __init__(self, config: RecoveryConfig) -> None:
        self._config, self._left = config, config.learner_restarts

    async def __call__(self, error: LearnerFailed, cluster: Cluster, config: TrainConfig, run: Run) -> LearnerGroup:
        """Fresh ranks, and the run's folder back at the last checkpoint; the engines stay as they are.

        Raises ``error`` where it would come again (a value that is wrong) or the budget is spent."""
        last = await run.last_checkpoint()
        while self._left and not isinstance(error.__cause__, ValueError):
            self._left -= 1
            done = self._config.learner_restarts - self._left
            place = "the start" if last is None else str(last)
            logger.warning("%s; starting the learner again from %s (%d left)", error, place, self._left)
            run.view.say(f"[bold red]{error}[/bold red]; starting the learner again from {place} ({self._left} left)")
            await asyncio.sleep(self._config.backoff_s * 2 ** (done - 1))
            cluster.release(ROLE)
            try:
                learners = await LearnerGroup.launch(cluster, config.learner)
            except LearnerFailed as another:
                error = another
                continue
            run.rewind(last)
            return learners
        error.add_note("no restarts are left (recovery.learner_restarts)" if not self._left else "it would come again")
        raise error
