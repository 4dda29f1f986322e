"""Graphs in fewer bits: what they compute, what they leave exact, and what the files hold."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch
from tiny_models import copy_checkpoint, make_config, make_model, save_model
from transformers import AutoModelForCausalLM

from dpo_fast.batches import Batch, Layout, arrange, make_batches
from dpo_fast.engines.onnxruntime import OnnxRuntimeEngine
from dpo_fast.engines.openvino import OpenVinoEngine
from dpo_fast.errors import CheckpointError, EngineOutputError, UsageError
from dpo_fast.export.calibration import largest_magnitudes
from dpo_fast.export.precision import make_engine_graph
from dpo_fast.export.probes import make_probes
from dpo_fast.export.products import find_products, find_routers, reached_from
from dpo_fast.export.quantize import FLOAT8_LIMIT, quantize_float8, quantize_int4, quantize_int8
from dpo_fast.export.weights_file import WeightsFile
from dpo_fast.recipes import Recipe
from dpo_fast.scores import score_pairs
from dpo_fast.token_table import make_table
from dpo_fast.types import TokenScores

from .binding import bind_folder, session

Trace = Callable[..., ir.Model]

TILE = 128  # does not divide the vocabulary of 500
PAIRS = make_probes(500, positions=256)
INT8 = Recipe("int8", "", "onnxruntime", "int8", TILE, 256, "fp32", reduce_range=False)
INT8_HEAD = Recipe("int8-head", "", "onnxruntime", "int8", TILE, 256, "int8", reduce_range=False)
INT7 = Recipe("int7", "", "onnxruntime", "int8", TILE, 256, "fp32", reduce_range=True)
INT4 = Recipe("int4", "", "onnxruntime", "int4", TILE, 256, "fp32", block_size=16, symmetric=True)
INT4_ZERO = Recipe("int4-zero", "", "onnxruntime", "int4", TILE, 256, "int4", block_size=16, symmetric=False)
OPENVINO_INT8 = Recipe("ov8", "", "openvino", "int8", TILE, 256, "int8")
FP16 = Recipe("fp16", "", "tensorrt", "fp16", TILE, 256, "fp32")
FP16_HEAD = Recipe("fp16-head", "", "tensorrt", "fp16", TILE, 256, "fp16")
BF16 = Recipe("bf16", "", "tensorrt", "bf16", TILE, 256, "fp32")
FP8 = Recipe("fp8", "", "tensorrt", "fp8", TILE, 256, "fp32", calibrator="largest")
MADE = [INT8, INT8_HEAD, INT7, INT4, INT4_ZERO, OPENVINO_INT8, FP16, FP16_HEAD, BF16, FP8]
# Mean error of a token's log-prob, in nats. These models have products of 32 to 64 terms and logits of several units; a
# sum of n terms, each off by a relative e at random, is off by e of its size. e is 2^-12 (float16), 2^-9 (bfloat16),
# 0.4 % (int8: half a step of 127 levels at a third of the range), 2^-5 (float8), 7 % (int4): times ten for the layers'
# sum and the size of logits. A form that is wrong, or whose scale is, is off by nats.
LIMITS = {"int8": 0.15, "int8-head": 0.2, "int7": 0.3, "int4": 1.0, "int4-zero": 1.2, "ov8": 0.25, "fp16": 0.006,
          "fp16-head": 0.008, "bf16": 0.06, "fp8": 0.7}  # fmt: skip


def make_exact(
    folder: Path, traced: Trace, model_type: str = "llama", dtype: torch.dtype = torch.float32, **keys: Any
) -> Path:
    """A folder with a tiny policy and its exact graph, as a bundle has them."""
    config = make_config(model_type, **keys)
    save_model(make_model(config).to(dtype), folder / "policy")
    bind_folder(folder / "policy", traced(config, vocabulary_tile=TILE))
    return folder


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory, traced: Trace) -> Path:
    """A policy in float32, its embedding tied to its head, with every recipe's graph made from the exact one."""
    folder = make_exact(tmp_path_factory.mktemp("precision"), traced, tie_word_embeddings=True)
    for recipe in MADE:
        make_engine_graph(folder, "policy", recipe, PAIRS)
    return folder


@pytest.fixture
def own(tmp_path: Path, exact: Path) -> Path:
    """The checkpoint and its exact graph, to be changed."""
    copy_checkpoint(exact / "policy", tmp_path / "policy")
    (tmp_path / "policy.onnx").write_bytes((exact / "policy.onnx").read_bytes())
    return tmp_path


def batch_of(layout: Layout, token_budget: int) -> Batch:
    """The first batch of the probes."""
    return next(make_batches(arrange(make_table(PAIRS), layout, token_budget), token_budget))


def run(graph: Path, recipe: Recipe, batch: Batch) -> TokenScores:
    """What a graph says, on what can run it here.

    ONNX Runtime's CPU provider has no bfloat16 products, and its optimiser moves float8 past operators that do not take
    it; OpenVINO computes bfloat16 products as they are typed.
    """
    if recipe.engine == "openvino":
        return OpenVinoEngine(graph, precision=recipe.precision, threads=1).score(batch)
    if recipe.precision == "bf16":
        return OpenVinoEngine(graph, precision="fp32", threads=1).score(batch)
    if recipe.precision == "fp8":
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        plain = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        names = [output.name for output in plain.get_outputs()]
        return TokenScores(**dict(zip(names, plain.run(names, batch.inputs), strict=True)))
    return OnnxRuntimeEngine(graph, threads=1).score(batch)


def nodes(path: Path) -> list[ir.Node]:
    return list(ir.load(path).graph)


def external(path: Path) -> dict[str, ir.ExternalTensor]:
    values = ir.load(path).graph.initializers.items()
    return {name: value.const_value for name, value in values if isinstance(value.const_value, ir.ExternalTensor)}


# -- numbers ----------------------------------------------------------------------------------------------------------


def test_int8_by_hand() -> None:
    weight = np.array([[1.0, -4.0, 0.0], [0.5, 2.0, 0.0], [-0.25, 0.016, 0.0]], np.float32)
    integers, scale = quantize_int8(weight)
    # 0.5 x 127 = 63.5 and -0.25 x 127 = -31.75; 2 x 127 / 4 = 63.5; 0.016 x 127 / 4 = 0.508. Halves go to even.
    assert integers.tolist() == [[127, -127, 0], [64, 64, 0], [-32, 1, 0]]
    np.testing.assert_allclose(scale, [1 / 127, 4 / 127, 1], rtol=1e-7)


def test_int8_with_reduced_range_by_hand() -> None:
    integers, scale = quantize_int8(np.array([[1.0], [-0.3]], np.float32), 63)
    assert integers.tolist() == [[63], [-19]]  # 18.9
    np.testing.assert_allclose(scale, [1 / 63], rtol=1e-7)


def test_symmetric_int4_by_hand() -> None:
    # The largest magnitude, -8, becomes level 0: scale 1, zero point 8. 7.6 would be level 16, and is cut to 15.
    weight = np.array([[-8.0], [7.6], [0.4], [3.0]], np.float32)
    levels, scale, zero_point = quantize_int4(weight, 4, symmetric=True)
    assert zero_point is None
    assert scale.tolist() == [[1.0]]
    assert levels.tolist() == [[[0 | 15 << 4, 8 | 11 << 4]]]
    # The largest is positive: the scale is negative, and the order of the levels turns round.
    levels, scale, _ = quantize_int4(-weight, 4, symmetric=True)
    assert scale.tolist() == [[-1.0]]
    assert levels.tolist() == [[[0 | 15 << 4, 8 | 11 << 4]]]


def test_int4_with_zero_points_by_hand() -> None:
    # From -3 to 12: scale 1, zero point 3. The second block, of one entry and a filler, is from 0 to 5: scale 1/3.
    weight = np.array([[-3.0], [12.0], [0.0], [5.4], [5.0]], np.float32)
    levels, scale, zero_point = quantize_int4(weight, 4, symmetric=False)
    assert scale.ravel().tolist() == [1.0, pytest.approx(1 / 3)]
    assert zero_point is not None
    assert zero_point.tolist() == [[3 | 0 << 4]]
    assert levels[0].tolist() == [[0 | 15 << 4, 3 | 8 << 4], [15, 0]]


def test_float8_by_hand() -> None:
    # 448 is the largest; 3 mantissa bits: from 256 to 448 the steps are 32, so 300 is nearer to 288 than to 320.
    numbers, scale = quantize_float8(np.array([[448.0], [300.0], [-1.0]], np.float32))
    assert scale.tolist() == [1.0]
    assert numbers.astype(np.float32).ravel().tolist() == [448.0, 288.0, -1.0]
    _, scale = quantize_float8(np.array([[1e-6]], np.float32))
    assert scale.tolist() == [2.0**-14]  # float16's smallest number with all of its bits


WEIGHTS = arrays.arrays(
    np.float32, arrays.array_shapes(min_dims=2, max_dims=2, max_side=40), elements=st.floats(-1e3, 1e3, width=32)
)


@given(weight=WEIGHTS)
def test_int8_is_off_by_half_a_step(weight: np.ndarray) -> None:
    integers, scale = quantize_int8(weight)
    error = np.abs(weight - integers * scale)
    assert (error <= scale * 0.501 + 1e-36).all()  # the rounding of the division, and of scales below float32's range


@given(weight=WEIGHTS, symmetric=st.booleans(), block=st.sampled_from([16, 32]))
def test_int4_is_what_onnx_runtime_takes_it_for(weight: np.ndarray, symmetric: bool, block: int) -> None:
    """The product with the identity gives the matrix back, off by a step at most (where a level is cut)."""
    inner, columns = weight.shape
    levels, scale, zero_point = quantize_int4(weight, block, symmetric=symmetric)
    inputs = {"levels": levels, "scale": scale} | ({} if zero_point is None else {"zero_point": zero_point})
    helper, numpy_helper = onnx.helper, onnx.numpy_helper
    attributes = {"K": inner, "N": columns, "bits": 4, "block_size": block}
    node = helper.make_node("MatMulNBits", ["x", *inputs], ["y"], domain="com.microsoft", **attributes)
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [None, inner])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [None, columns])],
        [numpy_helper.from_array(value, name) for name, value in inputs.items()],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnxruntime.set_default_logger_severity(3)
    one = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = one.run(None, {"x": np.eye(inner, dtype=np.float32)})
    steps = np.repeat(np.abs(scale), block, axis=1)[:, :inner].T
    assert (np.abs(found - weight) <= steps * 1.01).all()


@given(weight=WEIGHTS)
def test_float8_keeps_three_bits(weight: np.ndarray) -> None:
    numbers, scale = quantize_float8(weight)
    found = numbers.astype(np.float32) * scale.astype(np.float32)
    # Half of the last of three bits; the smallest steps are 2^-9; float16 rounds the scale, so the largest may be cut.
    limit = np.maximum(np.abs(weight) * 2**-4, scale * 2.0**-10) * 1.01
    assert (np.abs(found - weight) <= limit).all()
    assert (np.abs(numbers.astype(np.float32)) <= FLOAT8_LIMIT).all()


def test_a_weights_file_is_safetensors(tmp_path: Path) -> None:
    tensors = {
        "b.int8": np.arange(-3, 4, dtype=np.int8).reshape(7, 1),
        "a.float8": np.array([1.5, -448], ml_dtypes.float8_e4m3fn),
        "a.scale": np.array([0.1, 0.2, 0.3], np.float32),
        "a.empty": np.zeros((0, 4), np.uint8),
        "c.half": np.array([7], np.float16),
    }
    kinds = {"int8": "I8", "float8": "F8_E4M3", "scale": "F32", "empty": "U8", "half": "F16"}
    layouts = {name: (kinds[name.split(".")[1]], value.shape) for name, value in tensors.items()}
    path = tmp_path / "engines" / "x" / "policy.safetensors"
    with WeightsFile(path, layouts) as file:
        for name in reversed(tensors):
            file.write(name, tensors[name])
        references = {name: file.reference(name, tmp_path) for name in tensors}
    found = load_torch(path)  # safetensors' own reader
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert found[name].shape == value.shape
        assert bytes(found[name].view(torch.uint8).numpy().tobytes()) == value.tobytes()
        reference = references[name]
        assert reference.location == "engines/x/policy.safetensors"
        stored = path.read_bytes()[reference.offset : reference.offset + reference.length]
        assert stored == value.tobytes()
        assert reference.offset % value.dtype.itemsize == 0


def test_a_weights_file_must_be_complete(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="never written: b"), WeightsFile(tmp_path / "w", {"b": ("I8", (1,))}):
        pass
    with (
        pytest.raises(AssertionError, match="b: float32"),
        WeightsFile(tmp_path / "w", {"b": ("I8", (1,))}) as file,
    ):
        file.write("b", np.zeros(1, np.float32))


# -- graphs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", MADE, ids=lambda recipe: recipe.name)
def test_scores_are_near_the_exact_graphs(exact: Path, recipe: Recipe) -> None:
    batch = batch_of("shared", 400)
    found = run(exact / f"policy.{recipe.name}.onnx", recipe, batch)
    expected = OnnxRuntimeEngine(exact / "policy.onnx", threads=1).score(batch)
    for name in ("log_prob", "entropy"):
        error = np.abs(getattr(found, name) - getattr(expected, name))
        assert 0 < error.mean() < LIMITS[recipe.name]
    # What a mistaken graph would do: scores of other tokens, or of none.
    assert np.corrcoef(found.log_prob, expected.log_prob)[0, 1] > 0.9


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "dtype"),
    [
        ("gpt2", torch.float32),  # products that are `Gemm`, with biases
        ("qwen2", torch.float16),  # biases, a sliding window, an untied head
        ("gemma2", torch.bfloat16),  # soft caps; weights that are widened as they are read
        ("qwen3_moe", torch.float32),  # experts and routers
    ],
)
def test_other_architectures(tmp_path: Path, traced: Trace, model_type: str, dtype: torch.dtype) -> None:
    folder = make_exact(tmp_path, traced, model_type, dtype)
    batch = batch_of("plain", 400)
    expected = OnnxRuntimeEngine(folder / "policy.onnx", threads=1).score(batch)
    for recipe in (INT8, INT4, FP16, BF16, FP8):
        graph = folder / make_engine_graph(folder, "policy", recipe, PAIRS)
        onnx.checker.check_model(str(graph), full_check=True)
        error = np.abs(run(graph, recipe, batch).log_prob - expected.log_prob)
        assert 0 < error.mean() < LIMITS[recipe.name], f"{recipe.name}: {error.mean()}"


@pytest.mark.parametrize("recipe", [INT8, INT8_HEAD, INT4], ids=lambda recipe: recipe.name)
def test_scores_do_not_depend_on_the_batch(exact: Path, recipe: Recipe) -> None:
    """A pair alone, and padded among others: float32's rounding apart, which a level's rounding may enlarge."""
    engine = OnnxRuntimeEngine(exact / f"policy.{recipe.name}.onnx", threads=1)
    together = score_pairs(make_table(PAIRS), engine, layout="shared", token_budget=10_000)
    ends = np.cumsum(together.chosen.lengths)
    for number, pair in enumerate(PAIRS):
        alone = score_pairs(make_table([pair]), engine, layout="shared", token_budget=1)
        length = int(together.chosen.lengths[number])
        among_others = together.chosen.log_probs[ends[number] - length : ends[number]]
        np.testing.assert_allclose(alone.chosen.log_probs, among_others, atol=2e-2)
        assert np.abs(alone.chosen.log_probs - among_others).mean() < 2e-3


def test_one_outlier_does_not_coarsen_the_other_rows(own: Path) -> None:
    """With one scale for a whole batch, a row a thousand times larger would leave the others no levels."""
    weights = load_file(own / "policy" / "model.safetensors")
    weights["model.embed_tokens.weight"][7] *= 1000
    ordinary = [pair for pair in PAIRS if 7 not in (*pair.prompt_ids, *pair.chosen_ids, *pair.rejected_ids)]
    assert ordinary
    save_file(weights, own / "policy" / "model.safetensors", {"format": "pt"})
    graph = own / make_engine_graph(own, "policy", INT8)
    engine = OnnxRuntimeEngine(graph, threads=1)
    outlier = type(PAIRS[0])(99, [7, 7], [7, 7, 7], [7])
    apart = score_pairs(make_table(ordinary), engine, layout="shared", token_budget=10_000)
    beside = score_pairs(make_table([*ordinary, outlier]), engine, layout="shared", token_budget=10_000)
    count = len(apart.chosen.log_probs)
    np.testing.assert_allclose(beside.chosen.log_probs[:count], apart.chosen.log_probs, atol=2e-2)


@pytest.mark.parametrize("recipe", MADE, ids=lambda recipe: recipe.name)
def test_the_same_bytes_each_time(own: Path, exact: Path, recipe: Recipe) -> None:
    name = make_engine_graph(own, "policy", recipe, PAIRS)
    assert name == f"policy.{recipe.name}.onnx"
    assert (own / name).read_bytes() == (exact / name).read_bytes()
    stored = Path("engines") / recipe.name / "policy.safetensors"
    assert (own / stored).is_file() == (recipe.precision not in ("fp16", "bf16"))
    if (own / stored).is_file():
        assert (own / stored).read_bytes() == (exact / stored).read_bytes()


def test_the_exact_graph_is_what_some_recipes_run(own: Path) -> None:
    before = sorted(own.rglob("*"))
    for engine, precision in (("onnxruntime", "fp32"), ("openvino", "fp32"), ("openvino", "bf16")):
        assert make_engine_graph(own, "policy", Recipe("same", "", engine, precision, TILE, 256)) == "policy.onnx"
    assert sorted(own.rglob("*")) == before


@pytest.mark.parametrize("recipe", MADE, ids=lambda recipe: recipe.name)
def test_weights_lie_below_the_graph_and_are_read_from_where_they_are(exact: Path, recipe: Recipe) -> None:
    graph = exact / f"policy.{recipe.name}.onnx"
    own_file, checkpoint = f"engines/{recipe.name}/policy.safetensors", "policy/model.safetensors"
    for tensor in external(graph).values():
        assert tensor.location in (own_file, checkpoint)
        assert tensor.offset + tensor.length <= (exact / tensor.location).stat().st_size
    unchanged = {name: each.offset for name, each in external(graph).items() if each.location == checkpoint}
    at = {name: each.offset for name, each in external(exact / "policy.onnx").items()}
    assert all(at[name] == offset for name, offset in unchanged.items())
    embedding = next(node.inputs[0].name for node in nodes(exact / "policy.onnx") if node.op_type == "Gather")
    assert embedding in unchanged
    onnx.checker.check_model(str(graph), full_check=True)


def test_stored_integers_are_the_weights(exact: Path) -> None:
    stored = load_file(exact / "engines" / "int8" / "policy.safetensors")
    weights = load_file(exact / "policy" / "model.safetensors")
    products = [name for name in weights if name.endswith("_proj.weight")]
    assert sorted(stored) == sorted(f"{name}.{ending}" for name in products for ending in ("int8", "scale"))
    for name in products:
        restored = (stored[f"{name}.int8"] * stored[f"{name}.scale"]).T  # stored as (in, out)
        np.testing.assert_allclose(restored, weights[name], atol=stored[f"{name}.scale"].max() * 0.501)


def test_the_head_is_exact_unless_it_is_asked_for(exact: Path) -> None:
    def head_products(name: str) -> list[str]:
        graph = ir.load(exact / name).graph
        head = reached_from(value for value in graph.inputs if value.name == "target_index")
        return [node.op_type for node in graph if node in head and node.op_type.startswith("MatMul")]

    tiles = math.ceil(500 / TILE)
    mean_logit = 1
    assert head_products("policy.int8.onnx") == ["MatMul"] * (tiles + mean_logit)
    assert sorted(head_products("policy.int8-head.onnx")) == ["MatMul"] * mean_logit + ["MatMulIntegerToFloat"] * tiles
    for name in ("int8", "int4", "fp8"):
        tensors = external(exact / f"policy.{name}.onnx")
        assert not any("lm_head" in each for each, tensor in tensors.items() if "engines" in str(tensor.location))
    tensors = external(exact / "policy.int8-head.onnx")
    assert sum(each.startswith("lm_head") and each.endswith(".int8") for each in tensors) == tiles


@pytest.mark.parametrize("recipe", [FP16, FP16_HEAD, BF16, FP8], ids=lambda recipe: recipe.name)
def test_what_must_be_float32_is(exact: Path, recipe: Recipe) -> None:
    graph = ir.load(exact / f"policy.{recipe.name}.onnx").graph
    half = ir.DataType.BFLOAT16 if recipe.precision == "bf16" else ir.DataType.FLOAT16
    reducing = {
        "ArgMax",
        "Cos",
        "Div",
        "Exp",
        "Log",
        "Pow",
        "ReduceMax",
        "ReduceMean",
        "ReduceSum",
        "Sin",
        "Softmax",
        "Sqrt",
    }
    seen = set()
    for node in graph:
        if node.op_type in reducing:
            seen.add(node.op_type)
            assert all(value.dtype != half for value in (*node.inputs, *node.outputs))
    assert seen == reducing
    head = reached_from(value for value in graph.inputs if value.name == "target_index")
    in_head = {value.dtype for node in head for value in node.outputs}
    assert (half in in_head) == (recipe.head_precision != "fp32")
    body_products = [node for node in graph if node.op_type == "MatMul" and node not in head]
    assert len(body_products) == 2 * (7 + 2)  # of two layers: by weights, and attention's
    assert all(node.outputs[0].dtype == half for node in body_products)
    assert {output.dtype for output in graph.outputs} == {ir.DataType.FLOAT}
    # The mask's lowest float32 is added in float32: as float16 it would be infinite, and padding NaN.
    lowest = np.finfo(np.float32).min
    masks = [node for node in graph if any(v and v.const_value is not None and v.const_value.size == 1 and
             np.array_equal(v.const_value.numpy(), lowest) for v in node.inputs)]  # fmt: skip
    assert masks
    assert all(node.outputs[0].dtype == ir.DataType.FLOAT for node in masks)


def test_tensorrt_gets_standard_operators_alone(exact: Path) -> None:
    for recipe in (FP16_HEAD, FP8):
        assert {node.domain for node in nodes(exact / f"policy.{recipe.name}.onnx")} == {""}
    kinds = [node.op_type for node in nodes(exact / "policy.fp8.onnx")]
    assert (
        kinds.count("DequantizeLinear") == 14 + 8
    )  # 14 weights, and 4 activations in each layer: q, k and v share one


def test_padding_makes_no_nan_in_float16(exact: Path) -> None:
    batch = batch_of("plain", 10_000)
    assert batch.padding > 0
    assert np.isfinite(run(exact / "policy.fp16.onnx", FP16, batch).log_prob).all()


def test_routers_are_left_alone(tmp_path: Path, traced: Trace) -> None:
    folder = make_exact(tmp_path, traced, "qwen3_moe")
    model = ir.load(folder / make_engine_graph(folder, "policy", FP16))
    routers = find_routers(model.graph)
    assert len(routers) == 2  # one in each layer
    assert all(value.dtype == ir.DataType.FLOAT for node in routers for value in (*node.inputs, *node.outputs))
    assert not any(product.node in routers for product in find_products(ir.load(folder / "policy.onnx").graph))
    make_engine_graph(folder, "policy", INT8)
    assert not any(".gate." in name for name in load_file(folder / "engines" / "int8" / "policy.safetensors"))


# -- faults -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_is_not_hidden_by_quantising(own: Path, value: float) -> None:
    weights = load_torch(own / "policy" / "model.safetensors")
    weights["model.layers.0.input_layernorm.weight"][3] = value
    save_torch(weights, own / "policy" / "model.safetensors", {"format": "pt"})
    engine = OnnxRuntimeEngine(own / make_engine_graph(own, "policy", INT8), threads=1)
    with pytest.raises(EngineOutputError):
        score_pairs(make_table(PAIRS), engine, layout="shared", token_budget=256)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_that_float16_cannot_hold(tmp_path: Path, traced: Trace, dtype: torch.dtype) -> None:
    config = make_config()
    model = make_model(config).to(dtype)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = -70000.0
    save_model(model, tmp_path / "policy")
    bind_folder(tmp_path / "policy", traced(config, vocabulary_tile=TILE))
    for recipe in (FP16, FP16_HEAD):
        with pytest.raises(
            CheckpointError, match=r"'model\.layers\.1\.mlp\.up_proj\.weight' holds (7e\+04|69\d+|70\d+)"
        ):
            make_engine_graph(tmp_path, "policy", recipe)
    assert make_engine_graph(tmp_path, "policy", BF16) == "policy.bf16.onnx"


@pytest.mark.parametrize("calibration", [None, []])
def test_float8_without_calibration(own: Path, calibration: list[Any] | None) -> None:
    before = sorted(own.rglob("*"))
    with pytest.raises(UsageError, match=r"--recipe fp8: fp8 needs pairs .* --calibration DATASET"):
        make_engine_graph(own, "policy", FP8, calibration)
    assert sorted(own.rglob("*")) == before


def test_calibration_finds_what_pytorch_finds(exact: Path) -> None:
    """The largest input of two linear layers, one sequence at a time, by PyTorch's own hooks."""
    model = AutoModelForCausalLM.from_pretrained(exact / "policy", dtype=torch.float32)
    watched = {
        name: model.get_submodule(name) for name in ("model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj")
    }
    largest = dict.fromkeys(watched, 0.0)
    for name, module in watched.items():

        def watch(_: torch.nn.Module, inputs: tuple[torch.Tensor], name: str = name) -> None:
            largest[name] = max(largest[name], inputs[0].abs().max().item())

        module.register_forward_pre_hook(watch)
    with torch.no_grad():
        for pair in PAIRS:
            for completion in (pair.chosen_ids, pair.rejected_ids):
                model(torch.tensor([[*pair.prompt_ids, *completion]]))
    products = {product.name: product for product in find_products(ir.load(exact / "policy.onnx").graph)}
    names = {name: str(products[f"{name}.weight"].activation.name) for name in watched}
    found = largest_magnitudes(exact / "policy.onnx", names.values(), PAIRS)
    for name in watched:
        assert found[names[name]] == pytest.approx(largest[name], rel=1e-5)  # two float32 orders of summation
    assert not list(exact.glob("tmp*"))


def test_engine_graphs_load(exact: Path) -> None:
    """Each of ONNX Runtime's has the contract's inputs and outputs."""
    wanted = session(exact / "policy.onnx")
    for recipe in (INT8, INT4, FP16):
        found = session(exact / f"policy.{recipe.name}.onnx")
        assert [v.name for v in found.get_inputs()] == [v.name for v in wanted.get_inputs()]
        assert sorted(v.name for v in found.get_outputs()) == sorted(v.name for v in wanted.get_outputs())
