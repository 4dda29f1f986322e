"""Matrix products alone, on each engine and in each precision: what the benchmarks hold whole models against."""

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np

ROWS = 512  # tokens of a batch
TURNS = 100


def peak(engine: str, precision: str, inner: int, columns: int, *, rows: int = ROWS) -> float:
    """The fastest of 100 products of (rows, inner) by (inner, columns), in operations a second: two for each term.

    Args:
        engine: "onnxruntime", "openvino" or "torch".
        precision: "fp32"; "bf16" but on ONNX Runtime; "int8" on ONNX Runtime alone: unsigned by signed, to float32.
        inner: the sum's terms.
        columns: of the weight.
        rows: of the activation.
    """
    product = _MAKERS[engine](precision, rows, inner, columns)
    return 2 * rows * inner * columns / fastest(product, TURNS)


def fastest(run: Callable[[], Any], turns: int) -> float:
    """The shortest time of several turns, in seconds."""
    best = math.inf
    for _ in range(turns):
        started = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - started)
    return best


def _onnxruntime(precision: str, rows: int, inner: int, columns: int) -> Callable[[], Any]:
    import onnxruntime

    session = onnxruntime.InferenceSession(_graph(precision, inner, columns), providers=["CPUExecutionProvider"])
    left = _left(rows, inner)
    if precision == "int8":
        left = (left * 40 + 128).clip(0, 255).astype(np.uint8)
    return lambda: session.run(None, {"left": left})


def _openvino(precision: str, rows: int, inner: int, columns: int) -> Callable[[], Any]:
    import openvino

    core = openvino.Core()
    hints = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[precision]}
    request = core.compile_model(core.read_model(_graph("fp32", inner, columns)), "CPU", hints).create_infer_request()
    left = _left(rows, inner)
    return lambda: request.infer([left], share_inputs=True)


def _torch(precision: str, rows: int, inner: int, columns: int) -> Callable[[], Any]:
    import torch

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    left, right = torch.from_numpy(_left(rows, inner)).to(dtype), torch.from_numpy(_left(columns, inner)).to(dtype)
    return lambda: torch.nn.functional.linear(left, right)


_MAKERS: dict[str, Callable[[str, int, int, int], Callable[[], Any]]] = {
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
    "torch": _torch,
}


def _left(rows: int, inner: int) -> Any:
    return np.random.default_rng(0).standard_normal((rows, inner), np.float32)


def _graph(precision: str, inner: int, columns: int) -> bytes:
    """One product by a constant weight, as an ONNX file's bytes."""
    from onnx import TensorProto, helper, numpy_helper

    right = np.random.default_rng(1).standard_normal((inner, columns), np.float32)
    constants: dict[str, Any] = {"right": right}
    if precision == "int8":
        constants = {
            "right": (right * 30).clip(-127, 127).astype(np.int8),
            "one": np.float32(1),
            "scale": np.full(columns, 0.01, np.float32),
            "zero_point": np.uint8(128),
        }
        inputs = ["left", "right", "one", "scale", "zero_point"]
        node = helper.make_node("MatMulIntegerToFloat", inputs, ["product"], domain="com.microsoft")
    else:
        node = helper.make_node("MatMul", ["left", "right"], ["product"])
    left = TensorProto.UINT8 if precision == "int8" else TensorProto.FLOAT
    graph = helper.make_graph(
        [node],
        "gemm",
        [helper.make_tensor_value_info("left", left, ["rows", inner])],
        [helper.make_tensor_value_info("product", TensorProto.FLOAT, ["rows", columns])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    return model
