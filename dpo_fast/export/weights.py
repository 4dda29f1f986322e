"""Weights by reference: a graph's parameters are found in a checkpoint's own safetensors.

`dpo_fast.export.conversions` says which stored tensors a parameter is made from, and `dpo_fast.export.bindings` writes
that into the graph. Here it is held against the model: nothing missing, nothing left over, shapes and dtypes right.
"""

import re
from itertools import zip_longest
from typing import NoReturn

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from dpo_fast.errors import CheckpointError
from dpo_fast.export.bindings import Binding, Made, Stored, bind
from dpo_fast.export.checkpoint import FLOAT_SIZES, Checkpoint, same_bytes
from dpo_fast.export.conversions import Conversions, UnknownOperationError
from dpo_fast.quiet import quiet
from dpo_fast.text import named_line

__all__ = ["Binding", "Made", "Stored", "bind", "match_parameters"]


def match_parameters(
    config: PretrainedConfig, checkpoint: Checkpoint, folder: str, *, trust_remote_code: bool = False
) -> dict[str, Binding]:
    """Say which stored tensor each parameter of a configuration's causal LM is, or which ones it is made from.

    Tensors are renamed and put together as Transformers does when it loads them: experts are stacked, a checkpoint of
    the base model alone, without the base model's prefix, is accepted. Tied parameters (a head that is the embedding)
    share a tensor. Buffers that are saved with the parameters (the routers' correction in DeepSeek's models) are
    among them.

    Args:
        config: the model's configuration.
        checkpoint: where its weights lie.
        folder: the checkpoint's folder relative to the graph's file, such as "policy".
        trust_remote_code: whether the configuration's own Python code may be run.

    Returns:
        What to bind each parameter to, for every name of a tied parameter.

    Raises:
        CheckpointError: the configuration is not one of a causal LM, or a tensor is missing, is not the model's, or has
            another shape or an unsupported dtype.
    """
    try:
        with quiet(), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever an architecture's own code does with values that make no sense
        raise CheckpointError(
            f"{checkpoint.folder}: no causal LM can be built from config.json, "
            f"whose model type is {config.model_type!r} ({named_line(error)})"
        ) from error
    conversions = Conversions(model)
    found = _convert(conversions, checkpoint, folder)
    names_of: dict[int, list[str]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point():  # masks and the like are computed
            names_of.setdefault(id(tensor), []).append(name)
            shapes[name] = tuple(tensor.shape)
    bindings: dict[str, Binding] = {}
    for names in names_of.values():
        first, *others = [name for name in names if name in found] or names
        if first not in found or found[first].shape != shapes[first]:
            _refuse(conversions, checkpoint, first, shapes[first])
        for source in found[first].sources:
            _check_dtype(checkpoint, source)
        for other in others:
            _check_tied(checkpoint, found[first], found[other])
        bindings |= dict.fromkeys(names, found[first])
    # Older checkpoints store buffers that the model computes; the model's class names them by pattern.
    ignored = [*(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()), r"rotary_emb\.inv_freq"]
    ignored += [re.escape(name) for name, _ in model.named_buffers()]
    used = {source.name for binding in found.values() for source in binding.sources}
    for name in sorted(set(checkpoint.tensors) - used):
        as_loaded = conversions.rename(name)[0]
        if not any(re.search(pattern, known) for pattern in ignored for known in (name, as_loaded)):
            raise CheckpointError(_no_part(conversions, checkpoint, name))
    return bindings


def _convert(conversions: Conversions, checkpoint: Checkpoint, folder: str) -> dict[str, Binding]:
    """What Transformers would load, by the parameter's or buffer's name, whether it fits or not."""
    stored = {name: Stored(folder, name, tensor) for name, tensor in checkpoint.tensors.items()}
    found: dict[str, Binding] = {}
    for parameter, collected in conversions.collect(stored).items():
        if collected.ambiguous:
            one, other, *_ = sorted(collected.names)
            raise CheckpointError(
                f"{checkpoint.folder}: the tensors {one!r} and {other!r} are both the parameter {parameter!r} of "
                f"{type(conversions.model).__name__}; leave out the one that it was not trained with"
            )
        try:
            found |= conversions.convert(parameter, collected, stored)
        except UnknownOperationError as error:
            raise CheckpointError(
                f"{checkpoint.folder}: Transformers makes the parameter {parameter!r} of {collected.names[0]!r} by "
                f"{error}, which a graph that points at the stored tensors cannot do; save it as the model has it: "
                "AutoModelForCausalLM.from_pretrained(...).save_pretrained(..., save_original_format=False)"
            ) from error
        except Exception as error:  # operations on tensors that do not fit fail in their own ways
            _refuse(conversions, checkpoint, parameter, None, error)
    return found


def _refuse(
    conversions: Conversions,
    checkpoint: Checkpoint,
    parameter: str,
    shape: tuple[int, ...] | None,
    error: Exception | None = None,
) -> NoReturn:
    """Name the stored tensor for which a parameter is missing, has another shape, or cannot be made.

    It is the one that differs from what the model itself would be saved as.
    """
    model = conversions.model
    sources = [name for name in sorted(checkpoint.tensors) if conversions.rename(name)[0] == parameter]
    expected = conversions.expected(parameter) or ({parameter: shape} if shape and not sources else {})
    known: set[str] = set()
    for name, expected_shape in expected.items():
        names = (name, name.removeprefix(f"{model.base_model_prefix}."))
        found = next((n for n in names if n in checkpoint.tensors), None)
        if found is None:
            raise CheckpointError(
                f"{checkpoint.folder}: the tensor {name!r} is missing; {type(model).__name__} needs it "
                f"(the checkpoint holds {len(checkpoint.tensors)} tensors)"
            ) from error
        known.add(found)
        tensor = checkpoint.tensors[found]
        if tensor.shape != expected_shape:
            raise CheckpointError(
                f"{checkpoint.folder / tensor.file}: the tensor {found!r} has shape {list(tensor.shape)}, "
                f"and config.json says {list(expected_shape)}"
            ) from error
    for name in sources if expected else ():
        if name not in known:
            raise CheckpointError(_no_part(conversions, checkpoint, name)) from error
    reason = named_line(error) if error is not None else f"the result has not the shape {list(shape or ())}"
    raise CheckpointError(
        f"{checkpoint.folder}: Transformers cannot make the parameter {parameter!r} of the {len(sources)} tensors "
        f"{sources[0]!r} … ({reason}); is config.json the one of these weights?"
    ) from error


def _no_part(conversions: Conversions, checkpoint: Checkpoint, name: str) -> str:
    return (
        f"{checkpoint.folder / checkpoint.tensors[name].file}: the tensor {name!r} is no part of "
        f"{type(conversions.model).__name__}; is config.json the one of these weights?"
    )


def _check_dtype(checkpoint: Checkpoint, source: Stored) -> None:
    """Refuse a stored tensor of a dtype that no graph can point at."""
    if source.tensor.dtype not in FLOAT_SIZES:
        raise CheckpointError(
            f"{checkpoint.folder / source.tensor.file}: the tensor {source.name!r} is stored as {source.tensor.dtype}; "
            f"export a checkpoint in one of {', '.join(FLOAT_SIZES)}"
        )


def _check_tied(checkpoint: Checkpoint, one: Binding, other: Binding) -> None:
    """Refuse tied parameters that are stored twice and differ: Transformers would load them untied."""
    for first, second in zip_longest(one.sources, other.sources, fillvalue=one.sources[0]):
        if not same_bytes(checkpoint, first.name, second.name):
            raise CheckpointError(
                f"{checkpoint.folder}: config.json ties the tensors {first.name!r} and {second.name!r}, and their "
                "stored values differ; if they were trained apart, set tie_word_embeddings to false"
            )
