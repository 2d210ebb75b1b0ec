"""Whatever the ranks, the ZeRO stage and the micro-batches: one gradient, that of the step's loss written out."""

from __future__ import annotations

import math
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.compat import repair_torchvision
from episodes.types import Turn
from tests.factories import FAMILY, IDS, IMAGE_PAD, tiny_model
from tests.system.gradient_rank import OTHER, samples

pytestmark = pytest.mark.system

REPOSITORY = Path(__file__).parents[2]
BUDGET = 160
"""Padded tokens of a micro-batch: one rank then has 4."""
Gradient = Mapping[str, torch.Tensor]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def opened(model: Path, weights: Gradient | None = None) -> Any:
    repair_torchvision()
    from transformers import AutoModelForImageTextToText

    vlm = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32, attn_implementation="sdpa")
    if weights is not None:
        vlm.load_state_dict(dict(weights))
    return vlm


def replies(model: Path, vlm: Any) -> list[list[tuple[torch.Tensor, float, float]]]:
    """For each scored trajectory its sampled tokens as (log-prob, the engine's, advantage): plain transformers, one
    unpadded trajectory at a time, with full logits."""
    from transformers import AutoImageProcessor

    processor, found = AutoImageProcessor.from_pretrained(model), []
    for sample in samples():
        if math.isnan(sample.advantages[0]):
            continue
        ids: list[int] = []
        turns: list[tuple[int, Turn, float]] = []
        for turn, view, advantage in zip(
            sample.trajectory.turns, sample.trajectory.views, sample.advantages, strict=True
        ):
            for token in turn.prompt_ids.tolist():
                ids += [token] * (FAMILY.visual_tokens(view) if token == IMAGE_PAD else 1)
            turns.append((len(ids), turn, advantage))
            ids += turn.completion_ids.tolist()
        input_ids = torch.tensor([ids])
        pixels, grids = FAMILY.image_inputs(processor, list(sample.trajectory.views))
        logits = vlm(
            input_ids=input_ids,
            mm_token_type_ids=(input_ids == IMAGE_PAD).long(),
            pixel_values=pixels,
            image_grid_thw=grids,
        ).logits[0]
        logits[:, [IDS[token] for token in FAMILY.vision_tokens]] = -torch.inf
        found.append(
            [
                (torch.log_softmax(logits[place - 1], -1)[int(token)], float(behaviour), advantage)
                for start, turn, advantage in turns
                for place, (token, behaviour) in enumerate(zip(turn.completion_ids, turn.logprobs, strict=True), start)
            ]
        )
    return found


def token_loss(logprob: torch.Tensor, behaviour: float, advantage: float) -> torch.Tensor:
    ratio = (logprob - behaviour).exp()
    if not 1 / 8 <= ratio <= 8:
        return 0 * ratio
    return -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)


def reference(model: Path, weights: Gradient | None = None) -> tuple[Gradient, float, int]:
    """The mean over all sampled tokens, written out."""
    vlm = opened(model, weights)
    losses = [token_loss(*token) for trajectory in replies(model, vlm) for token in trajectory]
    loss = torch.stack(losses).mean()
    loss.backward()
    return {name: parameter.grad for name, parameter in vlm.named_parameters()}, loss.item(), len(losses)


def other_reference(model: Path, weights: Gradient) -> tuple[Gradient, float]:
    """The mean over trajectories of their means, with the divergence from the weights at the start."""
    vlm = opened(model, weights)
    with torch.no_grad():
        start = replies(model, opened(model))
    means = []
    for now, then in zip(replies(model, vlm), start, strict=True):
        losses = []
        for (logprob, behaviour, advantage), (before, *_) in zip(now, then, strict=True):
            ratio = (logprob - behaviour).exp().detach()
            kept = bool(1 / 8 <= ratio <= 8)
            penalty = OTHER.kl * kept * ratio * (logprob - before).square() / 2
            losses.append(token_loss(logprob, behaviour, advantage) + penalty)
        means.append(torch.stack(losses).mean())
    loss = torch.stack(means).mean()
    loss.backward()
    return {name: parameter.grad for name, parameter in vlm.named_parameters()}, loss.item()


def difference(got: Gradient, wanted: Gradient) -> float:
    """Norm of the difference over all parameters, relative to the norm of the reference."""
    assert got.keys() == wanted.keys()
    gap = sum((got[name].double() - wanted[name].double()).square().sum() for name in wanted)
    size = sum(wanted[name].double().square().sum() for name in wanted)
    return float((gap / size).sqrt())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def found(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], dict[int, Any]]:
    """(world, rank) -> stage -> what that process found."""
    out = tmp_path_factory.mktemp("gradients")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ports = {1: free_port(), 2: free_port()}
    stages = {1: ["2"], 2: ["1", "2", "3"]}
    places = [(2, 0), (2, 1), (1, 0)]
    processes = []
    for world, rank in places:
        arguments = [str(model), str(rank), str(world), str(ports[world]), str(out), str(BUDGET), *stages[world]]
        with (out / f"world{world}-rank{rank}.log").open("w") as log:
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "tests.system.gradient_rank", *arguments],
                    cwd=REPOSITORY, env=environment, stdout=log, stderr=subprocess.STDOUT,
                )
            )  # fmt: skip
    try:
        for (world, rank), process in zip(places, processes, strict=True):
            assert process.wait(timeout=240) == 0, (out / f"world{world}-rank{rank}.log").read_text()[-4000:]
    finally:
        for process in processes:
            process.kill()
    return {(world, rank): torch.load(out / f"world{world}-rank{rank}.pt") for world, rank in places}


@pytest.fixture(scope="module")
def first(model: Path) -> tuple[Gradient, float, int]:
    return reference(model)


CASES = [(2, 0, 1), (2, 0, 2), (2, 0, 3), (2, 1, 1), (2, 1, 2), (2, 1, 3), (1, 0, 2)]
NAMES = [f"{world}-ranks-rank-{rank}-zero-{stage}" for world, rank, stage in CASES]


@pytest.mark.parametrize(("world", "rank", "stage"), CASES, ids=NAMES)
def test_gradient_equals_the_reference(
    found: Any, first: tuple[Gradient, float, int], world: int, rank: int, stage: int
) -> None:
    result, (gradient, loss, tokens) = found[world, rank][stage], first
    assert result["tokens"] == tokens
    assert result["loss"] == pytest.approx(loss, abs=1e-6)
    assert difference(result["first"], gradient) <= 1e-5
    for name, wanted in gradient.items():
        gap = (result["first"][name] - wanted).abs().max()
        assert gap <= 1e-5 * max(wanted.abs().max(), 1e-2), name


@pytest.mark.parametrize(("world", "rank", "stage"), CASES, ids=NAMES)
def test_norm_is_that_of_the_gradient_before_clipping(
    found: Any, first: tuple[Gradient, float, int], world: int, rank: int, stage: int
) -> None:
    norm = float(sum(part.double().square().sum() for part in first[0].values())) ** 0.5
    assert found[world, rank][stage]["norm"] == pytest.approx(norm, rel=1e-5)
    assert norm > 1e-2, "the fixture must be clipped"


@pytest.mark.parametrize(("world", "rank", "stage"), CASES, ids=NAMES)
def test_nothing_of_the_first_step_is_left_in_the_second(
    found: Any, model: Path, world: int, rank: int, stage: int
) -> None:
    result = found[world, rank][stage]
    assert difference(result["second"], result["first"]) > 1e-3
    gradient, *_ = reference(model, result["weights"])
    assert difference(result["second"], gradient) <= 1e-5


@pytest.mark.parametrize(("world", "rank", "stage"), CASES, ids=NAMES)
def test_another_objective_has_another_denominator_and_one_gradient(
    found: Any, model: Path, world: int, rank: int, stage: int
) -> None:
    result = found[world, rank][stage]
    gradient, loss = other_reference(model, result["weights"])
    assert result["rows"] == sum(not math.isnan(sample.advantages[0]) for sample in samples())
    assert result["other_loss"] == pytest.approx(loss, abs=1e-6)
    assert difference(result["other"], result["second"]) > 1e-2
    assert difference(result["other"], gradient) <= 1e-5


def test_the_fixture_is_what_it_says(found: Any) -> None:
    assert found[1, 0][2]["passes"] == 4
    assert found[1, 0][2]["masked"] == 2
    assert found[2, 0][3]["own_passes"] < found[2, 1][3]["own_passes"] == found[2, 0][3]["passes"]
