"""OpenVINO on the CPU: the exact graph with its products in bfloat16, or a graph with int8 weights."""

import copy
import threading
from collections.abc import Sequence
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dpo_fast.batches import Batch
from dpo_fast.engines.onnxruntime import ADAPTER_GATES
from dpo_fast.errors import BundleError, EngineOutputError, MissingDependencyError, UsageError
from dpo_fast.text import said_by
from dpo_fast.types import TokenScores

if TYPE_CHECKING:
    import openvino

TARGETS = ("target_index", "target_ids")  # the inputs that say which states get logits, and of which tokens


# Held while OpenVINO compiles or computes: its plugin had races between threads that compile (openvinotoolkit/openvino,
# pull requests 17164 and 17184), and what goes wrong there ends the process without a word. An evaluation loses
# nothing: 60 pairs by two engines of 135M parameters on two cores took 17.7 s with it and 19.2 s without.
ONE_AT_A_TIME = threading.RLock()


@cache
def _open_once() -> "openvino.Core":
    import openvino

    return openvino.Core()


def open_core() -> "openvino.Core":
    """OpenVINO's core, one for the whole process, whichever threads ask for it.

    Each core's CPU plugin gives the thread that loads it another stack to handle signals on, and remembers the one
    before. Of two plugins, the one that is unloaded last puts back the other's, which is freed by then: the next
    Ctrl-C ends the process with SIGSEGV. One that stays loaded has no such end.

    Raises:
        ImportError: openvino is not installed.
    """
    with ONE_AT_A_TIME:  # threads that find no core would each make one
        return _open_once()


class OpenVinoEngine:
    """A log-prob graph on OpenVINO's CPU plugin.

    OpenVINO rounds the result of every product to the precision that it computes in. In bfloat16 a logit of 20 would be
    off by up to 0.06, so the graph is cut where the head begins: what makes the states is compiled in the lower
    precision, the head in float32.
    """

    def __init__(
        self, graph: Path, *, precision: str = "bf16", gates: Sequence[float] | None = None, threads: int = 0
    ) -> None:
        """Load a graph and the weights it points to.

        Args:
            graph: the .onnx file; its weights must lie in its folder or below.
            precision: "fp32"; "bf16"; or "int8" for a graph whose weights are int8, which computes in bfloat16 where
                the processor does.
            gates: one for each adapter in the graph: 1 turns it on, 0 off; None for a graph without adapters.
            threads: 0 lets OpenVINO take every physical core.

        Raises:
            MissingDependencyError: openvino is not installed.
            UsageError: the processor does not compute in bfloat16.
            BundleError: the graph or its weights cannot be loaded, or its inputs or outputs are not those of the graph
                contract.
        """
        try:
            import openvino
        except ImportError as error:
            raise MissingDependencyError("openvino", "openvino", "running a graph on OpenVINO") from error
        core = open_core()
        in_bfloat16 = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if precision == "bf16" and not in_bfloat16:
            raise UsageError(
                f"{graph}: is to run in bf16, and OpenVINO finds no bfloat16 arithmetic in this processor, so it would "
                "run in float32; use a recipe such as cpu-int8 or cpu-fp32"
            )
        body_precision = "bf16" if precision != "fp32" and in_bfloat16 else "f32"
        options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
        try:
            with ONE_AT_A_TIME:
                model = core.read_model(graph)
                self._outputs = [output.get_any_name() for output in model.outputs]
                self._check_contract(graph, model, gates)
                find_largest_by_comparing(model)
                body, head = split_head(model)
                self._body_inputs = [node.get_friendly_name() for node in body.get_parameters()]
                self._head_inputs = [node.get_friendly_name() for node in head.get_parameters()[len(body.outputs) :]]
                self._body, self._head = (
                    core.compile_model(part, "CPU", options | {"INFERENCE_PRECISION_HINT": hint}).create_infer_request()
                    for part, hint in ((body, body_precision), (head, "f32"))
                )
        except RuntimeError as error:
            raise BundleError(
                f"{graph}: OpenVINO cannot load it ({said_by(error)}); export the bundle again"
            ) from error
        self._gates: Sequence[float] | Sequence[Sequence[float]] | None = gates
        self.precision = precision
        computes = {"bf16": "bfloat16", "f32": "float32"}[body_precision]
        self.name = f"openvino {openvino.__version__.split('-')[0]} CPU, states in {computes}, head in float32"

    def _check_contract(self, graph: Path, model: "openvino.Model", gates: Sequence[float] | None) -> None:
        """Refuse a graph of other outputs, or of adapters where there should be none."""
        contract = [field.name for field in fields(TokenScores)]
        if sorted(self._outputs) != sorted(contract):
            raise BundleError(
                f"{graph}: puts out {', '.join(self._outputs)}, not {', '.join(contract)}; export the bundle again"
            )
        if (ADAPTER_GATES in {value.get_any_name() for value in model.inputs}) != (gates is not None):
            raise BundleError(f"{graph}: has adapters, or has none, where bundle.json says otherwise; export it again")

    def with_gates(self, gates: Sequence[float] | Sequence[Sequence[float]]) -> "OpenVinoEngine":
        """The same compiled graph with other adapters turned on; several lists of gates are taken by the rows in turn.

        The two share OpenVINO's buffers; `ONE_AT_A_TIME` keeps either from scoring while the other does.
        """
        other = copy.copy(self)
        other._gates = gates
        return other

    def score(self, batch: Batch) -> TokenScores:
        """Score a batch's N targets.

        Raises:
            EngineOutputError: OpenVINO failed, most likely for want of memory.
        """
        rows, width = batch.input_ids.shape
        inputs: dict[str, Any] = dict(batch.inputs)
        if self._gates is not None:
            gates = np.array(self._gates, np.float32)
            inputs[ADAPTER_GATES] = np.resize(gates, (rows, gates.shape[-1]))
        try:
            with ONE_AT_A_TIME:
                self._body.infer([inputs[name] for name in self._body_inputs], share_inputs=True)
                states = [self._body.get_output_tensor(number) for number in range(len(self._body.model_outputs))]
                self._head.infer([*states, *(inputs[name] for name in self._head_inputs)], share_inputs=True)
                scores = {name: np.array(self._head.get_tensor(name).data) for name in self._outputs}
        except RuntimeError as error:
            raise EngineOutputError(
                f"OpenVINO failed at a batch of {rows} x {width} tokens ({said_by(error)}); "
                "if memory is short, lower --token-budget or --max-length"
            ) from error
        return TokenScores(**scores)


def split_head(model: "openvino.Model") -> "tuple[openvino.Model, openvino.Model]":
    """Cut a log-prob graph in two: what makes the states, and the head, which is all that the targets reach.

    ::

        input_ids … -> [body] -> states ─┐
          target_index, target_ids … ┴-> [head] -> log_prob …

    Args:
        model: the whole graph; it is taken apart.

    Returns:
        The body, and the head, whose first inputs are the body's outputs, in order.
    """
    import openvino
    from openvino import opset13

    inputs = model.get_parameters()
    in_head = _reached([node for node in inputs if node.get_friendly_name() in TARGETS])
    computed = _reached(inputs)  # what is not is constant, and both parts may have it
    states: dict[Any, Any] = {}  # results of the body: the head's inputs
    shared: dict[Any, Any] = {}  # inputs of the whole that both parts take: the head's own
    for node in in_head:
        for place in node.inputs():
            source = place.get_source_output()
            origin = source.get_node()
            if origin in in_head or origin not in computed:
                continue
            key, made = (origin, shared) if origin in inputs else ((origin, source.get_index()), states)
            if key not in made:
                parameter = opset13.parameter(source.get_partial_shape(), source.get_element_type())
                parameter.set_friendly_name(origin.get_friendly_name())
                made[key] = (source, parameter)
            place.replace_source_output(made[key][1].output(0))
    body_inputs = [node for node in inputs if node not in in_head and _users(node)]
    head_inputs = [node for node in inputs if node in in_head] + [parameter for _, parameter in shared.values()]
    body = openvino.Model([opset13.result(source) for source, _ in states.values()], body_inputs, "body")
    head = openvino.Model(model.get_results(), [*(parameter for _, parameter in states.values()), *head_inputs], "head")
    return body, head


def find_largest_by_comparing(model: "openvino.Model") -> None:
    """Put comparisons with the maximum in the place of each search for the largest entry's position, in place.

    OpenVINO reads `ArgMax` as `TopK`, which took a sixth of all time over the logits, and promises nothing about ties;
    the contract's is_top1 needs the first of equal entries.
    """
    from openvino import opset13

    last = opset13.constant(np.array([-1]))
    for node in model.get_ordered_ops():
        if node.get_type_name() != "TopK" or node.output(0).get_target_inputs():
            continue  # whoever wants the values as well wants more than a position
        values, shape = node.input_value(0), node.get_input_partial_shape(0)
        if node.get_attributes()["axis"] not in (-1, len(shape) - 1) or not shape[-1].is_static:
            continue  # the choice between tiles is small
        if not np.array_equal(node.input_value(1).get_node().get_data(), 1):
            continue
        size = shape[-1].get_length()
        is_largest = opset13.equal(values, opset13.reduce_max(values, last, True))
        position = opset13.select(is_largest, opset13.constant(np.arange(size, dtype=np.float32)), np.float32(size))
        first = opset13.convert(opset13.reduce_min(position, last, True), node.output(1).get_element_type())
        for place in node.output(1).get_target_inputs():
            place.replace_source_output(first.output(0))


def _reached(nodes: "Sequence[openvino.Node]") -> "dict[openvino.Node, None]":
    """The nodes, and all that is computed from them; a dictionary, for its order."""
    reached: dict[openvino.Node, None] = {}
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in reached:
            reached[node] = None
            waiting += _users(node)
    return reached


def _users(node: "openvino.Node") -> "list[openvino.Node]":
    """The nodes that take a node's results, in order of their names."""
    users = {place.get_node() for output in node.outputs() for place in output.get_target_inputs()}
    return sorted(users, key=lambda user: str(user.get_friendly_name()))
