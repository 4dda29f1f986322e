"""OpenVINO: the same graph, the same scores; in bfloat16 with a head that is float32; and what it refuses."""

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import openvino
import pytest
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file, save_file

import dpo_fast.engines.openvino
from dpo_fast.batches import Batch, Layout, arrange, make_batches
from dpo_fast.engines.onnxruntime import OnnxRuntimeEngine
from dpo_fast.engines.openvino import OpenVinoEngine, find_largest_by_comparing, open_core, split_head
from dpo_fast.errors import BundleError, EngineOutputError, MissingDependencyError, UsageError
from dpo_fast.export.probes import make_probes
from dpo_fast.token_table import make_table
from dpo_fast.types import TokenizedPair, TokenScores

PAIRS = make_probes(500, positions=256)
OUTPUTS = ("log_prob", "entropy", "mean_logit", "is_top1", "log_sum_sq_prob")


def batches(pairs: list[TokenizedPair], layout: Layout, token_budget: int) -> list[Batch]:
    return list(make_batches(arrange(make_table(pairs), layout, token_budget), token_budget))


def errors(found: TokenScores, expected: TokenScores) -> dict[str, float]:
    """The mean absolute error of each output."""
    return {name: float(np.abs(getattr(found, name) - getattr(expected, name)).mean()) for name in OUTPUTS}


@pytest.fixture(scope="module")
def graph(tiny_bundle: Path) -> Path:
    return tiny_bundle / "policy.onnx"


def test_float32_scores_are_onnx_runtimes(graph: Path) -> None:
    engine, exact = OpenVinoEngine(graph, precision="fp32", threads=1), OnnxRuntimeEngine(graph, threads=1)
    for layout in ("shared", "plain"):
        for batch in batches(PAIRS, layout, 200):
            # Two orders of summation in float32: as far apart as ONNX Runtime and PyTorch may be.
            assert max(errors(engine.score(batch), exact.score(batch)).values()) < 1e-4


def test_bfloat16_scores_are_near(graph: Path) -> None:
    engine, exact = OpenVinoEngine(graph, threads=1), OnnxRuntimeEngine(graph, threads=1)
    batch = batches(PAIRS, "shared", 400)[0]
    found = errors(engine.score(batch), exact.score(batch))
    # 2^-9 of states of several units, through layers of 32 to 64 terms; float32 would be a thousand times nearer.
    assert 1e-4 < found["log_prob"] < 0.1
    assert found["entropy"] < 0.1
    assert (engine.precision, "states in bfloat16, head in float32" in engine.name) == ("bf16", True)


def test_logits_are_not_rounded_to_bfloat16(tiny_bundle: Path, tmp_path: Path) -> None:
    """With large logits, what OpenVINO does to a whole graph is far worse than what the states' rounding does."""
    for name in ("policy.onnx", "policy"):
        source = tiny_bundle / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    weights = load_file(tmp_path / "policy" / "model.safetensors")
    # States of one direction each: exact in bfloat16 whatever the layers do, so that the head alone is off.
    for name in weights:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weights[name][:] = 0
    weights["model.embed_tokens.weight"][:] = np.where(weights["model.embed_tokens.weight"] > 0, 1, -1)
    weights["model.norm.weight"][:] = 8
    save_file(weights, tmp_path / "policy" / "model.safetensors", {"format": "pt"})
    graph = tmp_path / "policy.onnx"
    batch = batches(PAIRS, "shared", 400)[0]
    exact = OnnxRuntimeEngine(graph, threads=1).score(batch).log_prob
    assert np.abs(exact).max() > 20
    found = OpenVinoEngine(graph, threads=1).score(batch).log_prob
    core = open_core()
    whole = core.compile_model(core.read_model(graph), "CPU", {"INFERENCE_PRECISION_HINT": "bf16"})
    rounded = whole(batch.inputs)["log_prob"]
    assert np.abs(found - exact).max() < 1e-2
    assert np.abs(rounded - exact).max() > 3e-2


def test_the_head_is_what_the_targets_reach(graph: Path) -> None:
    body, head = split_head(open_core().read_model(graph))
    assert {node.get_friendly_name() for node in body.get_parameters()} == {"input_ids", "position_ids", "segment_ids"}
    names = [node.get_friendly_name() for node in head.get_parameters()]
    assert len(body.outputs) == 1
    assert sorted(names[1:]) == ["target_ids", "target_index"]
    kinds = [node.get_type_name() for node in head.get_ops()]
    assert kinds.count("MatMul") == 4 + 1  # four tiles, and the mean logit
    assert sum(node.get_type_name() == "Softmax" for node in body.get_ops()) == 2  # attention's, in both layers


def test_weights_are_read_where_they_lie(graph: Path, tmp_path: Path) -> None:
    shutil.copy(graph, tmp_path / "policy.onnx")
    with pytest.raises(BundleError) as caught:
        OpenVinoEngine(tmp_path / "policy.onnx")
    assert str(caught.value).startswith(f"{tmp_path / 'policy.onnx'}: OpenVINO cannot load it (")
    assert "\n" not in str(caught.value)


def test_the_first_of_equal_logits_is_the_largest(tmp_path: Path) -> None:
    values = np.array([[1, 3, 3, 2], [5, 5, 5, 5], [0, -1, -2, 7], [np.nan, 1, 1, 0]], np.float32)
    node = helper.make_node("ArgMax", ["x"], ["y"], axis=-1, keepdims=0)
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4])
    result = helper.make_tensor_value_info("y", TensorProto.INT64, ["N"])
    model = helper.make_model(
        helper.make_graph([node], "one", [value], [result]), opset_imports=[helper.make_opsetid("", 20)], ir_version=10
    )
    onnx.save(model, tmp_path / "one.onnx")
    core = open_core()
    read = core.read_model(tmp_path / "one.onnx")
    find_largest_by_comparing(read)
    assert not [node for node in read.get_ops() if node.get_type_name() == "TopK"]
    compiled = core.compile_model(read, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    assert compiled(values[:3])[0].tolist() == [1, 0, 3]


# -- adapters, and graphs that are none -------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path) -> Callable[..., Path]:
    """Writes a graph that puts out each target's id plus the gates of its row, as a number: no model is needed."""

    def write(outputs: tuple[str, ...] = OUTPUTS, adapters: int | None = 2) -> Path:
        nodes = [
            helper.make_node("Cast", ["target_ids"], ["targets"], to=TensorProto.FLOAT),
            helper.make_node("Cast", ["position_ids"], ["positions"], to=TensorProto.FLOAT),
            helper.make_node("ReduceSum", ["positions"], ["total"], keepdims=0),
            helper.make_node("Mul", ["total", "nothing"], ["zero"]),
            helper.make_node("Add", ["targets", "zero"], ["moved"]),
        ]
        inputs = {name: ["B", "T"] for name in ("input_ids", "position_ids", "segment_ids")}
        inputs |= {name: ["N"] for name in ("target_index", "target_ids")}
        values = [helper.make_tensor_value_info(name, TensorProto.INT64, shape) for name, shape in inputs.items()]
        source = "moved"
        if adapters is not None:
            values.append(helper.make_tensor_value_info("adapter_gates", TensorProto.FLOAT, ["B", adapters]))
            # Gates as digits: 1 0 is 1, 0 1 is 10; of the row that target_index lies in.
            nodes += [
                helper.make_node("MatMul", ["adapter_gates", "digits"], ["number"]),
                helper.make_node("Shape", ["input_ids"], ["width"], start=1),
                helper.make_node("Div", ["target_index", "width"], ["row"]),
                helper.make_node("Gather", ["number", "row"], ["of_target"]),
                helper.make_node("Add", ["moved", "of_target"], ["with_gates"]),
            ]
            source = "with_gates"
        nodes += [helper.make_node("Identity", [source], [name]) for name in outputs]
        constants = {"nothing": np.float32(0), "digits": np.array([1, 10], np.float32)}
        graph = helper.make_graph(
            nodes,
            "small",
            values,
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N"]) for name in outputs],
            [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
        )
        path = tmp_path / "small.onnx"
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
        return path

    return write


def test_gates_reach_their_rows(small: Callable[..., Path]) -> None:
    path = small()
    batch = batches([TokenizedPair(1, [], [3, 4], [5, 6])], "plain", 100)[0]
    for make in (OpenVinoEngine, OnnxRuntimeEngine):
        engine = make(path, precision="fp32", gates=[1, 0], threads=1)
        one, other = engine.score(batch).log_prob, engine.with_gates([0, 1]).score(batch).log_prob
        assert (other - one).tolist() == [9.0] * len(one)
        assert engine.score(batch).log_prob.tolist() == one.tolist()


def test_a_graph_of_other_outputs(small: Callable[..., Path]) -> None:
    with pytest.raises(BundleError, match="puts out log_prob, entropy, not log_prob, entropy, mean_logit"):
        OpenVinoEngine(small(("log_prob", "entropy")), precision="fp32")


@pytest.mark.parametrize(("adapters", "gates"), [(None, [1, 0]), (2, None)])
def test_adapters_that_the_manifest_does_not_have(
    small: Callable[..., Path], adapters: int | None, gates: list[int] | None
) -> None:
    with pytest.raises(BundleError, match=r"has adapters, or has none, where bundle\.json says otherwise"):
        OpenVinoEngine(small(adapters=adapters), precision="fp32", gates=gates)


def test_files_that_are_no_graph(tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"no graph")
    for name in ("bad.onnx", "missing.onnx"):
        with pytest.raises(BundleError, match="OpenVINO cannot load it"):
            OpenVinoEngine(tmp_path / name)


def test_without_openvino(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'dpo-fast\[openvino\]'"):
        OpenVinoEngine(graph)


def test_a_processor_without_bfloat16(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenVINO would compute in float32 and say nothing."""

    class Core:
        """The one core, which claims less: a second one is never to be unloaded, see `open_core`."""

        def __getattr__(self, name: str) -> object:
            return getattr(open_core(), name)

        def get_property(self, *arguments: object) -> object:
            return ["FP32", "INT8"]

    monkeypatch.setattr(dpo_fast.engines.openvino, "open_core", Core)
    with pytest.raises(UsageError, match="is to run in bf16, and OpenVINO finds no bfloat16 arithmetic"):
        OpenVinoEngine(graph)
    assert "states in float32" in OpenVinoEngine(graph, precision="int8").name


def test_threads_share_one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the engines of policy and reference are the first things of OpenVINO's in a process."""
    made = []

    @cache
    def open_slowly() -> object:
        time.sleep(0.1)
        made.append(object())
        return made[-1]

    monkeypatch.setattr(dpo_fast.engines.openvino, "_open_once", open_slowly)
    with ThreadPoolExecutor(4) as threads:
        assert set(threads.map(lambda _: open_core(), range(4))) == set(made)
    assert len(made) == 1


def test_one_engine_at_a_time_compiles_or_scores(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside, most = 0, []

    def count(one: Callable[..., object]) -> Callable[..., object]:
        def counted(*arguments: object, **options: object) -> object:
            nonlocal inside
            inside += 1
            most.append(inside)
            try:
                time.sleep(0.02)
                return one(*arguments, **options)
            finally:
                inside -= 1

        return counted

    monkeypatch.setattr(openvino.Core, "compile_model", count(openvino.Core.compile_model))
    monkeypatch.setattr(openvino.InferRequest, "infer", count(openvino.InferRequest.infer))
    batch = batches(PAIRS[:2], "shared", 100)[0]
    with ThreadPoolExecutor(3) as threads:
        list(threads.map(lambda _: OpenVinoEngine(graph, threads=1).score(batch), range(3)))
    assert most == [1] * 3 * 4  # a body and a head of three engines are compiled, and computed


def test_a_failure_while_scoring_is_one_line(graph: Path) -> None:
    engine = OpenVinoEngine(graph, precision="fp32", threads=1)
    batch = batches(PAIRS[:1], "shared", 10)[0]
    batch = replace(batch, segment_ids=batch.segment_ids[None])  # of another rank than the graph's
    with pytest.raises(EngineOutputError, match=r"OpenVINO failed at a batch of \d+ x \d+ tokens") as caught:
        engine.score(batch)
    assert "\n" not in str(caught.value)


@pytest.mark.slow  # a process of its own
def test_ctrl_c_after_two_engines_is_no_crash(graph: Path) -> None:
    """Two cores that are loaded together, and unloaded in this order, leave a stack for signals that is freed."""
    code = """
import signal, sys
from pathlib import Path
from dpo_fast.engines.openvino import OpenVinoEngine
signal.signal(signal.SIGINT, signal.default_int_handler)
first = OpenVinoEngine(Path(sys.argv[1]), precision="fp32", threads=1)
second = OpenVinoEngine(Path(sys.argv[1]), precision="fp32", threads=1)
del first
del second
try:
    signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    print("interrupted")
"""
    done = subprocess.run([sys.executable, "-c", code, graph], capture_output=True, text=True, check=False)
    assert done.returncode != -signal.SIGSEGV
    assert done.stdout == "interrupted\n", done.stderr
