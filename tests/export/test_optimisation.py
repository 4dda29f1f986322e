"""Our optimiser is ONNX Script's: the same graph, found in less time."""

import onnx
import onnx_ir as ir
import pytest
from onnxscript.optimizer import optimize_ir
from onnxscript.rewriter.pattern import SimplePatternMatcher

from dpo_fast.export.optimisation import FOLDING_LIMIT, optimise

# Halves of a rotation, which become one Split: of x twice, in both orders, and of y by three, which stay.
HALVES = """<ir_version: 10, opset_import: ["": 20]>
g (float[B, 8] x, float[B, 8] y) => (float[B, 8] a, float[B, 8] b, float[B, 3] c)
<int64[1] zero = {0}, int64[1] three = {3}, int64[1] four = {4}, int64[1] eight = {8}, int64[1] axis = {1}>
{
    x1 = Slice(x, zero, four, axis)
    x2 = Slice(x, four, eight, axis)
    minus = Neg(x2)
    a = Concat<axis = 1>(minus, x1)
    square = Mul(x, x)
    s2 = Slice(square, four, eight, axis)
    s1 = Slice(square, zero, four, axis)
    b = Concat<axis = 1>(s2, s1)
    y1 = Slice(y, zero, three, axis)
    y2 = Slice(y, three, eight, axis)
    c = Neg(y1)
    unused = Neg(y2)
}
"""


@pytest.fixture
def original() -> ir.Model:
    return ir.from_onnx_text(HALVES)


def test_the_graph_is_the_same(original: ir.Model) -> None:
    expected = original.clone()
    optimize_ir(expected, input_size_limit=FOLDING_LIMIT, output_size_limit=FOLDING_LIMIT)

    optimise(original)

    assert onnx.printer.to_text(ir.to_proto(original)) == onnx.printer.to_text(ir.to_proto(expected))
    assert [node.op_type for node in original.graph].count("Split") >= 1


def test_patterns_are_looked_for_only_where_they_may_begin(original: ir.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[str] = []
    multi_match = SimplePatternMatcher._multi_match

    def counted(self: SimplePatternMatcher, candidate: tuple[ir.Node, ...], check_removable: bool) -> object:
        looked.append(candidate[0].op_type)
        return multi_match(self, candidate, check_removable)

    monkeypatch.setattr(SimplePatternMatcher, "_multi_match", counted)

    optimise(original)

    assert set(looked) == {"Slice"}
