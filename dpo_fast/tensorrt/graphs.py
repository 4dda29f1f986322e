"""The two graphs that TensorRT builds a role's plans from, made from the graph of the recipe's precision.

::

    input_ids, position_ids, segment_ids, target_index, adapter_gates -> [body] -> states, target_gates
    states, target_gates, target_ids                                  -> [head] -> log_prob, entropy …

The head is run over chunks of the states, so that the memory of its logits is bounded whatever the builder fuses.
"""

from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.convenience import replace_nodes_and_values
from onnx_ir.passes.common import RemoveUnusedNodesPass, ShapeInferencePass
from onnx_ir.tape import Tape

from dpo_fast.engines.onnxruntime import ADAPTER_GATES
from dpo_fast.errors import BuildError
from dpo_fast.export.external import readable
from dpo_fast.export.products import is_widening, reached_from
from dpo_fast.tensorrt.plans import STATES, TARGET_GATES

BODY, HEAD = "body", "head"
GATHERS = ("Gather", "GatherND")
NUMPY_TYPES = {ir.DataType.FLOAT: np.float32, ir.DataType.FLOAT16: np.float16}


def make_graphs(graph: Path) -> dict[str, ir.Model]:
    """A role's body and head.

    Args:
        graph: the role's graph in the recipe's precision, of standard operators.

    Returns:
        The two models under `BODY` and `HEAD`; their weights are read when they are written.

    Raises:
        BuildError: the graph has no place where it could be cut.
    """
    model = ir.load(graph)
    ShapeInferencePass()(model)
    _widen_behind_gathers(model)
    _find_largest_by_comparing(model)
    _average_weights(model)
    _cast_weights(model)
    try:
        return {BODY: _body(model.clone()), HEAD: _head(model.clone())}
    except LookupError as error:
        raise BuildError(f"{graph}: cannot be cut where the head begins ({error}); export the bundle again") from error


def write_graph(model: ir.Model, folder: Path, name: str) -> Path:
    """Write a graph with its weights beside it, each in the type in which it is used.

    Args:
        model: of `make_graphs`.
        folder: that exists.
        name: of the file, without a suffix.

    Returns:
        The .onnx file.
    """
    path = folder / f"{name}.onnx"
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = readable(value.const_value)
    ir.save(model, path, external_data=f"{name}.weights")
    return path


def _entrances(graph: ir.Graph) -> list[ir.Node]:
    """The nodes that take what belongs to the targets out of what belongs to all tokens, the states' first."""
    of_targets = reached_from(value for value in graph.inputs if value.name == "target_index")
    found = []
    for node in graph:
        if node.op_type not in GATHERS or node not in of_targets:
            continue
        data = node.inputs[0]
        if data is None or data.const_value is not None or data.producer() in of_targets:
            continue
        if data.is_graph_input() or data.producer() is not None:
            found.append(node)
    gates = [node for node in found if _gates_alone(node)]
    states = [node for node in found if node not in gates]
    if len(states) != 1 or len(gates) > 1:
        raise LookupError(f"{len(states)} values of the targets' states, {len(gates)} of their gates")
    return states + gates


def _gates_alone(node: ir.Node) -> bool:
    """Whether what a node gathers is the input `adapter_gates`."""
    data = node.inputs[0]
    return data is not None and data.name == ADAPTER_GATES


def _body(model: ir.Model) -> ir.Model:
    """What makes the states of the targets, and their gates."""
    graph = model.graph
    entrances = _entrances(graph)
    graph.outputs.clear()
    for node, name in zip(entrances, (STATES, TARGET_GATES), strict=False):
        value = node.outputs[0]
        value.name = name
        if value.shape is not None:
            value.shape = ir.Shape(["N", *value.shape[1:]])
        graph.outputs.append(value)
    return _pruned(model)


def _head(model: ir.Model) -> ir.Model:
    """What makes the outputs of the targets' states."""
    graph = model.graph
    for node, name in zip(_entrances(graph), (STATES, TARGET_GATES), strict=False):
        value = node.outputs[0]
        shape = None if value.shape is None else ir.Shape(["N", *value.shape[1:]])
        given = ir.Value(name=name, shape=shape, type=value.type)
        value.replace_all_uses_with(given)
        graph.inputs.append(given)
    return _pruned(model)


def _pruned(model: ir.Model) -> ir.Model:
    """A model without what its outputs do not need."""
    RemoveUnusedNodesPass()(model)
    graph = model.graph
    for value in [value for value in graph.inputs if not value.uses() and not value.is_graph_output()]:
        graph.inputs.remove(value)
    for name in [name for name, value in graph.initializers.items() if not value.uses()]:
        del graph.initializers[name]
    return model


def _widen_behind_gathers(model: ir.Model) -> None:
    """Turn ``gather(widen(table), ids)`` into ``widen(gather(table, ids))``: the embedding stays as it is stored."""
    for node in list(model.graph):
        table = node.inputs[0] if node.op_type == "Gather" else None
        cast = None if table is None else table.producer()
        stored = None if cast is None or not is_widening(cast) else cast.inputs[0]
        if stored is None or not _is_weight(stored):
            continue
        tape = Tape()
        gathered = tape.op("Gather", [stored, node.inputs[1]], dict(node.attributes))
        gathered.type, gathered.shape = stored.type, node.outputs[0].shape
        wide = tape.op("Cast", [gathered], {"to": ir.DataType.FLOAT})
        wide.dtype, wide.shape = ir.DataType.FLOAT, node.outputs[0].shape
        replace_nodes_and_values(model.graph, node, [node], tape.nodes, node.outputs, [wide])
    RemoveUnusedNodesPass()(model)


def _find_largest_by_comparing(model: ir.Model) -> None:
    """Put comparisons with the maximum in the place of each search for the largest entry's position.

    TensorRT reads `ArgMax` as `TopK`, and promises nothing about ties; the contract's is_top1 needs the first of equal
    entries.
    """
    for node in list(model.graph):
        values = node.inputs[0] if node.op_type == "ArgMax" else None
        if values is None or values.shape is None:
            continue
        axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
        axis %= len(values.shape)
        size = values.shape[axis]
        keeps = "keepdims" not in node.attributes or node.attributes["keepdims"].as_int() == 1
        if not isinstance(size, int) or values.dtype is None:
            continue
        tape = Tape()
        places = np.arange(size, dtype=np.float32).reshape([-1] + [1] * (len(values.shape) - 1 - axis))
        axes = tape.op("Constant", [], {"value_ints": [axis]})
        largest = tape.op("ReduceMax", [values, axes], {"keepdims": 1})
        position = tape.op(
            "Where",
            [
                tape.op("Equal", [values, largest]),
                tape.op("Constant", [], {"value": ir.tensor(places)}),
                tape.op("Constant", [], {"value": ir.tensor(np.float32(size))}),
            ],
        )
        first = tape.op("ReduceMin", [position, axes], {"keepdims": int(keeps)})
        found = tape.op("Cast", [first], {"to": ir.DataType.INT64})
        found.dtype, found.shape = ir.DataType.INT64, node.outputs[0].shape
        replace_nodes_and_values(model.graph, node, [node], tape.nodes, node.outputs, [found])


def _cast_weights(model: ir.Model) -> None:
    """Make a weight that is only cast a weight of the cast's type, whose values are computed when it is written."""
    graph = model.graph
    made: dict[tuple[ir.Value, int], ir.Value] = {}
    for node in list(graph):
        source = node.inputs[0] if node.op_type == "Cast" else None
        if not _is_weight(source):
            continue
        assert source is not None
        to = ir.DataType(node.attributes["to"].as_int())
        if (source, to) not in made:
            name = f"{source.name}.{to.name.lower()}"
            stored = source.const_value
            assert isinstance(stored, ir.ExternalTensor)
            tensor = ir.LazyTensor(
                lambda stored=stored, to=to, name=name: ir.tensor(  # type: ignore[misc]
                    readable(stored).numpy().astype(to.numpy()), dtype=to, name=name
                ),
                dtype=to,
                shape=ir.Shape(stored.shape.numpy()),
                name=name,
            )
            made[source, to] = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(to), const_value=tensor)
            graph.register_initializer(made[source, to])
        node.outputs[0].replace_all_uses_with(made[source, to])
    RemoveUnusedNodesPass()(model)


def _average_weights(model: ir.Model) -> None:
    """Make the mean of a weight a weight of its own: the plan would hold the matrix twice, and read it in each run."""
    for node in list(model.graph):
        source = node.inputs[0] if node.op_type == "ReduceMean" else None
        cast = None if source is None else source.producer()
        if cast is not None and is_widening(cast):
            source = cast.inputs[0]
        axes = node.inputs[1].const_value if source is not None and len(node.inputs) > 1 and node.inputs[1] else None
        if not _is_weight(source) or axes is None or node.outputs[0].dtype is None:
            continue
        assert source is not None
        stored = source.const_value
        assert isinstance(stored, ir.ExternalTensor)
        over = tuple(axes.numpy().reshape(-1).tolist())
        keeps = "keepdims" not in node.attributes or node.attributes["keepdims"].as_int() == 1
        name, kind = f"{source.name}.mean", node.outputs[0].dtype

        def mean(
            stored: ir.ExternalTensor = stored,
            over: tuple[int, ...] = over,
            keeps: bool = keeps,
            name: str = name,
            kind: ir.DataType = kind,
        ) -> ir.TensorProtocol:
            values = readable(stored).numpy().mean(over, dtype=np.float32, keepdims=keeps)
            return ir.tensor(values.astype(kind.numpy()), dtype=kind, name=name)

        sizes = stored.shape.numpy()
        kept = [1 if axis in over else size for axis, size in enumerate(sizes) if keeps or axis not in over]
        tensor = ir.LazyTensor(mean, dtype=kind, shape=ir.Shape(kept), name=name)
        value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(kind), const_value=tensor)
        model.graph.register_initializer(value)
        node.outputs[0].replace_all_uses_with(value)
    RemoveUnusedNodesPass()(model)


def _is_weight(value: ir.Value | None) -> bool:
    """Whether a value is a tensor of a weights' file."""
    return value is not None and isinstance(value.const_value, ir.ExternalTensor)
