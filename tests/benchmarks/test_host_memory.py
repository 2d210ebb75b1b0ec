"""What the memory benchmark makes of its samples, by hand, and what it measures of this process."""

from __future__ import annotations

import os

import pytest

from benchmarks.host_memory import figures, in_flight, memory, rise, role_of


def test_rise_of_a_straight_line_is_its_slope_with_no_interval() -> None:
    """Half a MiB a step is 50 in 100 steps; two samples of one step count as one."""
    found = rise([(step, 100 + 0.5 * step) for step in range(10) for _ in range(2)])
    assert found == pytest.approx({"per_100_steps": 50.0, "low": 50.0, "high": 50.0})


def test_rise_of_what_goes_up_and_down_includes_zero() -> None:
    found = rise([(step, 100.0 + step % 2) for step in range(20)])
    assert found["low"] < 0 < found["high"] and abs(found["per_100_steps"]) < 5


def test_figures_are_by_role_and_of_the_second_half() -> None:
    """The engines fill their caches in the first ten steps: that is no rise."""
    seen = [(step, {"learner": 10.0, "engines": 100.0 + min(step, 10)}) for step in range(1, 31)]
    found = figures(seen)
    assert found["all"]["first"] == 111 and found["all"]["last"] == found["all"]["most"] == 120
    assert found["engines"]["rise"]["per_100_steps"] == pytest.approx(0) == found["all"]["rise"]["high"]


def test_in_flight_holds_no_more_decoded_images_than_a_worker_opens() -> None:
    """250 questions of 4: 1,000 x 1 MiB stored, 250 x 8 MiB encoded; 2 x 16 sequences are 8 open images of 128 MiB."""
    cost = {"trajectory_bytes": 2**20, "image_bytes": 2**23, "decoded_bytes": 2**27}
    found = in_flight(cost, group=4, sequences=16)
    assert found == pytest.approx({"stored_gib": 1000 / 1024, "encoded_gib": 2000 / 1024, "decoded_a_worker_gib": 1.0})


def test_memory_of_this_process_is_the_drivers() -> None:
    assert 10 < memory(os.getpid())["driver"] < 10_000


@pytest.mark.parametrize(
    ("command", "role"),
    [
        ("ray::RolloutWorker", "rollout worker"),
        ("ray::LearnerRank.update", "learner"),
        ("VLLM::EngineCore", "engines"),
        ("/x/ray/core/src/ray/raylet/raylet --store", "raylet, with the object store"),
        ("/x/gcs_server", "other processes of Ray"),
    ],
)
def test_whose_a_process_is(command: str, role: str) -> None:
    assert role_of(command) == role
