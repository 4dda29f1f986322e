"""What TensorRT would refuse of a graph, or take and compute wrongly: found without TensorRT, from operators.toml."""

import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import onnx_ir as ir
from onnx_ir.convenience import get_const_tensor
from onnx_ir.passes.common import ShapeInferencePass

TABLE = Path(__file__).with_name("operators.toml")
LARGEST_TOP_K = 3839
# Inputs that become sizes, by operator: what they are computed from must be sizes too.
SIZES = {"Reshape": (1,), "Expand": (1,), "ConstantOfShape": (0,), "Range": (0, 1, 2), "Tile": (1,), "Pad": (1,),
         "Slice": (1, 2), "Split": (1,), "TopK": (1,)}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Violation:
    """A node that TensorRT would not take.

    Attributes:
        node: its name, or that of its first output.
        operator: its operator, with the domain where it has one.
        reason: what is wrong, and what would be right.
    """

    node: str
    operator: str
    reason: str

    def __str__(self) -> str:
        return f"node {self.node!r} ({self.operator}): {self.reason}"


@dataclass(frozen=True, slots=True)
class _Rule:
    """A line of the table."""

    types: frozenset[str]
    constants: tuple[int, ...]
    attributes: dict[str, list[Any]]
    outputs: int | None
    dimensions: int


def find_violations(model: ir.Model) -> list[Violation]:
    """What TensorRT would refuse of a graph.

    Args:
        model: its types are inferred where they are missing; nothing else is changed.

    Returns:
        One for each rule that a node breaks, in the graph's order; empty for a graph that may be built.
    """
    rules, refused, opset = _table()
    ShapeInferencePass()(model)
    found = []
    version = model.opset_imports.get("", 0)
    if not opset["first"] <= version <= opset["last"]:
        found.append(Violation("the graph", "opset", f"{version} is not between {opset['first']} and {opset['last']}"))
    for node in model.graph.all_nodes():
        name, operator = _names(node)
        reasons: Iterable[str]
        if node.domain not in ("", "ai.onnx"):
            reasons = ["is no standard operator"]
        elif node.op_type in refused:
            reasons = [refused[node.op_type]]
        elif node.op_type not in rules:
            reasons = ["there is no importer that is known of"]
        else:
            reasons = _broken(node, rules[node.op_type])
        found += [Violation(name, operator, reason) for reason in reasons]
    return found


def _broken(node: ir.Node, rule: _Rule) -> Iterator[str]:
    """The rules of its operator that a node breaks."""
    of_type = node.outputs[0] if node.op_type in ("Cast", "Constant") or not node.inputs else node.inputs[0]
    kind = None if of_type is None else of_type.dtype
    if kind is not None and kind.name not in rule.types:
        yield f"takes {', '.join(sorted(rule.types))}, not {kind.name}"
    for name, allowed in rule.attributes.items():
        if name in node.attributes and _plain(node.attributes[name].value) not in allowed:
            value = _plain(node.attributes[name].value)
            yield f"{name} must be {' or '.join(map(repr, allowed))}, not {value!r}"
    for position in rule.constants:
        given = node.inputs[position] if position < len(node.inputs) else None
        if given is not None and not _is_constant(given):
            yield f"input {position} must be known when the plan is built"
    if (
        rule.outputs is not None
        and sum(bool(value.name) and bool(value.uses()) for value in node.outputs) > rule.outputs
    ):
        yield f"gives {rule.outputs} output"
    shape = None if of_type is None else of_type.shape
    if shape is not None and len(shape) < rule.dimensions:
        yield f"takes {rule.dimensions} dimensions at least, not {len(shape)}"
    if node.op_type == "Slice" and len(node.inputs) < 4 and (shape is None or len(shape) > 1):
        yield "needs its axes"
    if node.op_type == "Squeeze" and len(node.inputs) < 2 and not _is_static(node.inputs[0]):
        yield "needs its axes"
    if node.op_type == "TopK" and _constant_size(node.inputs[1]) > LARGEST_TOP_K:
        yield f"finds at most {LARGEST_TOP_K} entries"
    if node.op_type == "Scan" and len(node.inputs) == node.attributes["num_scan_inputs"].as_int():
        yield "needs a state that is carried"
    if node.op_type in ("QuantizeLinear", "DequantizeLinear") and len(node.inputs) > 2:
        zero = node.inputs[2]
        if zero is not None and (zero.dtype is None or zero.dtype.name.startswith("U")):
            yield "is symmetric: a zero point of 0, in a signed type"
    for position in SIZES.get(node.op_type, ()):
        given = node.inputs[position] if position < len(node.inputs) else None
        if given is not None and not _is_size(given):
            yield f"input {position} is a size that depends on the data"


def _is_static(value: ir.Value | None) -> bool:
    """Whether all of a value's sizes are known."""
    return value is not None and value.shape is not None and all(isinstance(size, int) for size in value.shape)


def _is_constant(value: ir.Value) -> bool:
    """Whether a value is known before anything runs."""
    node = value.producer()
    return value.const_value is not None or (node is not None and node.op_type == "Constant")


def _constant_size(value: ir.Value | None) -> int:
    """A constant's number; 0 where it is not known."""
    tensor = None if value is None else get_const_tensor(value)
    return 0 if tensor is None else int(tensor.numpy().reshape(-1)[0])


def _is_size(value: ir.Value) -> bool:
    """Whether a value is computed of tensors' shapes and constants alone."""
    waiting, seen = [value], set()
    while waiting:
        each = waiting.pop()
        if each in seen or _is_constant(each):
            continue
        seen.add(each)
        node = each.producer()
        if node is None:  # an input: of the graph, or of a loop's body
            return False
        if node.op_type not in ("Shape", "Size"):
            waiting += [given for given in node.inputs if given is not None]
    return True


def _names(node: ir.Node) -> tuple[str, str]:
    operator = f"{node.domain}.{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type
    return str(node.name or node.outputs[0].name), operator


def _plain(value: Any) -> Any:
    return value.decode() if isinstance(value, bytes) else value


@cache
def _table() -> tuple[dict[str, _Rule], dict[str, str], dict[str, int]]:
    """The table: rules by operator, why others are refused, and the opsets."""
    table = tomllib.loads(TABLE.read_text(encoding="utf-8"))
    rules: dict[str, _Rule] = {}
    for line in table["operators"]:
        types = line["types"] if isinstance(line["types"], list) else table[line["types"]]
        rule = _Rule(
            frozenset(types),
            tuple(line.get("constants", ())),
            line.get("attributes", {}),
            line.get("outputs"),
            line.get("dimensions", 0),
        )
        rules |= dict.fromkeys(line["names"], rule)
    return rules, table["refused"], table["opset"]
