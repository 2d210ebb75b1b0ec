"""Stopped, killed and revived: the loop of ``jobs.train`` with a crew without machines (tests/jobs/fakes.py)."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ergo_rl.episodes.panels import PanelsConfig, Split, question
from ergo_rl.episodes.questions import write_questions
from ergo_rl.jobs import outage
from ergo_rl.jobs.config import CheckpointConfig, ConfigError, RecoveryConfig, TrainConfig, load_config
from ergo_rl.jobs.outage import RewardsUnavailable
from ergo_rl.jobs.run import Run
from ergo_rl.jobs.stopping import Stopped
from ergo_rl.jobs.train import train
from ergo_rl.learners.learner_group import LearnerFailed
from tests.conftest import ROOT
from tests.jobs.fakes import Learners, Rewards, World
from tests.jobs.test_checkpoints import Crash, FailingDisk

STEPS = 7


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "questions.parquet"
    write_questions(path, (question(PanelsConfig(), 0, Split.TRAIN, index) for index in range(10)), rows_per_group=4)
    return path


@pytest.fixture
def config(data: Path, tmp_path: Path) -> TrainConfig:
    loaded = load_config(
        ROOT / "configs" / "panels.yaml",
        [
            "name=story", f"runs_dir={tmp_path}", f"questions.paths=[{data}]", "embedded.panels=null",
            "evaluation.paths=[]", "samples_every=0", f"total_steps={STEPS}", "groups_per_step=3",
            "rollout.group_size=2", "checkpoint.every=2", "recovery.backoff_s=0.01",
            "learner.optimizer.total_steps=100",
        ],
    )  # fmt: skip
    return loaded


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    world = World()
    world.enter(monkeypatch)
    return world


def go(config: TrainConfig) -> Path:
    return asyncio.run(asyncio.wait_for(train(config), timeout=60))


def digest(folder: Path) -> str:
    return (folder / "policy" / "digest").read_text()


def records(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    steps = records(folder, "metrics.jsonl")
    assert [one["step"] for one in steps] == list(range(len(steps))), "every step once, in order"
    return [one["learner/loss"] for one in steps]


def numbers(folder: Path) -> list[int]:
    return [used["number"] for step in records(folder, "questions.jsonl") for used in step["questions"]]


@pytest.fixture
def whole(config: TrainConfig, world: World, tmp_path: Path) -> Path:
    """A run that nobody disturbed."""
    folder = go(replace(config, runs_dir=str(tmp_path / "undisturbed")))
    assert numbers(folder) == list(range(3 * STEPS)) and world.launches == 1
    return folder


def test_killed_at_any_operation_of_a_save_it_comes_to_the_same_end(
    config: TrainConfig, world: World, whole: Path, tmp_path: Path
) -> None:
    """Synchronous: every loss and the last weights, bit for bit, however often it is killed."""
    for at in (*range(12), *range(12, 200, 7)):  # a save makes about twelve operations, the run four of them
        mine = replace(config, runs_dir=str(tmp_path / f"killed-{at}"))
        world.disk = FailingDisk(at)
        crashed = False
        try:
            folder = go(mine)
        except Crash:
            crashed = True
            world.disk = FailingDisk(10 * at + 5)  # and perhaps once more
            try:
                folder = go(mine)
            except Crash:
                world.disk = type(world.disk).__mro__[1]()
                folder = go(mine)
        assert digest(folder) == digest(whole) and losses(folder) == losses(whole)
        assert numbers(folder) == numbers(whole) and folder.name == "story"
        if not crashed:
            break
    assert at > 40


@pytest.mark.parametrize("staleness", [0, 2])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_same_command_goes_on(
    config: TrainConfig, world: World, whole: Path, monkeypatch: pytest.MonkeyPatch, staleness: int, number: int
) -> None:
    """Asynchronous runs differ in who was asked when; what no run may do is use a question twice, or never."""
    config = replace(config, max_staleness=staleness, checkpoint=CheckpointConfig(every=0))
    update, seen = Learners.update, Counter[int]()

    async def interrupted(self: Learners, groups: Any) -> dict[str, float]:
        seen[self.step] += 1
        if self.step in (2, 5) and seen[self.step] == 1:
            os.kill(os.getpid(), number)
            await asyncio.sleep(0.05)  # the loop sees it
        return await update(self, groups)

    monkeypatch.setattr(Learners, "update", interrupted)
    for after in (3, 6):
        with pytest.raises(Stopped, match=signal.Signals(number).name):
            go(config)
        ended = json.loads((Path(config.runs_dir) / "story" / "ended.json").read_text())
        assert ended == {"done": False, "why": f"Stopped: stopped by {signal.Signals(number).name}"}
        assert len(losses(Path(config.runs_dir) / "story")) == after, "the step that had learned was finished"
    folder = go(config)
    assert set(seen.values()) == {1}, "no step was learned twice"
    assert numbers(folder) == list(range(3 * STEPS))
    used = [used["id"] for step in records(folder, "questions.jsonl") for used in step["questions"]]
    assert used == [used["id"] for step in records(whole, "questions.jsonl") for used in step["questions"]]
    if not staleness:
        assert digest(folder) == digest(whole) and losses(folder) == losses(whole)


def test_a_signal_while_engines_play_drops_the_step(
    config: TrainConfig, world: World, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score, calls = Rewards.score, [0]

    async def interrupted(self: Rewards, *arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == 8:  # the second question of the third step
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.sleep(100)
        return await score(self, *arguments)

    monkeypatch.setattr(Rewards, "score", interrupted)
    with pytest.raises(Stopped):
        go(config)
    assert len(losses(Path(config.runs_dir) / "story")) == 2
    folder = go(config)
    assert digest(folder) == digest(whole) and losses(folder) == losses(whole)


@pytest.mark.parametrize("dies_at", [{1}, {4}, {3, 6, 8}])
def test_a_dead_learner_is_started_again_from_the_last_checkpoint_and_engines_stay(
    config: TrainConfig, world: World, whole: Path, dies_at: set[int]
) -> None:
    world.updates, world.engines, world.launches, world.dies_at = 0, 0, 0, dies_at
    folder = go(config)
    assert digest(folder) == digest(whole) and losses(folder) == losses(whole) and numbers(folder) == numbers(whole)
    assert world.engines == 1 and world.launches == 1 + len(dies_at)


@pytest.mark.parametrize("dies_at", [set(), {4}])
def test_engines_that_sleep_do_so_for_each_update_and_new_weights_wake_them(
    config: TrainConfig, world: World, whole: Path, dies_at: set[int]
) -> None:
    """Also where the learner dies while they sleep. The crew says when somebody updates beside an engine that is awake,
    or plays on one that sleeps."""
    world.updates, world.dies_at = 0, dies_at
    engine = replace(config.rollout.engine, sleep=True)
    folder = go(replace(config, rollout=replace(config.rollout, engine=engine)))
    assert digest(folder) == digest(whole) and losses(folder) == losses(whole) and not world.rollouts.asleep


def test_a_spent_budget_ends_the_run_and_it_can_go_on(config: TrainConfig, world: World, whole: Path) -> None:
    world.updates, world.dies_at = 0, {4, 5}
    config = replace(config, recovery=RecoveryConfig(learner_restarts=1, backoff_s=0.01))
    with pytest.raises(LearnerFailed) as caught:
        go(config)
    assert caught.value.__notes__ == ["no restarts are left (recovery.learner_restarts)"]
    folder = go(config)
    assert digest(folder) == digest(whole) and losses(folder) == losses(whole)


def test_what_would_come_again_is_not_tried_again(
    config: TrainConfig, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fails(self: Learners, groups: Any) -> dict[str, float]:
        raise LearnerFailed("learner rank 0 failed in update: no token to learn from") from ValueError("no token")

    monkeypatch.setattr(Learners, "update", fails)
    with pytest.raises(LearnerFailed):
        go(config)
    assert world.launches == 1


def test_an_error_elsewhere_finds_the_run_saved(
    config: TrainConfig, world: World, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score, calls = Rewards.score, [0]

    async def breaks(self: Rewards, *arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == 17:
            raise OSError("the disk of the reward model is full")
        return await score(self, *arguments)

    monkeypatch.setattr(Rewards, "score", breaks)
    config = replace(config, checkpoint=CheckpointConfig(every=0))
    with pytest.raises(OSError, match="disk of the reward model"):
        go(config)
    assert (Path(config.runs_dir) / "story" / "checkpoints" / "step-000005" / "manifest.json").exists()
    folder = go(config)
    assert digest(folder) == digest(whole)


def test_an_outage_of_the_reward_model_is_waited_for(
    config: TrainConfig, world: World, whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(outage, "FIRST_WAIT_S", 0.01)
    world.outage = 7
    folder = go(config)
    assert digest(folder) == digest(whole)
    said = capsys.readouterr().out.replace("\n", " ")
    assert "paused: 100% of the step could not be scored: http://rewards:8000/v1/chat/completions: status 503" in said
    assert "the reward model answers again" in said


def test_an_outage_that_does_not_end_ends_the_run_saved(
    config: TrainConfig, world: World, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outage, "FIRST_WAIT_S", 0.01)
    update = Learners.update

    async def then_it_goes(self: Learners, groups: Any) -> dict[str, float]:
        found = await update(self, groups)
        world.outage = 10**6 if self.step == 3 else 0
        return found

    monkeypatch.setattr(Learners, "update", then_it_goes)
    config = replace(config, reward=replace(config.reward, outage_deadline_s=0.2))
    with pytest.raises(RewardsUnavailable, match=r"100% of the step is unscored .*reward\.outage_deadline_s.*503"):
        go(config)
    world.outage = 0
    monkeypatch.setattr(Learners, "update", update)
    folder = go(config)
    assert digest(folder) == digest(whole) and losses(folder) == losses(whole)


def test_questions_that_cannot_be_played_are_passed_over_once(
    config: TrainConfig, world: World, tmp_path: Path
) -> None:
    world.unplayable = {question(PanelsConfig(), 0, Split.TRAIN, index).id for index in (2, 5)}
    whole = go(replace(config, runs_dir=str(tmp_path / "undisturbed")))
    world.updates, world.dies_at = 0, {4}
    folder = go(config)
    assert digest(folder) == digest(whole)
    last = records(folder, "metrics.jsonl")[-1]
    assert last["count/unplayable"] == records(whole, "metrics.jsonl")[-1]["count/unplayable"] > 0


def test_a_damaged_checkpoint_costs_only_the_steps_behind_it(
    config: TrainConfig, world: World, whole: Path, caplog: pytest.LogCaptureFixture
) -> None:
    world.updates, world.dies_at = 0, {6}
    with pytest.raises(LearnerFailed):
        go(replace(config, recovery=RecoveryConfig(learner_restarts=0)))
    newest = Path(config.runs_dir) / "story" / "checkpoints" / "step-000004"
    (newest / "learner-00000.safetensors").write_bytes(b"4 another")
    folder = go(config)
    assert digest(folder) == digest(whole) and losses(folder) == losses(whole) and numbers(folder) == numbers(whole)
    assert "step-000004: learner-00000.safetensors has 9 bytes" in caplog.text


def test_a_run_that_is_done_is_not_gone_on_with(config: TrainConfig, world: World) -> None:
    assert go(config).name == "story" and go(config).name == "story-2"


def test_more_steps_from_a_checkpoint(config: TrainConfig, world: World, whole: Path) -> None:
    short = go(replace(config, total_steps=4, name="short"))
    longer = go(replace(config, resume=str(short), name="longer"))
    assert longer.name == "longer" and digest(longer) == digest(whole) and losses(longer) == losses(whole)
    again = go(replace(config, resume=str(short / "checkpoints" / "step-000002"), name="again"))
    assert digest(again) == digest(whole) and numbers(again) == numbers(whole)
    assert len(losses(short)) == 4, "the run that it came from is as it was"


def test_a_machine_with_nothing_but_the_url_goes_on(
    config: TrainConfig, world: World, whole: Path, tmp_path: Path
) -> None:
    config = replace(config, checkpoint=CheckpointConfig(every=2, url=f"file://{tmp_path / 'bucket'}"))
    world.updates, world.dies_at = 0, {6}
    with pytest.raises(LearnerFailed):
        go(replace(config, recovery=RecoveryConfig(learner_restarts=0)))
    folder = go(replace(config, runs_dir=str(tmp_path / "another-machine")))
    assert folder == tmp_path / "another-machine" / "story" and world.updates == 6 + 3, "from step 4 on"
    assert digest(folder) == digest(whole) and losses(folder) == losses(whole)
    assert sorted(path.name for path in (tmp_path / "bucket" / "story").glob("step-*")) == [
        "step-000006",
        "step-000007",
    ]


def test_another_configuration_is_refused_by_its_keys(config: TrainConfig, world: World) -> None:
    world.dies_at = {4}
    with pytest.raises(LearnerFailed):
        go(replace(config, recovery=RecoveryConfig(learner_restarts=0)))
    other = replace(config, seed=1, learner=replace(config.learner, temperature=0.5), total_steps=9)
    with pytest.raises(ConfigError, match=r"learner\.temperature \(1\.0, now 0\.5\), seed \(0, now 1\)") as caught:
        go(other)
    assert "total_steps" not in str(caught.value) and "resume=never" in str(caught.value)
    assert go(replace(other, resume="never")).name == "story-2"


def test_other_questions_are_refused(config: TrainConfig, world: World, data: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.parquet"
    mine.write_bytes(data.read_bytes())
    config = replace(config, questions=replace(config.questions, paths=[str(mine)]))
    world.dies_at = {4}
    with pytest.raises(LearnerFailed):
        go(replace(config, recovery=RecoveryConfig(learner_restarts=0)))
    write_questions(mine, (question(PanelsConfig(), 0, Split.TRAIN, index) for index in range(12)))
    with pytest.raises(ConfigError, match=r"questions\.paths had 10 rows at .*, now 12: other files"):
        go(config)


def test_a_folder_that_cannot_be_written_is_said_before_anything_starts(
    config: TrainConfig, world: World, tmp_path: Path
) -> None:
    (tmp_path / "in-the-way").write_text("a file")
    with pytest.raises(OSError, match="in-the-way"):
        go(replace(config, runs_dir=str(tmp_path / "in-the-way")))
    url = f"file://{tmp_path / 'in-the-way'}"
    with pytest.raises(OSError, match=r"checkpoint\.url: cannot write to file://"):
        go(replace(config, checkpoint=CheckpointConfig(url=url)))
    assert world.engines == 0


def test_a_run_that_another_process_is_at_is_left_alone(config: TrainConfig, world: World) -> None:
    with Run.open(config) as running:
        assert running.folder.name == "story"
        assert go(config).name == "story-2"
