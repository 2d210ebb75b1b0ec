"""The plan in numbers that one can check by hand, on a model of round sizes and on the published ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ergo_rl.cluster.config import EngineConfig
from ergo_rl.jobs.commands.plan import DOES_NOT_FIT, main
from ergo_rl.jobs.config import ConfigError, TrainConfig, load_config
from ergo_rl.jobs.memory_model import (
    GIB,
    MemoryItem,
    engine_memory,
    learner_host_parts,
    learner_parts,
    total,
    trained,
    trajectory_tokens,
)
from ergo_rl.jobs.model_shapes import ModelSpec, model_spec
from ergo_rl.jobs.placement_plan import Process, make_plan, phases, place
from ergo_rl.jobs.throughput import estimate_throughput
from ergo_rl.learners.config import Dtype, LoraConfig
from tests.conftest import ROOT

RECIPES = sorted((ROOT / "configs").glob("*.yaml"))
BILLION = 10**9
ROUND = ModelSpec(
    parameters=8 * BILLION, vision=BILLION, linear=(("q_proj", 1000, 1000), ("up_proj", 1000, 4000)), layers=10,
    hidden=1000, intermediate=4000, kv_width=500, kv_heads=4, vocabulary=100_000, vision_layers=20,
    vision_hidden=100, vision_intermediate=400, patches_per_token=4,
)  # fmt: skip


def sizes(parts: list[MemoryItem]) -> dict[str, float]:
    return {part.name: part.bytes for part in parts}


def recipe(*overrides: str) -> TrainConfig:
    return load_config(ROOT / "configs" / "ergo-7b.yaml", overrides)


@pytest.mark.parametrize(
    ("model", "parameters", "vision"),
    [
        # as the hub's safetensors indices count them
        ("Qwen/Qwen2.5-VL-3B-Instruct", 3_754_622_976, 668_684_288),
        ("Qwen/Qwen2.5-VL-7B-Instruct", 8_292_166_656, 676_550_144),
        ("Qwen/Qwen2.5-VL-72B-Instruct", 73_410_777_344, 704_573_696),
        ("Qwen/Qwen3-VL-4B-Instruct", 4_437_815_808, 415_347_712),
        ("Qwen/Qwen3-VL-8B-Instruct", 8_767_123_696, 576_388_336),
    ],
)
def test_model_spec_counts_published_models(model: str, parameters: int, vision: int) -> None:
    shape = model_spec(model)
    assert (shape.parameters, shape.vision) == (parameters, vision)


def test_model_spec_of_a_local_folder_equals_its_file() -> None:
    from safetensors import safe_open

    shape = model_spec("models/panels-policy")
    with safe_open(ROOT / "models/panels-policy/model.safetensors", "pt") as file:
        stored = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    count = 0
    for each in stored.values():
        size = 1
        for side in each:
            size *= side
        count += size
    assert shape.parameters == count


def test_model_spec_unknown_model_is_named() -> None:
    with pytest.raises(ConfigError, match=r"the size of \./no/such is not known.*Qwen/Qwen2\.5-VL-7B-Instruct"):
        model_spec("./no/such")


def test_learner_parts_are_sharded_by_zero_stage() -> None:
    """8e9 parameters in bfloat16 on 4 ranks, gigabytes."""
    found = {}
    for stage in (1, 2, 3):
        parts = sizes(learner_parts(ROUND, recipe("learner.ranks=4", f"learner.zero_stage={stage}"), on_gpu=True))
        found[stage] = [parts[name] / BILLION for name in ("weights", "gradients", "optimiser")]
    assert found == {1: [16, 48, 24], 2: [16, 8, 24], 3: [4, 8, 24]}
    whole = sizes(learner_parts(ROUND, recipe("learner.ranks=4"), on_gpu=True))
    assert whole["gathered weights"] == 2 * BILLION and whole["gradient bucket"] == BILLION
    assert whole["at the start"] == 16 * BILLION + 2 * GIB


def test_learner_parts_in_float32_take_four_bytes() -> None:
    config = recipe("learner.ranks=2", "learner.zero_stage=2", "learner.dtype=FLOAT32")
    parts = sizes(learner_parts(ROUND, config, on_gpu=True))
    assert [parts[name] / BILLION for name in ("weights", "gradients", "optimiser")] == [32, 16, 48]


def test_learner_parts_offloaded_optimiser_moves_to_main_memory() -> None:
    config = recipe("learner.ranks=4", "learner.offload_optimizer=true")
    assert "optimiser" not in sizes(learner_parts(ROUND, config, on_gpu=True))
    host = sizes(learner_host_parts(ROUND, config))
    assert host["offloaded optimiser"] == 32 * BILLION and host["at the start"] == 32 * BILLION
    assert sizes(learner_parts(ROUND, config, on_gpu=False))["optimiser"] == 24 * BILLION, "it is there already"


def test_trained_leaves_out_frozen_parameters() -> None:
    config = recipe("learner.freeze_vision=true", "learner.ranks=1", "learner.zero_stage=2").learner
    assert trained(ROUND, config) == 7 * BILLION
    lora = replace(config, lora=LoraConfig(rank=8, targets=["q_proj", "up_proj"]))
    assert trained(ROUND, lora) == 8 * 2000 + 8 * 5000
    parts = sizes(learner_parts(ROUND, replace(recipe(), learner=lora), on_gpu=True))
    assert parts["weights"] == 2 * (8 * BILLION + 56_000) and parts["optimiser"] == 12 * 56_000


def test_learner_parts_with_kl_hold_a_second_policy() -> None:
    with_it, without = (learner_parts(ROUND, recipe(f"learner.loss.kl={kl}"), on_gpu=True) for kl in (0.1, 0))
    assert total(with_it) - total(without) == 16 * BILLION


def test_learner_parts_activations_with_and_without_checkpointing() -> None:
    """A block keeps 11 x 1000 + 3 x 500 + 4 x 4000 = 28,500 numbers a token, one of the tower 14 x 100 + 4 x 400 =
    3,000 a patch. 2,560 tokens of the longest trajectory are 1,280 of text and as many of pictures: half of
    8,192 x 4."""
    assert trajectory_tokens(recipe()) == 640 + 640 + 512 + 512 + 256
    every = sizes(learner_parts(ROUND, recipe("learner.gradient_checkpointing=false"), on_gpu=True))
    assert every["activations, text"] == 2 * 8192 * 10 * 28_500
    assert every["activations, tower"] == 2 * 16_384 * 20 * 3_000
    some = sizes(learner_parts(ROUND, recipe(), on_gpu=True))
    assert some["activations, text"] == 2 * 8192 * (10 * 1000 + 28_500)
    assert some["activations, tower"] == 2 * 16_384 * (20 * 100 + 3_000)
    frozen = sizes(learner_parts(ROUND, recipe("learner.freeze_vision=true"), on_gpu=True))
    assert frozen["activations, tower"] == 2 * 16_384 * 3_000, "one block at a time, nothing is kept"


def test_learner_parts_logits_are_chunks_and_one_gradient() -> None:
    parts = sizes(learner_parts(ROUND, recipe(), on_gpu=True))
    assert parts["logits"] == 3 * 64 * 2**20 + 2 * 100_000 * 1000
    assert parts["weights to be synced"] == 256 * 2**20


def test_total_counts_the_start_only_where_it_is_more() -> None:
    parts = [MemoryItem("a", 3, ""), MemoryItem("b", 4, ""), MemoryItem("start", 6, "", held=False)]
    assert total(parts) == 7 and total([*parts, MemoryItem("more", 2, "", held=False)]) == 8


def test_engine_memory_computes_the_kv_cache() -> None:
    """2 (key, value) x 10 layers x 500 x 2 bytes = 20,000 bytes a token, 20 MB for 1,000 tokens."""
    engine = EngineConfig("m", "bfloat16", max_model_len=1000, max_num_seqs=10, gpu_memory_utilization=0.5)
    needs = engine_memory(ROUND, engine, tokens=100, gpu_memory=80 * BILLION)
    parts = sizes(list(needs.parts))
    assert parts["weights"] == 16 * BILLION and parts["KV cache, at least"] == 20_000_000
    work = 8192 * (6 * 1000 + 3 * 4000) * 2 + 400 * (6 * 100 + 3 * 400) * 2 + 2 * 4 * 10 * 100_000
    assert parts["work"] == work
    assert needs.limit == 40 * BILLION and needs.cache == 40 * BILLION - 16 * BILLION - work - 2 * GIB
    assert needs.conversations == needs.cache / 20_000_000
    spread = engine_memory(ROUND, replace(engine, tensor_parallel_size=8), 100, 80 * BILLION)
    assert sizes(list(spread.parts))["weights"] == 2 * BILLION
    assert sizes(list(spread.parts))["KV cache, at least"] == 5_000_000, "4 heads on 8 GPUs: one each, twice"
    on_cpu = engine_memory(ROUND, replace(engine, dtype="float32", kv_cache_gib=2), 100, None)
    assert sizes(list(on_cpu.parts)) == {"weights": 32 * BILLION, "KV cache": 2 * GIB, "processes": 3 * GIB}


def processes(*wanted: tuple[str, float]) -> list[Process]:
    return [Process(role, number, gpus, (), 0.0) for number, (role, gpus) in enumerate(wanted)]


def test_place_puts_whole_gpus_on_one_node_and_shares_together() -> None:
    gpus, missing = place(processes(("rollout", 0.4), ("reward", 2), ("learner", 0.6), ("learner", 1)), 2, 2)
    assert [[one.title for one in there] for there in gpus] == [
        ["rollout 0", "learner 2"], ["learner 3"], ["reward 1"], ["reward 1"]]  # fmt: skip
    assert missing == []


def test_phases_of_sleeping_engines_count_one_role_at_a_time() -> None:
    """50 of an engine, 2 of them while it sleeps; 40 of a learner, 10 of them between steps: 60 is the most."""
    engine, learner = (
        Process("rollout", 0, 0.4, (), 50, resting=2), Process("learner", 0, 0.6, (), 40, resting=10)
    )  # fmt: skip
    assert phases(recipe("max_staleness=0"), [engine, learner]) == [[50, 40]]
    sleeping = recipe("max_staleness=0", "rollout.engine.sleep=true")
    assert phases(sleeping, [engine, learner]) == [[50, 10], [2, 40]]


def test_plan_sleeping_engine_keeps_only_its_context_on_the_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    """3B on one GPU: 0.7 of it for the engine is too much beside a learner at work, and not beside one that rests."""
    large = ["rollout.engine.gpu_memory_utilization=0.7"]
    path = ROOT / "configs/ergo-3b.yaml"
    assert main([str(path), *large]) == DOES_NOT_FIT
    assert main([str(path), *large, "rollout.engine.sleep=true"]) == 0
    capsys.readouterr()
    plan = make_plan(load_config(path, [*large, "rollout.engine.sleep=true"]))
    (engine, learner) = plan.gpus[0]
    assert engine.resting == 2 * GIB, "its runtime"
    parts = sizes(list(learner.parts))
    passing = parts["activations, text"] + parts["activations, tower"] + parts["logits"]
    assert learner.resting == pytest.approx(sum(part.bytes for part in learner.parts if part.held) - passing)
    weights = 2 * 3_754_622_976
    assert sizes(list(engine.host_parts))["weights of an engine that sleeps"] == weights, "in main memory meanwhile"


def test_place_names_processes_without_a_gpu() -> None:
    _, missing = place(processes(("learner", 1), ("reward", 2)), 1, 2)
    assert missing == ["no place for reward 1, which asks for 2 GPUs; free then: 0, 1"]
    _, missing = place(processes(("learner", 0.5), ("learner", 0.5)), 1, 2)
    assert missing == [
        "GPU 0 would hold 2 learner ranks, and NCCL needs a GPU for each: raise learner.resources.gpus above 0.5"
    ]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_plan_shipped_recipes_fit_their_hardware(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(path)]) == 0
    assert "does not fit" not in capsys.readouterr().out


def test_plan_of_the_7b_recipe_adds_up(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(ROOT / "configs/ergo-7b.yaml")]) == 0
    said = capsys.readouterr().out
    plan = make_plan(recipe())
    assert [[one.title for one in there] for there in plan.gpus] == [
        ["rollout 0"], ["learner 0"], ["learner 1"], ["learner 2"]]  # fmt: skip
    learner = plan.gpus[1][0]
    parts = sizes(list(learner.parts))
    every = 8_292_166_656
    assert parts["weights"] == 2 * every / 3 and parts["gradients"] == 4 * every / 3
    assert parts["optimiser"] == 12 * every / 3
    assert learner.bytes == sum(part.bytes for part in learner.parts if part.held)
    assert f"│ at most              │   {learner.bytes / GIB:.1f} │" in said
    rollout = plan.gpus[0][0]
    assert rollout.bytes == pytest.approx(sum(part.bytes for part in rollout.parts)) == pytest.approx(0.85 * 80 * GIB)
    for text in ("15.4", "learner 2 (58.1)", "a step, a rough estimate", "main memory, all nodes"):
        assert text in said


def test_plan_refuses_four_gpus_of_24_gib(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(ROOT / "configs/ergo-7b.yaml"), "hardware.gpu_memory_gib=24"]) == DOES_NOT_FIT
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("does not fit: ")]
    assert said == ["does not fit: GPU 1, 2, 3: learner 58.1 = 58.1 GiB, and a GPU has 24"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["hardware.gpus_per_node=3"], "no place for learner 2, which asks for 1 GPUs; free then: 0, 0, 0"),
        (["rollout.engine.gpu_memory_utilization=0.2"], "a rollout engine needs 19.2 GiB .* gives it 16.0"),
        (["rollout.engine.tensor_parallel_size=2"], "tensor_parallel_size is 2, but a rollout worker gets 1 GPUs"),
        (["hardware.memory_gib_per_node=100"], "main memory: .* GiB are needed, and 1 x 100 are there"),
        (["learner.resources.gpus=0.5"], "GPU 1 would hold 2 learner ranks"),
    ],
)
def test_plan_refusals_name_the_numbers(overrides: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    import re

    assert main([str(ROOT / "configs/ergo-7b.yaml"), *overrides]) == DOES_NOT_FIT
    assert re.search(message, capsys.readouterr().out)


def test_throughput_estimate_by_hand() -> None:
    """256 trajectories of 1,280 + 256 + 512 tokens; 7e9 parameters of text 8 times, 1e9 of the tower 8 times for 4
    patches a token, on 3 GPUs at 35 % of 989e12."""
    assert recipe().learner.dtype is Dtype.BFLOAT16
    found = estimate_throughput(recipe(), ROUND, None)
    work = 256 * (2048 * 7e9 * 8 + 1280 * 4 * 1e9 * 8)
    assert found.learn == pytest.approx(work / (3 * 0.35 * 989e12))
    prefill = 256 * 1536 * 2 * 8e9 / (0.4 * 989e12)
    decode = 1 * 512 * 16e9 / (0.6 * 3.35e12)
    assert found.rollout == pytest.approx(prefill + decode)
    assert found.publish == 8.0 and found.reward == 0.0
    assert found.step == max(found.rollout, found.learn) + 8.0
    in_turn = estimate_throughput(recipe("max_staleness=0"), ROUND, None)
    assert in_turn.step == found.rollout + found.learn + 8.0


def test_plan_wrong_recipe_exits_with_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(ROOT / "configs/ergo-7b.yaml"), "learner.model=./gone", "rollout.engine.model=./gone"]) == 1
    assert "the size of ./gone is not known" in capsys.readouterr().err
    assert main([str(ROOT / "configs/ergo-7b.yaml"), "hardware.nodes=0"]) == 1
    assert "hardware.nodes is 0; it must be at least 1" in capsys.readouterr().err
