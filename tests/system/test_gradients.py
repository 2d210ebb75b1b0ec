"""Whatever the ranks, the ZeRO stage and the micro-batches: one gradient, that of the step's loss written out. And what
else has to hold on real ranks: offloading, precision of the master weights, adapters."""

from __future__ import annotations

import math
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from ergo_rl.cluster.compat import repair_torchvision
from ergo_rl.episodes.types import Turn
from ergo_rl.learners.config import Packing
from tests.factories import FAMILY, IDS, IMAGE_PAD, tiny_model
from tests.system.gradient_rank import LORA, OTHER, SPLITS, samples

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

    processor, replies = AutoImageProcessor.from_pretrained(model), []
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
        replies.append(
            [
                (torch.log_softmax(logits[place - 1], -1)[int(token)], float(behaviour), advantage)
                for start, turn, advantage in turns
                for place, (token, behaviour) in enumerate(zip(turn.completion_ids, turn.logprobs, strict=True), start)
            ]
        )
    return replies


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
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gradients")


@pytest.fixture(scope="module")
def results(model: Path, out: Path) -> dict[tuple[int, int], dict[int | str, Any]]:
    """(world, rank) -> ZeRO stage or name of a run -> the results of that process."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ports = {1: free_port(), 2: free_port()}
    runs = {
        1: ["2", "bfloat16"],
        2: ["1", "2", "3", "offloaded", "checkpointed", *(["adapted"] if find_spec("peft") else [])],
    }
    places = [(2, 0), (2, 1), (1, 0)]
    processes = []
    for world, rank in places:
        arguments = [str(model), str(rank), str(world), str(ports[world]), str(out), str(BUDGET), *runs[world]]
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
    results = {}
    for world, rank in places:
        loaded = torch.load(out / f"world{world}-rank{rank}.pt", weights_only=False)
        results[world, rank] = {int(run) if run.isdigit() else run: value for run, value in loaded.items()}
    return results


@pytest.fixture(scope="module")
def first(model: Path) -> tuple[Gradient, float, int]:
    return reference(model)


CASES = [(2, 0, 1), (2, 0, 2), (2, 0, 3), (2, 1, 1), (2, 1, 2), (2, 1, 3), (1, 0, 2)]
NAMES = [f"{world}-ranks-rank-{rank}-zero-{stage}" for world, rank, stage in CASES]


@pytest.mark.parametrize(("world", "rank", "stage"), CASES, ids=NAMES)
def test_gradient_equals_the_reference(
    results: Any, first: tuple[Gradient, float, int], world: int, rank: int, stage: int
) -> None:
    result, (gradient, loss, tokens) = results[world, rank][stage], first
    assert result["tokens"] == tokens
    assert result["loss"] == pytest.approx(loss, abs=1e-6)
    assert difference(result["first"], gradient) <= 1e-5
    for name, wanted in gradient.items():
        gap = (result["first"][name] - wanted).abs().max()
        assert gap <= 1e-5 * max(wanted.abs().max(), 1e-2), name


@pytest.mark.parametrize(("world", "rank", "stage"), CASES, ids=NAMES)
def test_norm_is_the_gradients_before_clipping(
    results: Any, first: tuple[Gradient, float, int], world: int, rank: int, stage: int
) -> None:
    norm = float(sum(part.double().square().sum() for part in first[0].values())) ** 0.5
    assert results[world, rank][stage]["norm"] == pytest.approx(norm, rel=1e-5)
    assert norm > 1e-2, "the fixture must be clipped"


@pytest.mark.parametrize(("world", "rank", "stage"), CASES, ids=NAMES)
def test_second_step_keeps_nothing_of_the_first(results: Any, model: Path, world: int, rank: int, stage: int) -> None:
    result = results[world, rank][stage]
    assert difference(result["second"], result["first"]) > 1e-3
    gradient, *_ = reference(model, result["weights"])
    assert difference(result["second"], gradient) <= 1e-5


@pytest.mark.parametrize(("world", "rank", "stage"), CASES, ids=NAMES)
def test_gradient_of_another_objective_equals_its_reference(
    results: Any, model: Path, world: int, rank: int, stage: int
) -> None:
    result = results[world, rank][stage]
    gradient, loss = other_reference(model, result["weights"])
    assert result["rows"] == sum(not math.isnan(sample.advantages[0]) for sample in samples())
    assert result["other_loss"] == pytest.approx(loss, abs=1e-6)
    assert difference(result["other"], result["second"]) > 1e-2
    assert difference(result["other"], gradient) <= 1e-5


@pytest.mark.parametrize(("world", "rank", "stage"), CASES, ids=NAMES)
def test_gradient_is_the_same_for_any_split_and_packing(results: Any, world: int, rank: int, stage: int) -> None:
    """1, 2, 4 and 8 micro-batches (of two ranks the second has six rows, so six at most), padded and end to end."""
    result, most = results[world, rank][stage], 6 if world == 2 else 8
    for packing in Packing:
        for count in SPLITS:
            passes, gradient = result["split", packing.value, count]
            assert passes == min(count, most)
            assert difference(gradient, result["second"]) <= 1e-5, (packing, count)


@pytest.mark.parametrize("rank", [0, 1])
def test_offloading_changes_neither_gradient_nor_step(results: Any, rank: int) -> None:
    got, wanted = results[2, rank]["offloaded"], results[2, rank][2]
    assert got["passes"] == wanted["passes"] > 1
    assert got["norm"] == pytest.approx(wanted["norm"], rel=1e-6)
    for what in ("first", "weights", "second"):
        assert difference(got[what], wanted[what]) <= 1e-5, what


@pytest.mark.parametrize("rank", [0, 1])
def test_recomputing_under_zero3_when_two_ranks_share_parameters_then_the_gradient_is_the_same(
    results: Any, first: tuple[Gradient, float, int], rank: int
) -> None:
    got, wanted = results[2, rank]["checkpointed"], results[2, rank][3]
    assert got["passes"] == wanted["passes"] > 1 and got["norm"] == pytest.approx(wanted["norm"], rel=1e-5)
    assert difference(got["first"], first[0]) <= 1e-5


@pytest.mark.parametrize(("world", "rank", "stage"), CASES, ids=NAMES)
def test_update_with_a_nan_gradient_on_one_rank_when_made_then_it_is_no_step_and_leaves_nothing(
    results: Any, world: int, rank: int, stage: int
) -> None:
    """And the third in a row is an error, on every rank."""
    result = results[world, rank][stage]["skipped"]
    assert result["metrics"]["learner/skipped"] == 1 and "learner/loss" not in result["metrics"]
    assert (result["counted"], result["moved"]) == (0, 0.0)
    assert all(torch.equal(result["after"][name], wanted) for name, wanted in result["before"].items())
    assert result["row"] == [0, 1, 1, 0, 1, 1]
    assert "3 updates in a row had a gradient that was NaN or infinite" in result["raised"]


@pytest.mark.parametrize("stage", ["1", "2", "3"])
def test_divergence_from_the_start_when_nothing_was_learned_then_it_is_exactly_0(results: Any, stage: str) -> None:
    assert results[1, 0]["bfloat16"][stage]["kl"] == 0.0


@pytest.mark.parametrize("stage", ["1", "2", "3"])
def test_master_weights_are_fp32_when_passes_are_bf16(results: Any, stage: str) -> None:
    """A step of 1e-6 (Adam's sign) moves nearly every master weight by 1e-6, and hardly any of the bf16 ones, whose
    spacing near 0.1 is 5e-4."""
    result = results[1, 0]["bfloat16"][stage]
    (before, after), (seen, now) = result["masters"], result["weights"]
    moved = torch.cat([(after[name] - before[name]).abs().flatten() for name in before])
    assert {weight.dtype for weight in after.values()} == {torch.float32}
    assert {weight.dtype for weight in now.values()} == {torch.bfloat16}
    assert 0.9e-6 <= moved.mean() <= 1.1e-6
    assert torch.cat([(now[name] != seen[name]).flatten() for name in now]).float().mean() < 0.05
    assert difference(result["again"], result["gradient"]) == 0, "nothing of a step is left in the next"


def test_gradients_of_bf16_passes_are_added_up_in_fp32(results: Any, first: Any) -> None:
    """Under ZeRO-1 ranks exchange the sum in bf16: it is rounded once, not with every micro-batch."""
    zero1, zero2, zero3 = (results[1, 0]["bfloat16"][stage]["gradient"] for stage in "123")
    assert difference(zero2, first[0]) <= 0.1, "bf16 forward and backward"
    assert difference(zero3, zero2) <= 1e-6
    assert any((part.bfloat16() != part).any() for part in zero2.values())
    assert all(torch.equal(zero1[name], part.bfloat16().float()) for name, part in zero2.items())


@pytest.mark.skipif(not find_spec("peft"), reason="needs peft")
def test_published_weights_are_base_plus_adapters(results: Any, model: Path, out: Path) -> None:
    """Two ranks of ZeRO-3: every adapted weight is base + alpha / rank x up x down, on both ranks and in the export,
    and plain transformers with these weights has the policy's log-probs."""
    result = results[2, 0]["adapted"]
    published = result["published"]
    assert all(torch.equal(published[name], other) for name, other in results[2, 1]["adapted"]["published"].items())
    assert len(result["adapters"]) == 2 * len(LORA.targets)
    for name, wanted in result["base"].items():
        if name in result["adapters"]:
            down, up, scale = result["adapters"][name]
            assert scale == LORA.alpha / LORA.rank and up.abs().max() > 1e-3
            wanted = wanted + scale * (up @ down)
        torch.testing.assert_close(published[name], wanted, atol=1e-6, rtol=0)
    exported = dict(opened(out / "adapted").named_parameters())
    assert all(torch.equal(exported[name], value) for name, value in published.items())
    with torch.no_grad():
        plain = replies(model, opened(model, published))
    for ours, theirs in zip(result["logprobs"], plain, strict=True):
        torch.testing.assert_close(ours, torch.stack([logprob for logprob, *_ in theirs]), atol=1e-5, rtol=0)


def test_fixture_has_the_passes_that_the_tests_need(results: Any) -> None:
    assert results[1, 0][2]["passes"] == 4
    assert results[1, 0][2]["masked"] == 2
    assert results[2, 0][3]["own_passes"] < results[2, 1][3]["own_passes"] == results[2, 0][3]["passes"]
