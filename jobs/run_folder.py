"""The folder of a run: its lock, its configuration, its log, and its records as of a checkpoint."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from omegaconf import OmegaConf

from ergo_rl.jobs.config import TrainConfig
from ergo_rl.jobs.resume import find_resume_point
from ergo_rl.jobs.run_paths import CONFIG, ENDED, RECORDS
from ergo_rl.jobs.trackers import require_packages


class RunFolder:
    """Open it with ``RunFolder.open``. All that is in it can be read while the run lasts."""

    def __init__(self, path: Path, checkpoint: Path | None) -> None:
        self.path = path
        self.origin = checkpoint
        """The checkpoint with which this process began; None: step 0."""
        self.checkpoint = checkpoint
        """The checkpoint that the records stand at; None: step 0."""

    @classmethod
    @contextmanager
    def open(cls, config: TrainConfig) -> Iterator[RunFolder]:
        """Open ``runs_dir/name``, or, where that name is taken, the folder with a number behind it (``jobs.resume``).

        Locks it, saves the configuration, and writes the log to ``run.log``. An error that leaves the block is noted in
        ``ended.json``. Raises ConfigError, DamagedCheckpoint, OSError."""
        require_packages(config.metrics)
        start = find_resume_point(config)
        OmegaConf.save(OmegaConf.structured(config), start.folder / CONFIG)
        log_file = logging.FileHandler(start.folder / "run.log", encoding="utf-8")
        log_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logging.getLogger().addHandler(log_file)
        folder = cls(start.folder, start.checkpoint)
        try:
            with start.lock:
                try:
                    folder.rewind(start.checkpoint)
                    yield folder
                except Exception as error:
                    folder.mark_ended(done=False, why=f"{type(error).__name__}: {error}")
                    raise
        finally:
            logging.getLogger().removeHandler(log_file)
            log_file.close()

    def rewind(self, checkpoint: Path | None) -> None:
        """Restore the records to a checkpoint (None: to step 0); what was recorded later is dropped."""
        self.checkpoint = checkpoint
        for name in RECORDS:
            content = (checkpoint / name).read_bytes() if checkpoint and (checkpoint / name).exists() else b""
            temporary = self.path / f".{name}"
            temporary.write_bytes(content)
            temporary.replace(self.path / name)
        (self.path / ENDED).unlink(missing_ok=True)

    def mark_ended(self, done: bool, why: str) -> None:
        """Write ``ended.json``. A run that is done is not resumed."""
        (self.path / ENDED).write_text(json.dumps({"done": done, "why": why}) + "\n")
