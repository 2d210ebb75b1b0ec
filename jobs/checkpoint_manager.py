"""What a checkpoint holds, when it is saved, and what happens when the learner dies.

=============================  =======================================================================================
``state.json``                 step (the policy version), rows of the data set, the scheduler's state
``learner-*.safetensors``      fp32 masters and moments by parameter (``learners.checkpoint``)
``groups.arrow`` and two more  scored groups that no step has used yet, with their pixels (``actors.snapshot``)
``*.jsonl``                    metrics, evaluations and used questions so far (``jobs.record_parts``)
``config.yaml``                the configuration
``inputs.json``                fingerprints of training files and models (``jobs.fingerprints``)
=============================  =======================================================================================

There is no random generator among it: every draw of a run is seeded by a number that is (``derive_seed(seed, number)``
for rollouts, the step for the learner and the shuffle control, the version for the weight check).
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pyarrow import ArrowException

from ergo_rl.actors.snapshot import SCHEMAS, read_groups, write_groups
from ergo_rl.actors.trajectory_store import Group
from ergo_rl.jobs.backend import Backend
from ergo_rl.jobs.checkpoint_store import CheckpointStore, CheckpointWriter, DamagedCheckpoint, read_manifest, step_of
from ergo_rl.jobs.config import CheckpointConfig, ConfigError, RecoveryConfig
from ergo_rl.jobs.monitor import Monitor
from ergo_rl.jobs.record_parts import write_record
from ergo_rl.jobs.remote_store import BackgroundCopies
from ergo_rl.jobs.rollout_scheduler import RolloutScheduler, SchedulerState
from ergo_rl.jobs.run_folder import RunFolder, ended_json
from ergo_rl.jobs.run_paths import CHECKPOINTS, CONFIG, INPUTS, RECORDS, step_folder
from ergo_rl.learners.learner_group import LearnerFailed, LearnerGroup
from ergo_rl.questions.dataset import Cursor

logger = logging.getLogger(__name__)

STATE = "state.json"
_LEARNER = "learner-{:05d}.safetensors"
_UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError,
               MemoryError, ArrowException)  # fmt: skip
"""What content that is not ours raises while it is read."""
PATIENCE_S = 20.0
"""How long a run that ends by a signal or an error waits for its copies: a scheduler kills it soon."""


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
        self._copies: BackgroundCopies | None = None
        if folder.remote is not None:
            self._copies = BackgroundCopies(folder.remote, self._store, config.outage_deadline_s, self._say)
            folder.closing.callback(self._copies.close)
            if folder.checkpoint is not None and folder.checkpoint.parent == self._store.folder:
                self._copies.copy(folder.checkpoint.name, self._store.names())  # the last process may not have done it
        self._learners: LearnerGroup
        self._state, self._saved_step = RunState(), 0
        self._records_of: Path | None = None
        """The checkpoint since which the records have only grown."""

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
                    self._state = self._with_other_rows(rows)
                await restore_learners(learners, checkpoint, self._backend.put)
        self._saved_step = self._state.step
        return self._state

    def _with_other_rows(self, rows: int) -> RunState:
        """Return the state for a data set of another size: cursors behind its end move to its end."""
        if not {"questions", "questions.paths"} & set(self._config.accept_changes):
            raise ConfigError(
                f"questions.paths had {self._state.rows} rows at {self._folder.checkpoint}, now {rows}: other files. "
                "Give the old ones, or go on with these by checkpoint.accept_changes=[questions.paths]"
            )

        def moved(cursor: Cursor) -> Cursor:
            return Cursor(cursor.epoch, min(cursor.position, rows))

        scheduler = self._state.scheduler
        in_flight = tuple((number, moved(cursor)) for number, cursor in scheduler.in_flight)
        scheduler = replace(scheduler, cursor=moved(scheduler.cursor), in_flight=in_flight)
        return RunState(self._state.step, rows, scheduler)

    def mark_step(self, step: int, scheduler: RolloutScheduler, groups: Sequence[Group]) -> None:
        """Note that the learner has learned from ``groups``: whatever happens now happens after ``step`` updates.

        Raises RunTakenOver, and OSError where no copy could be written for ``checkpoint.outage_deadline_s``."""
        self._state = RunState(step, self._state.rows, scheduler.state())
        self._monitor.record_questions(step - 1, groups)
        if self._copies is not None:
            self._copies.check()

    async def save(self) -> None:
        """Save the last consistent state, unless it was saved already or nothing was learned yet.

        A disk that is full or fails costs this checkpoint: it is reported, its remains are removed, the run goes on,
        and the next save is tried."""
        try:
            await self._save()
        except OSError as error:
            last = self._store.latest or "none yet"
            self._say(
                f"NOT SAVED after step {self._state.step}: {error}. What was written of it is removed; the last "
                f"checkpoint is {last}; training goes on, and the next save is tried"
            )

    async def finish(self) -> None:
        """Mark the run as done, when its copies are all there. Raises as ``mark_step``."""
        why = "all steps are done"
        if self._copies is not None:
            self._copies.mark_ended(ended_json(done=True, why=why))
            with self._monitor.console.waiting("writing the copies at checkpoint.url"):
                await self._copies.finish()
        self._folder.mark_ended(done=True, why=why)

    async def _save(self) -> None:
        """Raises OSError where the disk does not take it; nothing is left of it then."""
        if self._state.step > self._saved_step:
            with self._monitor.console.waiting(f"saving after step {self._state.step}"):
                await self._write()
            self._saved_step = self._state.step

    async def _write(self) -> None:
        """Write the checkpoint; old ones are removed only after that. It is copied in the background."""
        step, busy = self._state.step, () if self._copies is None else self._copies.busy
        evaluations = [record for record in self._monitor.evaluations if record["step"] == step]
        score = evaluations[-1].get(f"eval/{self._config.best}") if evaluations else None
        try:
            await asyncio.to_thread(self._folder.note_inputs)
            with self._store.write(step, score) as writer:
                await write_state(
                    writer, self._state, self._folder.path, self._learners, self._backend.get, self._records_of
                )
        except OSError:
            with suppress(OSError):  # perhaps more is kept than need be, and the next save finds room
                await asyncio.to_thread(self._store.prune, self._config.keep, busy)
            raise
        stay = await asyncio.to_thread(self._store.prune, self._config.keep, busy)
        self._records_of = self._store.folder / step_folder(step)
        if self._copies is not None:
            self._copies.copy(step_folder(step), stay)

    def _say(self, message: str) -> None:
        logger.warning("%s", message)
        self._monitor.console.say(message)

    @asynccontextmanager
    async def save_on_error(self) -> AsyncIterator[None]:
        """Save before an error leaves the block, unless it is the learner's; the error notes where that failed."""
        try:
            yield
        except LearnerFailed:
            raise  # it has no state to give: the last checkpoint counts
        except (Exception, asyncio.CancelledError) as error:
            try:
                await self._save()
            except Exception as failed:
                error.add_note(f"it could not be saved: {type(failed).__name__}: {failed}")
            await self.settle(error)
            raise

    async def settle(self, error: BaseException) -> None:
        """Give the copies a moment before the run ends by ``error``, which notes where they are not there then."""
        try:
            if self._copies is not None:
                await self._copies.finish(PATIENCE_S)
        except Exception as failed:
            if failed is not error:
                error.add_note(f"{failed}")

    async def last_checkpoint(self) -> Path | None:
        """Return the newest intact checkpoint; before the first save, the one that the run began with.

        Raises DamagedCheckpoint."""
        return await asyncio.to_thread(self._store.newest) or self._folder.origin

    def rewind(self, checkpoint: Path | None) -> None:
        """Bring records, alerts and console back to a checkpoint; None: to step 0."""
        self._records_of = checkpoint if self._folder.rewind(checkpoint) else None
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
                (str(error), "bold red"), f"; starting the learner again from {place} ({self._left} left)"
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
        await self._checkpoints.settle(error)
        raise error


async def write_state(
    writer: CheckpointWriter,
    state: RunState,
    run: Path,
    learners: LearnerGroup,
    get: Callable[[Any], Any],
    earlier: Path | None = None,
) -> None:
    """Write all of a checkpoint. ``learners`` must be at ``state.step``; records and configuration are those in the
    folder ``run``. get: from the object store; earlier: a checkpoint since which the records have only grown."""
    await asyncio.to_thread(_write_driver_state, writer, state, run, get, earlier)
    written = 0

    async def keep(file: Any) -> None:
        nonlocal written
        await asyncio.to_thread(writer.write, _LEARNER.format(written), await file)
        written += 1

    await learners.state(keep)


def _write_driver_state(
    writer: CheckpointWriter, state: RunState, run: Path, get: Callable[[Any], Any], earlier: Path | None
) -> None:
    cells = {"step": state.step, "rows": state.rows, "flow": scheduler_to_json(state.scheduler)}
    writer.write(STATE, (json.dumps(cells) + "\n").encode())
    for name in (CONFIG, INPUTS):
        if (run / name).exists():
            writer.write(name, (run / name).read_bytes())
    for name in RECORDS:
        if (run / name).exists():
            write_record(writer, run / name, earlier)
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
        return RunState(_count(cells["step"]), _count(cells["rows"]), scheduler_from_json(cells["flow"], groups))
    except _UNREADABLE as error:
        raise DamagedCheckpoint(f"{folder}: {type(error).__name__}: {str(error)[:400]}") from error


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
    in_flight = tuple((_count(number), _cursor(cursor)) for number, cursor in cells["in_flight"])
    state = {name: _count(value) for name, value in cells.items() if name not in ("cursor", "in_flight", "skipped")}
    skipped, cursor = tuple(map(_count, cells["skipped"])), _cursor(cells["cursor"])
    return SchedulerState(**state, cursor=cursor, in_flight=in_flight, skipped=skipped, groups=tuple(groups))


def _cursor(cells: dict[str, Any]) -> Cursor:
    return Cursor(**{name: _count(value) for name, value in cells.items()})


def _count(value: object) -> int:
    if type(value) is not int:
        raise TypeError(f"{value!r} is no whole number")
    return value
