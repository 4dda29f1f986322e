"""A product by a quantised weight as ONNX nodes: one class for each form.

Activations are quantised by rows, or not at all, or by constants: never by anything that depends on the other rows of a
batch, so that a pair's scores do not depend on which pairs it is scored with.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.tape import Tape

from dpo_fast.export import quantize
from dpo_fast.export.products import Product
from dpo_fast.export.weights_file import Layout
from dpo_fast.types import Float32Array

MICROSOFT = "com.microsoft"  # ONNX Runtime's own operators


TINY = np.float32(1e-30)  # of a row's scale, so that a row of zeros is divided by something


class Form(Protocol):
    """How a weight is stored, and its product computed."""

    def layout(self, inner: int, columns: int) -> dict[str, Layout]:
        """What is stored of an (inner, columns) weight, by ending of the tensors' names."""
        ...

    def quantize(self, weight: Float32Array) -> dict[str, NDArray[Any]]:
        """Its values."""
        ...

    def compute(self, tape: Tape, product: Product, stored: Mapping[str, ir.Value]) -> ir.Value:
        """Record the nodes of the product; the value that they end in."""
        ...


class _Constants:
    """A graph's small constants, each made once, where it is first needed."""

    def __init__(self) -> None:
        self._made: dict[tuple[str, bytes], ir.Value] = {}

    def __call__(self, tape: Tape, value: Any) -> ir.Value:
        array = np.asarray(value)
        key = (str(array.dtype), array.tobytes())
        if key not in self._made:
            self._made[key] = tape.op("Constant", [], {"value": ir.tensor(array)})
        return self._made[key]


class Int8:
    """Weights in int8 by column, activations in 8 bits by row; products of integers are exact.

    ``x @ W ~ (levels @ integers) * scale of the row * scale of the column``, where a row's largest magnitude has the
    level 127. Levels are stored as uint8 around 128, the form that ONNX Runtime's kernels take; its `QuantizeLinear`
    rounds half to even.
    """

    def __init__(self, *, reduce_range: bool) -> None:
        self._limit = quantize.REDUCED_LIMIT if reduce_range else quantize.INT8_LIMIT
        self._rows: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}  # one quantisation for all products of an activation
        self._constant = _Constants()

    def layout(self, inner: int, columns: int) -> dict[str, Layout]:
        """See `Form`."""
        return {"int8": ("I8", (inner, columns)), "scale": ("F32", (columns,))}

    def quantize(self, weight: Float32Array) -> dict[str, NDArray[Any]]:
        """See `Form`."""
        return dict(zip(("int8", "scale"), quantize.quantize_int8(weight, self._limit), strict=True))

    def compute(self, tape: Tape, product: Product, stored: Mapping[str, ir.Value]) -> ir.Value:
        """See `Form`."""
        one, zero_point = self._constant(tape, np.float32(1)), self._constant(tape, np.uint8(128))
        if product.activation not in self._rows:
            x, last = product.activation, self._constant(tape, np.array([-1]))
            largest = tape.op("ReduceMax", [tape.op("Abs", [x]), last], {"keepdims": 1})
            step = tape.op("Mul", [largest, self._constant(tape, np.float32(1 / 127))])
            # ONNX Runtime's maximum passes over NaN, and a sum does not: what is NaN must stay NaN.
            tiny = self._constant(tape, TINY)
            trace = tape.op("Mul", [tape.op("ReduceSum", [x, last], {"keepdims": 1}), tiny])
            scale = tape.op("Sum", [step, trace, tiny])
            levels = tape.op("QuantizeLinear", [tape.op("Div", [x, scale]), one, zero_point])
            self._rows[x] = levels, scale
        levels, row_scale = self._rows[product.activation]
        by_columns = tape.op(
            "MatMulIntegerToFloat", [levels, stored["int8"], one, stored["scale"], zero_point], domain=MICROSOFT
        )
        return tape.op("Mul", [by_columns, row_scale])


class Int4:
    """Weights in 4 bits by block, activations in float32."""

    def __init__(self, block_size: int, *, symmetric: bool) -> None:
        self._block_size, self._symmetric = block_size, symmetric

    def layout(self, inner: int, columns: int) -> dict[str, Layout]:
        """See `Form`."""
        blocks = -(-inner // self._block_size)
        layout: dict[str, Layout] = {
            "int4": ("U8", (columns, blocks, self._block_size // 2)),
            "scale": ("F32", (columns, blocks)),
        }
        return layout if self._symmetric else {**layout, "zero_point": ("U8", (columns, -(-blocks // 2)))}

    def quantize(self, weight: Float32Array) -> dict[str, NDArray[Any]]:
        """See `Form`."""
        levels, scale, zero_point = quantize.quantize_int4(weight, self._block_size, symmetric=self._symmetric)
        return {"int4": levels, "scale": scale, **({} if zero_point is None else {"zero_point": zero_point})}

    def compute(self, tape: Tape, product: Product, stored: Mapping[str, ir.Value]) -> ir.Value:
        """See `Form`."""
        inner, columns = product.shape
        attributes = {"K": inner, "N": columns, "bits": 4, "block_size": self._block_size, "accuracy_level": 1}
        return tape.op("MatMulNBits", [product.activation, *stored.values()], attributes, domain=MICROSOFT)


class Int8Weights:
    """Weights in int8 by column, widened before the product: the form that OpenVINO keeps compressed."""

    def layout(self, inner: int, columns: int) -> dict[str, Layout]:
        """See `Form`."""
        return {"int8": ("I8", (inner, columns)), "scale": ("F32", (columns,))}

    def quantize(self, weight: Float32Array) -> dict[str, NDArray[Any]]:
        """See `Form`."""
        return dict(zip(("int8", "scale"), quantize.quantize_int8(weight), strict=True))

    def compute(self, tape: Tape, product: Product, stored: Mapping[str, ir.Value]) -> ir.Value:
        """See `Form`."""
        weight = tape.op("DequantizeLinear", [stored["int8"], stored["scale"]], {"axis": 1})
        return tape.op("MatMul", [product.activation, weight])


class Float8:
    """Weights in float8e4m3fn by column, activations too, by a constant; both widened to float16 before the product.

    Quantising and widening again is how TensorRT is told to multiply in float8.
    """

    def __init__(self, largest: Mapping[ir.Value, float]) -> None:
        """Take the largest magnitude of each product's activation, from calibration."""
        self._largest = largest
        self._rounded: dict[ir.Value, ir.Value] = {}
        self._constant = _Constants()

    def layout(self, inner: int, columns: int) -> dict[str, Layout]:
        """See `Form`."""
        return {"float8": ("F8_E4M3", (inner, columns)), "scale": ("F16", (columns,))}

    def quantize(self, weight: Float32Array) -> dict[str, NDArray[Any]]:
        """See `Form`."""
        return dict(zip(("float8", "scale"), quantize.quantize_float8(weight), strict=True))

    def compute(self, tape: Tape, product: Product, stored: Mapping[str, ir.Value]) -> ir.Value:
        """See `Form`."""
        if product.activation not in self._rounded:
            scale = quantize.float8_scale(np.array(self._largest[product.activation], np.float32))
            step = self._constant(tape, scale)
            zero = self._constant(tape, np.zeros((), ir.DataType.FLOAT8E4M3FN.numpy()))
            narrow = tape.op("Cast", [product.activation], {"to": ir.DataType.FLOAT16})
            self._rounded[product.activation] = tape.op(
                "DequantizeLinear", [tape.op("QuantizeLinear", [narrow, step, zero]), step, zero]
            )
        weight = tape.op("DequantizeLinear", [stored["float8"], stored["scale"]], {"axis": 1})
        narrow = tape.op("MatMul", [self._rounded[product.activation], weight])
        return tape.op("Cast", [narrow], {"to": ir.DataType.FLOAT})
