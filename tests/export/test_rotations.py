"""Rotations of queries and keys become one operator each, where that is what they are, and say the same."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import parser
from tiny_models import make_config

from dpo_fast.export.positions import ROTARY_OPSET, fuse_rotations

SIZES = {"B": 2, "heads": 3, "T": 5, "D": 8}
ROTATION = """
<ir_version: 10, opset_import: ["" : 20]>
rotation (float[B, 3, T, 8] x, float[B, T, 4] angles, float[B, T, 4] others) => (float[B, 3, T, 8] y)
<int64[1] zero = {0}, int64[1] half = {HALF}, int64[1] end = {9223372036854775807}, int64[1] last = {3},
 int64[1] one = {1}, float factor = {1.5}>
{
    both = Concat <axis = -1> (angles, SECOND)
    cos = Cos (both)
    plain_sin = Sin (both)
    sin = Mul (plain_sin, factor)
    wide_cos = Unsqueeze (cos, one)
    wide_sin = Unsqueeze (sin, one)
    x1 = Slice (x, zero, half, last, one)
    x2 = Slice (x, half, end, last, one)
    minus_x2 = Neg (x2)
    turned = Concat <axis = -1> (minus_x2, x1)
    kept = Mul (x, wide_cos)
    moved = Mul (turned, wide_sin)
    y = Add (kept, moved)
}
"""


def make(second: str = "angles", half: str = "4") -> ir.Model:
    text = ROTATION.replace("SECOND", second).replace("HALF", half)
    proto = onnx.shape_inference.infer_shapes(parser.parse_model(text))
    return ir.from_proto(proto)


def run(model: ir.Model, path: Path, inputs: dict[str, np.ndarray]) -> np.ndarray:
    ir.save(model, path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {value.name: inputs[value.name] for value in session.get_inputs()})[0]


def test_one_operator_says_the_same(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    batch, heads, length, size = SIZES.values()
    shapes = {"x": (batch, heads, length, size), "angles": (batch, length, 4), "others": (batch, length, 4)}
    inputs = {name: random.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    model = make()
    expected = run(model, tmp_path / "seven.onnx", inputs)
    fuse_rotations(model)
    assert [node.op_type for node in model.graph].count("RotaryEmbedding") == 1
    assert not {"Neg", "Add"} & {node.op_type for node in model.graph}, "what it replaces is gone"
    assert model.opset_imports[""] == ROTARY_OPSET
    onnx.checker.check_model(ir.to_proto(model))
    # Two products and a sum of each entry, of magnitudes below 10, rounded once or twice.
    np.testing.assert_allclose(run(model, tmp_path / "one.onnx", inputs), expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize(
    "changes",
    [{"second": "others"}, {"half": "2"}],
    ids=["halves of cos and sin that differ", "halves of x of other sizes"],
)
def test_what_is_no_rotation_stays(changes: dict[str, str]) -> None:
    model = make(**changes)
    before = [node.op_type for node in model.graph]
    fuse_rotations(model)
    assert [node.op_type for node in model.graph] == before
    assert model.opset_imports[""] == 20


@pytest.mark.parametrize(("model_type", "fused"), [("llama", True), ("cohere", False)])
def test_families(traced: Callable[..., ir.Model], model_type: str, fused: bool) -> None:
    """Llama's halves of the entries rotate; Cohere's neighbours do, which is another order."""
    config = make_config(model_type)
    graph = traced(config, vocabulary_tile=128).graph
    rotations = [node for node in graph if node.op_type == "RotaryEmbedding"]
    assert len(rotations) == (2 * config.num_hidden_layers if fused else 0)
    assert len({node.inputs[1] for node in rotations}) == int(fused), "one cos for all layers"
