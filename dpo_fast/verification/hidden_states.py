"""Which layer drifts: a graph's hidden states against PyTorch's, layer by layer.

A layer's output is found in a graph by what flows through it, whatever its nodes are called::

    input_ids ─▶ [embedding] ─▶ ● ─▶ [layer 0] ─▶ ● ─▶ [layer 1] ─▶ ● ─▶ [norm, head] ─▶ log_prob …

At each ● one value alone carries on what has been computed from the tokens. The weights' names say which layer a node
belongs to (`dpo_fast.export.precision.layer_number`): layer K's output is the first such value behind the last use of
its weights, and it lies before the first use of the next layer's. Shapes do not count as being computed from tokens,
nor do masks and rotary angles, which come of positions and segments. A model whose layers hand each other more than one
value has no such places, and is refused.
"""

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

from dpo_fast.batches import Batch, arrange, make_batches
from dpo_fast.bundle import Bundle
from dpo_fast.engines.onnxruntime import CPU, gated_inputs, open_session, session_options
from dpo_fast.engines.openvino import ONE_AT_A_TIME, open_core
from dpo_fast.engines.torch import load_model
from dpo_fast.errors import BundleError, EngineOutputError, MissingDependencyError, UsageError
from dpo_fast.export.checkpoint import ADAPTER_CONFIG
from dpo_fast.export.precision import layer_number
from dpo_fast.files import storage_errors
from dpo_fast.text import said_by
from dpo_fast.token_table import make_table
from dpo_fast.types import Float64Array, TokenizedPair

EMBEDDING = -1  # in the place of a layer's number: what the first layer takes in
ONE_ROW = 1  # token budget of batches that hold a row each, however long, so that nothing is padded
# Float32 sums in another order are 1e-7 to 1e-5 off, in thirty layers; 1 % more on one of a layer's weights is 1e-3.
ROUNDING = 1e-4
SHARE = 0.5  # of the most that a layer adds: who adds as much is a culprit too
States = list[NDArray[np.float32]]  # of a row: the embedding's, then each layer's; PyTorch's (T, H)
Run = Callable[[Batch], States]


@dataclass(frozen=True, slots=True)
class LayerDrift:
    """How far a graph's hidden states are from PyTorch's behind one layer.

    Attributes:
        graph: the graph's file.
        precision: of its matrix products.
        layer: counted from 0; `EMBEDDING` for what the first layer takes in.
        error: root mean square of the difference over that of PyTorch's state, dimensionless.
        added: by how much the error is larger than behind the layer before; negative where it shrinks.
    """

    graph: str
    precision: str
    layer: int
    error: float
    added: float


def compare_hidden_states(
    bundle: Bundle, role: str, pairs: Sequence[TokenizedPair], *, trust_remote_code: bool = False
) -> list[LayerDrift]:
    """Compare a role's graphs with its PyTorch model in float32, one sequence a row.

    PyTorch's states of all pairs are kept in memory meanwhile: tokens x layers x width x 4 bytes.

    Args:
        bundle: whose exact graph, and whose engine's graph if that is another, are compared.
        role: "policy" or "reference".
        pairs: a few.
        trust_remote_code: whether the model's own Python code may be run.

    Returns:
        By graph, the exact one first, and by layer.

    Raises:
        UsageError: there are no pairs, the layers cannot be told apart, or nothing here runs the engine's graph (those
            for CUDA are fused across layers).
        CheckpointError: PyTorch cannot load the model.
        EngineOutputError: a state is not finite, or a graph fails.
        MissingDependencyError: what runs a graph is not installed.
    """
    if not pairs:
        raise UsageError("hidden states are compared on pairs, and there are none; name a data set that has some")
    batches = list(make_batches(arrange(make_table(pairs), "plain", ONE_ROW), ONE_ROW))
    recipe, entry = bundle.manifest.recipe, bundle.manifest.models[role]
    if recipe["engine"] == "onnxruntime-cuda":
        raise UsageError(
            f"{bundle.engine_graph(role)}: is fused for CUDA, a layer's end with the next one's beginning, so its "
            "hidden states cannot be compared; export a bundle with the recipe cpu-fp32 (tensorrt-fp16 for halves)"
        )
    graphs = {bundle.graph(role): ("onnxruntime", "fp32")}
    if bundle.engine_graph(role) != bundle.graph(role):
        graphs[bundle.engine_graph(role)] = recipe["engine"], recipe["precision"]
    found = {graph: find_layer_states(ir.load(graph).graph, graph) for graph in graphs}
    compared = [(graph, *how) for graph, how in graphs.items()]
    if (recipe["engine"], recipe["precision"]) == ("openvino", "bf16"):  # the exact graph, rounded by OpenVINO
        compared.append((bundle.graph(role), "openvino", "bf16"))
    with _torch_states(bundle, role, trust_remote_code=trust_remote_code) as run:
        expected = [run(batch) for batch in batches]
    drifts: list[LayerDrift] = []
    for graph, engine, precision in compared:
        names = found[graph]
        if len(names) != len(expected[0]):
            raise UsageError(
                f"{graph}: has {len(names) - 1} layers, and the PyTorch model {len(expected[0]) - 1}; their states "
                "cannot be compared"
            )
        with _graph_states(graph, names, engine, precision, entry.adapter_gates) as run:
            errors = _relative_errors(graph, expected, map(run, batches))
        before = [0.0, *errors[:-1]]
        drifts += [
            LayerDrift(graph.name, precision, layer, error, error - previous)
            for layer, (error, previous) in enumerate(zip(errors, before, strict=True), start=EMBEDDING)
        ]
    return drifts


def find_culprits(drifts: Sequence[LayerDrift]) -> list[LayerDrift]:
    """The layers that add most of one graph's drift, the worst first.

    Args:
        drifts: of one graph or several, each taken by itself.

    Returns:
        Graph by graph, each layer that adds at least `SHARE` of what the worst adds. None where no layer adds more than
        `ROUNDING`: the cause is then behind the layers (the last normalisation, the head) or before them (the tokens).
    """
    culprits: list[LayerDrift] = []
    for key in dict.fromkeys((drift.graph, drift.precision) for drift in drifts):
        of_graph = [drift for drift in drifts if (drift.graph, drift.precision) == key]
        least = max(SHARE * max(drift.added for drift in of_graph), ROUNDING)
        culprits += sorted((drift for drift in of_graph if drift.added >= least), key=lambda drift: -drift.added)
    return culprits


def find_layer_states(graph: ir.Graph, path: Path) -> list[str]:
    """The names of the values that are the states between a graph's layers: the embedding's, then each layer's output.

    Args:
        graph: exact, or an engine's.
        path: its file, for messages.

    Raises:
        UsageError: there are none; see the module.
    """
    flow = _Flow(graph)
    layers = sorted(flow.uses)
    if layers != list(range(len(layers))) or not layers:
        raise UsageError(
            f"{path}: the weights' names tell of the layers {', '.join(map(str, layers)) or 'none'}, and layers are "
            "counted from 0; its hidden states cannot be compared"
        )
    states: list[ir.Value] = []
    for layer in [EMBEDDING, *layers]:
        end = min((min(flow.uses[later]) for later in layers if later > layer), default=math.inf)
        if layer == EMBEDDING:  # the last: what scales an embedding belongs to it
            places = [place for place in flow.cuts if place < end][-1:]
        else:
            places = [place for place in flow.cuts if max(flow.uses[layer]) <= place < end][:1]
        if not places:
            what = "the embedding" if layer == EMBEDDING else f"layer {layer}"
            raise UsageError(
                f"{path}: {what} does not end in one value that all later layers take, so its hidden states cannot be "
                "compared; the log-probs still can"
            )
        states.append(flow.cuts[places[0]])
    return [str(state.name) for state in states]


class _Flow:
    """What is computed from the tokens in a graph, in its order.

    Attributes:
        uses: by layer, the places of the nodes at which its weights meet the flow.
        cuts: by place, the one value that all that follows takes.
    """

    def __init__(self, graph: ir.Graph) -> None:
        nodes = list(graph)
        needed = _needed(graph)
        flowing: set[ir.Value] = {value for value in graph.inputs if value.name == "input_ids"}
        layers_of: dict[ir.Value, set[int]] = {}  # of values that are made from weights, and from no tokens
        for name, weight in graph.initializers.items():
            number = layer_number(name)
            if isinstance(weight.const_value, ir.ExternalTensor) and number is not None:
                layers_of[weight] = {number}
        self.uses: dict[int, list[int]] = {}
        last_uses: dict[ir.Value, float] = {}
        made: dict[int, list[ir.Value]] = {}
        for place, node in enumerate(nodes):
            if node.op_type == "Shape" or node not in needed:
                continue
            inputs = _inputs(node)
            layers = {number for value in inputs for number in layers_of.get(value, ())}
            taken = [value for value in inputs if value in flowing]
            if not taken:
                layers_of |= dict.fromkeys(node.outputs, layers)
                continue
            for layer in layers:
                self.uses.setdefault(layer, []).append(place)
            flowing.update(node.outputs)
            made[place] = list(node.outputs)
            last_uses |= dict.fromkeys(taken, place)
        last_uses |= dict.fromkeys(graph.outputs, math.inf)
        self.cuts: dict[int, ir.Value] = {}
        live = {value for value in graph.inputs if value in flowing}
        for place, outputs in made.items():
            live |= set(outputs)
            live = {value for value in live if last_uses.get(value, -1) > place}
            if len(live) == 1:
                (self.cuts[place],) = live


def _inputs(node: ir.Node) -> list[ir.Value]:
    """What a node takes in, and what the graphs in its attributes take from outside."""
    found = [value for value in node.inputs if value is not None]
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            found += [value for inner in attribute.as_graph() for value in _inputs(inner)]
    return found


def _needed(graph: ir.Graph) -> set[ir.Node]:
    """The nodes whose values, and not only their shapes, an output is computed from."""
    needed: set[ir.Node] = set()
    waiting = [value.producer() for value in graph.outputs]
    while waiting:
        node = waiting.pop()
        if node is None or node in needed:
            continue
        needed.add(node)
        if node.op_type != "Shape":
            waiting += [value.producer() for value in _inputs(node)]
    return needed


@contextmanager
def _torch_states(bundle: Bundle, role: str, *, trust_remote_code: bool) -> Iterator[Run]:
    """A role's PyTorch model, run for its hidden states."""
    import torch

    entry, folder = bundle.manifest.models[role], bundle.model_folder(role)
    base = bundle.folder / entry.weights[0] if (folder / ADAPTER_CONFIG).is_file() else None
    model = load_model(folder, base, torch.float32, trust_remote_code=trust_remote_code)
    language_model = model if base is None else model.get_base_model()
    layers = _decoder_layers(language_model, role)
    decoder = language_model.base_model  # the head's logits are not asked for
    states: States = []

    def keep(state: Any) -> None:
        states.append(state.detach().float().numpy()[0])

    def keep_input(_: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        keep(args[0] if args else kwargs["hidden_states"])

    def keep_output(_: Any, args: tuple[Any, ...], output: Any) -> None:
        keep(output[0] if isinstance(output, tuple) else output)

    def run(batch: Batch) -> States:
        states.clear()
        with torch.inference_mode():
            decoder(
                input_ids=torch.from_numpy(batch.input_ids),
                attention_mask=torch.ones(batch.input_ids.shape, dtype=torch.long),
                use_cache=False,
            )
        return list(states)

    with ExitStack() as stack:
        hooks = [layers[0].register_forward_pre_hook(keep_input, with_kwargs=True)]
        hooks += [layer.register_forward_hook(keep_output) for layer in layers]
        for hook in hooks:
            stack.callback(hook.remove)
        yield run


def _decoder_layers(model: Any, role: str) -> list[Any]:
    """A PyTorch model's layers, in order: the modules whose number is the first in their parameters' names."""
    found: dict[str, None] = {}
    for name, _ in model.named_parameters():
        parts = name.split(".")
        number = next((index for index, part in enumerate(parts) if part.isdigit()), None)
        if number is not None:
            found[".".join(parts[:number])] = None
    if len(found) != 1:
        raise UsageError(
            f"{role}: {type(model).__name__} has layers in {', '.join(found) or 'no place'}, where one list of them is "
            "needed; its hidden states cannot be compared"
        )
    return list(model.get_submodule(*found).children())


@contextmanager
def _graph_states(
    graph: Path, names: Sequence[str], engine: str, precision: str, gates: Sequence[float] | None
) -> Iterator[Run]:
    """A graph, run for its hidden states; the rest of it is left out."""
    model = ir.load(graph)
    values = {str(value.name): value for node in model.graph for value in node.outputs}
    model.graph.outputs.clear()
    for number, name in enumerate(names):
        wide = ir.node("Cast", [values[name]], {"to": ir.DataType.FLOAT})  # a state may be in half precision
        wide.outputs[0].name, wide.outputs[0].dtype = f"state {number}", ir.DataType.FLOAT
        model.graph.append(wide)
        model.graph.outputs.append(wide.outputs[0])
    RemoveUnusedNodesPass()(model)
    # External data must lie below the graph that points to it.
    with storage_errors(graph), tempfile.NamedTemporaryFile(suffix=".onnx", dir=graph.parent) as file:
        ir.save(model, file.name)
        if engine == "openvino" or precision == "bf16":  # ONNX Runtime's CPU provider has no bfloat16 products
            yield _openvino(Path(file.name), graph, engine, precision, gates)
        else:
            yield _onnxruntime(Path(file.name), graph, precision, gates)


def _onnxruntime(exposed: Path, graph: Path, precision: str, gates: Sequence[float] | None) -> Run:
    """Run a graph on ONNX Runtime's CPU provider."""
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependencyError("onnxruntime", "cpu", "comparing hidden states") from error
    options = session_options(0)
    if precision == "fp8":  # the optimiser moves float8 past operators that do not take it
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = open_session(exposed, options, {CPU: {}})
    except BundleError as error:
        raise _cannot_run(graph, precision, "ONNX Runtime's CPU provider", error) from error
    wanted = {value.name for value in session.get_inputs()}

    def run(batch: Batch) -> States:
        inputs = {name: value for name, value in gated_inputs(batch, gates).items() if name in wanted}
        try:
            return list(session.run(None, inputs))
        except Exception as error:  # onnxruntime's own exceptions share no public base class
            raise EngineOutputError(f"{graph}: ONNX Runtime failed at its hidden states ({said_by(error)})") from error

    return run


def _openvino(exposed: Path, graph: Path, engine: str, precision: str, gates: Sequence[float] | None) -> Run:
    """Run a graph on OpenVINO: as its engine does, or as the graph is typed, where that is another's."""
    try:
        core = open_core()
    except ImportError as error:
        raise MissingDependencyError("openvino", "openvino", f"comparing hidden states in {precision}") from error
    in_bfloat16 = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if engine == "openvino" and precision == "bf16" and not in_bfloat16:
        raise UsageError(f"{graph}: is to run in bf16, and OpenVINO finds no bfloat16 arithmetic in this processor")
    hint = "bf16" if engine == "openvino" and precision != "fp32" and in_bfloat16 else "f32"
    try:
        with ONE_AT_A_TIME:
            compiled = core.compile_model(core.read_model(exposed), "CPU", {"INFERENCE_PRECISION_HINT": hint})
    except RuntimeError as error:
        raise _cannot_run(graph, precision, "OpenVINO", error) from error
    wanted = {name for value in compiled.inputs for name in value.names}

    def run(batch: Batch) -> States:
        inputs = {name: value for name, value in gated_inputs(batch, gates).items() if name in wanted}
        try:
            with ONE_AT_A_TIME:
                found = compiled(inputs)
        except RuntimeError as error:
            raise EngineOutputError(f"{graph}: OpenVINO failed at its hidden states ({said_by(error)})") from error
        return [np.array(found[number]) for number in range(len(compiled.outputs))]

    return run


def _cannot_run(graph: Path, precision: str, what: str, error: Exception) -> UsageError:
    """What is raised where a graph is made for operators that only its own engine has."""
    return UsageError(
        f"{graph}: nothing on this machine runs this graph in {precision} for its hidden states: {what} cannot load it "
        f"({said_by(error)}); compare those of a bundle in fp32"
    )


def _relative_errors(graph: Path, expected: Sequence[States], found: Iterator[States]) -> list[float]:
    """The root mean square of the difference over the state's, layer by layer, over all sequences."""
    differences, sizes = np.zeros(len(expected[0])), np.zeros(len(expected[0]))
    for theirs, ours in zip(expected, found, strict=True):
        for place, (one, other) in enumerate(zip(theirs, ours, strict=True)):
            if one.size != other.size:
                raise UsageError(
                    f"{graph}: the state of layer {place + EMBEDDING} has shape {list(other.shape)}, and PyTorch's "
                    f"{list(one.shape)}; they cannot be compared"
                )
            wide: Float64Array = one.astype(np.float64)
            # Within a row of its own, some layers work on (B x T, H).
            differences[place] += ((other.reshape(one.shape) - wide) ** 2).sum()
            sizes[place] += (wide**2).sum()
    for place, total in enumerate(differences + sizes):
        if not math.isfinite(total):
            raise EngineOutputError(f"{graph}: the state of layer {place + EMBEDDING}, or PyTorch's, is not finite")
    errors: list[float] = np.sqrt(differences / np.maximum(sizes, np.finfo(np.float64).tiny)).tolist()
    return errors
