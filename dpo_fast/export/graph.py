"""A causal LM's log-prob graph, traced from its configuration alone: no weights are loaded.

The traced forward takes rows of ``[prompt | completion 1 | completion 2 ...]`` and puts out, for each scored token,
what `dpo_fast.types.TokenScores` holds::

    input_ids     p0 p1 p2 c0 c1 r0 r1 r2 --
    segment_ids    0  0  0  1  1  2  2  2 -1     0 the prompt, k >= 1 completion k, -1 padding
    position_ids   0  1  2  3  4  3  4  5  0     every completion continues the prompt's positions
    predicts            c0 c1     r1 r2          the state at p2 predicts both c0 and r0
                        r0

A state sees itself, what precedes it in its own segment, and the prompt.
"""

import copy
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import torch
import transformers
from accelerate import init_empty_weights
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from transformers import AttentionInterface, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, masking_utils
from transformers.exporters import OnnxConfig, OnnxExporter
from transformers.exporters.utils import patch_attributes
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from dpo_fast.engines.onnxruntime import ADAPTER_GATES
from dpo_fast.errors import CheckpointError
from dpo_fast.export.adapters import AdaptedModules
from dpo_fast.export.attention import ATTENTION, grouped_attention
from dpo_fast.export.experts import DENSE, register
from dpo_fast.export.gated_layers import Gates, install
from dpo_fast.export.head import score
from dpo_fast.export.mixers import SCANS
from dpo_fast.export.optimisation import optimise
from dpo_fast.export.positions import (
    ALIBI,
    alibi,
    alibi_slopes,
    fuse_rotations,
    keep_first_frequencies,
    longest_sequence,
    windows,
)
from dpo_fast.export.probes import LONGEST_WINDOW
from dpo_fast.export.sizes import read_sizes
from dpo_fast.quiet import quiet

INPUTS = {
    "input_ids": ["B", "T"],
    "position_ids": ["B", "T"],
    "segment_ids": ["B", "T"],
    "target_index": ["N"],
    "target_ids": ["N"],
}

# Columns of the rows that are traced: several chunks of the layers that compute in chunks, of up to 256 tokens, because
# a graph traced of one chunk takes no row of two. The narrow one is for models that have fewer positions.
WIDTH, NARROW_WIDTH = 600, 24
# Each expert multiplies the tokens that chose it, gathered, and no others; the graph holds every expert's products.
GROUPED = "grouped_mm"
# What a model's code imports when it leaves windows to Transformers' masks.
WINDOW_MASKS = ("create_sliding_window_causal_mask", "create_chunked_causal_mask", "create_masks_for_generate")


def trace(
    config: PretrainedConfig,
    *,
    vocabulary_tile: int,
    trust_remote_code: bool = False,
    adapters: Sequence[AdaptedModules] = (),
    dense_experts: bool = False,
) -> ir.Model:
    """Trace the log-prob graph of a configuration's causal LM, in float32, with parameters that have no values yet.

    Args:
        config: the model's configuration.
        vocabulary_tile: how many columns of the vocabulary the head computes at a time.
        trust_remote_code: whether the configuration's own Python code may be run.
        adapters: what each adapter changes, in the order of the input `adapter_gates` (B, adapters); without any, the
            graph has no such input.
        dense_experts: whether every expert of a mixture computes every token, for engines that cannot gather them.

    Returns:
        The graph; its unbound initializers carry the parameters' names (`dpo_fast.export.weights` binds them).

    Raises:
        CheckpointError: the architecture cannot be exported.
    """
    with init_empty_weights(include_buffers=False):
        model = _build(config, trust_remote_code, DENSE if dense_experts else GROUPED)
    model.tie_weights()  # emptying parted what is tied
    with init_empty_weights(include_buffers=False):
        gates = install(model, adapters)
    # What a checkpoint stores has no value here; what a model computes as it is built (rotary frequencies) has.
    stored = {name for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    computed = {name: buffer for name, buffer in model.named_buffers() if name not in stored}
    positions = read_sizes(config).positions
    with FakeTensorMode(allow_non_fake_inputs=True):
        _take_values(model)
        # Sizes that differ from each other, and from 1: equal ones would be taken for the same dimension.
        width = WIDTH if positions is None or positions >= WIDTH else NARROW_WIDTH
        sample = {name: torch.zeros(2, width, dtype=torch.long) for name in INPUTS if name.endswith("ids")}
        sample |= {name: torch.zeros(16, dtype=torch.long) for name in ("target_index", "target_ids")}
        if adapters:
            sample[ADAPTER_GATES] = torch.zeros(2, len(adapters))
    _add_log_prob_forward(model, vocabulary_tile, gates)
    # DYNAMIC, not AUTO: a size that tracing would fix to the sample's is an error.
    shapes = {
        name: dict.fromkeys(range(len(INPUTS[name])), torch.export.Dim.DYNAMIC) for name in sample if name in INPUTS
    }
    if adapters:
        shapes[ADAPTER_GATES] = {0: torch.export.Dim.DYNAMIC}
    settings = OnnxConfig(dynamic=True, dynamic_shapes=shapes, optimize=False)
    # Where each node comes from in the model's code is dropped below; not looking it up saves a tenth of the time.
    without_stacks = (torch.fx.config, "do_not_emit_stack_traces", lambda _: True)
    with quiet(), patch_attributes([without_stacks, (torch.export, "export", _of_all_sizes(positions))]):
        try:
            graph: ir.Model = OnnxExporter().export(model, sample, config=settings).program
            for name, value in graph.graph.initializers.items():
                if name in stored:
                    value.const_value = None
                elif name in computed:
                    value.const_value = ir.tensor(computed[name].numpy(), name=name)
                elif value.const_value is not None:
                    value.const_value = ir.tensor(value.const_value.numpy(), name=name)  # an error if it has no values
            optimise(graph)
        except Exception as error:  # exporters and optimisers fail in as many ways as there are architectures
            raise CheckpointError(
                f"{type(config).__name__}: this architecture cannot be exported ({_first_line(error)}); "
                f"transformers {transformers.__version__}, torch {torch.__version__}"
            ) from error
    _divide_by_roots(graph)
    fuse_rotations(graph)
    _name_dimensions(graph)
    _forget_origins(graph)
    return graph


def _of_all_sizes(positions: int | None) -> Callable[..., Callable[..., ExportedProgram]]:
    """torch.export.export, which then refuses what it only notes: that a trace holds for inputs of some sizes alone.

    A model's code may do something else with long rows, such as leave out keys; a graph has one way for all of them.

    Args:
        positions: longer sequences than this the model does not have; None for no such end.
    """

    def wrap(export: Callable[..., ExportedProgram]) -> Callable[..., ExportedProgram]:
        def checked(*args: Any, **kwargs: Any) -> ExportedProgram:
            program = export(*args, **kwargs)
            for node in program.graph.nodes:
                if node.op == "placeholder" and node.name in INPUTS:
                    for name, size in zip(INPUTS[node.name], node.meta["val"].shape, strict=True):
                        holds = program.range_constraints[size.node.expr]
                        if holds.lower > 2 or holds.upper < (positions or sys.maxsize):
                            raise NotImplementedError(
                                f"its code does something else unless {holds.lower} <= {name} <= {holds.upper}"
                            )
            return program

        return checked

    return wrap


def _build(config: PretrainedConfig, trust_remote_code: bool, experts: str) -> PreTrainedModel:
    """The configuration's causal LM in evaluation mode, with our attention where the model takes any."""
    AttentionInterface.register(ATTENTION, grouped_attention)
    register()
    try:
        config = copy.deepcopy(config)  # the model writes into it
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
        with quiet():  # a family that computes attention in code of its own says so, and keeps it
            model.set_attn_implementation(ATTENTION)
        if model._can_set_experts_implementation():
            model.set_experts_implementation(experts)
    except (ValueError, KeyError, ImportError) as error:
        raise CheckpointError(
            f"model type {config.model_type!r} is not a causal LM that can be built: {_first_line(error)}"
        ) from error
    _check(model)
    keep_first_frequencies(model)
    return model.eval()


def _check(model: PreTrainedModel) -> None:
    """Refuse what the graph would get wrong, and the self-check would not see."""
    config = model.config.get_text_config()
    if _decoder(model) is model:
        raise CheckpointError(
            f"model type {config.model_type!r}: {type(model).__name__} has no decoder named "
            f"{model.base_model_prefix!r} whose states could be scored; it cannot be exported"
        )
    if getattr(config, "attn_temperature_tuning", None):
        raise CheckpointError(
            f"model type {config.model_type!r}: attn_temperature_tuning {config.attn_temperature_tuning} scales "
            "attention by a token's column in its row, which a shared prompt moves; it cannot be exported"
        )
    module = sys.modules[type(model).__module__]
    if not any(hasattr(module, name) for name in WINDOW_MASKS):
        for key, window in windows(config).items():
            if window > LONGEST_WINDOW:
                raise CheckpointError(
                    f"model type {config.model_type!r}: {key} {window} is applied by {module.__name__} itself, and no "
                    f"check here is longer than {LONGEST_WINDOW} tokens; it cannot be exported"
                )


def _decoder(model: PreTrainedModel) -> torch.nn.Module:
    """The part of a causal LM that ends in the states which its head takes; the model itself if it has none."""
    decoder: torch.nn.Module = getattr(model, "model", model) if model.base_model is model else model.base_model
    return decoder


def _take_values(model: PreTrainedModel) -> None:
    """Make every parameter and buffer a fake one: a shape on the CPU without memory.

    Not on the meta device, where tensors that are written out in a model's code would lose their values.
    """
    fakes: dict[int, torch.Tensor] = {}  # tied ones stay tied
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    fake = fakes.get(id(tensor), torch.empty(tensor.shape, dtype=tensor.dtype))
                    if isinstance(tensor, torch.nn.Parameter) and id(tensor) not in fakes:
                        fake = torch.nn.Parameter(fake, requires_grad=False)
                    fakes[id(tensor)] = tensors[name] = fake


def _add_log_prob_forward(model: PreTrainedModel, vocabulary_tile: int, gates: Gates) -> None:
    """Give the model a forward that returns the graph contract's outputs.

    A subclass of the model's own class passes every check of the exporter that a foreign wrapper fails.
    """
    decoder = _decoder(model)
    takes = inspect.signature(decoder.forward).parameters
    module, slopes, end = sys.modules[type(model).__module__], alibi_slopes(model), longest_sequence(model.config)
    # Functions of the model's own module that the trace cannot take, or not with a shared prompt.
    replaced: list[tuple[Any, str, Any]] = [
        (module, name, lambda _, scan=scan: scan) for name, scan in SCANS.items() if hasattr(module, name)
    ]

    class LogProb(type(model)):  # type: ignore[misc]
        def forward(
            self,
            input_ids: torch.Tensor,
            position_ids: torch.Tensor,
            segment_ids: torch.Tensor,
            target_index: torch.Tensor,
            target_ids: torch.Tensor,
            adapter_gates: torch.Tensor | None = None,
        ) -> dict[str, torch.Tensor]:
            if adapter_gates is not None:
                gates.set(adapter_gates)
            inputs: dict[str, Any] = {"input_ids": input_ids, "use_cache": False}
            if "position_ids" in takes:
                inputs["position_ids"] = position_ids
            bias = []
            if slopes is not None:
                values = alibi(self.config.model_type, slopes, position_ids)
                bias = [(module, ALIBI, lambda _: lambda *args, **kwargs: values)]
                inputs["attention_mask"] = torch.ones_like(input_ids)  # the function is not asked without one
            with _attention_mask(self.config, position_ids, segment_ids), patch_attributes(replaced + bias):
                hidden = decoder(**inputs).last_hidden_state  # (B, T, H)
            if end is not None:  # no number is better than one of other frequencies
                hidden = hidden.masked_fill(position_ids.max() >= end, torch.nan)
            hidden = hidden.reshape(-1, hidden.shape[-1])[target_index]  # (N, H)
            row_gates = None if adapter_gates is None else adapter_gates[target_index // input_ids.shape[1]]
            return score(self, hidden, target_ids, vocabulary_tile, row_gates)  # gates (N, adapters)

    model.__class__ = LogProb


@contextmanager
def _attention_mask(config: PretrainedConfig, position_ids: torch.Tensor, segment_ids: torch.Tensor) -> Iterator[None]:
    """Masks of positions and segments instead of columns, for every mask that the model asks Transformers for.

    The model asks for each kind that its layers need, with that kind's own rule (causal, a window, chunks) of a
    query's and a key's place. Asked of positions, the rule is the same with the prompt shared.
    """

    def mask(mask_function: Callable[..., torch.Tensor], **_: Any) -> torch.Tensor:
        """(B, 1, T, T) float32, added to the scores: 0 where a state may look, else the lowest number."""
        rows = torch.arange(position_ids.shape[0])[:, None, None, None]
        head = torch.zeros(1, 1, 1, 1, dtype=torch.long)
        seen, of = segment_ids[:, None, None, :], segment_ids[:, None, :, None]
        allowed = mask_function(rows, head, position_ids[:, None, :, None], position_ids[:, None, None, :])
        allowed = allowed & ((seen == 0) | (seen == of))
        return (~allowed).to(torch.float32) * torch.finfo(torch.float32).min

    masks, name = ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, config.get_text_config()._attn_implementation
    before = masks.get(name)
    masks[name] = mask
    # A row of completions is no row of packed documents, which Transformers would find by its positions.
    unpacked = (masking_utils, "find_packed_sequence_indices", lambda _: lambda position_ids: None)
    try:
        with patch_attributes([unpacked]):
            yield
    finally:
        del masks[name]
        if before is not None:
            masks[name] = before


def _divide_by_roots(model: ir.Model) -> None:
    """Turn ``x * (1 / sqrt(y))`` into ``x / sqrt(y)``, the form that ONNX Runtime fuses into one normalisation."""
    for node in list(model.graph):
        if node.op_type != "Reciprocal":
            continue
        root = node.inputs[0]
        source = root.producer() if root is not None else None
        uses = list(node.outputs[0].uses())
        if source is None or source.op_type != "Sqrt" or len(uses) != 1:
            continue
        product = uses[0].node
        if product.op_type != "Mul":
            continue
        other = product.inputs[1 - uses[0].idx]
        quotient = ir.node("Div", [other, root])
        quotient.outputs[0].shape, quotient.outputs[0].type = product.outputs[0].shape, product.outputs[0].type
        quotient.outputs[0].name = product.outputs[0].name
        model.graph.insert_before(product, quotient)
        product.outputs[0].replace_all_uses_with(quotient.outputs[0])
        model.graph.remove([product, node], safe=True)


def _name_dimensions(model: ir.Model) -> None:
    """Give inputs and outputs the contract's names of dimensions: B rows, T columns, N targets."""
    for value in model.graph.inputs:
        if value.name != ADAPTER_GATES:
            value.shape = ir.Shape(INPUTS[str(value.name)])
        elif value.shape is not None:
            value.shape = ir.Shape(["B", value.shape[1]])
    for value in model.graph.outputs:
        value.shape = ir.Shape(["N"])


def _forget_origins(model: ir.Model) -> None:
    """Take out where in which source files each node came from: most of a traced graph's bytes, and local paths."""
    model.graph.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        for output in node.outputs:
            output.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


def _first_line(error: BaseException) -> str:
    """The first line of what went wrong first, shortened: exporters wrap errors, and append pages."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200]
