"""A float32 graph's products in float16 or bfloat16, and everything that would suffer in float32.

Products, and what lies between two of them (activation functions, gates, biases, rearrangements), compute in half
precision. Whatever meets a float32 value is float32: the residual stream, normalisations, rotary angles, the mask and
the softmax of attention. So is the head, unless its products are asked for; what reduces the logits always is.

The graph is typed throughout, as ONNX and TensorRT's strongly typed networks want it, and has no operators but those it
had before, and `Cast`.
"""

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from dpo_fast.errors import CheckpointError
from dpo_fast.export.external import readable
from dpo_fast.export.products import MOVES, find_routers, is_widening, reached_from, stored_tensors

BETWEEN = MOVES | {"Add", "Expand", "Mul", "Neg", "Relu", "Sigmoid", "Sub", "Tanh"}
FLOAT16_LIMIT = 65504.0  # its largest number
# The magnitude of a floating-point number grows with its bits, taken as an integer without the sign.
MAGNITUDES = {ir.DataType.FLOAT: (np.uint32, 0x7FFFFFFF), ir.DataType.BFLOAT16: (np.uint16, 0x7FFF)}


def narrow(model: ir.Model, half: ir.DataType, head_products: Iterable[ir.Node] = ()) -> None:
    """Narrow a graph, in place.

    Args:
        model: the graph; some of its values may be in half precision already.
        half: FLOAT16 or BFLOAT16.
        head_products: those of the head that are to be narrow too.

    Raises:
        CheckpointError: a weight is too large for float16.
    """
    ShapeInferencePass()(model)
    _Narrowing(model.graph, half, frozenset(head_products)).run()


class _Narrowing:
    """One pass over a graph, in its order: each node is made narrow, or what it takes in is widened."""

    def __init__(self, graph: ir.Graph, half: ir.DataType, head_products: frozenset[ir.Node]) -> None:
        self._graph, self._half = graph, half
        head = reached_from(value for value in graph.inputs if value.name == "target_index")
        self._exact = (head - head_products) | find_routers(graph) | _between_products_and_scans(graph)
        # What comes of the embedding, and so of the weights; positions and masks do not.
        self._states = reached_from(value for value in graph.initializers.values() if _is_stored(value))
        self._dynamic = reached_from(graph.inputs)
        self._narrowed: dict[ir.Value, ir.Value] = {}
        self._widened: dict[ir.Value, ir.Value] = {}

    def run(self) -> None:
        """Narrow the graph."""
        for node in list(self._graph):
            if node not in self._dynamic or node.op_type in ("QuantizeLinear", "DequantizeLinear", "Shape"):
                continue
            if node.op_type == "Cast":
                source = node.inputs[0]
                if is_widening(node) and source is not None and source.dtype == self._half:
                    node.outputs[0].replace_all_uses_with(source)  # who needs it wide gets it so below
            elif self._is_narrow(node):
                self._replace_inputs(node, ir.DataType.FLOAT)
                for value in node.outputs:
                    if value.dtype == ir.DataType.FLOAT:
                        value.dtype = self._half
            else:
                self._replace_inputs(node, self._half)

    def _is_narrow(self, node: ir.Node) -> bool:
        """Whether a node is to compute in half precision; what precedes it has been decided."""
        if node in self._exact:
            return False
        numbers = [
            value for value in node.inputs if value is not None and value.dtype in (ir.DataType.FLOAT, self._half)
        ]
        if node.op_type == "MatMul":
            return all(_is_stored(value) or value.producer() in self._states for value in numbers)
        if node.op_type not in BETWEEN or len(set(numbers)) < len(numbers):  # a square may overflow
            return False
        changing = [value for value in numbers if not self._is_constant(value)]
        return bool(changing) and all(value.dtype == self._half for value in changing)

    def _is_constant(self, value: ir.Value) -> bool:
        """Whether a value is a weight, or a small constant that half precision can hold."""
        if value.const_value is not None and not _is_stored(value):
            return bool((np.abs(value.const_value.numpy()) <= FLOAT16_LIMIT).all())
        return stored_tensors(value) is not None

    def _replace_inputs(self, node: ir.Node, unwanted: ir.DataType) -> None:
        """Give a node its inputs of an unwanted type in the other one."""
        for position, value in enumerate(node.inputs):
            if value is not None and value.dtype == unwanted:
                convert = self._narrow_value if unwanted == ir.DataType.FLOAT else self._widen_value
                node.replace_input_with(position, convert(value, node))

    def _widen_value(self, value: ir.Value, before: ir.Node) -> ir.Value:
        if value not in self._widened:
            self._widened[value] = self._cast(value, ir.DataType.FLOAT, before)
        return self._widened[value]

    def _narrow_value(self, value: ir.Value, before: ir.Node) -> ir.Value:
        """A value in half precision; a weight is cast as it is stored, not first widened."""
        if value.dtype == self._half:
            return value
        if value in self._narrowed:
            return self._narrowed[value]
        node = value.producer()
        if node is None or stored_tensors(value) is None:
            if _is_stored(value):
                self._check_range(value)
            result = self._cast(value, self._half, before)
        elif is_widening(node):
            result = self._narrow_value(_first(node), before)
        else:
            count = len(node.inputs) if node.op_type == "Concat" else 1
            inputs = [
                self._narrow_value(given, before) if number < count and given is not None else given
                for number, given in enumerate(node.inputs)
            ]
            moved = ir.node(node.op_type, inputs, node.attributes, num_outputs=len(node.outputs))
            for old, new in zip(node.outputs, moved.outputs, strict=True):
                new.name, new.shape, new.dtype = f"{old.name}.half", old.shape, self._half
                self._narrowed[old] = new
            self._graph.insert_before(before, moved)
            result = self._narrowed[value]
        self._narrowed[value] = result
        return result

    def _cast(self, value: ir.Value, to: ir.DataType, before: ir.Node) -> ir.Value:
        cast = ir.node("Cast", [value], {"to": to})
        result = cast.outputs[0]
        result.name = f"{value.name}.{'wide' if to == ir.DataType.FLOAT else 'half'}"
        result.shape, result.dtype = value.shape, to
        self._graph.insert_before(before, cast)
        return result

    def _check_range(self, value: ir.Value) -> None:
        """Refuse a stored weight that float16 cannot hold."""
        tensor = value.const_value
        if self._half != ir.DataType.FLOAT16 or tensor is None or tensor.dtype not in MAGNITUDES or tensor.size == 0:
            return
        kind, mask = MAGNITUDES[tensor.dtype]
        assert isinstance(tensor, ir.ExternalTensor)
        stored = readable(tensor).numpy()
        largest = (stored.view(kind) & kind(mask)).max()
        magnitude = float(np.array(largest, kind).view(stored.dtype))
        if magnitude > FLOAT16_LIMIT:
            raise CheckpointError(
                f"the tensor {value.name!r} holds {magnitude:g}, and float16 ends at {FLOAT16_LIMIT:g}; "
                "export with a recipe in bf16 or fp32"
            )


def _between_products_and_scans(graph: ir.Graph) -> set[ir.Node]:
    """What lies between products and a scan: a state that is carried over a sequence is computed of float32.

    TensorRT-RTX 1.7 infers wrong shapes, too, for a scan's slices of what has been moved in half precision.
    """
    found: set[ir.Node] = set()
    waiting = [
        value.producer() for node in graph if node.op_type == "Scan" for value in node.inputs if value is not None
    ]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found and node.op_type in BETWEEN:
            found.add(node)
            waiting += [value.producer() for value in node.inputs if value is not None]
    return found


def _is_stored(value: ir.Value) -> bool:
    """Whether a value is a tensor of a weights' file."""
    return isinstance(value.const_value, ir.ExternalTensor)


def _first(node: ir.Node) -> ir.Value:
    value = node.inputs[0]
    assert value is not None
    return value
