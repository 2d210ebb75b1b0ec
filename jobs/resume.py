"""Which folder a run gets, and from which checkpoint it resumes."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from omegaconf import OmegaConf

from ergo_rl.jobs.checkpoint_store import (
    MANIFEST,
    CheckpointStore,
    DamagedCheckpoint,
    RemoteStore,
    step_of,
    verify_checkpoint,
)
from ergo_rl.jobs.config import CheckpointConfig, ConfigError, TrainConfig, keys_that_may_change, stored_config
from ergo_rl.jobs.run_paths import CHECKPOINTS, CONFIG, ENDED, POLICY

AUTO, NEVER = "auto", "never"


@dataclass(slots=True)
class ResumePoint:
    """Where a run begins."""

    folder: Path
    """Of the run."""
    checkpoint: Path | None
    """A verified checkpoint to resume from; None: begin with step 0."""
    lock: IO[bytes]
    """Locks the folder while it is open."""


def find_resume_point(config: TrainConfig) -> ResumePoint:
    """Find or create the folder of a run.

    ``resume: auto`` resumes the unfinished run of this name (the last of NAME, NAME-2, ...), unless another process
    runs it; ``never`` begins a new run; a path or URL of a checkpoint, or of a run, begins a new run from there.

    Raises ConfigError (naming the keys whose values do not fit), DamagedCheckpoint, OSError."""
    runs = Path(config.runs_dir)
    if not config.name or "/" in config.name or config.name.startswith("."):
        raise ConfigError(f"name {config.name!r} cannot be a folder name")
    if config.checkpoint.url:
        RemoteStore(config.checkpoint.url).probe()
    if config.resume not in (AUTO, NEVER):
        return _branch(config, runs)
    if config.resume == AUTO and (start := _unfinished(config, runs)) is not None:
        return start
    return _fresh(runs, config.name)


def remote_store(config: CheckpointConfig, folder: Path) -> RemoteStore | None:
    """Return the store to which the checkpoints of the run in ``folder`` are copied, if there is one."""
    url = config.url
    return RemoteStore(f"{url.rstrip('/')}/{folder.name}") if url else None


def differences(before: Any, config: TrainConfig) -> list[str]:
    """Return ``key (old, now new)`` of every value that must not change on resume.

    before: what ``stored_config`` returns."""
    now = _flat(OmegaConf.create(OmegaConf.to_yaml(OmegaConf.structured(config))))
    old, may_change = _flat(before), keys_that_may_change()
    return [
        f"{key} ({old[key]!r}, now {now[key]!r})"
        for key in sorted(old.keys() & now.keys())
        if old[key] != now[key] and not any(key == free or key.startswith(f"{free}.") for free in may_change)
    ]


def _unfinished(config: TrainConfig, runs: Path) -> ResumePoint | None:
    folder = next(reversed(list(_taken(runs, config.name))), None)
    if folder is None:
        return _from_remote(config, runs / config.name)
    if _done(folder):
        return None
    lock = _locked(folder)
    if lock is None:
        return None
    checkpoint = CheckpointStore(folder / CHECKPOINTS).newest()
    if checkpoint is None and (remote := remote_store(config.checkpoint, folder)) is not None:
        checkpoint = remote.download(CheckpointStore(folder / CHECKPOINTS))
    if checkpoint is None and (folder / CONFIG).exists() and differences(stored_config(folder / CONFIG), config):
        lock.close()
        return None  # it saved nothing and was configured otherwise: leave it as it is
    if checkpoint is not None:
        _must_fit(config, checkpoint, folder)
    return ResumePoint(folder, checkpoint, lock)


def _done(folder: Path) -> bool:
    """Whether the run is finished. Runs of former versions have a policy and no ``ended.json``."""
    ended = folder / ENDED
    return bool(json.loads(ended.read_text())["done"]) if ended.exists() else (folder / POLICY).exists()


def _from_remote(config: TrainConfig, folder: Path) -> ResumePoint | None:
    """Resume on a machine that has only the URL and not the run's folder."""
    remote = remote_store(config.checkpoint, folder)
    if remote is None or not (names := remote.names()) or step_of(names[0]) >= config.total_steps:
        return None
    start = _fresh(folder.parent, folder.name)
    start.checkpoint = remote.download(CheckpointStore(start.folder / CHECKPOINTS))
    if start.checkpoint is not None:
        _must_fit(config, start.checkpoint, folder)
    return start


def _branch(config: TrainConfig, runs: Path) -> ResumePoint:
    where = Path(config.resume)
    if "://" in config.resume:
        start = _fresh(runs, config.name)
        start.checkpoint = RemoteStore(config.resume).download(CheckpointStore(start.folder / CHECKPOINTS))
    elif (where / MANIFEST).exists():
        verify_checkpoint(where)
        start = _fresh(runs, config.name)
        start.checkpoint = where
    else:
        found = CheckpointStore(where / CHECKPOINTS).newest()
        start = _fresh(runs, config.name)
        start.checkpoint = found
    if start.checkpoint is None:
        raise ConfigError(f"resume: there is no checkpoint at {config.resume}; name a checkpoint, a run, auto or never")
    _must_fit(config, start.checkpoint, where)
    return start


def _must_fit(config: TrainConfig, checkpoint: Path, run: Path) -> None:
    try:
        before = stored_config(checkpoint / CONFIG)
    except OSError as error:
        raise DamagedCheckpoint(f"{checkpoint}: {CONFIG} cannot be read: {error}") from error
    if wrong := differences(before, config):
        raise ConfigError(
            f"{run} holds a run that stands after step {step_of(checkpoint.name)} and has another {', '.join(wrong)}: "
            "give the old values to resume it, or resume=never to begin a new run"
        )


def _fresh(runs: Path, name: str) -> ResumePoint:
    for number in range(1, 10_000):
        folder = runs / _numbered(name, number)
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        if (lock := _locked(folder)) is not None:
            return ResumePoint(folder, None, lock)
    raise ConfigError(f"there are too many runs called {name!r} in {runs}")


def _taken(runs: Path, name: str) -> Iterator[Path]:
    for number in range(1, 10_000):
        if not (folder := runs / _numbered(name, number)).is_dir():
            return
        yield folder


def _numbered(name: str, number: int) -> str:
    return name if number == 1 else f"{name}-{number}"


def _locked(folder: Path) -> IO[bytes] | None:
    """Lock a run; None where another process has locked it. The lock ends with the process, however that ends.

    Raises OSError where nothing can be written there."""
    file = (folder / ".lock").open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def _flat(config: Any, prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    cells: Any = config if isinstance(config, dict) else OmegaConf.to_container(config, resolve=True)
    for key, value in cells.items():
        if isinstance(value, dict) and value:
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
