"""Attention and normalisations as ONNX Runtime's operators for CUDA: the same scores, and nothing fused by mistake."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import parser
from tiny_models import make_config, make_model, save_model

from dpo_fast.batches import Layout, arrange, make_batches
from dpo_fast.engines.onnxruntime import OnnxRuntimeEngine
from dpo_fast.export.cuda_fusions import FORBIDDEN, fuse_for_cuda
from dpo_fast.export.precision import make_engine_graph
from dpo_fast.export.probes import make_probes
from dpo_fast.recipes import Recipe
from dpo_fast.token_table import make_table
from dpo_fast.types import TokenScores

from .binding import bind_folder, session

Trace = Callable[..., ir.Model]

TILE = 128
PAIRS = make_probes(500, positions=256)
# Narrowed graphs that nothing has been fused in.
FP16 = Recipe("fp16", "", "tensorrt", "fp16", TILE, 256)
BF16 = Recipe("bf16", "", "tensorrt", "bf16", TILE, 256)
NUMBERS = ("log_prob", "entropy", "mean_logit", "log_sum_sq_prob")
# Two orders of summation in float32, through two layers, of logits of several units: a rounding is 2^-24 of them, and
# some hundred add up. A mask or a weight that is wrong is off by tenths of a nat.
FLOAT32_LIMIT = 5e-5
# Attention's scores and probabilities are rounded to float16 at other places: 2^-11 of a logit of several units, as in
# any float16 graph.
FLOAT16_LIMIT = 0.05


def make_exact(folder: Path, traced: Trace, model_type: str, **keys: Any) -> Path:
    """A folder with a tiny policy and its exact graph, as a bundle has them."""
    config = make_config(model_type, **keys)
    save_model(make_model(config), folder / "policy")
    bind_folder(folder / "policy", traced(config, vocabulary_tile=TILE))
    return folder


def fused(path: Path) -> Path:
    """The graph of a file, fused, beside it."""
    model = ir.load(path)
    fuse_for_cuda(model)
    target = path.with_suffix(".fused.onnx")
    ir.save(model, target)
    return target


def count(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in ir.load(path).graph)


def score(graph: Path, layout: Layout) -> TokenScores:
    batch = next(make_batches(arrange(make_table(PAIRS), layout, 400), 400))
    return OnnxRuntimeEngine(graph, threads=1).score(batch)


def largest_error(found: TokenScores, expected: TokenScores) -> float:
    return max(float(np.abs(getattr(found, name) - getattr(expected, name)).max()) for name in NUMBERS)


def widen_attention(path: Path) -> Path:
    """The graph with its fused attention in float32, which is all that ONNX Runtime's CPU kernel takes."""
    model = ir.load(path)
    for node in list(model.graph):
        if node.op_type != "MultiHeadAttention":
            continue
        half = node.inputs[0].dtype
        for position, value in enumerate(node.inputs):
            if value is not None:
                cast = ir.node("Cast", [value], {"to": ir.DataType.FLOAT})
                model.graph.insert_before(node, cast)
                node.replace_input_with(position, cast.outputs[0])
        back = ir.node("Cast", [node.outputs[0]], {"to": half})
        back.outputs[0].dtype = half
        model.graph.insert_after(node, back)
        node.outputs[0].replace_all_uses_with(back.outputs[0])
        back.replace_input_with(0, node.outputs[0])
        node.outputs[0].dtype = ir.DataType.FLOAT
    target = path.with_suffix(".wide.onnx")
    ir.save(model, target)
    return target


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "attentions", "normalisations"),
    [
        # Of two layers with two normalisations each and a last one, all but the first are of a sum.
        ("llama", 2, {"SkipSimplifiedLayerNormalization": 4, "RMSNormalization": 1}),
        ("qwen2", 2, {"SkipSimplifiedLayerNormalization": 4, "RMSNormalization": 1}),  # biases; one layer has a window
        ("mistral", 2, {"SkipSimplifiedLayerNormalization": 4, "RMSNormalization": 1}),  # a window
        ("phi3", 2, {"SkipSimplifiedLayerNormalization": 4, "RMSNormalization": 1}),  # q, k and v in one product
        ("gpt2", 2, {"SkipLayerNormalization": 5}),  # as many key heads as heads; the first sum is of positions
        ("gemma2", 0, {"SkipSimplifiedLayerNormalization": 4, "RMSNormalization": 5}),  # soft caps; 1 + weight
        ("gpt_oss", 0, {"SkipSimplifiedLayerNormalization": 4, "RMSNormalization": 1}),  # sinks
        ("qwen3", 2, {"SkipSimplifiedLayerNormalization": 4, "RMSNormalization": 5}),  # of each head's query and key
        ("deepseek_v3", 2, {}),  # heads of values of another size
        ("bloom", 0, {}),  # ALiBi
    ],
)
def test_families_say_the_same_in_float32(
    tmp_path: Path, traced: Trace, model_type: str, attentions: int, normalisations: dict[str, int]
) -> None:
    exact = make_exact(tmp_path, traced, model_type) / "policy.onnx"
    made = fused(exact)
    found = count(made)
    assert found["MultiHeadAttention"] == attentions
    assert {name: found[name] for name in normalisations} == normalisations
    # Attention's softmaxes are gone; the head has one for each tile of the vocabulary, as before.
    assert count(exact)["Softmax"] - found["Softmax"] == attentions
    onnx.checker.check_model(str(made), full_check=True)
    for layout in ("shared", "plain"):
        assert largest_error(score(made, layout), score(exact, layout)) < FLOAT32_LIMIT


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory, traced: Trace) -> Path:
    folder = make_exact(tmp_path_factory.mktemp("llama"), traced, "llama")
    for recipe in (FP16, BF16):
        make_engine_graph(folder, "policy", recipe)
    return folder


@pytest.mark.slow
def test_float16_says_the_same(llama: Path) -> None:
    narrow = llama / "policy.fp16.onnx"
    made = widen_attention(fused(narrow))
    for layout in ("shared", "plain"):
        assert 0 < largest_error(score(made, layout), score(narrow, layout)) < FLOAT16_LIMIT


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "half"), [("fp16", ir.DataType.FLOAT16), ("bf16", ir.DataType.BFLOAT16)], ids=["fp16", "bf16"]
)
def test_types_stay(llama: Path, name: str, half: ir.DataType) -> None:
    """Attention is in half precision throughout, its mask too; normalisations and the residual stream in float32."""
    made = fused(llama / f"policy.{name}.onnx")
    onnx.checker.check_model(str(made), full_check=True)
    seen = set()
    for node in ir.load(made).graph:
        dtypes = {value.dtype for value in (*node.inputs, *node.outputs) if value is not None and value.name}
        if node.op_type == "MultiHeadAttention":
            assert dtypes == {half}
        elif node.op_type.endswith("Normalization"):
            assert dtypes == {ir.DataType.FLOAT}
        else:
            continue
        seen.add(node.op_type)
    assert seen == {"MultiHeadAttention", "SkipSimplifiedLayerNormalization", "RMSNormalization"}


@pytest.mark.slow
def test_one_mask_for_all_layers_that_no_type_makes_infinite(llama: Path) -> None:
    graph = ir.load(fused(llama / "policy.fp16.onnx")).graph
    masks = {node.inputs[5] for node in graph if node.op_type == "MultiHeadAttention"}
    assert len(masks) == 1
    constants = [value.producer() for value in masks.pop().producer().inputs]
    numbers = [node.attributes["value"].as_tensor().numpy() for node in constants if node.op_type == "Constant"]
    assert numbers == [np.float16(FORBIDDEN)]
    assert np.isfinite(numbers[0])


@pytest.mark.slow
def test_fusing_again_changes_nothing(llama: Path) -> None:
    once = fused(llama / "policy.onnx")
    assert fused(once).read_bytes() == once.read_bytes()


@pytest.mark.slow
def test_a_token_that_may_not_be_seen_changes_nothing(llama: Path) -> None:
    """The mask is what keeps one completion from the other: with other tokens there, scores stay to the last bit."""
    made = fused(llama / "policy.onnx")
    engine = OnnxRuntimeEngine(made, threads=1)
    batch = next(make_batches(arrange(make_table(PAIRS[:1]), "shared", 400), 400))
    before = engine.score(batch).log_prob
    first = batch.completions[0, 2]
    batch.input_ids[batch.segment_ids == 2] = 3
    after = engine.score(batch).log_prob
    np.testing.assert_array_equal(after[:first], before[:first])
    assert np.abs(after[first:] - before[first:]).max() > 0.1


# -- what is nearly a normalisation -----------------------------------------------------------------------------------

RMS = """
<ir_version: 10, opset_import: ["" : 20]>
norm (float[B, T, 8] a, float[B, T, 8] b) => (float[B, T, 8] minus_y, float[B, T, 8] minus_x)
<float[8] weight = {1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0}, float power = {POWER}, float epsilon = {0.01},
 int64[1] axes = {AXES}>
{
    x = Add (a, b)
    squares = Pow (x, power)
    mean = ReduceMean <keepdims = 1> (squares, axes)
    raised = Add (mean, epsilon)
    root = Sqrt (raised)
    even = Div (NUMERATOR, root)
    y = Mul (weight, even)
    minus_y = Neg (y)
    minus_x = Neg (x)
}
"""


def make_rms(power: str = "2.0", axes: str = "-1", numerator: str = "x") -> ir.Model:
    text = RMS.replace("POWER", power).replace("AXES", axes).replace("NUMERATOR", numerator)
    return ir.from_proto(onnx.shape_inference.infer_shapes(parser.parse_model(text)))


def test_a_normalised_sum_by_hand(tmp_path: Path) -> None:
    model = make_rms()
    fuse_for_cuda(model)
    assert [node.op_type for node in model.graph] == ["SkipSimplifiedLayerNormalization", "Neg", "Neg"]
    ir.save(model, tmp_path / "fused.onnx")
    random = np.random.default_rng(0)
    a, b = (random.standard_normal((2, 3, 8), np.float32) for _ in range(2))
    minus_y, minus_x = session(tmp_path / "fused.onnx").run(None, {"a": a, "b": b})
    x = (a + b).astype(np.float64)
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 0.01) * np.arange(1, 9)
    np.testing.assert_allclose(-minus_y, expected, atol=2e-6)  # float32, of numbers below 20
    np.testing.assert_array_equal(minus_x, -(a + b))


@pytest.mark.parametrize("changes", [{"power": "3.0"}, {"axes": "1"}, {"numerator": "a"}], ids=str)
def test_what_is_no_normalisation_stays(changes: dict[str, str]) -> None:
    model = make_rms(**changes)
    before = [node.op_type for node in model.graph]
    fuse_for_cuda(model)
    assert [node.op_type for node in model.graph] == before
    assert model.opset_imports == {"": 20}


def test_outputs_of_the_graph_keep_their_names() -> None:
    text = RMS.replace("minus_y, float", "y, float").replace("    minus_y = Neg (y)\n", "")
    text = text.replace("POWER", "2.0").replace("AXES", "-1").replace("NUMERATOR", "x")
    model = ir.from_proto(onnx.shape_inference.infer_shapes(parser.parse_model(text)))
    before = [node.op_type for node in model.graph]
    fuse_for_cuda(model)
    assert [node.op_type for node in model.graph] == before
