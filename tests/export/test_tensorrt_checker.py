"""The table of operators: seeded violations, and each line of it held against TensorRT-RTX's own parser."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from dpo_fast.tensorrt.checker import _table, find_violations

FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL
Nodes = list[onnx.NodeProto]
VECTOR, MATRIX = ("x", FLOAT, ["N"]), ("x", FLOAT, ["N", 8])


def constant(name: str, value: Any) -> onnx.NodeProto:
    return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(np.asarray(value), name))


def make(nodes: Nodes, *inputs: tuple[str, int, list[Any]], output: str = "y", opset: int = 23) -> onnx.ModelProto:
    """A model of some nodes; the output's type and shape are left to be inferred."""
    graph = helper.make_graph(
        nodes,
        "one",
        [helper.make_tensor_value_info(*value) for value in inputs],
        [onnx.ValueInfoProto(name=output)],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return onnx.shape_inference.infer_shapes(helper.make_model(graph, opset_imports=opsets, ir_version=10))


def node(operator: str, inputs: list[str], outputs: list[str] | None = None, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(operator, inputs, outputs or ["y"], **attributes)


def violations(model: onnx.ModelProto) -> list[str]:
    return [str(violation) for violation in find_violations(ir.from_proto(model))]


AXES = constant("axes", np.array([0]))
SEEDED: dict[str, tuple[Callable[[], onnx.ModelProto], str]] = {
    "logarithm of a sum of exponentials": (
        lambda: make([AXES, node("ReduceLogSumExp", ["x", "axes"])], VECTOR),
        "its maximum is not subtracted first",
    ),
    "logarithm of a softmax": (lambda: make([node("LogSoftmax", ["x"])], VECTOR), "minus infinity for unlikely tokens"),
    "a contributed operator": (
        lambda: make([node("FusedMatMul", ["x", "x"], domain="com.microsoft")], MATRIX),
        "(com.microsoft.FusedMatMul): is no standard operator",
    ),
    "positions that are not zero": (
        lambda: make([node("NonZero", ["x"])], VECTOR),
        "the size of what it finds depends on the data",
    ),
    "a sum that is scattered": (
        lambda: make(
            [node("ScatterElements", ["x", "i", "u"], axis=0, reduction="add")],
            VECTOR,
            ("i", INT64, ["N"]),
            ("u", FLOAT, ["N"]),
        ),
        "reduction must be 'none', not 'add'",
    ),
    "integers summed up": (
        lambda: make([constant("axis", np.int64(0)), node("CumSum", ["x", "axis"])], ("x", INT64, ["N"])),
        "takes BFLOAT16, FLOAT, FLOAT16, not INT64",
    ),
    "float64": (lambda: make([node("Exp", ["x"])], ("x", TensorProto.DOUBLE, ["N"])), "not DOUBLE"),
    "a cast to float64": (lambda: make([node("Cast", ["x"], to=TensorProto.DOUBLE)], VECTOR), "not DOUBLE"),
    "the largest, not sorted": (
        lambda: make([constant("k", np.array([2])), node("TopK", ["x", "k"], ["y", "i"], sorted=0)], MATRIX),
        "sorted must be 1, not 0",
    ),
    "too many of the largest": (
        lambda: make(
            [constant("k", np.array([4000])), node("TopK", ["x", "k"], ["y", "i"])], ("x", FLOAT, ["N", 5000])
        ),
        "finds at most 3839 entries",
    ),
    "a shape that is an input": (
        lambda: make([node("Reshape", ["x", "shape"])], VECTOR, ("shape", INT64, [2])),
        "input 1 is a size that depends on the data",
    ),
    "a shape of the largest token": (
        lambda: make(
            [
                node("ReduceMax", ["ids"], ["largest"], keepdims=1),
                node("Expand", ["x", "largest"]),
            ],
            ("x", FLOAT, [1]),
            ("ids", INT64, ["N"]),
        ),
        "input 1 is a size that depends on the data",
    ),
    "axes that are an input": (
        lambda: make([node("ReduceSum", ["x", "axes"])], MATRIX, ("axes", INT64, [1])),
        "input 1 must be known when the plan is built",
    ),
    "quantised around something": (
        lambda: make(
            [constant("s", np.float32(1)), constant("z", np.uint8(128)), node("QuantizeLinear", ["x", "s", "z"])],
            VECTOR,
        ),
        "a zero point of 0, in a signed type",
    ),
    "dynamic int8": (
        lambda: make([node("DynamicQuantizeLinear", ["x"], ["y", "s", "z"])], VECTOR),
        "quantise symmetrically, by constants",
    ),
    "a squeeze without axes": (lambda: make([node("Squeeze", ["x"])], ("x", FLOAT, ["N", 1])), "needs its axes"),
    "a slice without axes": (
        lambda: make(
            [constant("a", np.array([0])), constant("b", np.array([2])), node("Slice", ["x", "a", "b"])], MATRIX
        ),
        "needs its axes",
    ),
    "a softmax of a vector": (lambda: make([node("Softmax", ["x"])], VECTOR), "takes 2 dimensions at least, not 1"),
    "an operator nobody knows": (lambda: make([node("Hardmax", ["x"])], VECTOR), "no importer that is known of"),
    "an opset of tomorrow": (lambda: make([node("Exp", ["x"])], VECTOR, opset=26), "26 is not between 9 and 24"),
}


@pytest.mark.parametrize("fault", SEEDED)
def test_a_seeded_violation_is_found(fault: str) -> None:
    made, message = SEEDED[fault]
    found = violations(made())
    assert any(message in violation for violation in found), found


def test_a_violation_within_a_loop_is_found() -> None:
    body = helper.make_graph(
        [node("Add", ["state", "x"], ["next"]), node("LogSoftmax", ["next"], ["out"])],
        "body",
        [helper.make_tensor_value_info(name, FLOAT, [8]) for name in ("state", "x")],
        [helper.make_tensor_value_info(name, FLOAT, [8]) for name in ("next", "out")],
    )
    scan = node("Scan", ["start", "x"], ["end", "y"], body=body, num_scan_inputs=1)
    found = violations(make([constant("start", np.zeros(8, np.float32)), scan], MATRIX))
    assert [message.split(": ")[0] for message in found] == ["node 'out' (LogSoftmax)"]


def test_sizes_of_shapes_are_no_data() -> None:
    nodes = [
        node("Shape", ["x"], ["shape"]),
        constant("two", np.array([2])),
        constant("first", np.array(0)),
        node("Gather", ["shape", "first"], ["rows"]),
        constant("axes", np.array([0])),
        node("Unsqueeze", ["rows", "axes"], ["one"]),
        constant("eight", np.array([4])),
        node("Concat", ["one", "two", "eight"], ["new"], axis=0),
        node("Reshape", ["x", "new"]),
    ]
    assert violations(make(nodes, MATRIX)) == []


# What TensorRT-RTX's parser takes and the table refuses, on purpose: parsing is not computing rightly, and TensorRT
# itself has no such importers.
TAKEN_ALL_THE_SAME = {
    "ReduceLogSumExp",  # computed without subtracting the maximum
    "ReduceLogSum",
    "LogSoftmax",
    "NonMaxSuppression",  # sizes that depend on the data
    "Attention",
}

EXAMPLES: dict[str, Callable[[], onnx.ModelProto]] = {
    **{
        name: lambda name=name: make([node(name, ["x", "x"])], VECTOR)
        for name in ("Add", "Sub", "Mul", "Div", "Min", "Max", "Pow", "Mod", "Sum")
        if name != "Mod"
    },
    "Mod": lambda: make([node("Mod", ["x", "x"])], ("x", INT64, ["N"])),
    **{
        name: lambda name=name: make([node(name, ["x"])], VECTOR)
        for name in (
            "Abs",
            "Neg",
            "Sign",
            "Clip",
            "Exp",
            "Log",
            "Sqrt",
            "Reciprocal",
            "Sigmoid",
            "Tanh",
            "Erf",
            "Relu",
            "LeakyRelu",
            "Elu",
            "Softplus",
            "Cos",
            "Sin",
            "IsInf",
            "IsNaN",
            "Floor",
            "Ceil",
            "Round",
            "HardSigmoid",
            "Gelu",
            "Mish",
            "Identity",
            "Shape",
            "Size",
            "NonZero",
            "Unique",
        )
    },
    **{
        name: lambda name=name: make([node(name, ["x"])], MATRIX)
        for name in ("Softmax", "ArgMax", "ArgMin", "LogSoftmax")
    },
    **{
        name: lambda name=name: make([node(name, ["x", "x"])], VECTOR)
        for name in ("Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual")
    },
    **{name: lambda name=name: make([node(name, ["x", "x"])], ("x", BOOL, ["N"])) for name in ("And", "Or", "Xor")},
    "Not": lambda: make([node("Not", ["x"])], ("x", BOOL, ["N"])),
    "Where": lambda: make([node("Where", ["c", "x", "x"])], VECTOR, ("c", BOOL, ["N"])),
    "Cast": lambda: make([node("Cast", ["x"], to=INT64)], VECTOR),
    **{
        name: lambda name=name: make([AXES, node(name, ["x", "axes"])], MATRIX)
        for name in (
            "ReduceMax",
            "ReduceMin",
            "ReduceSum",
            "ReduceMean",
            "ReduceProd",
            "ReduceSumSquare",
            "ReduceL2",
            "ReduceLogSumExp",
            "ReduceLogSum",
        )
    },
    "TopK": lambda: make([constant("k", np.array([2])), node("TopK", ["x", "k"], ["y", "i"])], MATRIX),
    "CumSum": lambda: make([constant("axis", np.int64(0)), node("CumSum", ["x", "axis"])], MATRIX),
    "MatMul": lambda: make([node("MatMul", ["x", "w"])], MATRIX, ("w", FLOAT, [8, 4])),
    "Gemm": lambda: make([node("Gemm", ["x", "w"])], MATRIX, ("w", FLOAT, [8, 4])),
    "Einsum": lambda: make([node("Einsum", ["x", "w"], equation="nk,km->nm")], MATRIX, ("w", FLOAT, [8, 4])),
    "Concat": lambda: make([node("Concat", ["x", "x"], axis=0)], VECTOR),
    "Transpose": lambda: make([node("Transpose", ["x"])], MATRIX),
    "Flatten": lambda: make([node("Flatten", ["x"])], MATRIX),
    "Trilu": lambda: make([node("Trilu", ["x"])], MATRIX),
    "Split": lambda: make([node("Split", ["x"], ["y", "z"], axis=1, num_outputs=2)], MATRIX),
    "Gather": lambda: make([node("Gather", ["x", "i"])], MATRIX, ("i", INT64, ["N"])),
    "GatherElements": lambda: make([node("GatherElements", ["x", "i"])], VECTOR, ("i", INT64, ["N"])),
    "GatherND": lambda: make([node("GatherND", ["x", "i"])], MATRIX, ("i", INT64, ["N", 1])),
    "ScatterND": lambda: make(
        [node("ScatterND", ["x", "i", "u"])], VECTOR, ("i", INT64, ["N", 1]), ("u", FLOAT, ["N"])
    ),
    "ScatterElements": lambda: make(
        [node("ScatterElements", ["x", "i", "u"])], VECTOR, ("i", INT64, ["N"]), ("u", FLOAT, ["N"])
    ),
    "Reshape": lambda: make([constant("s", np.array([-1, 4])), node("Reshape", ["x", "s"])], MATRIX),
    "Expand": lambda: make([constant("s", np.array([3, 1, 8])), node("Expand", ["x", "s"])], MATRIX),
    "Tile": lambda: make([constant("s", np.array([2])), node("Tile", ["x", "s"])], VECTOR),
    "Slice": lambda: make(
        [constant("a", np.array([0])), constant("b", np.array([2])), AXES, node("Slice", ["x", "a", "b", "axes"])],
        MATRIX,
    ),
    "Pad": lambda: make([constant("p", np.array([0, 1, 0, 1])), node("Pad", ["x", "p"])], MATRIX),
    "Squeeze": lambda: make([AXES, node("Squeeze", ["x", "axes"])], ("x", FLOAT, [1, "N"])),
    "Unsqueeze": lambda: make([AXES, node("Unsqueeze", ["x", "axes"])], VECTOR),
    "ConstantOfShape": lambda: make(
        [node("Shape", ["x"], ["s"]), node("ConstantOfShape", ["s"], ["z"]), node("Add", ["x", "z"])], VECTOR
    ),
    "Range": lambda: make(
        [
            constant("a", np.int64(0)),
            constant("d", np.int64(1)),
            node("Size", ["x"], ["b"]),
            node("Range", ["a", "b", "d"]),
        ],
        VECTOR,
    ),
    "OneHot": lambda: make(
        [
            constant("d", np.array([8])),
            constant("v", np.array([0.0, 1.0], np.float32)),
            node("OneHot", ["i", "d", "v"]),
        ],
        ("i", INT64, ["N"]),
    ),
    "Conv": lambda: make(
        [constant("w", np.ones((8, 1, 3), np.float32)), node("Conv", ["x", "w"], group=8, pads=[1, 1])],
        ("x", FLOAT, ["N", 8, "T"]),
    ),
    "LayerNormalization": lambda: make(
        [constant("w", np.ones(8, np.float32)), node("LayerNormalization", ["x", "w"])], MATRIX
    ),
    "RMSNormalization": lambda: make(
        [constant("w", np.ones(8, np.float32)), node("RMSNormalization", ["x", "w"])], MATRIX
    ),
    "RotaryEmbedding": lambda: make(
        [node("RotaryEmbedding", ["x", "c", "s"])],
        ("x", FLOAT, ["N", 2, "T", 8]),
        ("c", FLOAT, ["N", "T", 4]),
        ("s", FLOAT, ["N", "T", 4]),
    ),
    "QuantizeLinear": lambda: make(
        [
            constant("s", np.float32(0.1)),
            constant("z", np.int8(0)),
            node("QuantizeLinear", ["x", "s", "z"], ["q"]),
            node("DequantizeLinear", ["q", "s", "z"]),
        ],
        VECTOR,
    ),
    "Constant": lambda: make([constant("c", np.float32([2])), node("Mul", ["x", "c"])], VECTOR),
    "DynamicQuantizeLinear": lambda: make([node("DynamicQuantizeLinear", ["x"], ["y", "s", "z"])], VECTOR),
    "MatMulInteger": lambda: make(
        [node("MatMulInteger", ["x", "w"])], ("x", TensorProto.INT8, ["N", 8]), ("w", TensorProto.INT8, [8, 4])
    ),
    "BitShift": lambda: make([node("BitShift", ["x", "x"], direction="LEFT")], ("x", TensorProto.UINT8, ["N"])),
    "BitwiseAnd": lambda: make([node("BitwiseAnd", ["x", "x"])], ("x", INT64, ["N"])),
    "BitwiseOr": lambda: make([node("BitwiseOr", ["x", "x"])], ("x", INT64, ["N"])),
    "BitwiseNot": lambda: make([node("BitwiseNot", ["x"])], ("x", INT64, ["N"])),
    "Compress": lambda: make([node("Compress", ["x", "c"])], VECTOR, ("c", BOOL, ["N"])),
    "Hardmax": lambda: make([node("Hardmax", ["x"])], VECTOR),
}
# In EXAMPLES with another operator, or of several, which the families' plans have; and with no example of one node.
ELSEWHERE = {"DequantizeLinear", "Scan", "Loop", "If", "Swish", "QLinearMatMul", "ConvInteger", "Attention",
             "NonMaxSuppression"}  # fmt: skip
PARSE = """
import json, sys
import tensorrt_rtx as trt
log, found = trt.Logger(trt.Logger.INTERNAL_ERROR), {}
for path in sys.argv[1:]:
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    found[path] = trt.OnnxParser(network, log).parse_from_file(path)
print(json.dumps(found))
"""


def test_the_table_says_what_the_parser_says(tmp_path: Path) -> None:
    """Operator by operator; where they disagree, the reason is written down above."""
    for name, made in EXAMPLES.items():
        onnx.save(made(), tmp_path / f"{name}.onnx")
    paths = [str(tmp_path / f"{name}.onnx") for name in EXAMPLES]
    child = subprocess.run([sys.executable, "-c", PARSE, *paths], capture_output=True, text=True, check=True)
    parsed = {Path(path).stem: taken for path, taken in json.loads(child.stdout.splitlines()[-1]).items()}
    accepted = {name: violations(made()) == [] for name, made in EXAMPLES.items()}
    assert accepted | dict.fromkeys(TAKEN_ALL_THE_SAME & set(EXAMPLES), True) == parsed


def test_every_operator_of_the_table_has_an_example() -> None:
    rules, refused, _ = _table()
    assert set(rules) | set(refused) <= set(EXAMPLES) | ELSEWHERE
    assert not set(rules) & set(refused)
