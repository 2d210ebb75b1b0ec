"""What the benchmarks make of their measurements, by hand; no benchmark runs here."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import driver, end_to_end, episode, learner, overlap, rollout, weights
from benchmarks.reporting import report
from ergo_rl.jobs.benchmark_grid import Mode, Record
from tests.conftest import ROOT


def test_a_report_is_written_and_its_status_says_whether_the_target_was_met(tmp_path: Path) -> None:
    arguments = argparse.Namespace(out=tmp_path / "new" / "it.json", rounds=3)
    assert report(arguments, {"ratio": 1.23456789, "by": {"a": [1.0, 2]}}, True, "fast") == 0
    said = json.loads(arguments.out.read_text())
    assert said["found"] == {"ratio": 1.235, "by": {"a": [1.0, 2]}} and said["verdict"] == "ok: fast"
    assert said["settings"]["rounds"] == 3 and said["machine"]["cores"] == os.cpu_count()
    assert report(arguments, {}, False, "slow") == 1
    assert json.loads(arguments.out.read_text())["verdict"] == "MISSED: slow"


def test_cpu_seconds_are_those_of_this_process_too() -> None:
    """In a process of its own: what lives below the tests' comes and goes."""
    burn = """
import time
from benchmarks.reporting import cpu_seconds
before, mine = cpu_seconds(), time.process_time()
while time.process_time() - mine < 0.1:
    pass
print(cpu_seconds() - before)
"""
    done = subprocess.run([sys.executable, "-c", burn], cwd=ROOT, capture_output=True, text=True, check=True)
    assert 0.08 <= float(done.stdout) <= 1


def test_weights() -> None:
    """200 MB: gathered in 0.1 s and delivered in 0.1 s, a memcpy takes 0.05 s warm and 0.1 s fresh."""
    copies = {"memcpy": [0.05], "memcpy_fresh": [0.1], "memcpy_shared": [0.4], "memcpy_again": [0.08]}
    times = copies | {"gather": [0.1, 0.3, 0.1], "deliver": [0.1], "publish": [0.5]}
    times |= {"first_gather": [0.2], "first_deliver": [0.3]}
    found = weights.figures(200_000_000, times)
    assert found["transport/memcpy"] == pytest.approx(4.0) and found["transport/memcpy_fresh"] == pytest.approx(2.0)
    assert found["transport_gb_per_s"] == pytest.approx(1.0) and found["publish/memcpy_fresh"] == pytest.approx(5.0)
    assert found["learner_stall_s"] == 0.1 and found["stall/memcpy_fresh"] == pytest.approx(1.0)
    assert found["transport/memcpy_shared"] == pytest.approx(0.5)
    assert found["transport/memcpy_again"] == pytest.approx(2.5) and found["first/memcpy_fresh"] == pytest.approx(5.0)
    small = found | {"bytes": 99_000_000, "transport/memcpy_fresh": 9.0}
    assert weights.verdict({"5 MB": small, "200 MB": found})[0]
    assert not weights.verdict({"200 MB": found | {"transport/memcpy_fresh": 3.1}})[0]
    assert not weights.verdict({"5 MB": small})[0], "nothing was large enough to count"
    found = weights.figures(200_000_000, copies | {"send": [0.25], "first_send": [0.5]})
    assert found["learner_stall_s"] == 0.25 and found["transport/memcpy_fresh"] == pytest.approx(2.5)


def test_overlap() -> None:
    """Rollouts take 2 s and learning 1 s where nothing overlaps; ahead by one a step takes 2.1 s."""

    def step(seconds: float, rollout: float) -> dict[str, float]:
        return {"step": seconds, "rollout": rollout, "learn": 1.0, "publish": 0.1, "cpu": 3.0}

    found = overlap.figures({0: [step(3.1, 2.0)] * 3, 1: [step(2.1, 1.0), step(9.0, 1.0), step(2.0, 1.0)]}, cores=2)
    assert found["larger_s"] == 2.0
    assert found["staleness"][0]["step/larger"] == pytest.approx(1.55)
    assert found["staleness"][1]["step/larger"] == pytest.approx(1.05)
    assert found["staleness"][1]["cpu_s_per_core"] == 1.5
    assert overlap.verdict(found)[0]
    found["staleness"][1]["step/larger"] = 1.11
    assert not overlap.verdict(found)[0]


def test_episode() -> None:
    """36 + 36 tokens against 576 are an eighth; a reply without a crop has 36."""

    def record(mode: Mode, tokens: tuple[int, int], seconds: float, correct: bool) -> Record:
        return Record("q", "", mode, 0, correct, None, "", "", None, None, tokens, 1, seconds, ())

    two = [record(Mode.TWO_STAGE, (36, 36), seconds, correct=True) for seconds in (0.2, 0.3, 9.0)]
    direct = [record(Mode.DIRECT, (576, 0), 0.6, correct) for correct in (True, False, False)]
    found = episode.figures({Mode.TWO_STAGE: two, Mode.DIRECT: direct})
    assert found["two-stage/direct"] == {"visual_tokens": 0.125, "seconds": pytest.approx(0.5)}
    assert found[Mode.TWO_STAGE]["accuracy"] == 1 and found[Mode.DIRECT]["accuracy"] == pytest.approx(1 / 3)
    good, line = episode.verdict(found)
    assert good and "0.12 of the visual tokens (72 against 576), takes 0.50 of the time" in line
    same = episode.figures({Mode.TWO_STAGE: [record(Mode.TWO_STAGE, (288, 288), 1, True)], Mode.DIRECT: direct})
    assert not episode.verdict(same)[0]


def test_driver() -> None:
    one = {"overhead_ms": 0.5, "linear": 0.99, "trajectories_per_s": 1.0}
    assert driver.figures({1: one, 256: one})[0]
    assert not driver.figures({1: one | {"overhead_ms": 1.1}, 256: one})[0], "the worst counts"
    assert not driver.figures({1: one, 256: one | {"linear": 0.94}})[0]
    assert driver.figures({1: one | {"linear": 0.5}, 256: one})[0], "linear is asked of the most workers"


def test_rollout() -> None:
    """Two rounds of 10 trajectories: 1 s against 1.2 s, 2 s against 3 s. Ratios 1.2 and 1.5."""
    counts = [{"trajectories": 10, "turns": 18, "reply_tokens": 100, "prompt_tokens": 1000, "core_s": 1.2}] * 2
    found = rollout.figures({"ours": [1.0, 2.0], "chat": [1.2, 3.0]}, {"ours": counts, "chat": counts})
    assert found["speedup"]["median"] == pytest.approx(1.35) and found["ours"]["trajectories"] == 20
    assert found["reply_tokens_ratio"] == 1.0 and found["core_busy"] == pytest.approx(0.8)
    assert rollout.verdict(found | {"longest_loop_stall_ms": 3.0})[0]


def test_the_learner_against_the_plain_loop() -> None:
    """1,000 tokens in 2 s against 1.8 s: 0.9 times."""
    found = learner.against_plain({"learner": [2.0], "plain": [1.8]}, 1000)
    assert found == {
        "update/learner/tokens_per_s": 500.0, "update/plain/tokens_per_s": 555.6, "update/learner/speedup": 0.9,
    }  # fmt: skip
    ways = {way: {"padding": 0.0, "tokens_per_s": 1.0, "speedup": 1.0} for way in learner.WAYS}
    flat = {f"{way}/{name}": value for way, one in ways.items() for name, value in one.items()}
    good, line = learner.verdict(flat | found)
    assert not good and line.startswith("TOO SLOW; one batch")
    assert learner.verdict(flat | found | {"update/learner/speedup": 0.96})[0]


def test_end_to_end() -> None:
    """Steps of 1 s against 2 s; the first of each block is left out."""
    ours = {"seconds": [9.0, 1.0, 1.0], "lengths": [10.0, 20.0]}
    trl = {"seconds": [9.0, 2.0, 2.0], "lengths": [15.0, 15.0]}
    found = end_to_end.figures({"ours": [ours], "trl": [trl]}, trajectories=64)
    assert found["speedup"] == 2.0 and found["ours"]["trajectories_per_s"] == 64.0
    assert found["ours"]["reply_tokens"]["mean"] == 15.0
    assert end_to_end.verdict(found, "larger")[0] and not end_to_end.verdict(found | {"speedup": 1.9}, "larger")[0]
    assert end_to_end.reward_of("Eel 12!") == pytest.approx(2 / 3) and end_to_end.reward_of("") == 0.0


class InProcess:
    """``driver.Timers`` without Ray: called as an actor is, it answers with futures."""

    def __init__(self, seconds: float) -> None:
        self._timers = driver.Timers(seconds, tokens=4)

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._timers, name)

        def remote(*arguments: Any) -> Any:
            answer = asyncio.ensure_future(method(*arguments))
            return [self._first(answer), answer] if name == "rollout" else answer

        return SimpleNamespace(remote=remote, options=lambda **_: SimpleNamespace(remote=remote))

    @staticmethod
    async def _first(answer: Any) -> Any:
        return (await answer)[0]


def test_the_simulation_plays_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three workers, 2 + 1 rounds of groups of 4 in 50 ms each. How long it takes is the benchmark's business."""
    monkeypatch.setattr(driver.RewardPool, "score", _judged)
    monkeypatch.setattr("ergo_rl.cluster.worker_pool.ray.cancel", lambda answer: None)
    arguments = argparse.Namespace(group_size=4, rounds=2, seconds=0.05)
    processes: Any = [InProcess(0.05), InProcess(0.05)]
    found = asyncio.run(driver.measure(processes, 3, arguments))
    assert found["trajectories"] == 24 and found["linear"] > 0 and found["overhead_ms"] >= 0


async def _judged(self: Any, question: Any, trajectories: Any) -> Any:
    played = (await trajectories)[1]
    return await driver.Timers(0.0, 4).score(0, question, played)
