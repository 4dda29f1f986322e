"""Weights by reference: a graph's initializers point into a checkpoint's own safetensors.

Nothing is copied: an initializer is a file, an offset and a length. Weights kept in bfloat16 or float16 are cast to
float32 in the graph, which the engine does once, when it loads.
"""

import re

import onnx_ir as ir
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from dpo_fast.errors import CheckpointError
from dpo_fast.export.checkpoint import FLOAT_SIZES, Checkpoint, same_bytes
from dpo_fast.quiet import quiet

ONNX_TYPES = {"F32": ir.DataType.FLOAT, "F16": ir.DataType.FLOAT16, "BF16": ir.DataType.BFLOAT16}


def match_names(config: PretrainedConfig, checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> dict[str, str]:
    """Say which stored tensor each parameter of a configuration's causal LM is.

    Tied parameters (a head that is the embedding) share a tensor. A checkpoint of the base model alone, without the
    base model's prefix, is accepted, as Transformers does.

    Returns:
        The stored name by parameter name, for every name of a tied parameter.

    Raises:
        CheckpointError: the configuration is not one of a causal LM, or a tensor is missing, is not the model's, or has
            another shape or an unsupported dtype.
    """
    try:
        with quiet(), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever an architecture's own code does with values that make no sense
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise CheckpointError(
            f"{checkpoint.folder}: no causal LM can be built from config.json, "
            f"whose model type is {config.model_type!r} ({reason})"
        ) from error
    prefix = f"{model.base_model_prefix}."
    names_of: dict[int, list[str]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names_of.setdefault(id(parameter), []).append(name)
        shapes[name] = tuple(parameter.shape)
    stored_names: dict[str, str] = {}
    used: set[str] = set()
    for names in names_of.values():
        candidates = [c for name in names for c in (name, name.removeprefix(prefix)) if c in checkpoint.tensors]
        if not candidates:
            converted = get_checkpoint_conversion_mapping(config.model_type) is not None
            raise CheckpointError(
                f"{checkpoint.folder}: the tensor {names[0]!r} is missing; {type(model).__name__} needs it"
                + (", and Transformers makes it from others as it loads, which a graph cannot point at" * converted)
                + f" (the checkpoint holds {len(checkpoint.tensors)} tensors)"
            )
        _check_tensor(checkpoint, candidates[0], shapes[names[0]])
        for other in candidates[1:]:
            if not same_bytes(checkpoint, candidates[0], other):  # Transformers would load them untied
                raise CheckpointError(
                    f"{checkpoint.folder}: config.json ties the tensors {candidates[0]!r} and {other!r}, and their "
                    "stored values differ; if they were trained apart, set tie_word_embeddings to false"
                )
        used.update(candidates)
        stored_names |= dict.fromkeys(names, candidates[0])
    # Older checkpoints store buffers that the model computes; the model's class names them by pattern.
    ignored = [*(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()), r"rotary_emb\.inv_freq"]
    ignored += [re.escape(name) for name, _ in model.named_buffers()]
    for name in sorted(set(checkpoint.tensors) - used):
        if not any(re.search(pattern, name) for pattern in ignored):
            raise CheckpointError(
                f"{checkpoint.folder / checkpoint.tensors[name].file}: the tensor {name!r} is no part of "
                f"{type(model).__name__}; is config.json the one of these weights?"
            )
    return stored_names


def _check_tensor(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> None:
    """Refuse a stored tensor of another shape than the model's, or of a dtype that no graph can point at."""
    tensor = checkpoint.tensors[name]
    if tensor.shape != shape:
        raise CheckpointError(
            f"{checkpoint.folder / tensor.file}: the tensor {name!r} has shape {list(tensor.shape)}, "
            f"and config.json says {list(shape)}"
        )
    if tensor.dtype not in FLOAT_SIZES:
        raise CheckpointError(
            f"{checkpoint.folder / tensor.file}: the tensor {name!r} is stored as {tensor.dtype}; "
            f"export a checkpoint in one of {', '.join(FLOAT_SIZES)}"
        )


def bind(graph: ir.Model, checkpoint: Checkpoint, stored_names: dict[str, str], folder: str) -> ir.Model:
    """A copy of a traced graph whose parameters are a checkpoint's tensors, by file, offset and length.

    Args:
        graph: from `dpo_fast.export.graph.trace`.
        checkpoint: whose files lie in `folder` beside the graph.
        stored_names: from `match_names`.
        folder: the checkpoint's folder relative to the graph's file, such as "policy".
    """
    bound = graph.clone()
    for name, value in list(bound.graph.initializers.items()):
        if value.const_value is not None:
            continue
        tensor = checkpoint.tensors[stored_names[name]]
        dtype = ONNX_TYPES[tensor.dtype]
        value.const_value = ir.ExternalTensor(
            f"{folder}/{tensor.file}",
            tensor.offset,
            tensor.length,
            dtype,
            shape=ir.Shape(tensor.shape),
            name=name,
        )
        if dtype != ir.DataType.FLOAT:
            cast = ir.node("Cast", [value], attributes={"to": ir.DataType.FLOAT})
            widened = cast.outputs[0]
            widened.name, widened.shape, widened.type = f"{name}.float32", value.shape, ir.TensorType(ir.DataType.FLOAT)
            value.replace_all_uses_with(widened)
            cast.replace_input_with(0, value)
            value.type = ir.TensorType(dtype)
            bound.graph.insert_before(bound.graph[0], cast)
    return bound
