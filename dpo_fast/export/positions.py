"""Positions that are more than indices: rotations, lengths at which frequencies change, windows, biases by distance."""

import sys
from collections.abc import Iterator
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes.common import CommonSubexpressionEliminationPass, RemoveUnusedNodesPass
from onnxscript.rewriter.pattern import RewriteRule, RewriteRuleSet
from transformers import PretrainedConfig, PreTrainedModel

# The configuration's names for how far a layer looks back, in tokens.
WINDOWS = ("sliding_window", "attention_chunk_size", "window_size", "attention_window_size")

ROTARY_OPSET = 23  # in which ONNX has the operator `RotaryEmbedding`

ALIBI = "build_alibi_tensor"  # a function of the modules of families with biases by distance


def windows(config: PretrainedConfig) -> dict[str, int]:
    """How far layers look back, in tokens, by the configuration's own key."""
    text_config = config.get_text_config()
    found = {name: getattr(text_config, name, None) for name in WINDOWS}
    return {name: value for name, value in found.items() if type(value) is int}


def longest_sequence(config: PretrainedConfig) -> int | None:
    """The longest sequence in tokens at which rotary frequencies do not yet depend on its length; None for no such end.

    Beyond it "longrope" (arXiv:2402.13753) and "dynamic" scaling give all tokens of a sequence other frequencies, and
    two completions of one prompt may be of lengths on both sides. The graph holds the frequencies up to there.
    """
    text_config = config.get_text_config()
    ends = []
    for parameters in _rope_parameters(text_config):
        if parameters["rope_type"] == "longrope":
            end = parameters.get("original_max_position_embeddings")
            ends.append(int(end or text_config.max_position_embeddings))
        elif "dynamic" in parameters["rope_type"]:
            ends.append(int(text_config.max_position_embeddings))
    return min(ends, default=None)


def _rope_parameters(config: PretrainedConfig) -> Iterator[dict[str, Any]]:
    """The parameters of each kind of rotary embedding: families have one, or one for each kind of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    for candidate in (parameters, *parameters.values()):
        if isinstance(candidate, dict) and isinstance(candidate.get("rope_type"), str):
            yield candidate


def keep_first_frequencies(model: PreTrainedModel) -> None:
    """Let rotary embeddings never look at the length: their frequencies stay as built, those of short sequences."""
    for module in model.modules():
        rope_type = getattr(module, "rope_type", None)
        if isinstance(rope_type, dict):
            module.rope_type = dict.fromkeys(rope_type, "default")
        elif isinstance(rope_type, str):
            module.rope_type = "default"


def alibi_slopes(model: PreTrainedModel) -> torch.Tensor | None:
    """The slope of each head's bias by distance (arXiv:2108.12409), (heads,), or None where a family has no such."""
    build = getattr(sys.modules[type(model).__module__], ALIBI, None)
    if build is None or not getattr(model.config, "alibi", True):  # some of falcon's have
        return None
    bias: torch.Tensor = build(torch.ones(1, 2, dtype=torch.long), model.config.num_attention_heads, torch.float32)
    return bias[:, 0, 1]  # slope · 1


def alibi(model_type: str, slopes: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
    """ALiBi by position instead of column, (B * heads, 1, T): right with a shared prompt too.

    What is added to a score is slope · position of the key: what the query's position adds is the same for all keys,
    and softmax takes it away.

    Args:
        model_type: falcon's biases are rounded to bfloat16, whatever its dtype.
        slopes: (heads,).
        position_ids: (B, T).
    """
    precision = torch.bfloat16 if model_type == "falcon" else torch.float32
    positions = position_ids.to(precision).to(torch.float32)
    bias = slopes[:, None, None] * positions[:, None, None]  # (B, heads, 1, T)
    return bias.to(precision).to(torch.float32).reshape(-1, 1, position_ids.shape[1])


def fuse_rotations(model: ir.Model) -> None:
    """Turn each ``x * cos + concat(-x[h:], x[:h]) * sin`` into one `RotaryEmbedding`, in place.

    That is how Transformers rotates queries and keys, in seven passes over them. It is done where the two halves of cos
    and of sin are equal, as they are where both are made from ``concat(angles, angles)``; else the graph stays.
    """
    rule = RewriteRule(_rotation, _rotary_embedding, _is_rotation, remove_nodes=False)  # others use cos and sin too
    if RewriteRuleSet([rule]).apply_to_model(model):
        model.opset_imports[""] = ROTARY_OPSET
        RemoveUnusedNodesPass()(model)
        CommonSubexpressionEliminationPass()(model)  # each rotation has taken halves of cos and sin for itself


def _rotation(op: Any, x: Any, cos: Any, sin: Any, start: Any, middle: Any, middle_too: Any, end: Any) -> Any:
    """The pattern that is looked for: x is (B, heads, T, D), cos and sin are (B, T, D)."""
    first, second = op.Slice(x, start, middle, [3], [1]), op.Slice(x, middle_too, end, [3], [1])
    turned = op.Concat(op.Neg(second), first, axis=-1)
    return x * op.Unsqueeze(cos, [1]) + turned * op.Unsqueeze(sin, [1])


def _is_rotation(
    _: Any,
    x: ir.Value,
    cos: ir.Value,
    sin: ir.Value,
    start: ir.Value,
    middle: ir.Value,
    middle_too: ir.Value,
    end: ir.Value,
    **__: Any,
) -> bool:
    """Whether what matches the pattern has the sizes and halves of a rotation."""
    if x.shape is None or len(x.shape) != 4:
        return False
    batch, heads, length, size = x.shape
    if not isinstance(heads, int) or not isinstance(size, int):
        return False
    half, bounds = size // 2, [start.const_value, middle.const_value, middle_too.const_value, end.const_value]
    numbers = [None if bound is None else bound.numpy().item() for bound in bounds]
    return (
        numbers[:3] == [0, half, half]
        and numbers[3] is not None
        and numbers[3] >= size == 2 * half
        and all(value.shape == ir.Shape([batch, length, size]) and _has_equal_halves(value) for value in (cos, sin))
    )


def _has_equal_halves(value: ir.Value | None) -> bool:
    """Whether a value comes of ``concat(angles, angles)`` by functions of each entry alone."""
    node = None if value is None else value.producer()
    if node is None:
        return False
    if node.op_type == "Concat":
        at_the_end = node.attributes["axis"].as_int() in (-1, 2)  # of (B, T, D)
        return at_the_end and len(node.inputs) == 2 and node.inputs[0] is node.inputs[1]
    one_by_one = all(
        given is not None and given.const_value is not None and given.const_value.size == 1 for given in node.inputs[1:]
    )
    return node.op_type in ("Cast", "Cos", "Mul", "Sin") and one_by_one and _has_equal_halves(node.inputs[0])


def _rotary_embedding(op: Any, x: ir.Value, cos: ir.Value, sin: ir.Value, **_: Any) -> Any:
    """What is put in the pattern's place; of cos and sin it takes one half."""
    assert x.shape is not None
    heads, size = x.shape[1], x.shape[3]
    assert isinstance(size, int)
    start, stop, axis = (op.Constant(value_ints=[number]) for number in (0, size // 2, 2))
    return op.RotaryEmbedding(x, op.Slice(cos, start, stop, axis), op.Slice(sin, start, stop, axis), num_heads=heads)
