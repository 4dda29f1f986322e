"""Body and head: together they are the whole graph, number for number, whatever the head takes at a time."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import make_config, make_model, save_model

from dpo_fast.errors import BuildError, BundleError
from dpo_fast.export.external import readable
from dpo_fast.export.head import OUTPUTS
from dpo_fast.export.precision import make_engine_graph
from dpo_fast.recipes import Recipe
from dpo_fast.tensorrt.graphs import BODY, HEAD, make_graphs, write_graph
from dpo_fast.tensorrt.plans import STATES

from .binding import bind_folder, session
from .by_hand import Arrays, lay_out, tokens

Trace = Callable[..., ir.Model]
ROWS = [tokens(60, 12, 9, 11), tokens(80, 7, 1), tokens(90, 21, 5, 16)]
TILE = 128  # four tiles of a vocabulary of 500, the last one smaller
FP16 = Recipe("fp16", "", "tensorrt", "fp16", TILE, 256, "fp32", head_chunk=256)
FP16_HEAD = Recipe("fp16-head", "", "tensorrt", "fp16", TILE, 256, "fp16", head_chunk=256)
BF16 = Recipe("bf16", "", "tensorrt", "bf16", TILE, 256, "fp32", head_chunk=256)


def make_exact(folder: Path, traced: Trace, dtype: torch.dtype = torch.float32, **keys: Any) -> Path:
    config = make_config("llama", **keys)
    save_model(make_model(config).to(dtype), folder / "policy")
    return bind_folder(folder / "policy", traced(config, vocabulary_tile=TILE, dense_experts=True))


def write_both(graph: Path, folder: Path) -> dict[str, Path]:
    folder.mkdir(exist_ok=True)
    return {part: write_graph(model, folder, part) for part, model in make_graphs(graph).items()}


def run_both(parts: dict[str, Path], inputs: Arrays, chunk: int) -> Arrays:
    """The body, then the head over chunks of its states."""
    body, head = (session(parts[part]) for part in (BODY, HEAD))
    (states,) = body.run([STATES], {value.name: inputs[value.name] for value in body.get_inputs()})
    found = []
    for start in range(0, len(states), chunk):
        stop = start + chunk
        found.append(
            head.run(list(OUTPUTS), {STATES: states[start:stop], "target_ids": inputs["target_ids"][start:stop]})
        )
    return {name: np.concatenate(values) for name, values in zip(OUTPUTS, zip(*found, strict=True), strict=True)}


@pytest.mark.parametrize("recipe", [None, FP16, FP16_HEAD], ids=["fp32", "fp16", "fp16-head"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_both_parts_are_the_whole(tmp_path: Path, traced: Trace, recipe: Recipe | None, dtype: torch.dtype) -> None:
    graph = make_exact(tmp_path, traced, dtype, tie_word_embeddings=True)
    if recipe is not None:
        graph = tmp_path / make_engine_graph(tmp_path, "policy", recipe, None)
    inputs = lay_out(ROWS)
    whole = dict(zip(OUTPUTS, session(graph).run(list(OUTPUTS), inputs), strict=True))
    parts = write_both(graph, tmp_path / "parts")
    for chunk in (1000, 7, 1):
        found = run_both(parts, inputs, chunk)
        for name in OUTPUTS:
            # The same numbers in products of other heights: float32's rounding; float16's, where the head is float16.
            tolerance = 2e-2 if recipe is FP16_HEAD else 1e-5
            np.testing.assert_allclose(found[name], whole[name], rtol=0, atol=tolerance, err_msg=name)


def test_weights_lie_beside_the_graph_in_the_type_of_their_product(tmp_path: Path, traced: Trace) -> None:
    """Nothing is left to be cast but states, and the embedding stays as it is stored."""
    make_exact(tmp_path, traced, torch.bfloat16)
    graph = tmp_path / make_engine_graph(tmp_path, "policy", BF16, None)
    parts = write_both(graph, tmp_path / "parts")
    stored = load_file(tmp_path / "policy" / "model.safetensors")
    body = {str(name): value.const_value for name, value in ir.load(parts[BODY]).graph.initializers.items()}
    named = {
        name: tensor for name, tensor in body.items() if name.removesuffix(".float") in stored and tensor is not None
    }
    assert len(named) == 2 * 9 + 2  # of two layers, the embedding and the last norm
    assert {tensor.dtype for name, tensor in named.items() if "proj" in name} == {ir.DataType.BFLOAT16}
    assert named["model.embed_tokens.weight"].dtype == ir.DataType.BFLOAT16
    assert {tensor.dtype for name, tensor in named.items() if "norm" in name} == {ir.DataType.FLOAT}
    for name, tensor in named.items():
        original = stored[name.removesuffix(".float")].float().numpy()
        np.testing.assert_array_equal(np.asarray(tensor.numpy(), np.float32), original)
    for part in parts.values():
        model = ir.load(part)
        assert {str(value.const_value.location) for value in model.graph.initializers.values()
                if isinstance(value.const_value, ir.ExternalTensor)} == {f"{part.stem}.weights"}  # fmt: skip
        casts = [node for node in model.graph if node.op_type == "Cast"]
        assert not [node for node in casts if node.inputs[0] is not None and node.inputs[0].const_value is not None]


def test_the_mean_logit_needs_no_matrix(tmp_path: Path, traced: Trace) -> None:
    """h · mean(W): the mean is computed once, not in each run."""
    graph = make_exact(tmp_path, traced, torch.bfloat16)
    model = make_graphs(graph)[HEAD]
    assert not [node for node in model.graph if node.op_type == "ReduceMean"]
    write_graph(model, tmp_path, "head")
    mean = ir.load(tmp_path / "head.onnx").graph.initializers["lm_head.weight.mean"].const_value
    weight = load_file(tmp_path / "policy" / "model.safetensors")["lm_head.weight"].double().numpy()
    assert mean is not None
    np.testing.assert_allclose(mean.numpy().reshape(-1), weight.mean(0), rtol=0, atol=1e-7)  # float32's sum of 500


def test_the_first_of_equal_logits_is_found(tmp_path: Path, traced: Trace) -> None:
    """Two tokens of one embedding, in one tile and in two: is_top1 is for the first of them alone."""
    config = make_config("llama")
    model = make_model(config)
    with torch.no_grad():
        weight = model.lm_head.weight
        for first, second in ((3, 9), (5, 300)):
            weight[second] = weight[first]
    save_model(model, tmp_path / "policy")
    graph = bind_folder(tmp_path / "policy", traced(config, vocabulary_tile=TILE, dense_experts=True))
    head = write_both(graph, tmp_path / "parts")[HEAD]
    vectors = weight.detach().numpy()[[3, 5]] * 100  # states that like these tokens best
    ids = np.array([3, 9, 5, 300])
    inputs = {STATES: vectors[[0, 0, 1, 1]].astype(np.float32), "target_ids": ids}
    (found,) = session(head).run(["is_top1"], inputs)
    assert found.tolist() == [1, 0, 1, 0]


def test_a_body_takes_only_what_it_reads(tmp_path: Path, traced: Trace) -> None:
    config = make_config("mamba")
    save_model(make_model(config), tmp_path / "policy")
    graph = bind_folder(tmp_path / "policy", traced(config, vocabulary_tile=TILE, dense_experts=True))
    parts = make_graphs(graph)
    assert [value.name for value in parts[BODY].graph.inputs] == ["input_ids", "target_index"]
    assert sorted(str(value.name) for value in parts[HEAD].graph.inputs) == [STATES, "target_ids"]


def test_a_graph_without_targets_cannot_be_cut(tmp_path: Path) -> None:
    value = ir.val("x", ir.DataType.FLOAT, [1])
    node = ir.node("Exp", [value])
    node.outputs[0].name = "y"
    model = ir.Model(ir.Graph([value], node.outputs, nodes=[node], opset_imports={"": 20}, name="g"), ir_version=10)
    ir.save(model, tmp_path / "policy.onnx")
    with pytest.raises(BuildError, match=r"cannot be cut where the head begins \(0 values of the targets' states"):
        make_graphs(tmp_path / "policy.onnx")


def test_hard_linked_weights_are_read(tmp_path: Path, traced: Trace) -> None:
    """As a bundle has them that was exported with --link, or from a Hub snapshot; what lies outside is not."""
    graph = make_exact(tmp_path, traced)
    weights = tmp_path / "policy" / "model.safetensors"
    (tmp_path / "elsewhere").hardlink_to(weights)
    name = make_engine_graph(tmp_path, "policy", FP16, None)
    parts = write_both(tmp_path / name, tmp_path / "parts")
    onnxruntime.InferenceSession(parts[BODY], providers=["CPUExecutionProvider"])
    tensor = next(
        value.const_value
        for value in ir.load(graph).graph.initializers.values()
        if isinstance(value.const_value, ir.ExternalTensor)
    )
    shutil.move(weights, tmp_path.parent / "outside.safetensors")
    weights.symlink_to(tmp_path.parent / "outside.safetensors")
    with pytest.raises(BundleError, match="outside the bundle; do not trust"):
        readable(tensor)
