"""The benchmarks of recovery count what they say, in numbers that can be checked by hand."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from benchmarks import chaos, faults, lives, resume, scaling
from benchmarks.lives import GROUPS, G


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs without engines, see there."""
    monkeypatch.setattr(lives, "TRAIN", [sys.executable, "-m", "tests.benchmarks.stub_run"])


def test_chaos_hurts_every_kind_and_sees_it_come_back(stub: None, tmp_path: Path) -> None:
    kinds = chaos.plan(1, list(chaos.KINDS), seed=3)
    trial = chaos.Chaos(tmp_path, kinds, seed=3, hang_timeout_s=0.5, patience_s=60)
    assert trial.go() == 0 and [kill.kind for kill in trial.killed] == kinds and not trial.orphans
    assert chaos.verdict(chaos.count(tmp_path / "run", trial.steps), 8, 8, [], 0)[0]
    for kill in trial.killed:
        assert 0 < kill.recovery_s < 60 and 0 < kill.gone_s < 60
        assert ("hung" in kill.noticed) == (kill.kind == "hung engine core")
        assert kill.gone_s >= 0.5 or kill.kind != "hung engine core"
        assert ("gone on with at step" in kill.noticed) == (kill.kind == "driver")


def test_chaos_sees_what_is_lost(stub: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUB_FORGETS", "1")
    trial = chaos.Chaos(tmp_path, ["rollout actor"], seed=0, hang_timeout_s=5, patience_s=60)
    assert trial.go() == 0
    counted = chaos.count(tmp_path / "run", trial.steps)
    assert counted["questions_missing"] == 1 and not chaos.verdict(counted, 1, 1, [], 0)[0]


def test_resume_kills_between_and_inside_saves_and_sees_the_next_step(stub: None, tmp_path: Path) -> None:
    trial = resume.Cut(tmp_path, steps=30, kills=4, seed=0, patience_s=60)
    assert trial.go() == 0 and len(trial.done) == 4 and all(kill.exact for kill in trial.done)
    assert sum(kill.inside_save for kill in trial.done) >= 1
    assert [line["step"] for line in lives.lines_of(tmp_path / "run" / "metrics.jsonl")] == list(range(30))
    found = resume.compare(tmp_path / "run", tmp_path / "run")
    assert resume.verdict(found, trial.done, 4, [])[0]


def records(run: Path, steps: int, **changes: Any) -> Path:
    """A run's records: questions 2n and 2n + 1 in step n."""
    run.mkdir(parents=True)
    metrics = [{"step": step} | dict.fromkeys(resume.FIGURES, 0.5 + step) for step in range(steps)]
    used = [
        {"step": step, "questions": [{"number": n, "id": f"q{n}", "samples": G} for n in (2 * step, 2 * step + 1)]}
        for step in range(steps)
    ]
    for name, lines in (("metrics", changes.get("metrics", metrics)), ("questions", changes.get("questions", used))):
        (run / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "policy").mkdir()
    save_file({"w": torch.tensor([1.0, changes.get("weight", 2.0)])}, run / "policy" / "model.safetensors")
    return run


def test_a_run_that_lost_nothing(tmp_path: Path) -> None:
    counted = chaos.count(records(tmp_path / "run", 3), steps=3)
    assert GROUPS == 2 and counted["steps"] == 3 and counted["questions"] == 6 and counted["trajectories"] == 6 * G
    assert not any(list(counted.values())[3:])
    assert chaos.verdict(counted, 8, 8, [], 0) == (True, "NOTHING LOST: 8 kills, 3 steps, 6 questions x 4")


@pytest.mark.parametrize(
    ("lines", "wrong"),
    [
        ([(0, ["q0", "q1"], 4)], {"steps_without_questions": 1, "questions_missing": 2}),
        (
            [(0, ["q0", "q1"], 4), (1, ["q1", "q2"], 4)],
            {"questions_missing": 1, "questions_in_two_steps": 1, "questions_not_exactly_G_times": 1},
        ),
        (
            [(0, ["q0", "q0"], 4), (1, ["q2", "q3"], 4)],
            {"questions_missing": 1, "questions_in_two_steps": 1, "questions_not_exactly_G_times": 1,
             "step_question_sample_twice": 4},
        ),
        ([(0, ["q0", "q1"], 3), (1, ["q2", "q3"], 4)], {"questions_not_exactly_G_times": 2}),
    ],
)  # fmt: skip
def test_what_is_missing_or_there_twice_is_counted(
    tmp_path: Path, lines: list[tuple[int, list[str], int]], wrong: dict[str, int]
) -> None:
    numbers = iter(range(100))
    used = [
        {"step": step, "questions": [{"number": next(numbers), "id": one, "samples": samples} for one in ids]}
        for step, ids, samples in lines
    ]
    counted = chaos.count(records(tmp_path / "run", 2, questions=used), steps=2)
    assert {name: value for name, value in list(counted.items())[3:] if value} == wrong
    good, line = chaos.verdict(counted, 1, 2, ["VLLM::EngineCore"], 0)
    assert not good and line.startswith("NOT SO: ") and "1 kills were not made, 1 processes outlived a driver" in line


def test_steps_made_twice_and_out_of_order(tmp_path: Path) -> None:
    counted = chaos.count(records(tmp_path / "run", 2, metrics=[{"step": 0}, {"step": 0}]), steps=2)
    assert counted["steps_twice"] == 1 and counted["steps_missing"] == 1


def test_every_kind_comes_as_often_as_asked_for_and_the_order_is_the_seeds() -> None:
    order = chaos.plan(3, list(chaos.KINDS), seed=0)
    assert len(order) == 22 and Counter(order)["hung engine core"] == 1 and Counter(order)["driver"] == 3
    assert order == chaos.plan(3, list(chaos.KINDS), seed=0) != chaos.plan(3, list(chaos.KINDS), seed=1)


def test_the_table_has_median_and_most() -> None:
    kills = [chaos.Kill("driver", 3, seconds, 1.0, 1, "") for seconds in (9.0, 30.0, 10.0)]
    (_, line) = chaos.table(kills)
    assert line.split() == ["driver", "3", "10.0", "at", "most", "30.0", "1.0", "3"]


def test_two_runs_are_compared_to_the_last_bit(tmp_path: Path) -> None:
    whole, same = records(tmp_path / "whole", 4), records(tmp_path / "same", 4)
    kills = [resume.Kill(2, True, 2, 0.1), resume.Kill(-1, False, 0, 0.1)]
    assert resume.verdict(resume.compare(whole, same), kills, 2, []) == (
        True,
        "THE SAME TO THE LAST BIT: 2 kills, 1 of them inside a save; 4 steps",
    )
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    lines[3]["learner/loss"] += 0.25
    found = resume.compare(whole, records(tmp_path / "other", 4, metrics=lines, weight=2.5))
    assert found["steps_that_differ"] == 1 and found["largest_loss_difference"] == 0.25
    assert found["tensors_that_differ"] == 1 and found["largest_weight_difference"] == 0.5
    good, line = resume.verdict(found, [resume.Kill(2, False, 3, 0.1)], 2, [])
    assert not good and "1 kills were not made, 1 lives went on elsewhere" in line


def test_gaps_of_a_phase_and_what_counts_as_a_pause() -> None:
    """Steps end at 1, 2, 3, 5, 6; the command ran from 2.5 to 4: the gaps 2 -> 3 and 3 -> 5 lie in it."""
    assert scaling.gaps([1.0, 2.0, 3.0, 5.0, 6.0], 2.5, 4.0) == [1.0, 2.0]
    slow = scaling.Phase("--rollout-workers 3", "3 rollout workers", 20.0, 9, 2.0, 3.5, 0)
    assert slow.pause_in_steps == 0.75
    phases = [slow, slow, slow]
    assert scaling.verdict(phases) == (True, "NO PAUSE: 0.75 steps at most")
    paused = scaling.Phase("--reward-workers 2", "2 reward workers", 20.0, 9, 2.0, 4.5, 3)
    good, line = scaling.verdict([slow, paused])
    assert not good and line == (
        "NOT SO: --reward-workers 2 paused for 1.2 steps, --reward-workers 2 did not take part within a step, "
        "not everything was asked for: 1.25 steps at most"
    )


class Life:
    """Steps that ended at 10, 12, 21 and 23 s of the clock."""

    def __init__(self, steps: list[tuple[int, float]]) -> None:
        self._steps = steps

    def steps(self) -> list[dict[str, float]]:
        return [{"step": step, "time": at} for step, at in self._steps]

    def wait_for(self, what: str, happened: Any, *_: object, **__: object) -> None:
        assert happened(), what


def trial(*steps: tuple[int, float]) -> faults.Faults:
    made = object.__new__(faults.Faults)
    made.life, made.steps, made.patience_s = Life(list(steps)), 9, 1.0  # type: ignore[assignment]
    return made


def test_fault_that_the_run_goes_through_is_timed_by_its_own_steps() -> None:
    """It begins at 11 behind step 0, is over at 22; step 1 and 2 end meanwhile."""
    found = trial((0, 10), (1, 12), (2, 21), (3, 23))._over("a fault", 11.0, 0, 2.5, 22.0, "")
    assert (found.noticed_s, found.goes_on_s, found.lasted_s) == (2.5, 1.0, 11.0)
    assert (found.steps_meanwhile, found.steps_again, found.status) == (2, 0, None)


def test_steps_that_are_made_again_are_counted_and_going_on_is_the_first_new_one() -> None:
    """Stopped at 11 behind step 2; the learner begins again at step 1."""
    found = trial((0, 9), (1, 15), (2, 17), (3, 21))._over("a fault", 11.0, 2, 3.0, 14.0, "")
    assert (found.steps_again, found.goes_on_s, found.steps_meanwhile) == (2, 10.0, 0)


def test_next_life_counts_from_the_end_of_the_last_one() -> None:
    """Told to stop at 11, in step 1, which is finished at 12; the next life makes step 2 at 40."""
    found = trial((0, 10), (1, 12), (2, 40))._over("a fault", 11.0, 1, 0.1, 13.0, "", 13.0)
    assert (found.steps_again, found.goes_on_s, found.lasted_s) == (0, 29.0, 2.0)


def test_verdict_of_the_faults_names_what_was_lost() -> None:
    same = dict.fromkeys(("steps", "tensors", "steps_that_differ", "tensors_that_differ"), 0) | {"steps": 9}
    fine = [faults.Fault("told to stop", 3, 0.1, 30, 5, 0, 0, 143), faults.Fault("full disk", 5, 1, 2, 9, 4, 0)]
    assert faults.verdict(same, fine, 2, [], []) == (True, "NOTHING LOST, THE SAME TO THE LAST BIT: 2 faults, 9 steps")
    lost = [faults.Fault("told to stop", 3, 0.1, 30, 5, 0, 1, 1)]
    good, line = faults.verdict(same | {"tensors_that_differ": 2}, lost, 2, ["step-000009"], ["raylet"])
    assert not good and line == (
        "NOT SO: tensors_that_differ 2, 1 faults were not played, told to stop ended with 1, told to stop: 1 steps "
        "again, step-000009 not at the URL, 1 processes outlived their run: 1 faults, 9 steps"
    )
    assert len({len(line) for line in faults.table(fine)}) == 1
