"""The training loop, stopped, killed and resumed, on a backend in memory (tests/backends/memory.py)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ergo_rl.cluster.placement import Cluster
from ergo_rl.episodes.probe import Replacement
from ergo_rl.examples.panels.scenes import PanelsConfig, Split, question
from ergo_rl.jobs import rollout_scheduler
from ergo_rl.jobs.checkpoint_store import FileSystem
from ergo_rl.jobs.config import CheckpointConfig, ConfigError, RecoveryConfig, TrainConfig, load_config
from ergo_rl.jobs.evaluation import wilson
from ergo_rl.jobs.rollout_scheduler import RewardsUnavailable
from ergo_rl.jobs.run_folder import RunFolder
from ergo_rl.jobs.shutdown import Stopped
from ergo_rl.jobs.trainer import Trainer
from ergo_rl.learners.learner_group import LearnerFailed
from ergo_rl.questions.dataset import write_questions
from tests.backends.memory import Learners, MemoryBackend, Rewards
from tests.conftest import ROOT
from tests.jobs.test_checkpoint_store import Crash, FailingFileSystem

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
def backend() -> MemoryBackend:
    return MemoryBackend()


def fit(config: TrainConfig, backend: MemoryBackend) -> Path:
    """As the command line does it."""
    return asyncio.run(asyncio.wait_for(Trainer(config, backend=backend).afit(handle_signals=True), timeout=60))


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
def whole(config: TrainConfig, backend: MemoryBackend, tmp_path: Path) -> Path:
    """A run that nobody disturbed."""
    folder = fit(replace(config, runs_dir=str(tmp_path / "undisturbed")), backend)
    assert numbers(folder) == list(range(3 * STEPS)) and backend.learner_starts == 1
    return folder


def test_run_with_probes_learns_the_same(
    config: TrainConfig, backend: MemoryBackend, whole: Path, data: Path, tmp_path: Path
) -> None:
    """Evaluations after 0, 2, 4, 6 and 7 steps, every second and the last with a probe of four questions. No episode in
    memory has an answer and every replay is right: all harm."""
    held = replace(config.evaluation, paths=[str(data)], questions=4, every=2, probe=2)
    folder = fit(replace(config, evaluation=held, runs_dir=str(tmp_path / "probed")), backend)
    assert digest(folder) == digest(whole) and losses(folder) == losses(whole)
    lines = records(folder, "evaluations.jsonl")
    probed = [line for line in lines if "eval/probe_none_harm" in line]
    assert [line["step"] for line in lines] == [0, 2, 4, 6, 7] and [line["step"] for line in probed] == [0, 4, 7]
    for line in probed:
        assert line["eval/accuracy"] == 0 and line["eval/visual_tokens"] == 14 and line["eval/looks"] == 1
        for how in Replacement:
            assert line[f"eval/probe_{how}_harm"] == line[f"eval/probe_{how}_reliance"] == 1, how
        assert line["eval/probe_none_harm_low"] == wilson(4, 4)[0]


def test_run_killed_at_any_operation_of_a_save_resumes_to_the_same_end(
    config: TrainConfig, backend: MemoryBackend, whole: Path, tmp_path: Path
) -> None:
    """Synchronous: every loss and the last weights, bit for bit, however often it is killed."""
    for at in (*range(12), *range(12, 200, 7)):  # a save makes about twelve operations, the run four of them
        mine = replace(config, runs_dir=str(tmp_path / f"killed-{at}"))
        backend.file_system = FailingFileSystem(at)
        crashed = False
        try:
            folder = fit(mine, backend)
        except Crash:
            crashed = True
            backend.file_system = FailingFileSystem(10 * at + 5)  # and perhaps once more
            try:
                folder = fit(mine, backend)
            except Crash:
                backend.file_system = FileSystem()
                folder = fit(mine, backend)
        assert digest(folder) == digest(whole) and losses(folder) == losses(whole)
        assert numbers(folder) == numbers(whole) and folder.name == "story"
        if not crashed:
            break
    assert at > 40


def test_skipped_updates_when_two_come_in_a_row_then_they_are_no_steps_but_an_alarm(
    config: TrainConfig, backend: MemoryBackend, caplog: pytest.LogCaptureFixture
) -> None:
    backend.skips_at = {3, 4}
    folder = fit(config, backend)
    assert backend.updates == STEPS + 2 and len(losses(folder)) == STEPS, "every step is there once, with an update"
    assert [line.get("learner/skipped", 0) for line in records(folder, "metrics.jsonl")] == [0, 0, 2, 0, 0, 0, 0]
    assert [line.get("alarm/skipped_update", 0) for line in records(folder, "metrics.jsonl")] == [0, 0, 1, 0, 0, 0, 0]
    assert numbers(folder) == list(range(3 * (STEPS + 2))), "the questions of a skipped update are not asked again"
    assert "step 2: alarm skipped_update" in caplog.text


@pytest.mark.parametrize("staleness", [0, 2])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_saves_and_the_same_command_resumes(
    config: TrainConfig,
    backend: MemoryBackend,
    whole: Path,
    monkeypatch: pytest.MonkeyPatch,
    staleness: int,
    number: int,
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
            fit(config, backend)
        ended = json.loads((Path(config.runs_dir) / "story" / "ended.json").read_text())
        assert ended == {"done": False, "why": f"Stopped: stopped by {signal.Signals(number).name}"}
        assert len(losses(Path(config.runs_dir) / "story")) == after, "the step that had learned was finished"
    folder = fit(config, backend)
    assert set(seen.values()) == {1}, "no step was learned twice"
    assert numbers(folder) == list(range(3 * STEPS))
    used = [used["id"] for step in records(folder, "questions.jsonl") for used in step["questions"]]
    assert used == [used["id"] for step in records(whole, "questions.jsonl") for used in step["questions"]]
    if not staleness:
        assert digest(folder) == digest(whole) and losses(folder) == losses(whole)


def test_signal_during_rollouts_drops_the_step(
    config: TrainConfig, backend: MemoryBackend, whole: Path, monkeypatch: pytest.MonkeyPatch
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
        fit(config, backend)
    assert len(losses(Path(config.runs_dir) / "story")) == 2
    folder = fit(config, backend)
    assert digest(folder) == digest(whole) and losses(folder) == losses(whole)


@pytest.mark.parametrize("dies_at", [{1}, {4}, {3, 6, 8}])
def test_dead_learner_restarts_from_the_last_checkpoint_and_engines_stay(
    config: TrainConfig, backend: MemoryBackend, whole: Path, dies_at: set[int]
) -> None:
    backend.updates, backend.engine_starts, backend.learner_starts, backend.dies_at = 0, 0, 0, dies_at
    folder = fit(config, backend)
    assert digest(folder) == digest(whole) and losses(folder) == losses(whole) and numbers(folder) == numbers(whole)
    assert backend.engine_starts == 1 and backend.learner_starts == 1 + len(dies_at)


@pytest.mark.parametrize("dies_at", [set(), {4}])
def test_sleeping_engines_sleep_for_each_update_and_new_weights_wake_them(
    config: TrainConfig, backend: MemoryBackend, whole: Path, dies_at: set[int]
) -> None:
    """Also where the learner dies while they sleep. The crew says when somebody updates beside an engine that is awake,
    or plays on one that sleeps."""
    backend.updates, backend.dies_at = 0, dies_at
    engine = replace(config.rollout.engine, sleep=True)
    folder = fit(replace(config, rollout=replace(config.rollout, engine=engine)), backend)
    assert digest(folder) == digest(whole) and losses(folder) == losses(whole) and not backend.rollouts.asleep


def test_spent_restarts_end_the_run_and_it_can_be_resumed(
    config: TrainConfig, backend: MemoryBackend, whole: Path
) -> None:
    backend.updates, backend.dies_at = 0, {4, 5}
    config = replace(config, recovery=RecoveryConfig(learner_restarts=1, backoff_s=0.01))
    with pytest.raises(LearnerFailed) as caught:
        fit(config, backend)
    assert caught.value.__notes__ == ["no restarts are left (recovery.learner_restarts)"]
    folder = fit(config, backend)
    assert digest(folder) == digest(whole) and losses(folder) == losses(whole)


def test_learner_error_that_would_repeat_is_not_retried(
    config: TrainConfig, backend: MemoryBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fails(self: Learners, groups: Any) -> dict[str, float]:
        raise LearnerFailed("learner rank 0 failed in update: no token to learn from") from ValueError("no token")

    monkeypatch.setattr(Learners, "update", fails)
    with pytest.raises(LearnerFailed):
        fit(config, backend)
    assert backend.learner_starts == 1


def test_error_outside_the_learner_saves_the_run(
    config: TrainConfig, backend: MemoryBackend, whole: Path, monkeypatch: pytest.MonkeyPatch
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
        fit(config, backend)
    assert (Path(config.runs_dir) / "story" / "checkpoints" / "step-000005" / "manifest.json").exists()
    folder = fit(config, backend)
    assert digest(folder) == digest(whole)


def test_verifier_outage_pauses_the_run(
    config: TrainConfig,
    backend: MemoryBackend,
    whole: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(rollout_scheduler, "FIRST_WAIT_S", 0.01)
    backend.outage = 7
    folder = fit(config, backend)
    assert digest(folder) == digest(whole)
    said = capsys.readouterr().out.replace("\n", " ")
    assert "paused: 100% of the step could not be scored: http://rewards:8000/v1/chat/completions: status 503" in said
    assert "the verifier answers again" in said


def test_verifier_outage_beyond_the_deadline_ends_the_run_saved(
    config: TrainConfig, backend: MemoryBackend, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollout_scheduler, "FIRST_WAIT_S", 0.01)
    update = Learners.update

    async def then_it_goes(self: Learners, groups: Any) -> dict[str, float]:
        found = await update(self, groups)
        backend.outage = 10**6 if self.step == 3 else 0
        return found

    monkeypatch.setattr(Learners, "update", then_it_goes)
    config = replace(config, reward=replace(config.reward, outage_deadline_s=0.2))
    with pytest.raises(RewardsUnavailable, match=r"100% of the step is unscored .*reward\.outage_deadline_s.*503"):
        fit(config, backend)
    backend.outage = 0
    monkeypatch.setattr(Learners, "update", update)
    folder = fit(config, backend)
    assert digest(folder) == digest(whole) and losses(folder) == losses(whole)


def test_unplayable_questions_are_skipped_once(config: TrainConfig, backend: MemoryBackend, tmp_path: Path) -> None:
    backend.unplayable = {question(PanelsConfig(), 0, Split.TRAIN, index).id for index in (2, 5)}
    whole = fit(replace(config, runs_dir=str(tmp_path / "undisturbed")), backend)
    backend.updates, backend.dies_at = 0, {4}
    folder = fit(config, backend)
    assert digest(folder) == digest(whole)
    last = records(folder, "metrics.jsonl")[-1]
    assert last["count/unplayable"] == records(whole, "metrics.jsonl")[-1]["count/unplayable"] > 0


def test_damaged_checkpoint_costs_only_the_steps_after_the_one_before(
    config: TrainConfig, backend: MemoryBackend, whole: Path, caplog: pytest.LogCaptureFixture
) -> None:
    backend.updates, backend.dies_at = 0, {6}
    with pytest.raises(LearnerFailed):
        fit(replace(config, recovery=RecoveryConfig(learner_restarts=0)), backend)
    newest = Path(config.runs_dir) / "story" / "checkpoints" / "step-000004"
    (newest / "learner-00000.safetensors").write_bytes(b"4 another")
    folder = fit(config, backend)
    assert digest(folder) == digest(whole) and losses(folder) == losses(whole) and numbers(folder) == numbers(whole)
    assert "step-000004: learner-00000.safetensors has 9 bytes" in caplog.text


def test_finished_run_is_not_resumed(config: TrainConfig, backend: MemoryBackend) -> None:
    assert fit(config, backend).name == "story" and fit(config, backend).name == "story-2"


def test_resume_from_a_path_trains_more_steps_in_a_new_run(
    config: TrainConfig, backend: MemoryBackend, whole: Path
) -> None:
    short = fit(replace(config, total_steps=4, name="short"), backend)
    longer = fit(replace(config, resume=str(short), name="longer"), backend)
    assert longer.name == "longer" and digest(longer) == digest(whole) and losses(longer) == losses(whole)
    again = fit(replace(config, resume=str(short / "checkpoints" / "step-000002"), name="again"), backend)
    assert digest(again) == digest(whole) and numbers(again) == numbers(whole)
    assert len(losses(short)) == 4, "the run that it came from is as it was"


def test_machine_with_only_the_url_resumes(
    config: TrainConfig, backend: MemoryBackend, whole: Path, tmp_path: Path
) -> None:
    config = replace(config, checkpoint=CheckpointConfig(every=2, url=f"file://{tmp_path / 'bucket'}"))
    backend.updates, backend.dies_at = 0, {6}
    with pytest.raises(LearnerFailed):
        fit(replace(config, recovery=RecoveryConfig(learner_restarts=0)), backend)
    folder = fit(replace(config, runs_dir=str(tmp_path / "another-machine")), backend)
    assert folder == tmp_path / "another-machine" / "story" and backend.updates == 6 + 3, "from step 4 on"
    assert digest(folder) == digest(whole) and losses(folder) == losses(whole)
    assert sorted(path.name for path in (tmp_path / "bucket" / "story").glob("step-*")) == [
        "step-000006",
        "step-000007",
    ]


def test_resume_with_other_values_is_refused_naming_the_keys(config: TrainConfig, backend: MemoryBackend) -> None:
    backend.dies_at = {4}
    with pytest.raises(LearnerFailed):
        fit(replace(config, recovery=RecoveryConfig(learner_restarts=0)), backend)
    other = replace(config, seed=1, learner=replace(config.learner, temperature=0.5), total_steps=9)
    with pytest.raises(ConfigError, match=r"learner\.temperature \(1\.0, now 0\.5\), seed \(0, now 1\)") as caught:
        fit(other, backend)
    assert "total_steps" not in str(caught.value) and "resume=never" in str(caught.value)
    assert fit(replace(other, resume="never"), backend).name == "story-2"


def test_resume_with_other_questions_is_refused(
    config: TrainConfig, backend: MemoryBackend, data: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "mine.parquet"
    mine.write_bytes(data.read_bytes())
    config = replace(config, questions=replace(config.questions, paths=[str(mine)]))
    backend.dies_at = {4}
    with pytest.raises(LearnerFailed):
        fit(replace(config, recovery=RecoveryConfig(learner_restarts=0)), backend)
    write_questions(mine, (question(PanelsConfig(), 0, Split.TRAIN, index) for index in range(12)))
    with pytest.raises(ConfigError, match=r"has another questions\.paths\.0 \(other content behind .*mine\.parquet"):
        fit(config, backend)


def test_unwritable_folder_is_refused_before_anything_starts(
    config: TrainConfig, backend: MemoryBackend, tmp_path: Path
) -> None:
    (tmp_path / "in-the-way").write_text("a file")
    with pytest.raises(OSError, match="in-the-way"):
        fit(replace(config, runs_dir=str(tmp_path / "in-the-way")), backend)
    url = f"file://{tmp_path / 'in-the-way'}"
    with pytest.raises(OSError, match=r"checkpoint\.url: cannot write to file://"):
        fit(replace(config, checkpoint=CheckpointConfig(url=url)), backend)
    assert backend.engine_starts == 0


def test_run_locked_by_another_process_is_left_alone(config: TrainConfig, backend: MemoryBackend) -> None:
    with RunFolder.open(config) as running:
        assert running.path.name == "story"
        assert fit(config, backend).name == "story-2"


# --- starting ---------------------------------------------------------------------------------------------------------


def test_roles_start_side_by_side(config: TrainConfig, backend: MemoryBackend) -> None:
    """Each waits until all three have begun."""
    together = asyncio.Barrier(3)

    async def meet() -> None:
        await together.wait()

    backend.starts = dict.fromkeys(("rollout", "reward", "learner"), meet)
    fit(config, backend)
    assert sorted(backend.starting) == ["learner", "reward", "rollout"] and backend.closed == []


@pytest.mark.parametrize("fails", ["rollout", "reward", "learner"])
def test_role_that_fails_to_start_ends_the_run_with_its_own_error_and_the_others_at_once(
    fails: str, config: TrainConfig, backend: MemoryBackend
) -> None:
    async def fail() -> None:
        await asyncio.sleep(0.01)
        raise LearnerFailed(f"the {fails} has no GPU")

    async def load() -> None:
        await asyncio.sleep(600)

    backend.starts = dict.fromkeys(("rollout", "reward", "learner"), load) | {fails: fail}
    with pytest.raises(LearnerFailed, match=f"the {fails} has no GPU"):
        fit(config, backend)
    ended = {"rollout", "reward"} | ({"learner"} if fails != "learner" else set())
    assert set(backend.closed) == ended and backend.updates == 0


def test_signal_while_roles_start_ends_them(config: TrainConfig, backend: MemoryBackend) -> None:
    async def load() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(600)

    backend.starts = {"learner": load}
    with pytest.raises(Stopped):
        fit(config, backend)
    assert set(backend.closed) == {"rollout", "reward", "learner"}


def test_too_little_shared_memory_is_said_at_the_start(
    config: TrainConfig, backend: MemoryBackend, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    short = contextlib.nullcontext(Cluster(config.cluster, shortage="/dev/shm has 0.06 GiB free"))
    monkeypatch.setattr(MemoryBackend, "connect", lambda *_: short)
    fit(config, backend)
    assert "/dev/shm has 0.06 GiB free" in capsys.readouterr().out
