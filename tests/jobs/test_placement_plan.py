"""The plan in numbers that one can check by hand, on a model of round sizes and on the published ones."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from ergo_rl.cluster import weight_sender
from ergo_rl.cluster.config import EngineConfig
from ergo_rl.episodes.families import UnknownFamily, family_of
from ergo_rl.jobs.commands.plan import DOES_NOT_FIT, main
from ergo_rl.jobs.config import ConfigError, TrainConfig, load_config
from ergo_rl.jobs.cost_model import (
    GIB,
    PACKED_BUFFER,
    MemoryItem,
    ModelSpec,
    When,
    at_rest,
    engine_batch,
    engine_memory,
    estimate_throughput,
    learner_host_parts,
    learner_parts,
    model_spec,
    received,
    total,
    trained,
    trajectory_tokens,
)
from ergo_rl.jobs.placement_plan import Process, make_plan, phases, place
from ergo_rl.learners.config import Dtype, LoraConfig
from tests.conftest import ROOT

RECIPES = sorted((ROOT / "configs").glob("*.yaml"))
BILLION = 10**9
ROUND = ModelSpec(
    parameters=8 * BILLION, vision=BILLION, linear=(("q_proj", 1000, 1000), ("up_proj", 1000, 4000)), layers=10,
    hidden=1000, intermediate=4000, kv_width=500, kv_heads=4, vocabulary=100_000, vision_layers=20,
    vision_hidden=100, vision_intermediate=400, patches_per_token=4, largest=100_000_000,
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


@pytest.mark.parametrize(
    ("overrides", "largest", "published", "received_bytes"),
    [
        # ZeRO-3 gathers a bucket of 256 MiB; NCCL has two packed buffers of 512 MiB and the tensors of the next
        ([], 1, {"bucket to be published": 2**28, "buffers of NCCL": 3 * 2**29}, 2 * 2**29),
        # a largest tensor of 2 x 1e9 bytes makes every bucket and buffer that large
        ([], BILLION, {"bucket to be published": 2 * BILLION, "buffers of NCCL": 6 * BILLION}, 4 * BILLION),
        (["learner.zero_stage=2"], 1, {"buffers of NCCL": 3 * 2**29}, 2 * 2**29),
        (["learner.zero_stage=2", "weights.transport=object_store"], 1, {}, None),
        (
            ["learner.zero_stage=2", "learner.ranks=1", "learner.resources.gpus=0.6", "rollout.resources.gpus=0.4"],
            10**8,
            {"buffer of CUDA IPC": 2**29 + 2 * 10**8},
            2**29,
        ),
    ],
)
def test_published_weights_cost_what_their_transport_needs(
    overrides: list[str], largest: int, published: dict[str, int], received_bytes: int | None
) -> None:
    shape, config = replace(ROUND, largest=largest), recipe(*overrides)
    parts = learner_parts(shape, config, on_gpu=True)
    assert {part.name: part.bytes for part in parts if part.when is When.PUBLISHING} == published
    item = received(shape, config)
    assert (item and item.bytes) == received_bytes


def test_packed_buffers_are_those_of_the_weight_sender() -> None:
    assert PACKED_BUFFER == weight_sender.BUFFER_BYTES


def test_total_counts_the_start_only_where_it_is_more() -> None:
    parts = [MemoryItem("a", 3, ""), MemoryItem("b", 4, ""), MemoryItem("start", 6, "", When.START)]
    assert total(parts) == 7 and total([*parts, MemoryItem("more", 2, "", When.START)]) == 8


def test_total_counts_passes_or_publishing_because_they_follow_each_other() -> None:
    parts = [MemoryItem("a", 3, ""), MemoryItem("pass", 5, "", When.WORKING), MemoryItem("b", 2, "", When.PUBLISHING)]
    assert total(parts) == 3 + 5 and at_rest(parts) == 3 + 2
    assert total([*parts, MemoryItem("c", 4, "", When.PUBLISHING)]) == 3 + 6


def test_engine_memory_computes_the_kv_cache() -> None:
    """2 (key, value) x 10 layers x 500 x 2 bytes = 20,000 bytes a token, 20 MB for 1,000 tokens."""
    engine = EngineConfig("m", "bfloat16", max_model_len=1000, max_num_seqs=10, gpu_memory_utilization=0.5)
    needs = engine_memory(ROUND, engine, tokens=100, gpu_memory=80 * BILLION)
    parts = sizes(list(needs.parts))
    assert parts["weights"] == 16 * BILLION and parts["KV cache, at least"] == 20_000_000
    work = 2048 * (6 * 1000 + 3 * 4000) * 2 + 400 * (6 * 100 + 3 * 400) * 2 + 2 * 4 * 10 * 100_000
    assert parts["work"] == work
    assert needs.limit == 40 * BILLION and needs.cache == 40 * BILLION - 16 * BILLION - work - 2 * GIB
    assert needs.conversations == needs.cache / 20_000_000
    spread = engine_memory(ROUND, replace(engine, tensor_parallel_size=8), 100, 80 * BILLION)
    assert sizes(list(spread.parts))["weights"] == 2 * BILLION
    assert sizes(list(spread.parts))["KV cache, at least"] == 5_000_000, "4 heads on 8 GPUs: one each, twice"
    on_cpu = engine_memory(ROUND, replace(engine, dtype="float32", kv_cache_gib=2), 100, None)
    assert sizes(list(on_cpu.parts)) == {
        "weights": 32 * BILLION, "KV cache": 2 * GIB, "prepared views": 4 * GIB, "processes": 3 * GIB}  # fmt: skip


def test_engine_memory_reads_what_the_recipe_hands_to_vllm() -> None:
    engine = EngineConfig("m", "bfloat16", max_model_len=1000, max_num_seqs=10, gpu_memory_utilization=0.5)
    assert engine_batch(engine) == 2048 and engine_batch(replace(engine, max_num_seqs=2)) == 2000
    wide = replace(engine, extra={"max_num_batched_tokens": 8192})
    plain, large = (sizes(list(engine_memory(ROUND, each, 100, 80 * BILLION).parts)) for each in (engine, wide))
    assert large["work"] - plain["work"] == (8192 - 2048) * 18_000 * 2
    fixed = engine_memory(ROUND, replace(engine, extra={"kv_cache_memory_bytes": 10**9}), 100, 80 * BILLION)
    assert fixed.cache == pytest.approx(10**9) and fixed.conversations == pytest.approx(50)
    assert fixed.limit == pytest.approx(16 * BILLION + plain["work"] + 2 * GIB + 10**9)
    half = engine_memory(ROUND, replace(engine, extra={"kv_cache_dtype": "fp8"}), 100, 80 * BILLION)
    assert sizes(list(half.parts))["KV cache, at least"] == 10_000_000
    with pytest.raises(ConfigError, match=r"engine\.extra\.max_num_batched_tokens is 'many'; it must be a number"):
        engine_batch(replace(engine, extra={"max_num_batched_tokens": "many"}))


def quantised(tmp_path: Path, settings: object) -> ModelSpec:
    """A Qwen2.5-VL of 2 blocks: 7 linear layers each, 4 of 8 x 8 (keys and values 4 x 8) and 3 of 8 x 16."""
    config = {
        "model_type": "qwen2_5_vl", "tie_word_embeddings": False, "quantization_config": settings,
        "text_config": {
            "model_type": "qwen2_5_vl_text", "vocab_size": 100, "hidden_size": 8, "intermediate_size": 16,
            "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1]},
        },
        "vision_config": {
            "model_type": "qwen2_5_vl_vision", "depth": 1, "hidden_size": 8, "intermediate_size": 16, "num_heads": 2,
            "out_hidden_size": 8, "patch_size": 14, "spatial_merge_size": 2,
        },
    }  # fmt: skip
    folder = tmp_path / f"model-{len(list(tmp_path.iterdir()))}"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return model_spec(str(folder))


def test_model_spec_counts_quantised_weights(tmp_path: Path) -> None:
    """A block: q and o 8 x 8, k and v 8 x 4, three of 8 x 16: 576 numbers. In groups of 4 inputs 144 scales of 2 bytes
    and as many zero points of half a byte."""
    awq = {"quant_method": "awq", "bits": 4, "group_size": 4, "zero_point": True, "modules_to_not_convert": ["visual"]}
    spec = quantised(tmp_path, awq)
    assert (spec.quantised, spec.quantised_bytes) == (2 * 576, 2 * (576 / 2 + 144 * 2.5))
    assert spec.weight_bytes(2) == 2 * (spec.parameters - 1152) + 1296
    some = quantised(tmp_path, awq | {"modules_to_not_convert": ["visual", "mlp"]})
    assert some.quantised == 2 * (64 + 64 + 32 + 32)
    gptq = quantised(tmp_path, {"quant_method": "gptq", "bits": 8, "group_size": -1, "sym": True})
    outputs = 2 * (8 + 8 + 4 + 4 + 16 + 16 + 8)
    assert (gptq.quantised, gptq.quantised_bytes) == (1152, 1152 + outputs * 3)
    packed = {"num_bits": 4, "group_size": 4, "symmetric": True, "type": "int"}
    compressed = {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": packed}}}
    tensors = quantised(tmp_path, compressed | {"ignore": ["re:.*visual.*", "lm_head"]})
    assert (tensors.quantised, tensors.quantised_bytes) == (1152, 2 * (576 / 2 + 144 * 2))
    fp8 = quantised(tmp_path, {"quant_method": "fp8", "weight_block_size": [128, 128]})
    assert fp8.quantised > 1152 and fp8.quantised < fp8.parameters - 2 * 800, "the tower, too; not embeddings and head"
    assert fp8.quantised <= fp8.quantised_bytes < 1.5 * fp8.quantised
    unknown = quantised(tmp_path, {"quant_method": "of tomorrow", "bits": 3})
    assert (unknown.quantised, unknown.how_quantised) == (0, "of tomorrow")


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "awq"},
        {"quant_method": "gptq", "bits": "four"},
        {"quant_method": "compressed-tensors", "config_groups": {}},
        {"quant_method": "compressed-tensors", "config_groups": {}, "ignore": ["re:("]},
        {"quant_method": "fp8", "ignored_layers": 3},
    ],
)
def test_model_spec_names_what_it_cannot_read(settings: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"quantization_config of .*model-0 cannot be read"):
        quantised(tmp_path, settings)


def test_plan_of_an_awq_judge_of_72b_fits_one_card(capsys: pytest.CaptureFixture[str]) -> None:
    """In a block q and o have 8192 x 8192 numbers, k and v 8192 x 1024, three others 8192 x 29,568; of 80 blocks.
    Half a byte each and 2.5 bytes for each 128 of them, two bytes for all other numbers: 42.9 GB."""
    judge = "Qwen/Qwen2.5-VL-72B-Instruct-AWQ"
    spec = model_spec(judge)
    blocks = 80 * 8192 * (2 * 8192 + 2 * 1024 + 3 * 29_568)
    assert spec.quantised == blocks and spec.parameters == 73_410_777_344
    assert spec.weight_bytes(2) == blocks / 2 + blocks / 128 * 2.5 + 2 * (73_410_777_344 - blocks)
    assert 42.8e9 < spec.weight_bytes(2) < 42.9e9
    one = ["reward.resources.gpus=1", "reward.verifier.engine.tensor_parallel_size=1", "hardware.gpus_per_node=5"]
    config = str(ROOT / "configs/ergo-7b-judge.yaml")
    assert main([config, *one, f"reward.verifier.engine.model={judge}"]) == 0
    capsys.readouterr()
    assert main([config, *one]) == DOES_NOT_FIT
    assert "a reward engine needs 1" in capsys.readouterr().out


def test_plan_refuses_what_training_refuses_in_the_same_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_5"}))
    with pytest.raises(UnknownFamily) as refused:
        family_of(str(tmp_path))
    assert main([str(ROOT / "configs/ergo-7b.yaml"), f"model={tmp_path}"]) == 1
    assert capsys.readouterr().err == f"ergo-rl plan: {refused.value}\n"
    assert "'qwen3_5' model; known families: qwen2_5_vl, qwen3_vl" in str(refused.value)


def test_plan_refuses_to_train_quantised_weights(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(ROOT / "configs/ergo-7b.yaml"), "model=Qwen/Qwen2.5-VL-72B-Instruct-AWQ"]) == DOES_NOT_FIT
    assert "is quantised (awq), and training needs whole weights" in capsys.readouterr().out


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
    large = ["rollout.engine.gpu_memory_utilization=0.7", "rollout.engine.extra.kv_cache_memory_bytes=null"]
    path = ROOT / "configs/ergo-3b.yaml"
    assert main([str(path), *large]) == DOES_NOT_FIT
    assert main([str(path), *large, "rollout.engine.sleep=true"]) == 0
    capsys.readouterr()
    plan = make_plan(load_config(path, [*large, "rollout.engine.sleep=true"]))
    (engine, learner) = plan.gpus[0]
    assert engine.resting == 2 * GIB, "its runtime"
    parts = sizes(list(learner.parts))
    passing = parts["activations, text"] + parts["activations, tower"] + parts["logits"]
    everything = sum(part.bytes for part in learner.parts if part.when is not When.START)
    assert learner.resting == pytest.approx(everything - passing)
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
    assert learner.bytes == sum(part.bytes for part in learner.parts if part.when in (When.ALWAYS, When.WORKING))
    assert f"│ {'at most':22} │   {learner.bytes / GIB:.1f} │" in said
    rollout = plan.gpus[0][0]
    share, buffers = 0.85 * 80 * GIB, 2 * 2 * 152_064 * 3584
    held = sum(part.bytes for part in rollout.parts)
    assert rollout.bytes == pytest.approx(held) == pytest.approx(share + buffers)
    for text in ("15.4", "learner 2 (57.9)", "a step, a rough estimate", "main memory, all nodes"):
        assert text in said


def test_plan_refuses_four_gpus_of_24_gib(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(ROOT / "configs/ergo-7b.yaml"), "hardware.gpu_memory_gib=24"]) == DOES_NOT_FIT
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("does not fit: ")]
    assert said == ["does not fit: GPU 1, 2, 3: learner 57.9 = 57.9 GiB, and a GPU has 24"]


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
