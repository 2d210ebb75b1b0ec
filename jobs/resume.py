"""Which folder a run gets, and from which checkpoint it resumes. With ``checkpoint.url`` both sides count: a name is
free where it is free on both, and of two newest checkpoints the newer one is resumed."""

from __future__ import annotations

import fcntl
import json
import logging
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from omegaconf import OmegaConf

from ergo_rl.jobs.checkpoint_store import (
    MANIFEST,
    CheckpointStore,
    DamagedCheckpoint,
    read_manifest,
    step_of,
    verify_checkpoint,
)
from ergo_rl.jobs.config import (
    CheckpointConfig,
    ConfigError,
    TrainConfig,
    all_keys,
    config_values,
    keys_of_run,
    keys_that_may_change,
    same_when_resolved,
    stored_config,
)
from ergo_rl.jobs.fingerprints import inputs_of, other_content, read_inputs
from ergo_rl.jobs.lease import RunInUse
from ergo_rl.jobs.remote_store import RemoteRuns, RemoteStore
from ergo_rl.jobs.run_paths import CHECKPOINTS, CONFIG, ENDED, INPUTS, POLICY
from ergo_rl.jobs.storage import Storage

logger = logging.getLogger(__name__)

AUTO, NEVER = "auto", "never"


class RunLock:
    """Keeps other processes from a run: a lock on its folder, and an owner record at the URL."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.remote: RemoteStore | None = None

    def close(self) -> None:
        if self.remote is not None:
            self.remote.close()
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(slots=True)
class ResumePoint:
    """Where a run begins."""

    folder: Path
    """Of the run."""
    checkpoint: Path | None
    """A verified checkpoint to resume from; None: begin with step 0."""
    lock: RunLock
    """Locks the folder while it is open."""

    @property
    def remote(self) -> RemoteStore | None:
        """Where copies of its checkpoints go."""
        return self.lock.remote

    @property
    def store(self) -> CheckpointStore:
        return CheckpointStore(self.folder / CHECKPOINTS)


def find_resume_point(config: TrainConfig) -> ResumePoint:
    """Find or create the folder of a run.

    ``resume: auto`` resumes the unfinished run of this name (the last of NAME, NAME-2, ...), unless another process
    runs it; ``never`` begins a new run; a path or URL of a checkpoint, or of a run, begins a new run from there.

    Raises ConfigError (naming the keys whose values do not fit), RunInUse (naming the process that writes the copies of
    the run), DamagedCheckpoint, OSError."""
    runs = Path(config.runs_dir)
    if not config.name or "/" in config.name or config.name.startswith("."):
        raise ConfigError(f"name {config.name!r} cannot be a folder name")
    far = RemoteRuns(config.checkpoint) if config.checkpoint.url else None
    if config.resume not in (AUTO, NEVER):
        return _branch(config, runs, far)
    if config.resume == AUTO and (start := _unfinished(config, runs, far)) is not None:
        return start
    return _fresh(runs, config.name, far)


def remote_store(config: CheckpointConfig, folder: Path) -> RemoteStore | None:
    """Return the store to which the checkpoints of the run in ``folder`` are copied, if there is one."""
    return RemoteStore(Storage.open(config.url).below(folder.name), config.outage_deadline_s) if config.url else None


def differences(before: Any, config: TrainConfig) -> list[str]:
    """Return ``key (old, now new)`` of every value that must not change on resume. ``checkpoint.accept_changes`` names
    exceptions.

    before: what ``stored_config`` returns. A key that an older version did not have counts with its default."""
    old, now = _flat(before), _flat(config_values(config))
    free = (*keys_that_may_change(), *config.checkpoint.accept_changes)
    found = []
    for key in sorted(old.keys() | now.keys()):
        if _is_below(key, free):
            continue
        if key in old and key in now:
            if old[key] != now[key] and not same_when_resolved(key, old, now):
                found.append(f"{key} ({old[key]!r}, now {now[key]!r})")
        elif _is_free_form(key):
            was, is_now = (repr(side[key]) if key in side else "not there" for side in (old, now))
            found.append(f"{key} ({was}, now {is_now})")
        elif key in now and key not in keys_of_run() and now[key] != _defaults().get(key):
            found.append(f"{key} (not known to the version that saved it, now {now[key]!r})")
    return found


def _unfinished(config: TrainConfig, runs: Path, far: RemoteRuns | None) -> ResumePoint | None:
    name = next(reversed(list(_taken(runs, config.name, far))), None)
    if name is None:
        return None
    folder, remote = runs / name, far.run(name) if far is not None else None
    if _done(folder) or (remote is not None and remote.is_done()):
        return None
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    if (lock := _locked(folder)) is None:
        return None
    with ExitStack() as undo:
        if made:
            undo.callback(_remove_if_empty, folder)
        undo.callback(lock.close)
        start = ResumePoint(folder, None, lock)
        if remote is not None and _finished_there(remote, start.store, config.total_steps):
            return None
        if remote is not None:
            remote.acquire()
            lock.remote = remote
        start.checkpoint = _newest_of_both(start.store, remote)
        if start.checkpoint is None and (folder / CONFIG).exists() and _was_configured_otherwise(folder, config):
            return None  # it saved nothing: leave it as it is
        if start.checkpoint is not None:
            _must_fit(config, start.checkpoint, folder)
        undo.pop_all()
        return start
    raise AssertionError("unreachable")


def _finished_there(remote: RemoteStore, store: CheckpointStore, total_steps: int) -> bool:
    """Whether the copies have all steps and this machine has not: then there is nothing left to do here."""
    there = max((manifest.step for _, manifest in remote.readable()), default=0)
    here = max((step_of(name) for name in store.names()), default=0)
    return there >= total_steps > here


def _newest_of_both(store: CheckpointStore, remote: RemoteStore | None) -> Path | None:
    """Return the newest intact checkpoint of a run's folder and its copies, fetched where it is one of these."""
    store.tidy()
    damaged: DamagedCheckpoint | None = None
    try:
        here = store.newest()
    except DamagedCheckpoint as error:
        here, damaged = None, error
    if remote is not None:
        copies = remote.readable()
        mine = "" if here is None else read_manifest(here).run
        theirs = copies[0][1].run if copies else ""
        if mine and theirs and mine != theirs:
            raise ConfigError(
                f"{store.folder.parent} ({mine:.8}) and {remote.url} ({theirs:.8}) are two different runs of one name: "
                "move one of the two, or give this run another name"
            )
        try:
            if copied := remote.download(store, above=-1 if here is None else step_of(here.name), adopt=True):
                return copied
        except DamagedCheckpoint as error:
            damaged = damaged or error
    if here is None and damaged is not None:
        raise damaged
    return here


def _was_configured_otherwise(folder: Path, config: TrainConfig) -> bool:
    try:
        return bool(differences(stored_config(folder / CONFIG), config))
    except (OSError, ConfigError) as error:
        logger.warning("%s cannot be read (%s); its run saved nothing and begins anew", folder / CONFIG, error)
        return False


def _done(folder: Path) -> bool:
    """Whether the run is finished. Runs of former versions have a policy and no ``ended.json``."""
    ended = folder / ENDED
    try:
        return json.loads(ended.read_bytes())["done"] is True
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            logger.warning("%s cannot be read (%s): the run counts as finished if it has a policy", ended, error)
        return (folder / POLICY).exists()


def _branch(config: TrainConfig, runs: Path, far: RemoteRuns | None) -> ResumePoint:
    where = Path(config.resume)
    remote = None if "://" not in config.resume else RemoteStore(config.resume, config.checkpoint.outage_deadline_s)
    found: Path | None = None
    if remote is None and (where / MANIFEST).exists():
        verify_checkpoint(where)
        found = where
    elif remote is None:
        found = CheckpointStore(where / CHECKPOINTS).newest()
    if found is None and (remote is None or not remote.names()):
        raise ConfigError(f"resume: there is no checkpoint at {config.resume}; name a checkpoint, a run, auto or never")
    start = _fresh(runs, config.name, far)
    try:
        start.checkpoint = found if remote is None else remote.download(start.store)
        assert start.checkpoint is not None
        _must_fit(config, start.checkpoint, where)
    except BaseException:
        start.lock.close()
        raise
    return start


def _must_fit(config: TrainConfig, checkpoint: Path, run: Path) -> None:
    try:
        before = stored_config(checkpoint / CONFIG)
    except (OSError, ConfigError) as error:
        raise DamagedCheckpoint(f"{checkpoint}: {CONFIG} cannot be read: {error}") from error
    wrong = differences(before, config)
    changed = other_content(read_inputs(checkpoint / INPUTS), inputs_of(config), config)
    wrong += [phrase for key, phrase in changed.items() if not _is_below(key, config.checkpoint.accept_changes)]
    if wrong:
        raise ConfigError(
            f"{run} holds a run that stands after step {step_of(checkpoint.name)} and has another {', '.join(wrong)}: "
            "give the old values to resume it, or name the keys in checkpoint.accept_changes to go on with the new "
            "ones, or resume=never to begin a new run"
        )


def _fresh(runs: Path, name: str, far: RemoteRuns | None) -> ResumePoint:
    there = set(far.names()) if far is not None else set()
    for number in range(1, 10_000):
        folder = runs / _numbered(name, number)
        if folder.name in there:
            continue
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        if (lock := _locked(folder)) is None:
            continue
        if far is not None:
            remote = far.run(folder.name)
            try:
                remote.acquire()
            except RunInUse:  # another machine began one of this name in this moment
                lock.close()
                _remove_if_empty(folder)
                continue
            except BaseException:
                lock.close()
                raise
            lock.remote = remote
        return ResumePoint(folder, None, lock)
    raise ConfigError(f"there are too many runs called {name!r} in {runs}")


def _taken(runs: Path, name: str, far: RemoteRuns | None) -> Iterator[str]:
    there = set(far.names()) if far is not None else set()
    for number in range(1, 10_000):
        if not (runs / (numbered := _numbered(name, number))).is_dir() and numbered not in there:
            return
        yield numbered


def _numbered(name: str, number: int) -> str:
    return name if number == 1 else f"{name}-{number}"


def _remove_if_empty(folder: Path) -> None:
    """Remove a folder that was only just made, so that its name stays free."""
    with suppress(OSError):
        (folder / ".lock").unlink(missing_ok=True)
        (folder / CHECKPOINTS).rmdir() if (folder / CHECKPOINTS).exists() else None
        folder.rmdir()


def _locked(folder: Path) -> RunLock | None:
    """Lock a run; None where another process has locked it. The lock ends with the process, however that ends.

    Raises OSError where nothing can be written there."""
    file = (folder / ".lock").open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return RunLock(file)


def _is_below(key: str, keys: tuple[str, ...] | list[str]) -> bool:
    return any(key == other or key.startswith(f"{other}.") for other in keys)


def _is_free_form(key: str) -> bool:
    """Whether a key is one of a user's own below a key of ours, such as the weight of a reward term."""
    *above, _ = accumulate(key.split("."), "{}.{}".format)
    return key not in _leaves() and any(name in _leaves() for name in above)


@cache
def _leaves() -> frozenset[str]:
    """Our keys that are no sections."""
    known = all_keys(TrainConfig())
    return frozenset(known) - {name.rpartition(".")[0] for name in known}


@cache
def _defaults() -> dict[str, Any]:
    return _flat(OmegaConf.structured(TrainConfig))


def _flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Values by dotted key, interpolations unresolved; an empty section has none."""
    found: dict[str, Any] = {}
    cells: Any = config if isinstance(config, dict) else OmegaConf.to_container(config, enum_to_str=True)
    for key, value in cells.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
