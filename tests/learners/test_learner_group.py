import asyncio
import errno
import math
import os
import resource
import signal
import time
from collections.abc import Awaitable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from ergo_rl.cluster.config import Resources
from ergo_rl.cluster.placement import Cluster
from ergo_rl.cluster.weight_buckets import Bucket, unpack
from ergo_rl.episodes.types import Trajectory
from ergo_rl.learners.config import LearnerConfig, OptimizerConfig
from ergo_rl.learners.failures import SaveFailed
from ergo_rl.learners.learner_group import (
    LearnerFailed,
    LearnerGroup,
    RankBatch,
    TrainingGroup,
    balanced_split,
    rank_actor,
    shard_groups,
)
from tests.factories import trajectory, view


def group(name: str, advantages: tuple[float, ...], tokens: tuple[int, ...]) -> TrainingGroup:
    by_turn = tuple((advantage,) for advantage in advantages)
    return TrainingGroup(name, f"reference to {name}", by_turn, tokens)  # type: ignore[arg-type]


def test_shard_groups_balances_the_cost() -> None:
    groups = [group("a", (1.0, 2.0), (10, 10)), group("b", (3.0, 4.0, 5.0), (20, 15, 10))]
    assert shard_groups(groups, 2) == [
        [RankBatch("reference to a", (0, 1), ((1.0,), (2.0,))), RankBatch("reference to b", (0,), ((3.0,),))],
        [RankBatch("reference to b", (1, 2), ((4.0,), (5.0,)))],
    ]


def test_shard_groups_counts_unscored_trajectories_as_free() -> None:
    shares = shard_groups([group("a", (math.nan, math.nan, 1.0, 2.0), (500, 500, 10, 10))], 2)
    assert [share.members for rank in shares for share in rank] == [(0, 1, 2), (3,)]


def test_shard_groups_gives_an_idle_rank_one_trajectory_without_loss() -> None:
    first, second = shard_groups([group("a", (1.0,), (10,))], 2)
    working, idle = sorted([first[0], second[0]], key=lambda share: math.isnan(share.advantages[0][0]))
    assert working.advantages == ((1.0,),) and math.isnan(idle.advantages[0][0]) and idle.members == (0,)


def test_group_with_unequal_lengths_is_refused() -> None:
    with pytest.raises(ValueError, match="'a': 2 advantages, 1 lengths"):
        group("a", (1.0, 2.0), (10,))
    with pytest.raises(ValueError, match="no trajectories"):
        shard_groups([], 2)


@given(st.lists(st.integers(0, 100), max_size=30), st.integers(1, 8))
def test_balanced_split_loses_nothing_and_is_balanced(costs: list[int], parts: int) -> None:
    pieces = balanced_split(costs, parts)
    assert len(pieces) == parts
    assert [index for piece in pieces for index in piece] == list(range(len(costs)))
    share = sum(costs) / parts
    for piece in pieces:  # each end of a piece is off by at most half an item
        assert sum(costs[index] for index in piece) <= share + max(costs, default=0) + 1e-6


@pytest.fixture(scope="module")
def played() -> list[tuple[Trajectory, ...]]:
    """Two groups of four, each with one coarse view; one- and two-turn."""

    def make(question: int, sample: int, coarse: Any) -> Trajectory:
        replies = (4 + sample,) if sample == 2 else (3 + sample, 6 - question)
        crop = view(2 + sample, 3, sample)
        return trajectory(f"q{question}", sample, replies=replies, coarse=coarse, crop=crop, seed=question)

    scenes = [view(3 + question, 3, question) for question in range(2)]
    return [tuple(make(question, sample, scene) for sample in range(4)) for question, scene in enumerate(scenes)]


def logprobs_of(
    model: Path | str, weights: dict[str, torch.Tensor] | None, episodes: tuple[Trajectory, ...]
) -> list[np.ndarray]:
    """The same by a policy in this process, with other weights if given."""
    from transformers import AutoImageProcessor

    from ergo_rl.learners.batch import Batcher, Sample
    from ergo_rl.learners.model import PolicyModel
    from tests.factories import FAMILY, IDS, IMAGE_PAD

    policy = PolicyModel(LearnerConfig(model=str(model)))
    if weights is not None:
        policy.vlm.load_state_dict(weights)
    batcher = Batcher(FAMILY, AutoImageProcessor.from_pretrained(model), IMAGE_PAD, IDS["<|im_end|>"], 1)
    result = []
    for episode in episodes:
        (batch,) = batcher.batches(batcher.plan([Sample(episode, (0.0,))]))
        with torch.no_grad():
            logprobs, _ = policy(batch, 1.0, [IDS[token] for token in FAMILY.vision_tokens])
        result.append(logprobs[batch.loss_mask].numpy())
    return result


def furthest(these: list[np.ndarray], those: list[np.ndarray]) -> float:
    return max(float(np.abs(this - that).max()) for this, that in zip(these, those, strict=True))


@pytest.mark.system
@pytest.mark.timeout(600)
def test_two_zero3_ranks_update_save_restore_and_fail(
    ray_cluster: Cluster,
    tiny: Path,
    tmp_path: Path,
    played: list[tuple[Trajectory, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Update, log-probs, weights, export, state and restore, saves that fail, the death of a rank, and one that is
    stopped: one story, because starting two ranks takes most of the time."""
    monkeypatch.setattr("ergo_rl.learners.learner_group.PING_S", 0.2)
    config = LearnerConfig(
        model=str(tiny),
        ranks=2,
        resources=Resources(cpus=0.1),
        zero_stage=3,
        stage3_persistence_threshold=0,
        micro_batch_tokens=100,
        bucket_bytes=200_000,
        optimizer=OptimizerConfig(lr=1e-3),
    )
    asyncio.run(story(ray_cluster, config, tmp_path, played))


async def story(cluster: Cluster, config: LearnerConfig, folder: Path, played: list[tuple[Trajectory, ...]]) -> None:
    references = [ray.put(trajectories) for trajectories in played]
    advantages = ((1.0,), (-0.5,), (math.nan,), (0.25,))
    groups = [TrainingGroup(f"q{n}", reference, advantages, (30,) * 4) for n, reference in enumerate(references)]
    learners = await LearnerGroup.launch(cluster, config)

    before = await learners.logprobs(references[0])
    assert furthest(before, logprobs_of(config.model, None, played[0])) < 1e-5

    report = await learners.update(groups)
    sampled = sum(int(episode.loss_mask.sum()) for group in played for n, episode in enumerate(group) if n != 2)
    assert report["learner/tokens"] == sampled
    assert report["learner/trajectories"] == 6 and report["learner/length_mismatches"] == 0
    assert report["learner/lr"] == 1e-3 and report["learner/grad_norm"] > 0
    after = await learners.logprobs(references[0])
    assert furthest(after, before) > 1e-3

    buckets = await learners.weights()
    await learners.export(folder / "export")
    state = await state_of(learners)
    at_save = await learners.update(groups)
    moved = await all_weights(learners)
    assert await learners.restore(state) == 1
    assert furthest(await learners.logprobs(references[0]), after) == 0.0
    again = await learners.update(groups)  # the optimiser's moments were restored, too
    assert again["learner/loss"] == at_save["learner/loss"]
    assert bitwise(await all_weights(learners), moved)

    await failing_saves(learners, folder, state)
    ray.kill(learners._actors[1])
    with pytest.raises(LearnerFailed, match="learner rank 1 died in update"):
        await asyncio.wait_for(learners.update(groups), timeout=60)

    # in fresh processes, as after a crash: bitwise on as many ranks, and nearly so on one rank of another stage
    for ranks, stage in ((2, 3), (1, 2)):
        other = await LearnerGroup.launch(cluster, replace(config, ranks=ranks, zero_stage=stage))
        assert await other.restore(state) == 1
        assert bitwise(await all_weights(other), await files_of(buckets))
        await other.update(groups)
        result = await all_weights(other)
        assert bitwise(result, moved) or (ranks == 1 and close(result, moved))
        await stopped(other, ranks - 1, other.update(groups))

    assert len(buckets) > 2  # and they outlive the ranks
    weights = await files_of(buckets)
    assert furthest(logprobs_of(config.model, weights, played[0]), after) < 1e-5
    assert furthest(logprobs_of(folder / "export", None, played[0]), after) < 1e-5


async def failing_saves(learners: LearnerGroup, folder: Path, state: list[ray.ObjectRef]) -> None:
    """A full disk, of the driver and of a rank: an error of its own, nothing left behind, and no rank is lost."""
    asked = 0

    async def keep(file: ray.ObjectRef) -> None:
        nonlocal asked
        asked += 1
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left on device"):
        await learners.state(keep)
    assert asked == 1, "after the first error nothing more is handed out"

    def limit(rank: Any, size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    await learners._actors[0].__ray_call__.remote(limit, 300_000)  # a file of the export has 0.6 MB
    with pytest.raises(SaveFailed, match=r"disk could not be written: .*File too large"):
        await learners.export(folder / "disk")
    await learners._actors[0].__ray_call__.remote(limit, resource.RLIM_INFINITY)
    assert [path.name for path in folder.iterdir()] == ["export"]
    assert len(await state_of(learners)) == len(state)
    for _ in range(2):  # the second time over the first
        await learners.export(folder / "disk")
    assert sorted(path.name for path in folder.iterdir()) == ["disk", "export"]


async def stopped(learners: LearnerGroup, rank: int, call: Awaitable[Any]) -> None:
    """SIGSTOP of one rank, of several or the only one, in the middle of a call: noticed, and its process is ended."""
    pid: int = await learners._actors[rank].__ray_call__.remote(lambda rank: os.getpid())
    os.kill(pid, signal.SIGSTOP)
    learners._hang_timeout_s = 3.0
    with pytest.raises(
        LearnerFailed, match=rf"learner rank {rank} was silent for 3 s \(learner.hang_timeout_s\) in upd"
    ):
        await asyncio.wait_for(call, timeout=30)
    await ended(pid)


async def ended(pid: int) -> None:
    async with asyncio.timeout(30):
        while Path(f"/proc/{pid}").exists():
            await asyncio.sleep(0.1)


async def state_of(learners: LearnerGroup) -> list[ray.ObjectRef]:
    files: list[ray.ObjectRef] = []

    async def keep(file: ray.ObjectRef) -> None:
        files.append(file)

    await learners.state(keep)
    assert len(files) > 2, "in pieces"
    return files


async def files_of(references: Sequence[ray.ObjectRef]) -> dict[str, torch.Tensor]:
    """The tensors of all files, or of all buckets, together."""
    tensors: dict[str, torch.Tensor] = {}
    for reference in references:
        file = await reference
        if isinstance(file, Bucket):
            tensors |= unpack(torch.from_numpy(np.concatenate(file.parts)), file.spec)
        else:
            tensors |= safetensors.torch.load(file)
    return tensors


async def all_weights(learners: LearnerGroup) -> dict[str, torch.Tensor]:
    return await files_of(await learners.weights())


def bitwise(these: dict[str, torch.Tensor], those: dict[str, torch.Tensor]) -> bool:
    return these.keys() == those.keys() and all(torch.equal(these[name], those[name]) for name in these)


def close(these: dict[str, torch.Tensor], those: dict[str, torch.Tensor]) -> bool:
    """Sums over ranks are in another order; Adam makes a whole step of a gradient that is nearly 0."""
    off = [float(((these[name] - those[name]).abs() > 1e-5).float().mean()) for name in these]
    return these.keys() == those.keys() and max(off) < 0.05


@pytest.mark.system
def test_several_ranks_when_they_are_stopped_then_all_are_named(
    ray_cluster: Cluster, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks that have not started: what they compute does not matter here. A long call alone is no reason."""
    monkeypatch.setattr("ergo_rl.learners.learner_group.PING_S", 0.2)

    async def run() -> None:
        rank = rank_actor().options(num_cpus=0)
        group = LearnerGroup([rank.remote(LearnerConfig(model=str(tiny))) for _ in range(3)], hang_timeout_s=2.0)

        def nap(rank: Any, seconds: float) -> int:
            time.sleep(seconds)
            return os.getpid()

        await group._all("address", [actor.address.remote() for actor in group._actors], ping=False)
        pids = await group._all("nap", [actor.__ray_call__.remote(nap, 3.0) for actor in group._actors])
        for pid in (pids[0], pids[2]):
            os.kill(pid, signal.SIGSTOP)
        with pytest.raises(LearnerFailed, match="learner rank 0 and 2 was silent for 2 s"):
            await group._all("nap", [actor.__ray_call__.remote(nap, 3.0) for actor in group._actors])
        for pid in pids:
            await ended(pid)

    asyncio.run(run())


@pytest.mark.system
def test_failed_start_names_rank_and_cause(ray_cluster: Cluster, tmp_path: Path) -> None:
    config = LearnerConfig(model=str(tmp_path / "nothing-here"), resources=Resources(cpus=0.1))
    with pytest.raises(LearnerFailed, match=r"(?s)learner rank 0 failed in start: .*nothing-here"):
        asyncio.run(LearnerGroup.launch(ray_cluster, config))
