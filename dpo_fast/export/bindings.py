"""A graph's parameters bound to the tensors of a checkpoint, by file, offset and length.

Nothing is copied. A parameter is a stored tensor as it lies, or it is made from several by operations that only move
elements, written into the graph as ONNX nodes. Weights kept in bfloat16 or float16 are cast to float32 there. An engine
computes all of this once, when it loads.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from dpo_fast.export.checkpoint import StoredTensor

ONNX_TYPES = {"F32": ir.DataType.FLOAT, "F16": ir.DataType.FLOAT16, "BF16": ir.DataType.BFLOAT16}


@dataclass(frozen=True, slots=True)
class Stored:
    """A parameter that is a stored tensor, as it lies.

    Attributes:
        folder: the checkpoint's folder relative to the graph's file, such as "policy".
        name: the tensor's name in the checkpoint.
        tensor: where its bytes lie.
    """

    folder: str
    name: str
    tensor: StoredTensor

    @property
    def shape(self) -> tuple[int, ...]:
        """As stored."""
        return self.tensor.shape

    @property
    def sources(self) -> "tuple[Stored, ...]":
        """The stored tensors that it consists of: itself."""
        return (self,)


@dataclass(frozen=True, slots=True)
class Made:
    """A parameter, or a step towards one, that is made from stored tensors by moving their elements.

    Attributes:
        operation: the ONNX operator.
        parts: what it is applied to: several for Concat, in their order; one for the others.
        numbers: Concat: the axis; Reshape: the new shape; Slice: axis, start, end; Transpose: the permutation.
        shape: of the result.
    """

    operation: Literal["Concat", "Reshape", "Slice", "Transpose"]
    parts: "tuple[Binding, ...]"
    numbers: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def sources(self) -> tuple[Stored, ...]:
        """The stored tensors that it is made from, in the order of their use."""
        return tuple(source for part in self.parts for source in part.sources)


Binding = Stored | Made


def bind(graph: ir.Model, bindings: Mapping[str, Binding]) -> ir.Model:
    """A copy of a traced graph whose parameters are a checkpoint's tensors, by file, offset and length.

    A parameter that is a stored tensor becomes an initializer of the parameter's name. The stored tensors that others
    are made from become initializers named FOLDER/TENSOR, one for each however often it is used.

    Args:
        graph: from `dpo_fast.export.graph.trace`.
        bindings: by parameter; from `dpo_fast.export.weights.match_parameters`.
    """
    bound = graph.clone()
    start = bound.graph[0]
    for name, parameter in list(bound.graph.initializers.items()):
        if parameter.const_value is not None:
            continue
        binding = bindings[name]
        del bound.graph.initializers[name]
        nodes: list[ir.Node] = []
        if isinstance(binding, Stored):
            value = _initializer(bound.graph, binding, name)
        else:
            # Elements are moved in the stored precision and widened at the end: while an engine folds this, it holds
            # every step's result.
            mixed = len({source.tensor.dtype for source in binding.sources}) > 1
            value = _make(bound.graph, binding, nodes, widen_first=mixed)
            value.name = name if value.dtype == ir.DataType.FLOAT else f"{name}.{binding.sources[0].tensor.dtype}"
        if value.dtype != ir.DataType.FLOAT:
            value = _widen(value, nodes)
            value.name = f"{name}.float32"
        parameter.replace_all_uses_with(value)
        bound.graph.insert_before(start, nodes)
    return bound


def _make(graph: ir.Graph, binding: Binding, nodes: list[ir.Node], *, widen_first: bool) -> ir.Value:
    """The value of a binding in a graph; the nodes that compute it are appended to `nodes`."""
    if isinstance(binding, Stored):
        name = f"{binding.folder}/{binding.name}"  # no parameter's name has a slash
        value = graph.initializers.get(name) or _initializer(graph, binding, name)
        return _widen(value, nodes) if widen_first and value.dtype != ir.DataType.FLOAT else value
    inputs = [_make(graph, part, nodes, widen_first=widen_first) for part in binding.parts]
    numbers = binding.numbers
    attributes: dict[str, int | list[int]] = {}
    match binding.operation:
        case "Concat":
            attributes = {"axis": numbers[0]}
        case "Transpose":
            attributes = {"perm": list(numbers)}
        case "Reshape":
            inputs.append(_constant(numbers, nodes))
        case "Slice":
            axis, start, end = numbers
            inputs += [_constant([number], nodes) for number in (start, end, axis)]
    return _append(nodes, ir.node(binding.operation, inputs, attributes), binding.shape, inputs[0].dtype)


def _initializer(graph: ir.Graph, stored: Stored, name: str) -> ir.Value:
    """A new initializer that is a stored tensor, whole."""
    tensor = stored.tensor
    external = ir.ExternalTensor(
        f"{stored.folder}/{tensor.file}",
        tensor.offset,
        tensor.length,
        ONNX_TYPES[tensor.dtype],
        shape=ir.Shape(tensor.shape),
        name=name,
    )
    value = ir.Value(
        name=name, shape=external.shape, type=ir.TensorType(ONNX_TYPES[tensor.dtype]), const_value=external
    )
    graph.initializers.add(value)
    return value


def _widen(value: ir.Value, nodes: list[ir.Node]) -> ir.Value:
    cast = ir.node("Cast", [value], {"to": ir.DataType.FLOAT})
    return _append(nodes, cast, value.shape, ir.DataType.FLOAT)


def _constant(numbers: Sequence[int], nodes: list[ir.Node]) -> ir.Value:
    node = ir.node("Constant", [], {"value_ints": list(numbers)})
    return _append(nodes, node, (len(numbers),), ir.DataType.INT64)


def _append(
    nodes: list[ir.Node], node: ir.Node, shape: Sequence[int] | ir.Shape | None, dtype: ir.DataType | None
) -> ir.Value:
    """Append a node of one output, whose shape and type are known; the output."""
    nodes.append(node)
    (output,) = node.outputs
    output.shape = None if shape is None else ir.Shape(shape)
    output.type = None if dtype is None else ir.TensorType(dtype)
    return output
