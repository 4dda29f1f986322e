"""Hidden states of graphs against PyTorch's: equal where the graph is exact, and a fault is found where it is."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from dpo_fast.bundle import POLICY, REFERENCE, open_bundle
from dpo_fast.engines.openvino import open_core
from dpo_fast.errors import EngineOutputError, UsageError
from dpo_fast.export.exporter import ExportOptions, export
from dpo_fast.recipes import Recipe
from dpo_fast.verification.hidden_states import (
    EMBEDDING,
    LayerDrift,
    _torch_states,
    compare_hidden_states,
    find_culprits,
    find_layer_states,
)

from .layered_bundle import FP8, INT4, INT8, PAIRS, make_bundle, save_adapter, spoil_scales, with_recipe

pytestmark = pytest.mark.usefixtures("one_thread")
# Two float32 orders of summation, some 20 sums of up to 64 terms behind each other: 1e-7 each.
EXACT = 5e-6
FEW = PAIRS[:3]
BF16 = Recipe("bf16", "", "tensorrt", "bf16", 128, 256, "fp32", head_chunk=256)
FP16 = Recipe("fp16", "", "tensorrt", "fp16", 128, 256, "fp32", head_chunk=256)
CUDA = Recipe("cuda", "", "onnxruntime-cuda", "bf16", 128, 256, "fp32")
OPENVINO_INT8 = Recipe("ov8", "", "openvino", "int8", 128, 256, "fp32")


def files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen2", "gemma2", "mixtral", "phi3", "opt"])
def test_states_of_exact_graphs_are_pytorchs(tmp_path: Path, model_type: str) -> None:
    bundle = make_bundle(tmp_path, model_type=model_type, layers=2)
    before = files(tmp_path)
    drifts = compare_hidden_states(bundle, POLICY, FEW)
    assert [drift.layer for drift in drifts] == [EMBEDDING, 0, 1]
    assert {(drift.graph, drift.precision) for drift in drifts} == {("policy.onnx", "fp32")}
    assert all(drift.error < EXACT for drift in drifts)
    assert drifts[0].error < 1e-7, "an embedding is looked up"
    assert drifts[-1].error > 0, "another library's sums"
    assert find_culprits(drifts) == []
    assert files(tmp_path) == before, "what was exposed is removed"


def test_the_states_are_those_that_transformers_names(tmp_path: Path) -> None:
    """The embedding's and each layer's but the last, which Transformers gives only behind the last normalisation."""
    bundle = make_bundle(tmp_path, layers=3)
    ids = np.arange(3, 20)[None]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / POLICY)
    with torch.inference_mode():
        expected = model(torch.from_numpy(ids), output_hidden_states=True).hidden_states
    with _torch_states(bundle, POLICY, trust_remote_code=False) as run:
        found = run(type("Batch", (), {"input_ids": ids})())
    assert len(found) == len(expected) == 4
    for ours, theirs in zip(found[:-1], expected[:-1], strict=True):
        np.testing.assert_array_equal(ours, theirs[0].numpy())
    with torch.inference_mode():
        normalised = model.model.norm(torch.from_numpy(found[-1]))
    np.testing.assert_array_equal(normalised.numpy(), expected[-1][0].numpy())


@pytest.mark.parametrize(
    ("tensor", "layer"),
    [
        ("model.layers.1.mlp.down_proj.weight", 1),
        ("model.layers.1.self_attn.v_proj.weight", 1),
        ("model.layers.2.self_attn.q_proj.weight", 2),
        ("model.layers.3.input_layernorm.weight", 3),
        ("model.layers.0.mlp.gate_proj.weight", 0),
        ("model.embed_tokens.weight", EMBEDDING),
        ("lm_head.weight", None),
        ("model.norm.weight", None),
    ],
)
def test_one_tensor_off_by_one_percent_is_found(tmp_path: Path, tensor: str, layer: int | None) -> None:
    bundle = make_bundle(tmp_path, fault=lambda model: model.get_parameter(tensor).mul_(1.01))
    drifts = compare_hidden_states(bundle, POLICY, FEW)
    culprits = find_culprits(drifts)
    assert [culprit.layer for culprit in culprits[:1]] == ([] if layer is None else [layer])
    sound = [drift.error for drift in drifts if layer is None or drift.layer < layer]
    assert all(error < EXACT for error in sound), "what lies before the fault is as it was"


def test_two_swapped_layers_are_found(tmp_path: Path) -> None:
    def swap(model: PreTrainedModel) -> None:
        layers = model.model.layers
        layers[1], layers[2] = layers[2], layers[1]

    drifts = compare_hidden_states(make_bundle(tmp_path, fault=swap), POLICY, FEW)
    error = {drift.layer: drift.error for drift in drifts}
    assert max(error[EMBEDDING], error[0]) < EXACT
    assert error[1] > 0.1, "another layer's output"
    assert {culprit.layer for culprit in find_culprits(drifts)} <= {1, 2}
    assert find_culprits(drifts)[0].layer == 1


def test_the_layer_whose_int8_scales_are_spoilt_is_found(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path, INT8, change=lambda model: spoil_scales(model, 2))
    drifts = compare_hidden_states(bundle, POLICY, FEW)
    assert [drift.precision for drift in drifts] == ["fp32"] * 5 + ["int8"] * 5
    assert all(drift.error < EXACT for drift in drifts[:5])
    assert [(each.layer, each.graph) for each in find_culprits(drifts)] == [(2, "policy.int8.onnx")]


def test_each_precision_is_run_and_named(tmp_path: Path) -> None:
    """The fewer bits, the larger the error; all of them far from float32's, and none of another model's size."""
    errors = {}
    for recipe in (FP16, BF16, INT8, OPENVINO_INT8, FP8, INT4):
        drifts = compare_hidden_states(make_bundle(tmp_path / recipe.name, recipe), POLICY, FEW)
        assert {drift.graph for drift in drifts[5:]} == {f"policy.{recipe.name}.onnx"}
        assert {drift.precision for drift in drifts[5:]} == {recipe.precision}
        assert max(drift.error for drift in drifts[:5]) < EXACT
        errors[recipe.name] = drifts[-1].error
    assert EXACT < errors["fp16"] < errors["bf16"] < errors["int4"] < 1
    assert errors["fp16"] < min(errors["int8"], errors["ov8"]) < errors["fp8"] < errors["int4"]


def test_openvino_rounds_the_exact_graph(tmp_path: Path) -> None:
    bundle = with_recipe(make_bundle(tmp_path), Recipe("openvino-bf16", "", "openvino", "bf16", 128, 256))
    if "BF16" not in open_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        with pytest.raises(UsageError, match="finds no bfloat16 arithmetic"):
            compare_hidden_states(bundle, POLICY, FEW)
        return
    drifts = compare_hidden_states(bundle, POLICY, FEW)
    assert [(drift.graph, drift.precision) for drift in drifts[4:6]] == [
        ("policy.onnx", "fp32"),
        ("policy.onnx", "bf16"),
    ]
    assert drifts[4].error < EXACT < drifts[9].error < 0.1


def test_a_graph_for_an_engine_that_is_not_here(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path, CUDA)
    with pytest.raises(UsageError, match=r"policy\.cuda\.onnx: is fused for CUDA") as caught:
        compare_hidden_states(bundle, POLICY, FEW)
    assert "\n" not in str(caught.value)


def test_a_graph_that_nothing_here_runs(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path, INT8)
    path = bundle.engine_graph(POLICY)
    path.write_bytes(path.read_bytes().replace(b"MatMulIntegerToFloat", b"MatMulOfSomeOtherMake"[:20]))
    before = files(tmp_path)
    with pytest.raises(
        UsageError, match=r"policy\.int8\.onnx: nothing on this machine runs this graph in int8"
    ) as caught:
        compare_hidden_states(bundle, POLICY, FEW)
    assert "\n" not in str(caught.value)
    assert files(tmp_path) == before


def test_no_pairs(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there are none; name a data set"):
        compare_hidden_states(make_bundle(tmp_path), POLICY, [])


def test_a_state_that_is_not_finite(tmp_path: Path) -> None:
    def overflow(model: PreTrainedModel) -> None:
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.inf

    bundle = make_bundle(tmp_path, fault=overflow)
    with pytest.raises(EngineOutputError, match=r"faulty\.onnx: the state of layer 1, or PyTorch's, is not finite"):
        compare_hidden_states(bundle, POLICY, FEW)


def test_another_number_of_layers(tmp_path: Path) -> None:
    make_bundle(tmp_path / "three", layers=3)
    bundle = make_bundle(tmp_path / "four", layers=4)
    (tmp_path / "four" / POLICY).rename(tmp_path / "four" / "moved")
    (tmp_path / "three" / POLICY).rename(tmp_path / "four" / POLICY)
    with pytest.raises(UsageError, match="has 4 layers, and the PyTorch model 3"):
        compare_hidden_states(bundle, POLICY, FEW)


@pytest.mark.slow
def test_roles_that_share_a_graph_by_their_gates(tmp_path: Path) -> None:
    """An adapter and its base: one graph, with the adapter on for the policy and off for the reference."""
    make_bundle(tmp_path / "made")
    base = tmp_path / "made" / POLICY
    save_adapter(base, tmp_path / "adapter")
    out = export(
        str(tmp_path / "adapter"), "base", tmp_path / "bundle", ExportOptions(self_check=False, base=str(base))
    )
    bundle = open_bundle(out)
    assert bundle.graph(POLICY) == bundle.graph(REFERENCE)
    for role in (POLICY, REFERENCE):
        drifts = compare_hidden_states(bundle, role, FEW)
        assert len(drifts) == 5
        assert all(drift.error < EXACT for drift in drifts), role
    # With the gates of the other role, the adapter is missing, from the first layer on.
    entries = bundle.manifest.models
    wrong = replace(entries[POLICY], adapter_gates=entries[REFERENCE].adapter_gates)
    swapped = replace(bundle, manifest=replace(bundle.manifest, models={**entries, POLICY: wrong}))
    assert compare_hidden_states(swapped, POLICY, FEW)[1].error > 1e-3


# -- where a layer ends -----------------------------------------------------------------------------------------------


def weight(name: str) -> ir.Value:
    tensor = ir.ExternalTensor("w", 0, 64, ir.DataType.FLOAT, shape=ir.Shape([4, 4]), name=name)
    return ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(ir.DataType.FLOAT), const_value=tensor)


def by_hand(steps: list[tuple[str, str, list[str]]], weights: list[str], output: str) -> ir.Graph:
    """A graph of steps: what is made, the operator, what it is made of."""
    ids = ir.Value(name="input_ids", type=ir.TensorType(ir.DataType.INT64))
    values = {"input_ids": ids} | {name: weight(name) for name in weights}
    nodes = []
    for made, operator, sources in steps:
        node = ir.node(operator, [values[source] for source in sources])
        values[made] = node.outputs[0]
        values[made].name = made
        nodes.append(node)
    return ir.Graph([ids], [values[output]], nodes=nodes, initializers=[values[name] for name in weights])


RESIDUAL = [
    ("embedded", "Gather", ["embed", "input_ids"]),
    ("a", "MatMul", ["embedded", "h.0.w"]),
    ("state 0", "Add", ["a", "embedded"]),
    ("root", "Sqrt", ["state 0"]),
    ("normal", "Div", ["state 0", "root"]),
    ("b", "MatMul", ["normal", "h.1.w"]),
    ("state 1", "Add", ["b", "state 0"]),
    ("size", "Shape", ["state 0"]),  # a shape says nothing of the tokens
    ("shaped", "Reshape", ["state 1", "size"]),
    ("logits", "MatMul", ["shaped", "embed"]),
]


def test_states_by_hand() -> None:
    graph = by_hand(RESIDUAL, ["embed", "h.0.w", "h.1.w"], "logits")
    assert find_layer_states(graph, Path("a.onnx")) == ["embedded", "state 0", "state 1"]


def test_what_scales_an_embedding_belongs_to_it_and_a_last_bias_to_its_layer() -> None:
    steps = [
        ("looked up", "Gather", ["embed", "input_ids"]),
        ("embedded", "Mul", ["looked up", "scale"]),
        ("a", "MatMul", ["embedded", "h.0.w"]),
        ("state 0", "Add", ["a", "h.0.b"]),
        ("normal", "Mul", ["state 0", "norm"]),
    ]
    graph = by_hand(steps, ["embed", "scale", "h.0.w", "h.0.b", "norm"], "normal")
    assert find_layer_states(graph, Path("a.onnx")) == ["embedded", "state 0"]


CHANGES: list[tuple[str, Callable[[list], list], list[str], str]] = [
    ("two values between layers", lambda steps: [*steps[:6], ("state 1", "Add", ["b", "a"]), *steps[7:]],
     ["embed", "h.0.w", "h.1.w"], "layer 0 does not end in one value"),
    ("tokens that reach a later layer", lambda steps: [*steps[:6], ("state 1", "Add", ["b", "input_ids"]), *steps[7:]],
     ["embed", "h.0.w", "h.1.w"], "the embedding does not end in one value"),
    ("a layer's weight in the next", lambda steps: [*steps[:6], ("state 1", "Add", ["b", "h.0.w"]), *steps[7:]],
     ["embed", "h.0.w", "h.1.w"], "layer 0 does not end in one value"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "weights", "message"), [case[1:] for case in CHANGES], ids=[c[0] for c in CHANGES])
def test_graphs_without_such_places(change: Callable[[list], list], weights: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=f"a.onnx: {re.escape(message)}"):
        find_layer_states(by_hand(change(RESIDUAL), weights, "logits"), Path("a.onnx"))


def test_a_graph_without_numbered_layers() -> None:
    steps = [("x", "Gather", ["embed", "input_ids"]), ("y", "MatMul", ["x", "w"])]
    with pytest.raises(UsageError, match="tell of the layers none"):
        find_layer_states(by_hand(steps, ["embed", "w"], "y"), Path("a.onnx"))


def test_culprits_by_hand() -> None:
    def drifts(graph: str, errors: list[float]) -> list[LayerDrift]:
        before = [0.0, *errors[:-1]]
        return [LayerDrift(graph, "int8", n - 1, e, e - b) for n, (e, b) in enumerate(zip(errors, before, strict=True))]

    of_one = drifts("one", [0.0, 0.01, 0.05, 0.04, 0.065])  # adds 0.01, 0.04, -0.01, 0.025: half of 0.04 and more
    of_other = drifts("other", [0.0, 5e-5, 9e-5])
    assert [(each.graph, each.layer) for each in find_culprits(of_one + of_other)] == [("one", 1), ("one", 3)]
    assert find_culprits([]) == []
