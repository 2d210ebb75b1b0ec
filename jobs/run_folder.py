"""The folder of a run: its lock, its configuration, its log, and its records as of a checkpoint."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from ergo_rl.jobs.config import TrainConfig, config_yaml
from ergo_rl.jobs.fingerprints import inputs_json, inputs_of
from ergo_rl.jobs.record_parts import read_record
from ergo_rl.jobs.resume import ResumePoint, find_resume_point
from ergo_rl.jobs.run_paths import CONFIG, ENDED, INPUTS, RECORDS, replace_file
from ergo_rl.jobs.trackers import require_packages

logger = logging.getLogger(__name__)


class RunFolder:
    """Open it with ``RunFolder.open``. All that is in it can be read while the run lasts."""

    def __init__(self, start: ResumePoint, config: TrainConfig) -> None:
        self.path, self.remote, self._config = start.folder, start.remote, config
        self.origin = start.checkpoint
        """The checkpoint with which this process began; None: step 0."""
        self.checkpoint = start.checkpoint
        """The checkpoint that the records stand at; None: step 0."""
        self._inputs: dict[str, str] = {}
        self.closing = ExitStack()
        """What is closed before the run's lock is given back."""

    @classmethod
    @contextmanager
    def open(cls, config: TrainConfig) -> Iterator[RunFolder]:
        """Open ``runs_dir/name``, or, where that name is taken, the folder with a number behind it (``jobs.resume``).

        Locks it, saves the configuration, and writes the log to ``run.log``. An error that leaves the block is noted in
        ``ended.json``. Raises ConfigError, DamagedCheckpoint, RunInUse, OSError."""
        require_packages(config.metrics)
        start = find_resume_point(config)
        with start.lock:
            folder = cls(start, config)
            replace_file(folder.path / CONFIG, config_yaml(config).encode())
            folder.note_inputs()
            with _logging_to(folder.path / "run.log"), folder.closing:
                try:
                    folder.rewind(start.checkpoint)
                    yield folder
                except Exception as error:
                    folder.mark_ended(done=False, why=f"{type(error).__name__}: {error}")
                    raise

    def note_inputs(self) -> None:
        """Note the fingerprints of training files and models, as far as that was not done yet: a model from a hub has
        none before it was loaded for the first time. Raises OSError."""
        if (now := {**inputs_of(self._config), **self._inputs}) != self._inputs:
            replace_file(self.path / INPUTS, inputs_json(now))
            self._inputs = now

    def rewind(self, checkpoint: Path | None) -> bool:
        """Restore the records to a checkpoint (None: to step 0); what was recorded later is dropped.

        Returns whether they are now what the checkpoint's parts of them say, byte by byte."""
        self.checkpoint, same = checkpoint, True
        for name in RECORDS:
            content, whole = read_record(checkpoint, name) if checkpoint is not None else (b"", True)
            _cut_back(self.path / name, content)
            same = same and whole
        (self.path / ENDED).unlink(missing_ok=True)
        return same

    def mark_ended(self, done: bool, why: str) -> None:
        """Write ``ended.json``. A run that is done is not resumed. A disk that does not take it is logged."""
        try:
            replace_file(self.path / ENDED, ended_json(done, why))
        except OSError as error:
            logger.error("%s could not be written: %s", self.path / ENDED, error)


def _cut_back(path: Path, content: bytes) -> None:
    """Make a record what it was; where it has only grown since, that needs no room on a full disk. Raises OSError."""
    if path.exists():
        with path.open("r+b") as file:
            if file.read(len(content)) == content:
                file.truncate(len(content))
                return
    replace_file(path, content)


def ended_json(done: bool, why: str) -> bytes:
    return (json.dumps({"done": done, "why": why}) + "\n").encode()


class _LogFile(logging.FileHandler):
    """A log that loses lines on a full disk and does not print a traceback for each."""

    def handleError(self, record: logging.LogRecord) -> None: ...


@contextmanager
def _logging_to(path: Path) -> Iterator[None]:
    log_file = _LogFile(path, encoding="utf-8")
    log_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(log_file)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(log_file)
        with suppress(OSError):
            log_file.close()
