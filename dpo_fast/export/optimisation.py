"""ONNX Script's optimiser: constants folded, what does nothing taken out."""

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
from onnxscript.optimizer import optimize_ir
from onnxscript.rewriter.pattern import MatchResult, SimplePatternMatcher
from transformers.exporters.utils import patch_attributes

# Constants up to this many elements are folded into the graph; parameters never are, they have no value here.
FOLDING_LIMIT = 4096

Match = Callable[..., MatchResult]


def optimise(graph: ir.Model) -> None:
    """Optimise a graph in place.

    Args:
        graph: parameters without values stay as they are.
    """
    with patch_attributes([(SimplePatternMatcher, "match", _only_where_it_may_begin)]):
        optimize_ir(graph, input_size_limit=FOLDING_LIMIT, output_size_limit=FOLDING_LIMIT)


def _only_where_it_may_begin(match: Match) -> Match:
    """A pattern of several outputs begins at nodes of its first one's operator.

    The matcher sees that as well, but only after it has gone through the whole graph, at each of its nodes: half of the
    time that a model of 30 layers takes to trace.
    """

    def quick(self: SimplePatternMatcher, model: ir.Model, graph: ir.Graph, node: ir.Node, **rest: Any) -> MatchResult:
        first = self.pattern.output_nodes[0].op_identifier()  # None: any operator
        if self.pattern.has_single_output_node or first in (None, node.op_identifier()):
            return match(self, model, graph, node, **rest)
        return MatchResult().fail("another operator")

    return quick
