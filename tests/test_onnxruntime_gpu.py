"""ONNX Runtime on a GPU, as far as it can be seen without one: the way there and back, what it asks for and refuses."""

import io
import os
import shutil
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import parser
from safetensors.numpy import load_file, save_file

from dpo_fast.batches import Batch, Layout, arrange, make_batches
from dpo_fast.engines import onnxruntime_gpu
from dpo_fast.engines.onnxruntime import CPU, OnnxRuntimeEngine
from dpo_fast.engines.onnxruntime_gpu import (
    CUDA,
    CUDA_OPTIONS,
    SHAPE_OPERATORS,
    TENSORRT,
    OnnxRuntimeGpuEngine,
    check_placement,
    check_providers,
    content_key,
    placement,
    profile_shapes,
    tensorrt_options,
)
from dpo_fast.errors import BundleError, EngineOutputError, MissingDependencyError, StorageError
from dpo_fast.export.probes import make_probes
from dpo_fast.tensorrt.plans import Profile
from dpo_fast.token_table import make_table

PAIRS = make_probes(500, positions=256)
OUTPUTS = ("log_prob", "entropy", "mean_logit", "is_top1", "log_sum_sq_prob")
PROFILE = Profile(rows=(1, 4, 16), width=(8, 256, 2048), targets=(1, 512, 4096))

# The options of ONNX Runtime's TensorRT provider: the names in
# onnxruntime/core/providers/tensorrt/tensorrt_execution_provider_info.cc, as the crate `ort` 2.0.0-rc.15, which is for
# ONNX Runtime 1.31, lists them in src/ep/tensorrt.rs.
TENSORRT_OPTIONS = frozenset(
    {"device_id", "has_user_compute_stream", "user_compute_stream", "trt_max_workspace_size", "trt_min_subgraph_size",
     "trt_max_partition_iterations", "trt_fp16_enable", "trt_bf16_enable", "trt_int8_enable", "trt_dla_enable",
     "trt_dla_core", "trt_int8_calibration_table_name", "trt_int8_use_native_calibration_table",
     "trt_engine_cache_enable", "trt_engine_cache_path", "trt_dump_subgraphs", "trt_engine_cache_prefix",
     "trt_weight_stripped_engine_enable", "trt_onnx_model_folder_path", "trt_engine_decryption_enable",
     "trt_engine_decryption_lib_path", "trt_force_sequential_engine_build", "trt_context_memory_sharing_enable",
     "trt_layer_norm_fp32_fallback", "trt_timing_cache_enable", "trt_timing_cache_path", "trt_force_timing_cache",
     "trt_detailed_build_log", "trt_build_heuristics_enable", "trt_sparsity_enable", "trt_builder_optimization_level",
     "trt_auxiliary_streams", "trt_tactic_sources", "trt_extra_plugin_lib_paths", "trt_profile_min_shapes",
     "trt_profile_max_shapes", "trt_profile_opt_shapes", "trt_cuda_graph_enable", "trt_dump_ep_context_model",
     "trt_ep_context_file_path", "trt_ep_context_embed_mode", "trt_engine_hw_compatible"}
)  # fmt: skip
# Of the CUDA provider, which has many more: onnxruntime/core/providers/cuda/cuda_execution_provider_info.cc.
SOME_CUDA_OPTIONS = frozenset({"device_id", "enable_cuda_graph", "gpu_mem_limit", "use_tf32"})

# The graph contract with gates, in a form that shows them: each output is a row's gates, weighed 1 and 10.
GATED = """
<ir_version: 10, opset_import: ["" : 20]>
gated (int64[B, T] input_ids, int64[B, T] position_ids, int64[B, T] segment_ids, int64[N] target_index,
       int64[N] target_ids, float[B, 2] adapter_gates)
   => (float[N] log_prob, float[N] entropy, float[N] mean_logit, float[N] is_top1, float[N] log_sum_sq_prob)
<float[2] weights = {1.0, 10.0}, int64[1] one = {1}, int64 zero = {0}>
{
    weighed = Mul (adapter_gates, weights)
    of_rows = ReduceSum <keepdims = 0> (weighed, one)
    shape = Shape (input_ids)
    width = Gather (shape, one)
    rows = Div (target_index, width)
    log_prob = Gather (of_rows, rows)
    entropy = Identity (log_prob)
    mean_logit = Identity (log_prob)
    is_top1 = Identity (log_prob)
    log_sum_sq_prob = Identity (log_prob)
}
"""


def batches(layout: Layout, token_budget: int) -> list[Batch]:
    return list(make_batches(arrange(make_table(PAIRS), layout, token_budget), token_budget))


@pytest.fixture
def graph(tiny_bundle: Path) -> Path:
    return tiny_bundle / "policy.onnx"


@pytest.fixture
def own(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A policy's graph and weights, to be changed."""
    shutil.copytree(tiny_bundle / "policy", tmp_path / "policy")
    return Path(shutil.copy(tiny_bundle / "policy.onnx", tmp_path))


# -- there and back ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["shared", "plain"])
def test_bound_inputs_and_outputs_change_nothing(graph: Path, layout: Layout) -> None:
    """On the same provider, batches of other shapes one after the other, to the last bit."""
    bound = OnnxRuntimeGpuEngine(graph, precision="fp32", provider=CPU, threads=1)
    plain = OnnxRuntimeEngine(graph, threads=1)
    shapes = set()
    for batch in batches(layout, 60) + batches(layout, 400):
        found, expected = bound.score(batch), plain.score(batch)
        for name in OUTPUTS:
            values = getattr(found, name)
            assert values.dtype == getattr(expected, name).dtype
            np.testing.assert_array_equal(values, getattr(expected, name))
        shapes.add(batch.input_ids.shape)
    assert len(shapes) > 2
    assert bound.precision == "fp32"
    assert bound.name == f"onnxruntime {onnxruntime.__version__} {CPU}"


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["shared", "plain"])
def test_batches_of_more_rows_than_the_profile_has(graph: Path, layout: Layout) -> None:
    engine = OnnxRuntimeGpuEngine(graph, provider=CPU, profile=replace(PROFILE, rows=(1, 1, 2)), threads=1)
    plain = OnnxRuntimeEngine(graph, threads=1)
    batch = batches(layout, 1000)[0]
    assert len(batch.input_ids) > 4
    # In any order of the targets, and with rows that have none.
    shuffled = np.random.default_rng(0).permutation(len(batch.target_ids))[: len(batch.target_ids) // 2]
    other = replace(batch, target_index=batch.target_index[shuffled], target_ids=batch.target_ids[shuffled])
    width = batch.input_ids.shape[1]
    last = batch.target_index // width == 2
    single = replace(batch, target_index=batch.target_index[last], target_ids=batch.target_ids[last])
    for given in (batch, other, single):
        found, expected = engine.score(given), plain.score(given)
        for name in OUTPUTS:
            # Products of other heights are summed in other orders.
            np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=0, atol=5e-5)


@pytest.mark.slow
def test_what_is_given_out_stays_when_the_next_batch_comes(graph: Path) -> None:
    engine = OnnxRuntimeGpuEngine(graph, provider=CPU, threads=1)
    first, second = batches("shared", 60)[:2]
    given = engine.score(first).log_prob
    kept = given.copy()
    engine.score(second)
    np.testing.assert_array_equal(given, kept)


def test_gates_of_rows_and_of_both_roles(tmp_path: Path) -> None:
    path = tmp_path / "gated.onnx"
    onnx.save(parser.parse_model(GATED), path)
    batch = batches("plain", 200)[0]
    rows = batch.target_index // batch.input_ids.shape[1]
    assert rows.max() > 0
    engine = OnnxRuntimeGpuEngine(path, provider=CPU, gates=[1, 0])
    other = engine.with_gates([0, 1])
    both = engine.with_gates([[1, 0], [0, 1]])
    np.testing.assert_array_equal(engine.score(batch).log_prob, np.full(len(rows), 1))
    np.testing.assert_array_equal(other.score(batch).log_prob, np.full(len(rows), 10))
    np.testing.assert_array_equal(both.score(batch).log_prob, np.where(rows % 2, 10, 1))
    with pytest.raises(BundleError, match=r"gated\.onnx: has adapters, or has none"):
        OnnxRuntimeGpuEngine(path, provider=CPU)


@pytest.mark.slow
def test_a_failure_is_said_in_one_line(graph: Path) -> None:
    batch = batches("shared", 60)[0]
    batch.input_ids[0, 0] = 10_000
    with pytest.raises(EngineOutputError, match=r"failed at a batch of \d+ x \d+ tokens .*--token-budget") as caught:
        OnnxRuntimeGpuEngine(graph, provider=CPU).score(batch)
    assert "\n" not in str(caught.value)


def test_a_graph_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("no graph")
    printed = io.StringIO()
    with redirect_stdout(printed), pytest.raises(BundleError, match=r"text\.onnx: ONNX Runtime cannot load it"):
        OnnxRuntimeGpuEngine(tmp_path / "text.onnx", provider=CPU)
    assert printed.getvalue() == ""


# -- which provider computes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("provider", "extra"), [(CUDA, "gpu"), (TENSORRT, "onnxruntime-tensorrt")])
def test_a_build_without_the_provider(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, provider: str, extra: str
) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CPU])
    said = rf"{provider} \(after `pip uninstall onnxruntime`\) needs .*'onnxruntime-gpu': .*'dpo-fast\[{extra}\]'"
    with pytest.raises(MissingDependencyError, match=said):
        OnnxRuntimeGpuEngine(tmp_path / "any.onnx", provider=provider)


def test_a_provider_that_did_not_start(tmp_path: Path) -> None:
    """What ONNX Runtime makes of a missing CUDA library: a session on the CPU."""
    check_providers(tmp_path, [CUDA], [CUDA, CPU])
    check_providers(tmp_path, [TENSORRT, CUDA], [TENSORRT, CUDA, CPU])
    with pytest.raises(MissingDependencyError, match=rf"{CUDA} did not start, only {CPU} did; .*dpo-fast\[gpu\]"):
        check_providers(tmp_path, [CUDA], [CPU])
    with pytest.raises(MissingDependencyError, match=rf"{TENSORRT} did not start.*dpo-fast\[onnxruntime-tensorrt\]"):
        check_providers(tmp_path, [TENSORRT, CUDA], [CUDA, CPU])
    with pytest.raises(BundleError, match=f"prefers {CPU} to {CUDA}"):
        check_providers(tmp_path, [CUDA], [CPU, CUDA])


@pytest.mark.slow
def test_a_session_on_the_cpu_is_no_session_on_cuda(graph: Path) -> None:
    session = OnnxRuntimeGpuEngine(graph, provider=CPU)._session
    placed = placement(session)
    operators = {operator for _, operator in placed}
    assert {"MatMul", "Softmax", "Shape"} <= operators
    check_placement(graph, [CPU], placed)
    with pytest.raises(BundleError, match=rf"{CUDA} does not take all of its operators .*MatMul on {CPU}.*cpu-fp32"):
        check_placement(graph, [CUDA], placed)
    # With everything but shapes on the GPU, all is well.
    moved = [(CPU if operator in SHAPE_OPERATORS else CUDA, operator) for _, operator in placed]
    check_placement(graph, [CUDA], moved)
    check_placement(graph, [TENSORRT, CUDA], moved)
    with pytest.raises(BundleError, match=rf"{TENSORRT} does not take .*Softmax on {CPU}"):
        check_placement(graph, [TENSORRT, CUDA], [*moved, (CPU, "Softmax")])


# -- what it asks for -------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The providers and the options that a session would be opened with, on a machine that has them all."""
    seen: dict[str, Any] = {}

    def open_session(graph: Path, options: onnxruntime.SessionOptions, providers: dict[str, Any]) -> SimpleNamespace:
        seen.update(providers)
        assert options.get_session_config_entry("session.record_ep_graph_assignment_info") == "1"
        names = [*providers, CPU]
        return SimpleNamespace(
            get_providers=lambda: names,
            get_provider_graph_assignment_info=list,
            get_outputs=lambda: [SimpleNamespace(name=name) for name in OUTPUTS],
            get_inputs=list,
        )

    monkeypatch.setattr(onnxruntime_gpu, "open_session", open_session)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [TENSORRT, CUDA, CPU])
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: sys.stdout.write("not found"))
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
    return seen


def test_cuda_computes_float32_in_float32(
    graph: Path, asked: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    OnnxRuntimeGpuEngine(graph, provider_options={"device_id": "1"})
    assert asked == {CUDA: {"use_tf32": "0", "device_id": "1"}}
    assert set(CUDA_OPTIONS) <= SOME_CUDA_OPTIONS
    assert capsys.readouterr().out == ""
    asked.clear()
    OnnxRuntimeGpuEngine(graph, provider_options={"use_tf32": "1"})
    assert asked == {CUDA: {"use_tf32": "1"}}


def test_tensorrt_leaves_the_rest_to_cuda_with_its_engines_in_the_cache(
    graph: Path, asked: dict[str, Any], own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "")
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE")
    OnnxRuntimeGpuEngine(graph, provider=TENSORRT, profile=PROFILE, provider_options={"device_id": "1"})
    assert list(asked) == [TENSORRT, CUDA]
    assert asked[CUDA] == CUDA_OPTIONS
    options = asked[TENSORRT]
    assert set(options) <= TENSORRT_OPTIONS
    # Nothing that would let TensorRT choose other types than the graph's.
    assert not {"trt_fp16_enable", "trt_bf16_enable", "trt_int8_enable"} & set(options)
    assert options["device_id"] == "1"
    assert options["trt_engine_cache_enable"] == options["trt_timing_cache_enable"] == "1"
    engines, timing = Path(options["trt_engine_cache_path"]), Path(options["trt_timing_cache_path"])
    assert engines.is_dir()
    assert timing.is_dir()
    assert engines.is_relative_to(own_cache)
    assert timing.is_relative_to(own_cache)
    assert not timing.is_relative_to(engines)
    assert os.environ["NVIDIA_TF32_OVERRIDE"] == "0"


def test_shapes_of_a_profile_by_hand() -> None:
    smallest = "input_ids:1x8,position_ids:1x8,segment_ids:1x8,target_index:1,target_ids:1"
    assert profile_shapes(PROFILE, 0, 0) == smallest
    largest = "input_ids:16x2048,position_ids:16x2048,segment_ids:16x2048,target_index:4096,target_ids:4096"
    assert profile_shapes(PROFILE, 2, 0) == largest
    assert profile_shapes(PROFILE, 1, 3).endswith(",target_index:512,target_ids:512,adapter_gates:4x3")


def test_shapes_are_those_of_the_profile(graph: Path) -> None:
    options = tensorrt_options(graph, PROFILE, 0)
    assert set(options) <= TENSORRT_OPTIONS
    assert [options[f"trt_profile_{name}_shapes"].partition(",")[0] for name in ("min", "opt", "max")] == [
        "input_ids:1x8",
        "input_ids:4x256",
        "input_ids:16x2048",
    ]
    # Every input of the graph has a shape: the provider refuses a profile that lacks one.
    session = onnxruntime.InferenceSession(graph, providers=[CPU])
    named = {each.partition(":")[0] for each in options["trt_profile_min_shapes"].split(",")}
    assert named == {value.name for value in session.get_inputs()}
    assert not any("profile" in name for name in tensorrt_options(graph, None, 0))


def test_other_weights_have_other_engines(own: Path, tmp_path: Path) -> None:
    """TensorRT's engine holds the weights: taken for another checkpoint's, it would score the wrong model."""
    before = content_key(own)
    moved = tmp_path / "moved"
    shutil.copytree(own.parent / "policy", moved / "policy")
    assert content_key(Path(shutil.copy(own, moved / "reference.onnx"))) == before, "the same, wherever it lies"
    weights = load_file(own.parent / "policy" / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, own.parent / "policy" / "model.safetensors", {"format": "pt"})
    assert content_key(own) != before
    folders = [tensorrt_options(path, None, 0) for path in (own, moved / "reference.onnx")]
    assert folders[0]["trt_engine_cache_path"] != folders[1]["trt_engine_cache_path"]
    assert folders[0]["trt_timing_cache_path"] == folders[1]["trt_timing_cache_path"]


def test_weights_that_are_not_there(own: Path) -> None:
    (own.parent / "policy" / "model.safetensors").unlink()
    with pytest.raises(BundleError, match=r"policy\.onnx: cannot be read .*model\.safetensors"):
        content_key(own)


def test_a_cache_that_cannot_be_written(graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DPO_FAST_CACHE", str(tmp_path / "file"))
    with pytest.raises(StorageError, match="DPO_FAST_CACHE"):
        tensorrt_options(graph, None, 0)
