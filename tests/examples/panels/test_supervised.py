"""The supervised loop, and the batches that the tiny models are pretrained on."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ergo_rl.episodes.families import Qwen25VL
from ergo_rl.examples.panels.batches import (
    EDGE_BINS,
    TEXTS,
    ReplyTask,
    SceneBatches,
    SceneFeatures,
    TowerTask,
    compute_features,
)
from ergo_rl.examples.panels.scenes import COLOURS, PanelsConfig, Split, scene
from ergo_rl.examples.panels.supervised import Conversation, DenseTower, GroundedModel, TrainingSchedule, collate, fit
from ergo_rl.examples.panels.targets import Pointing, coarse_view
from ergo_rl.examples.panels.tiny_model import TinyConfig, make_model, make_processor, make_tokenizer

FAMILY = Qwen25VL()
SMALL = TinyConfig(hidden=32, layers=1, intermediate=48, vision_hidden=32, vision_layers=1, vision_intermediate=48)


def line() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 1)


def squares(model: nn.Linear) -> Any:
    def loss(batch: Tensor) -> tuple[Tensor, Mapping[str, float]]:
        return (model(batch) - batch.sum(-1, keepdim=True)).square().mean(), {}

    return loss


def batches(first: int) -> Iterable[Tensor]:
    for step in range(first, 100):
        yield torch.randn(8, 3, generator=torch.Generator().manual_seed(step))


def test_fit_learns_and_an_interrupted_fit_ends_the_same(tmp_path: Path) -> None:
    schedule = TrainingSchedule(steps=60, rate=0.1, warmup=5, save_every=7)
    losses: list[float] = []
    whole = line()
    fit(
        whole,
        squares(whole),
        batches,
        schedule,
        tmp_path / "a.pt",
        lambda step, figures: losses.append(figures["loss"]),
    )
    assert losses[-1] < 0.01 * losses[0] and len(losses) == 60

    class Interrupted(Exception):
        pass

    def stop(step: int, figures: Mapping[str, float]) -> None:
        if step == 31:
            raise Interrupted

    broken = line()
    with pytest.raises(Interrupted):
        fit(broken, squares(broken), batches, schedule, tmp_path / "b.pt", stop)
    resumed, steps = line(), []
    fit(resumed, squares(resumed), batches, schedule, tmp_path / "b.pt", lambda step, figures: steps.append(step))
    assert steps == list(range(29, 61))  # from the checkpoint of step 28
    assert torch.equal(resumed.weight, whole.weight)
    seconds = fit(resumed, squares(resumed), batches, schedule, tmp_path / "b.pt", lambda step, figures: None)
    assert seconds > 0 and torch.equal(resumed.weight, whole.weight)


def test_the_rate_warms_up_and_decays_to_a_tenth() -> None:
    schedule = TrainingSchedule(steps=100, warmup=10)
    assert [round(schedule.factor(step), 3) for step in (0, 9, 50, 99)] == [0.1, 0.91, 0.5, 0.1]


def test_collate_expands_each_placeholder_once_and_pads_on_the_right() -> None:
    rows = [
        Conversation([5, 9, 6], [False, False, True], [torch.zeros(3, 2)], [(1, 2, 6)]),
        Conversation(
            [9, 9, 7, 8], [False, False, True, True], [torch.zeros(1, 2), torch.zeros(2, 2)], [(1, 2, 2), (1, 2, 4)]
        ),
    ]
    batch = collate(rows, image_id=9, pad_id=0)
    assert batch.input_ids.tolist() == [[5, 9, 9, 9, 6], [9, 9, 9, 7, 8]]
    assert batch.labels.tolist() == [[-100, -100, -100, -100, 6], [-100, -100, -100, 7, 8]]
    assert batch.token_types.tolist() == [[0, 1, 1, 1, 0], [1, 1, 1, 0, 0]]
    assert batch.grids.tolist() == [[1, 2, 6], [1, 2, 2], [1, 2, 4]] and len(batch.features) == 3
    shorter = collate([rows[0], Conversation([7], [True], [], [])], image_id=9, pad_id=0)
    assert shorter.input_ids.tolist()[1] == [7, 0, 0, 0, 0] and shorter.attention_mask.tolist()[1] == [1, 0, 0, 0, 0]


@pytest.fixture(scope="module")
def tiny() -> Any:
    tokenizer = make_tokenizer(TEXTS)
    return make_model(tokenizer, SMALL, seed=0), make_processor(tokenizer)


@pytest.fixture(scope="module")
def features(tiny: Any) -> list[SceneFeatures]:
    model, processor = tiny
    batches = SceneBatches(FAMILY, processor.image_processor, seed=0, count=8, scenes=2)
    return compute_features(model.model.visual, batches, lambda done: None)


def test_scene_batches_start_easy(features: list[SceneFeatures]) -> None:
    assert [len(scene.panels) for scene in features] == [1, 1, 2, 2] + [4] * 12
    assert all(scene.coarse is not None and scene.coarse.shape == (36, 32) for scene in features)


def reply_task(features: list[SceneFeatures], processor: Any, **mix: int) -> ReplyTask:
    return ReplyTask(features, processor.tokenizer, FAMILY, 0, 10, Pointing(), **mix)


@pytest.mark.parametrize("mix", [{"looks": 2}, {"reads": 2}, {"verifies": 3}])
def test_only_replies_are_taught(tiny: Any, features: list[SceneFeatures], mix: dict[str, int]) -> None:
    tokenizer = tiny[1].tokenizer
    batch = reply_task(features, tiny[1], **mix)(9)
    for labels, ids in zip(batch.labels, batch.input_ids, strict=True):
        taught = tokenizer.decode(labels[labels >= 0])
        whole = tokenizer.decode(ids).replace("<|endoftext|>", "")
        assert (
            whole.endswith(taught)
            and taught.endswith("<|im_end|>")
            and whole.count("<|im_start|>assistant") == 1 + ("reads" in mix)
        )
        start = {"looks": "<think>", "reads": "<think>a ", "verifies": "<answer>"}[next(iter(mix))]
        assert taught.startswith(start) and "user" not in taught


def test_the_loss_from_stored_features_is_the_models_own(tiny: Any, features: list[SceneFeatures]) -> None:
    """Stored features instead of pixels, against a plain forward pass from pixels."""
    model, processor = tiny
    row = replace(reply_task(features, processor).look(features[0], np.random.default_rng(0)), word=None)
    batch = collate([row], processor.tokenizer.convert_tokens_to_ids("<|image_pad|>"), 0)
    ours, _ = GroundedModel(model, SMALL.hidden, EDGE_BINS).loss(batch)
    view = coarse_view(scene(PanelsConfig(panels=1), 0, Split.LANGUAGE, 0), FAMILY)
    pixels, grids = FAMILY.image_inputs(processor.image_processor, [view])
    plain = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        mm_token_type_ids=batch.token_types,
        pixel_values=pixels,
        image_grid_thw=grids,
        labels=batch.labels,
    ).loss
    assert ours.item() == pytest.approx(plain.item(), rel=2e-3)  # features keep 16 bits


def test_the_grounded_word_is_the_colour_that_is_asked_about(tiny: Any, features: list[SceneFeatures]) -> None:
    tokenizer = tiny[1].tokenizer
    batch = reply_task(features, tiny[1], looks=8, reads=2)(9)
    assert len(batch.words) == 8  # only where pointing is taught
    for (row, place), edges in zip(batch.words.tolist(), batch.edges.tolist(), strict=True):
        words = tokenizer.decode(batch.input_ids[row, : place + 1])
        assert words.split()[-1] in COLOURS and words.endswith(f"on the {words.split()[-1]}")
        x1, y1, x2, y2 = (4 * edge for edge in edges)  # bins of 4 pixels of the coarse view
        assert 20 <= x2 - x1 <= 40 and 20 <= y2 - y1 <= 40  # panels are 22 to 38 of them


def test_batches_depend_on_the_step_alone(tiny: Any, features: list[SceneFeatures]) -> None:
    first, again = (TowerTask(FAMILY, tiny[1].image_processor, 0, scenes=1)(5) for _ in range(2))
    assert torch.equal(first.pixel_values, again.pixel_values) and torch.equal(first.mark, again.mark)
    first, again = (reply_task(features, tiny[1], looks=1, reads=1, verifies=1)(5).input_ids for _ in range(2))
    assert torch.equal(first, again)


def test_dense_labels_teach_a_tower(tiny: Any, tmp_path: Path) -> None:
    """40 steps on one batch: the loss falls by half, and nothing but the tower and its heads changed."""
    model, processor = tiny
    tower = DenseTower(model.model.visual, SMALL.hidden, 6, 4, EDGE_BINS)
    batch = TowerTask(FAMILY, processor.image_processor, 0, scenes=2)(0)
    before = model.lm_head.weight.clone()
    losses: list[float] = []
    started = time.monotonic()
    fit(
        tower,
        tower.loss,
        lambda first: [batch] * 40,
        TrainingSchedule(steps=40, rate=3e-3, warmup=5),
        tmp_path / "t.pt",
        lambda step, figures: losses.append(figures["loss"]),
    )
    assert losses[-1] < 0.5 * losses[0] and torch.equal(model.lm_head.weight, before)
    assert time.monotonic() - started < 120
