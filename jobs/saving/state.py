"""What a checkpoint holds, and the way there and back.

=============================  =======================================================================================
``state.json``                 step (the policy version), rows of the data set, the flow: cursor, numbers, in flight
``learner-*.safetensors``      fp32 masters and moments by parameter (``learners.checkpoint``)
``groups.arrow`` and two more  scored groups that no step has used yet, with their pixels (``actors.snapshot``)
``*.jsonl``                    metrics, evaluations and used questions so far: to go on takes nothing else
``config.yaml``                the resolved configuration
=============================  =======================================================================================

There is no generator among it: every draw of the run is seeded by a number that is there
(``derive_seed(seed, number)`` for rollouts, the step for the learner and the shuffle control, the version for the
proof).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import ray
from omegaconf import OmegaConf

from ergo_rl.actors.snapshot import SCHEMAS, read_groups, write_groups
from ergo_rl.actors.trajectory_store import Group
from ergo_rl.jobs.config import TrainConfig
from ergo_rl.jobs.flow import FlowState
from ergo_rl.jobs.layout import CONFIG, EVALUATIONS, METRICS
from ergo_rl.jobs.saving.checkpoints import DamagedCheckpoint, Draft, read_manifest
from ergo_rl.learners.learner_group import LearnerGroup
from ergo_rl.questions.dataset import Cursor

STATE = "state.json"
RECORDS = (METRICS, EVALUATIONS, "questions.jsonl")
"""Files of the run folder with a line per step."""
_LEARNER = "learner-{:05d}.safetensors"


@dataclass(frozen=True, slots=True)
class RunState:
    """A run between two steps. step: updates behind it; rows: of the training questions, to notice other files."""

    step: int = 0
    rows: int = 0
    flow: FlowState = field(default_factory=FlowState)


async def write_state(draft: Draft, state: RunState, config: TrainConfig, run: Path, learners: LearnerGroup) -> None:
    """All of it into ``draft``. ``learners`` must be at ``state.step``; the records are those in the folder ``run``."""
    await asyncio.to_thread(_write_facts, draft, state, config, run)
    written = 0

    async def keep(file: ray.ObjectRef) -> None:
        nonlocal written
        await asyncio.to_thread(draft.write, _LEARNER.format(written), await file)
        written += 1

    await learners.state(keep)


def _write_facts(draft: Draft, state: RunState, config: TrainConfig, run: Path) -> None:
    cells = {"step": state.step, "rows": state.rows, "flow": flow_cells(state.flow)}
    draft.write(STATE, (json.dumps(cells) + "\n").encode())
    draft.write(CONFIG, OmegaConf.to_yaml(OmegaConf.structured(config)).encode())
    for name in RECORDS:
        if (run / name).exists():
            draft.write(name, (run / name).read_bytes())
    with ExitStack() as stack:
        files = {name: stack.enter_context(draft.create(f"{name}.arrow")) for name in SCHEMAS}
        write_groups(state.flow.groups, files)


def read_state(folder: Path) -> RunState:
    """All but the learner's part; trajectories go into the object store. ``folder`` was checked.

    Raises DamagedCheckpoint where the content is not what this version writes."""
    try:
        cells = json.loads((folder / STATE).read_bytes())
        with ExitStack() as stack:
            files = {name: stack.enter_context((folder / f"{name}.arrow").open("rb")) for name in SCHEMAS}
            groups = tuple(read_groups(files))
        return RunState(int(cells["step"]), int(cells["rows"]), flow_state(cells["flow"], groups))
    except (OSError, ValueError, KeyError, TypeError) as error:  # pyarrow's errors are among them
        raise DamagedCheckpoint(f"{folder}: {type(error).__name__}: {error}") from error


async def restore_learners(learners: LearnerGroup, folder: Path) -> int:
    """Give the learner's part of a checkpoint to fresh ranks; returns the step that comes next."""
    names = sorted(name for name in read_manifest(folder).files if name.startswith("learner-"))

    def put(name: str) -> ray.ObjectRef:
        return ray.put((folder / name).read_bytes())

    return await learners.restore([await asyncio.to_thread(put, name) for name in names])


def flow_cells(state: FlowState) -> dict[str, Any]:
    """As JSON takes it, without the groups."""
    cells = {name: getattr(state, name) for name in FlowState.__dataclass_fields__ if name != "groups"}
    in_flight = [[number, asdict(cursor)] for number, cursor in state.in_flight]
    return {**cells, "cursor": asdict(state.cursor), "in_flight": in_flight, "skipped": list(state.skipped)}


def flow_state(cells: dict[str, Any], groups: Iterable[Group]) -> FlowState:
    """Raises ValueError, TypeError or KeyError for what ``flow_cells`` does not write."""
    in_flight = tuple((int(number), Cursor(**cursor)) for number, cursor in cells["in_flight"])
    whole = {**cells, "cursor": Cursor(**cells["cursor"]), "in_flight": in_flight, "skipped": tuple(cells["skipped"])}
    return FlowState(**whole, groups=tuple(groups))
