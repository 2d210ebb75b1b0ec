"""Fingerprints of what a run reads and does not copy: training files and base models. A checkpoint notes them, so that
a run is not resumed with other content behind the same paths.

Of a file its size and a digest: of all its bytes up to ``WHOLE_BYTES``, else of ``PIECES`` pieces, spread evenly from
its first to its last byte (in a Parquet file the last ones list every column chunk with its place, size and statistics;
in a safetensors file the first ones list every tensor). Of a local model the files that transformers and vLLM load; of
a model from the hub the commit in the cache. Pictures that rows name by path are covered for evaluations alone
(``of_question``).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from ergo_rl.actors.rollout_worker import SkippedQuestion
from ergo_rl.episodes.types import Question
from ergo_rl.jobs.config import TrainConfig
from ergo_rl.model_names import split_revision
from ergo_rl.questions.dataset import DatasetError, expand_paths
from ergo_rl.rewards.config import Backend

logger = logging.getLogger(__name__)

WHOLE_BYTES = 256 << 20
PIECES, PIECE_BYTES = 256, 64 << 10
_OF_A_MODEL = (".safetensors", ".bin", ".json", ".model", ".txt", ".jinja")


def inputs_of(config: TrainConfig) -> dict[str, str]:
    """Return the fingerprint of each training file and model, by key. What is not on this machine has none."""
    found = {f"questions.paths.{place}": _of_rows(path) for place, path in enumerate(config.questions.paths)}
    found["learner.model"] = _of_model(config.learner.model)
    if config.reward.verifier.backend is Backend.ENGINE:
        found["reward.verifier.engine.model"] = _of_model(config.reward.verifier.engine.model)
    return {key: fingerprint for key, fingerprint in found.items() if fingerprint}


def of_evaluation(config: TrainConfig) -> dict[str, str]:
    """Return the fingerprints of the held-out files, together, and of the policy: what the answers depend on."""
    files = " ".join(map(_of_rows, config.evaluation.paths))
    return {"content of the questions": files, "content of the policy": _of_model(config.rollout.engine.model)}


def of_question(question: Question | SkippedQuestion) -> str:
    """Return the fingerprint of all that an answer to a question depends on, its picture included; empty for a row that
    is none."""
    if isinstance(question, SkippedQuestion):
        return ""
    picture = question.image if isinstance(question.image, bytes) else _of_file(question.image).encode()
    words = repr((question.text, question.options, question.answer, question.boxes, question.source))
    return hashlib.blake2b(words.encode() + b"\n" + picture, digest_size=16).hexdigest()


def other_content(before: Mapping[str, str], now: Mapping[str, str], config: TrainConfig) -> dict[str, str]:
    """Return a phrase for each key whose content is another one; only what both have is compared."""
    models = {
        "learner.model": config.learner.model,
        "reward.verifier.engine.model": config.reward.verifier.engine.model,
    }
    places = models | {f"questions.paths.{place}": path for place, path in enumerate(config.questions.paths)}
    return {
        key: f"{key} (other content behind {places.get(key)})"
        for key in sorted(before.keys() & now.keys())
        if before[key] != now[key]
    }


def read_inputs(path: Path) -> dict[str, str]:
    """Read noted fingerprints; nothing where there are none (of an older version). What cannot be read is named."""
    try:
        noted = json.loads(path.read_bytes())
        return {str(key): str(value) for key, value in noted.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        logger.warning("%s cannot be read (%s): contents of files and models are not compared", path, error)
        return {}


def inputs_json(inputs: Mapping[str, str]) -> bytes:
    return (json.dumps(inputs, indent=1) + "\n").encode()


def _of_rows(path: str) -> str:
    """Of a file, or of all that a pattern or folder names; empty where there are none: whoever reads them says so."""
    try:
        return " ".join(map(_of_file, expand_paths([Path(path)], (".parquet",))))
    except DatasetError:
        return ""


def _of_model(name: str) -> str:
    folder = Path(name)
    if not name or not folder.is_dir():
        return _of_hub(name) if name else ""
    files = sorted(path for path in folder.iterdir() if path.suffix in _OF_A_MODEL and path.is_file())
    lines = "\n".join(f"{path.name} {_of_file(path)}" for path in files)
    return hashlib.blake2b(lines.encode(), digest_size=16).hexdigest()


def _of_hub(name: str) -> str:
    """The commit of a model in the hub's cache; empty where this machine has not loaded it."""
    from huggingface_hub import try_to_load_from_cache

    repository, revision = split_revision(name)
    try:
        path = try_to_load_from_cache(repository, "config.json", revision=revision)
    except ValueError:  # no name of the hub: whoever loads it says so
        return ""
    return Path(path).parent.name if isinstance(path, str) else ""


def _of_file(path: Path) -> str:
    """Empty where it cannot be read: whoever loads it says so."""
    digest = hashlib.blake2b(digest_size=16)
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            for start, length in _pieces(size):
                file.seek(start)
                digest.update(file.read(length))
    except OSError:
        return ""
    return f"{size}:{digest.hexdigest()}"


def _pieces(size: int) -> Iterator[tuple[int, int]]:
    if size <= WHOLE_BYTES:
        yield from ((start, PIECE_BYTES) for start in range(0, size, PIECE_BYTES))
        return
    for place in range(PIECES):
        yield (size - PIECE_BYTES) * place // (PIECES - 1), PIECE_BYTES
