"""Matrix products by weights: which of a graph's products have one, and what its values are."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator
from onnx_ir.convenience import replace_nodes_and_values
from onnx_ir.tape import Tape

from dpo_fast.export.external import readable
from dpo_fast.types import Float32Array

# Operators that only move a tensor's entries; the widening casts of a stored bfloat16 or float16 commute with them.
MOVES = frozenset({"Concat", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"})
ADAPTER = ".lora_"  # in the names of an adapter's own matrices, which are small and stay as they are


@dataclass(frozen=True, slots=True)
class Product:
    """A node ``activation @ weight`` whose weight is made from stored tensors alone.

    Attributes:
        node: the `MatMul`.
        activation: (…, K).
        weight: an initializer or an expression of initializers.
        shape: (K, N), the weight's.
        name: of the first stored tensor that it is made from, numbered from the second product by that tensor on.
        is_head: whether it makes logits.
    """

    node: ir.Node
    activation: ir.Value
    weight: ir.Value
    shape: tuple[int, int]
    name: str
    is_head: bool


def find_products(graph: ir.Graph) -> list[Product]:
    """All products of a graph by weights that may be quantised, in its order.

    An adapter's own small matrices are left out, and what chooses among experts, where an error is a different choice.
    """
    # target_index chooses the states that get logits: what is computed from it is the head.
    head = reached_from(value for value in graph.inputs if value.name == "target_index")
    routers = find_routers(graph)
    products: list[Product] = []
    seen: dict[str, int] = {}
    for node in graph:
        if node.op_type != "MatMul" or node in routers:
            continue
        activation, weight = node.inputs
        assert activation is not None
        assert weight is not None
        sources = stored_tensors(weight)
        if sources is None or stored_tensors(activation) is not None or any(ADAPTER in name for name in sources):
            continue
        shape = _moved(weight).shape
        if len(shape) != 2:  # a stack of experts, whose products are not of one matrix
            continue
        first = sources[0]
        seen[first] = seen.get(first, 0) + 1
        name = first if seen[first] == 1 else f"{first}.{seen[first]}"
        products.append(Product(node, activation, weight, shape, name, node in head))
    return products


def find_routers(graph: ir.Graph) -> set[ir.Node]:
    """The products from which the largest are chosen (`TopK`), with nothing between that is a product too."""
    routers: set[ir.Node] = set()
    seen: set[ir.Node] = set()
    waiting = [node for node in graph if node.op_type == "TopK"]
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.op_type == "MatMul":
            routers.add(node)
        else:
            waiting += [source for value in node.inputs if value is not None and (source := value.producer())]
    return routers


def split_gemms(model: ir.Model) -> None:
    """Turn ``Gemm(x, W, b)`` into ``x @ W + b``, so that products are `MatMul` alone, in place."""
    for node in list(model.graph):
        factors = [node.attributes[name].as_float() for name in ("alpha", "beta") if name in node.attributes]
        transposed = {
            name for name in ("transA", "transB") if name in node.attributes and node.attributes[name].as_int()
        }
        if node.op_type != "Gemm" or any(factor != 1 for factor in factors) or "transA" in transposed:
            continue
        tape = Tape()
        weight = node.inputs[1]
        if "transB" in transposed:
            weight = tape.op("Transpose", [weight], {"perm": [1, 0]})
        result = tape.op("MatMul", [node.inputs[0], weight])
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            result = tape.op("Add", [result, node.inputs[2]])
        replace_nodes_and_values(model.graph, node, [node], tape.nodes, node.outputs, [result])


def stored_tensors(value: ir.Value) -> list[str] | None:
    """Names of the stored tensors that a value is made from by moving entries alone; None if by anything else."""
    if value.const_value is not None:
        return [str(value.name)] if isinstance(value.const_value, ir.ExternalTensor) else None
    node = value.producer()
    if node is None or not (node.op_type in MOVES or is_widening(node)):
        return None
    # All of a Concat's inputs are tensors; of the others the first, and what follows says where to.
    count = len(node.inputs) if node.op_type == "Concat" else 1
    if any(given is None or given.const_value is None for given in node.inputs[count:]):
        return None
    found = [None if source is None else stored_tensors(source) for source in node.inputs[:count]]
    return None if None in found else [name for names in found for name in names or ()]


def evaluate(weight: ir.Value) -> Float32Array:
    """The values of an expression that `stored_tensors` accepts, as float32.

    Entries are moved as they lie, by views of the mapped file, and widened at the end: only what is asked for is read.
    """
    values: Float32Array = np.ascontiguousarray(_moved(weight), dtype=np.float32)
    return values


def _moved(value: ir.Value) -> NDArray[Any]:
    """An expression's values in the dtype in which they are stored."""
    constant = value.const_value
    if constant is not None:
        return (readable(constant) if isinstance(constant, ir.ExternalTensor) else constant).numpy()
    node = value.producer()
    assert node is not None
    if node.op_type == "Cast":
        return _moved(_given(node.inputs[0]))
    inputs = {str(source.name): _moved(source) for source in node.inputs if source is not None}
    outputs = ReferenceEvaluator(ir.to_proto(node), opsets={"": 20}).run(None, inputs)
    moved: NDArray[Any] = outputs[node.outputs.index(value)]
    return moved


def is_widening(node: ir.Node) -> bool:
    """Whether a node casts to float32."""
    return node.op_type == "Cast" and node.attributes["to"].as_int() == ir.DataType.FLOAT


def _given(value: ir.Value | None) -> ir.Value:
    assert value is not None
    return value


def reached_from(values: Iterable[ir.Value]) -> set[ir.Node]:
    """All nodes that are computed from any of some values."""
    reached: set[ir.Node] = set()
    waiting = [node for value in values for node in value.consumers()]
    while waiting:
        node = waiting.pop()
        if node not in reached:
            reached.add(node)
            waiting += [consumer for output in node.outputs for consumer in output.consumers()]
    return reached
