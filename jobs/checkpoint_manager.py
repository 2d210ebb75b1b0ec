"""What a checkpoint holds, when it is saved, and what happens when the learner dies.

=============================  =======================================================================================
``state.json``                 step (the policy version), rows of the data set, the scheduler's state
``learner-*.safetensors``      fp32 masters and moments by parameter (``learners.checkpoint``)
``groups.arrow`` and two more  scored groups that no step has used yet, with their pixels (``actors.snapshot``)
``*.jsonl``                    metrics, evaluations and used questions so far
``config.yaml``                the resolved configuration
=============================  =======================================================================================

There is no random generator among it: every draw of a run is seeded by a number that is (``derive_seed(seed, number)``
for rollouts, the step for the learner and the shuffle control, the version for the weight check).
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ergo_rl.actors.snapshot import SCHEMAS, read_groups, write_groups
from ergo_rl.actors.trajectory_store import Group
from ergo_rl.jobs.backend import Backend
from ergo_rl.jobs.checkpoint_store import CheckpointStore, CheckpointWriter, DamagedCheckpoint, read_manifest, step_of
from ergo_rl.jobs.config import CheckpointConfig, ConfigError, RecoveryConfig
from ergo_rl.jobs.monitor import Monitor
from ergo_rl.jobs.resume import remote_store
from ergo_rl.jobs.rollout_scheduler import RolloutScheduler, SchedulerState
from ergo_rl.jobs.run_folder import RunFolder
from ergo_rl.jobs.run_paths import CHECKPOINTS, CONFIG, RECORDS, step_folder
from ergo_rl.learners.learner_group import LearnerFailed, LearnerGroup
from ergo_rl.questions.dataset import Cursor

logger = logging.getLogger(__name__)

STATE = "state.json"
_LEARNER = "learner-{:05d}.safetensors"


@dataclass(frozen=True, slots=True)
class RunState:
    """State of a run between two steps, without the learner's part."""

    step: int = 0
    """Updates so far."""
    rows: int = 0
    """Of the training questions, to notice other files."""
    scheduler: SchedulerState = field(default_factory=SchedulerState)


class CheckpointManager:
    """Holds the last consistent (learner, scheduler) state and saves it on demand.

    The state is consistent right after an update: its groups are done with, all others are still to be used.

    Example::

        checkpoints = CheckpointManager(folder, monitor, config.checkpoint, backend)
        state = await checkpoints.restore(learners, rows=len(questions))
        async with checkpoints.save_on_error():
            ...
            checkpoints.mark_step(step + 1, scheduler, groups)
            await checkpoints.save()
    """

    def __init__(self, folder: RunFolder, monitor: Monitor, config: CheckpointConfig, backend: Backend) -> None:
        self._folder, self._monitor, self._config, self._backend = folder, monitor, config, backend
        self._store = CheckpointStore(folder.path / CHECKPOINTS, backend.file_system)
        self._remote = remote_store(config, folder.path)
        self._learners: LearnerGroup
        self._state, self._saved_step = RunState(), 0

    async def restore(self, learners: LearnerGroup, rows: int) -> RunState:
        """Bring fresh ``learners`` to the checkpoint that the run's folder stands at, and return its state.

        rows: of the training questions. Raises DamagedCheckpoint where the content cannot be read, ConfigError for
        other questions."""
        self._learners, checkpoint = learners, self._folder.checkpoint
        self._state = RunState(rows=rows)
        if checkpoint is not None:
            with self._monitor.console.waiting(f"resuming from {checkpoint}"):
                self._state = await asyncio.to_thread(read_state, checkpoint, self._backend.put)
                if self._state.rows != rows:
                    raise ConfigError(
                        f"questions.paths had {self._state.rows} rows at {checkpoint}, now {rows}: other files"
                    )
                await restore_learners(learners, checkpoint, self._backend.put)
        self._saved_step = self._state.step
        return self._state

    def mark_step(self, step: int, scheduler: RolloutScheduler, groups: Sequence[Group]) -> None:
        """Note that the learner has learned from ``groups``: whatever happens now happens after ``step`` updates."""
        self._state = RunState(step, self._state.rows, scheduler.state())
        self._monitor.record_questions(step - 1, groups)

    async def save(self) -> None:
        """Save the last consistent state, unless it was saved already or nothing was learned yet. Raises OSError."""
        if self._state.step > self._saved_step:
            with self._monitor.console.waiting(f"saving after step {self._state.step}"):
                await self._write()
            self._saved_step = self._state.step

    async def _write(self) -> None:
        """Write the checkpoint and its remote copy; old ones are removed only after that."""
        step = self._state.step
        evaluations = [record for record in self._monitor.evaluations if record["step"] == step]
        score = evaluations[-1].get(f"eval/{self._config.best}") if evaluations else None
        with self._store.write(step, score) as writer:
            await write_state(writer, self._state, self._folder.path, self._learners, self._backend.get)
        if self._remote is not None:
            await asyncio.to_thread(self._remote.upload, self._store.folder / step_folder(step))
        stay = await asyncio.to_thread(self._store.prune, self._config.keep)
        if self._remote is not None:
            await asyncio.to_thread(self._remote.prune, stay)

    @asynccontextmanager
    async def save_on_error(self) -> AsyncIterator[None]:
        """Save before an error leaves the block, unless it is the learner's; the error notes where that failed."""
        try:
            yield
        except LearnerFailed:
            raise  # it has no state to give: the last checkpoint counts
        except (Exception, asyncio.CancelledError) as error:
            try:
                await self.save()
            except Exception as failed:
                error.add_note(f"it could not be saved: {type(failed).__name__}: {failed}")
            raise

    async def last_checkpoint(self) -> Path | None:
        """Return the newest intact checkpoint; before the first save, the one that the run began with.

        Raises DamagedCheckpoint."""
        return await asyncio.to_thread(self._store.newest) or self._folder.origin

    def rewind(self, checkpoint: Path | None) -> None:
        """Bring records, alerts and console back to a checkpoint; None: to step 0."""
        self._folder.rewind(checkpoint)
        self._monitor.rewind(0 if checkpoint is None else step_of(checkpoint.name))


class LearnerRestarter:
    """Starts fresh learners in place of failed ones, a few times in a run."""

    def __init__(self, config: RecoveryConfig, checkpoints: CheckpointManager, monitor: Monitor) -> None:
        self._config, self._left = config, config.learner_restarts
        self._checkpoints, self._console = checkpoints, monitor.console

    async def restart(self, error: LearnerFailed, start: Callable[[], Awaitable[LearnerGroup]]) -> LearnerGroup:
        """Call ``start``, and bring the run's folder back to the last checkpoint; the engines stay as they are.

        Raises ``error`` where it would be raised again (a wrong value) or no restarts are left."""
        last = await self._checkpoints.last_checkpoint()
        while self._left and not isinstance(error.__cause__, ValueError):
            self._left -= 1
            done = self._config.learner_restarts - self._left
            place = "the start" if last is None else str(last)
            logger.warning("%s; starting the learner again from %s (%d left)", error, place, self._left)
            self._console.say(
                f"[bold red]{error}[/bold red]; starting the learner again from {place} ({self._left} left)"
            )
            await asyncio.sleep(self._config.backoff_s * 2 ** (done - 1))
            try:
                learners = await start()
            except LearnerFailed as another:
                error = another
                continue
            self._checkpoints.rewind(last)
            return learners
        error.add_note("no restarts are left (recovery.learner_restarts)" if not self._left else "it would come again")
        raise error


async def write_state(
    writer: CheckpointWriter, state: RunState, run: Path, learners: LearnerGroup, get: Callable[[Any], Any]
) -> None:
    """Write all of a checkpoint. ``learners`` must be at ``state.step``; records and configuration are those in the
    folder ``run``. get: from the object store."""
    await asyncio.to_thread(_write_driver_state, writer, state, run, get)
    written = 0

    async def keep(file: Any) -> None:
        nonlocal written
        await asyncio.to_thread(writer.write, _LEARNER.format(written), await file)
        written += 1

    await learners.state(keep)


def _write_driver_state(writer: CheckpointWriter, state: RunState, run: Path, get: Callable[[Any], Any]) -> None:
    cells = {"step": state.step, "rows": state.rows, "flow": scheduler_to_json(state.scheduler)}
    writer.write(STATE, (json.dumps(cells) + "\n").encode())
    for name in (CONFIG, *RECORDS):
        if (run / name).exists():
            writer.write(name, (run / name).read_bytes())
    with ExitStack() as stack:
        files = {name: stack.enter_context(writer.create(f"{name}.arrow")) for name in SCHEMAS}
        write_groups(state.scheduler.groups, files, get)


def read_state(folder: Path, put: Callable[[Any], Any]) -> RunState:
    """Read all but the learner's part of a verified checkpoint; trajectories go into the object store by ``put``.

    Raises DamagedCheckpoint where the content is not what this version writes."""
    try:
        cells = json.loads((folder / STATE).read_bytes())
        with ExitStack() as stack:
            files = {name: stack.enter_context((folder / f"{name}.arrow").open("rb")) for name in SCHEMAS}
            groups = tuple(read_groups(files, put))
        return RunState(int(cells["step"]), int(cells["rows"]), scheduler_from_json(cells["flow"], groups))
    except (OSError, ValueError, KeyError, TypeError) as error:  # pyarrow's errors derive from these
        raise DamagedCheckpoint(f"{folder}: {type(error).__name__}: {error}") from error


async def restore_learners(learners: LearnerGroup, folder: Path, put: Callable[[Any], Any]) -> int:
    """Give the learner's part of a checkpoint to fresh ranks; returns the step that comes next."""
    names = sorted(name for name in read_manifest(folder).files if name.startswith("learner-"))

    def put_file(name: str) -> Any:
        return put((folder / name).read_bytes())

    return await learners.restore([await asyncio.to_thread(put_file, name) for name in names])


def scheduler_to_json(state: SchedulerState) -> dict[str, Any]:
    """Return the state without its groups as JSON takes it."""
    cells = {name: getattr(state, name) for name in SchedulerState.__dataclass_fields__ if name != "groups"}
    in_flight = [[number, asdict(cursor)] for number, cursor in state.in_flight]
    return {**cells, "cursor": asdict(state.cursor), "in_flight": in_flight, "skipped": list(state.skipped)}


def scheduler_from_json(cells: dict[str, Any], groups: Iterable[Group]) -> SchedulerState:
    """Invert ``scheduler_to_json``. Raises ValueError, TypeError or KeyError for other content."""
    in_flight = tuple((int(number), Cursor(**cursor)) for number, cursor in cells["in_flight"])
    state = {**cells, "cursor": Cursor(**cells["cursor"]), "in_flight": in_flight, "skipped": tuple(cells["skipped"])}
    return SchedulerState(**state, groups=tuple(groups))
