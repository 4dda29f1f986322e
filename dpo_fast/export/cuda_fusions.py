"""Attention and normalisations of a graph for ONNX Runtime's CUDA provider: one operator each, in place of many.

=====================================================  ====================================================
in the graph                                           becomes
=====================================================  ====================================================
`dpo_fast.export.attention`, without cap or sink       com.microsoft.MultiHeadAttention
x / sqrt(mean(x²) + epsilon) · weight                  RMSNormalization
the same of a + b, which is needed elsewhere too       com.microsoft.SkipSimplifiedLayerNormalization
LayerNormalization of a + b, likewise                  com.microsoft.SkipLayerNormalization
=====================================================  ====================================================

What is not exactly one of these stays as it is: attention whose scores are capped, that has a sink or a bias for each
head, and normalisations in other forms.

ONNX Runtime's GroupQueryAttention would not need keys and values for every query head, but its CUDA kernel refuses a
mask of pairs of tokens, which a shared prompt needs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import CommonSubexpressionEliminationPass, RemoveUnusedNodesPass
from onnx_ir.tape import Tape

from dpo_fast.export.quantized_products import MICROSOFT

RMS_OPSET = 23  # in which ONNX has the operator `RMSNormalization`
# What is added to the scores of tokens that may not be seen. Not float32's lowest, which is infinite in float16, and
# whose sum with a score may be: kernels that go through the keys in blocks may meet a block with nothing else in it.
# A probability of exp(-65504) is 0 as well.
FORBIDDEN = -65504.0
HALVES_AND_FLOAT = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})


def fuse_for_cuda(model: ir.Model) -> None:
    """Fuse a typed graph's attention and normalisations, in place.

    Args:
        model: in float32, or narrowed (`dpo_fast.export.half`), with the shapes of its values.
    """
    graph = model.graph
    for node in list(graph):
        if node.op_type == "Softmax" and (attention := _find_attention(node)) is not None:
            _fuse_attention(graph, attention)
    for node in list(graph):
        normalisation = _find_rms(node) or _find_layer_norm(node)
        if normalisation is not None and not _is_given_out(normalisation.state, normalisation.last.outputs[0]):
            _fuse_normalisation(graph, normalisation)
    RemoveUnusedNodesPass()(model)
    CommonSubexpressionEliminationPass()(model)  # each layer has made the mask for itself
    graph.sort()
    if any(node.domain == MICROSOFT for node in graph):
        model.opset_imports[MICROSOFT] = 1
    if any(node.op_type == "RMSNormalization" for node in graph):
        model.opset_imports[""] = max(model.opset_imports[""], RMS_OPSET)


# -- attention --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Attention:
    """What one attention is made of.

    Attributes:
        query: (B, key heads, groups * T, D), scaled.
        key: (B, key heads, D, T).
        value: (B, key heads, T, D of values).
        forbidden: (B, 1, T, T) bool, True where a token may not look.
        key_heads, groups: how many, and how many query heads share each.
        size, value_size: D, and D of values.
        last: the node that makes (B, T, heads, D of values).
    """

    query: ir.Value
    key: ir.Value
    value: ir.Value
    forbidden: ir.Value
    key_heads: int
    groups: int
    size: int
    value_size: int
    last: ir.Node


def _find_attention(softmax: ir.Node) -> _Attention | None:
    """The attention around a softmax over (B, key heads, groups, T, T), if it is ours, without cap or sink."""
    shape = softmax.outputs[0].shape
    if shape is None or len(shape) != 5 or softmax.attributes["axis"].as_int() not in (-1, 4):
        return None
    key_heads, groups = shape[1], shape[2]
    total = _made_by(softmax.inputs[0], "Add")
    if total is None:
        return None
    for scores, mask in (tuple(total.inputs), tuple(reversed(total.inputs))):
        product = _made_by(scores, "MatMul", through=("Reshape", "Cast"))
        forbidden = _forbidden(mask)
        if product is not None and forbidden is not None:
            break
    else:
        return None
    second = _only_use(softmax.outputs[0], through=("Reshape", "Cast"))
    if second is None or second.op_type != "MatMul":
        return None
    last = _only_use(second.outputs[0], through=("Reshape",))
    if last is None or last.op_type != "Transpose" or _permutation(last) != [0, 2, 1, 3]:
        return None
    (query, key), value = product.inputs, second.inputs[1]
    assert query is not None
    assert key is not None
    assert value is not None
    sizes = [_static_size(query, 3), _static_size(key, 2), _static_size(value, 3)]
    heads_of = [_static_size(each, 1) for each in (query, key, value)]
    if (
        not isinstance(key_heads, int)
        or not isinstance(groups, int)
        or heads_of != [key_heads] * 3
        or sizes[0] != sizes[1]
        or sizes[0] is None
        or sizes[2] is None
        or len({each.dtype for each in (query, key, value)}) > 1
        or query.dtype not in HALVES_AND_FLOAT
        or not _is_of(last.outputs[0], [key_heads * groups, sizes[2]])
        or _is_given_out(last.outputs[0])
    ):
        return None
    return _Attention(query, key, value, forbidden, key_heads, groups, sizes[0], sizes[2], last)


def _forbidden(mask: ir.Value | None) -> ir.Value | None:
    """Of a mask (B, 1, 1, T, T) that is 0 or float32's lowest, where it is the lowest, as (B, 1, T, T) bool."""
    product = _made_by(mask, "Mul", through=("Unsqueeze",))
    if mask is None or mask.shape is None or product is None or product.outputs[0].shape is None:
        return None
    wide, given = list(mask.shape), list(product.outputs[0].shape)
    if len(given) != 4 or wide != [given[0], 1, 1, *given[2:]]:
        return None
    for values, factor in (tuple(product.inputs), tuple(reversed(product.inputs))):
        cast = _made_by(values, "Cast")
        if (
            cast is not None
            and cast.inputs[0] is not None
            and cast.inputs[0].dtype == ir.DataType.BOOL
            and _constant(factor) == np.finfo(np.float32).min
            and _static_size(cast.inputs[0], 1) == 1
        ):
            return cast.inputs[0]
    return None


def _fuse_attention(graph: ir.Graph, found: _Attention) -> None:
    """Put one operator in the place of an attention."""
    tape = Tape()
    heads, half = found.key_heads * found.groups, found.query.dtype
    assert half is not None
    # (B, key heads, groups * T, D) is (B, heads, T, D) as it lies.
    query = _reshape(tape, found.query, [0, heads, -1, found.size])
    query = _reshape(tape, _transpose(tape, query, [0, 2, 1, 3]), [0, 0, heads * found.size])
    key = _spread(tape, _transpose(tape, found.key, [0, 3, 1, 2]), found.groups, heads * found.size)
    value = _spread(tape, _transpose(tape, found.value, [0, 2, 1, 3]), found.groups, heads * found.value_size)
    is_forbidden = tape.op("Cast", [found.forbidden], {"to": half})
    bias = tape.op("Mul", [is_forbidden, _scalar(tape, FORBIDDEN, half)])
    for each in (is_forbidden, bias):
        each.dtype, each.shape = half, found.forbidden.shape
    attended = tape.op(
        "MultiHeadAttention",
        [query, key, value, None, None, bias],
        {"num_heads": heads, "scale": 1.0},  # queries have been scaled
        domain=MICROSOFT,
    )
    old = found.last.outputs[0]
    assert old.shape is not None
    attended.dtype, attended.shape = half, ir.Shape([old.shape[0], old.shape[1], heads * found.value_size])
    parted = _reshape(tape, attended, [0, 0, heads, found.value_size])
    parted.shape = old.shape
    graph.insert_before(found.last, tape.nodes)
    old.replace_all_uses_with(parted)


def _spread(tape: Tape, value: ir.Value, groups: int, width: int) -> ir.Value:
    """Each key head for all query heads of its group: (B, T, key heads, D) to (B, T, heads * D)."""
    if groups > 1:
        wide = tape.op("Unsqueeze", [value, _ints(tape, [3])])
        repeated = tape.op("Expand", [wide, _ints(tape, [1, 1, 1, groups, 1])])
        wide.type = repeated.type = value.type
        value = repeated
    return _reshape(tape, value, [0, 0, width])


def _transpose(tape: Tape, value: ir.Value, permutation: Sequence[int]) -> ir.Value:
    """A value with its axes in another order, made from what it was itself transposed from."""
    node = value.producer()
    if node is not None and node.op_type == "Transpose":
        source, before = node.inputs[0], _permutation(node)
        assert source is not None
        return _transpose(tape, source, [before[axis] for axis in permutation])
    if node is not None and node.op_type == "Cast" and _made_by(node.inputs[0], "Transpose") is not None:
        source = node.inputs[0]
        assert source is not None
        moved = tape.op("Cast", [_transpose(tape, source, permutation)], dict(node.attributes))
    elif list(permutation) == sorted(permutation):
        return value
    else:
        moved = tape.op("Transpose", [value], {"perm": list(permutation)})
    moved.type = value.type
    return moved


# -- normalisations ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Normalisation:
    """A normalisation over the last axis.

    Attributes:
        state: what is normalised.
        weight: (H,).
        bias: (H,), or None.
        epsilon: what is added to the mean of squares, or to the variance.
        is_rms: whether the mean stays.
        last: the node that makes the result.
    """

    state: ir.Value
    weight: ir.Value
    bias: ir.Value | None
    epsilon: float
    is_rms: bool
    last: ir.Node


def _find_rms(product: ir.Node) -> _Normalisation | None:
    """The normalisation by the root of the mean square that a product with a weight ends, if it is one."""
    if product.op_type != "Mul":
        return None
    for weight, quotient in (tuple(product.inputs), tuple(reversed(product.inputs))):
        division = _made_by(quotient, "Div")
        root = None if division is None else _made_by(division.inputs[1], "Sqrt")
        raised = None if root is None else _made_by(root.inputs[0], "Add")
        if division is None or raised is None or weight is None:
            continue
        mean, epsilon = _made_by(raised.inputs[0], "ReduceMean"), _constant(raised.inputs[1])
        square = None if mean is None else _made_by(mean.inputs[0], "Pow")
        state = division.inputs[0]
        if (
            mean is None
            or epsilon is None
            or square is None
            or state is None
            or square.inputs[0] is not state
            or _constant(square.inputs[1]) != 2
            or not _is_mean_of_last_axis(mean, state)
            or not _is_for(weight, state)
        ):
            continue
        return _Normalisation(state, weight, None, epsilon, True, product)
    return None


def _find_layer_norm(node: ir.Node) -> _Normalisation | None:
    """A `LayerNormalization` over the last axis, if it is one."""
    if node.op_type != "LayerNormalization" or node.domain:
        return None
    state, weight, bias = (*node.inputs, None)[:3]
    axis, epsilon = node.attributes.get("axis"), node.attributes.get("epsilon")
    if (
        state is None
        or weight is None
        or state.shape is None
        or (axis is not None and axis.as_int() not in (-1, len(state.shape) - 1))
        or any(each.uses() for each in node.outputs[1:])
        or not all(each is None or _is_for(each, state) for each in (weight, bias))
    ):
        return None
    return _Normalisation(state, weight, bias, 1e-5 if epsilon is None else epsilon.as_float(), False, node)


def _fuse_normalisation(graph: ir.Graph, found: _Normalisation) -> None:
    """Put one operator in the place of a normalisation, and of the sum that it is of."""
    tape = Tape()
    old = found.last.outputs[0]
    sum_node = _made_by(found.state, "Add")
    terms = [] if sum_node is None else list(sum_node.inputs)
    if terms and all(_is_alike(term, found.state) for term in terms):
        inputs = [*terms, found.weight, *([] if found.bias is None else [found.bias])]
        normalised, *unused, total = tape.op_multi_out(
            "SkipSimplifiedLayerNormalization" if found.is_rms else "SkipLayerNormalization",
            inputs,
            {"epsilon": found.epsilon},
            domain=MICROSOFT,
            num_outputs=4,
        )
        total.type, total.shape = found.state.type, found.state.shape
        for value in unused:  # the mean, and one over the deviation
            value.name = ""
    elif found.is_rms:
        attributes = {"axis": -1, "epsilon": found.epsilon, "stash_type": int(ir.DataType.FLOAT)}
        normalised, total = tape.op("RMSNormalization", [found.state, found.weight], attributes), None
    else:
        return
    normalised.type, normalised.shape = old.type, old.shape
    graph.insert_before(found.last, tape.nodes)
    old.replace_all_uses_with(normalised)
    if total is not None:
        found.state.replace_all_uses_with(total)


def _is_mean_of_last_axis(mean: ir.Node, state: ir.Value) -> bool:
    """Whether a `ReduceMean` keeps all axes but reduces the last."""
    keeps = "keepdims" not in mean.attributes or mean.attributes["keepdims"].as_int() == 1
    axes = mean.inputs[1].const_value if len(mean.inputs) > 1 and mean.inputs[1] is not None else None
    rank = 0 if state.shape is None else len(state.shape)
    return keeps and axes is not None and axes.numpy().tolist() in ([-1], [rank - 1])


def _is_for(weight: ir.Value, state: ir.Value) -> bool:
    """Whether a weight is of a normalisation over a state's last axis, in float32 as the state is."""
    shapes_known = weight.shape is not None and state.shape is not None
    return (
        shapes_known
        and len(weight.shape or ()) == 1
        and isinstance((state.shape or [None])[-1], int)
        and (weight.shape or [None])[0] == (state.shape or [None])[-1]
        and weight.dtype == state.dtype == ir.DataType.FLOAT
    )


def _is_alike(term: ir.Value | None, state: ir.Value) -> bool:
    """Whether a term of a sum is (B, T, H) as the sum is."""
    if term is None or term.const_value is not None or term.shape is None or state.shape is None:
        return False
    return len(state.shape) == 3 and term.shape == state.shape and term.dtype == state.dtype


# -- looking at a graph, and adding to it -----------------------------------------------------------------------------


def _made_by(value: ir.Value | None, operator: str, through: Sequence[str] = ()) -> ir.Node | None:
    """The node of an operator that a value comes from, at once or through some others."""
    node = None if value is None else value.producer()
    while node is not None and node.op_type in through:
        source = node.inputs[0]
        node = None if source is None else source.producer()
    return node if node is not None and node.op_type == operator and not node.domain else None


def _only_use(value: ir.Value, through: Sequence[str]) -> ir.Node | None:
    """The only node that takes a value first, at once or through some others."""
    uses = list(value.uses())
    if len(uses) != 1 or uses[0].idx != 0 or value.is_graph_output():
        return None
    node = uses[0].node
    return _only_use(node.outputs[0], through) if node.op_type in through else node


def _constant(value: ir.Value | None) -> float | None:
    """The number that a value is, if it is one."""
    constant = None if value is None else value.const_value
    return float(constant.numpy().item()) if constant is not None and constant.size == 1 else None


def _static_size(value: ir.Value, axis: int) -> int | None:
    """How long an axis of a value of rank four is, if that is known."""
    if value.shape is None or len(value.shape) != 4:
        return None
    size = value.shape[axis]
    return size if isinstance(size, int) else None


def _is_given_out(*values: ir.Value) -> bool:
    """Whether any of some values is the graph's output, which must keep its name."""
    return any(value.is_graph_output() for value in values)


def _is_of(value: ir.Value, sizes: Sequence[int | None]) -> bool:
    """Whether a value's last axes have these sizes."""
    return value.shape is not None and len(value.shape) == 4 and list(value.shape)[2:] == list(sizes)


def _permutation(node: ir.Node) -> list[int]:
    return [int(axis) for axis in node.attributes["perm"].as_ints()]


def _reshape(tape: Tape, value: ir.Value, shape: Sequence[int]) -> ir.Value:
    """A value in another shape; 0 keeps an axis."""
    result = tape.op("Reshape", [value, _ints(tape, shape)])
    result.type = value.type
    return result


def _ints(tape: Tape, numbers: Sequence[int]) -> ir.Value:
    result: ir.Value = tape.op("Constant", [], {"value": ir.tensor(np.array(numbers, np.int64))})
    return result


def _scalar(tape: Tape, number: float, dtype: ir.DataType) -> ir.Value:
    result: ir.Value = tape.op("Constant", [], {"value": ir.tensor(np.array(number, dtype.numpy()))})
    return result
