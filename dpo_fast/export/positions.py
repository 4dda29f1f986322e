"""Positions that are more than indices: lengths at which frequencies change, windows, and biases by distance."""

import sys
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

# The configuration's names for how far a layer looks back, in tokens.
WINDOWS = ("sliding_window", "attention_chunk_size", "window_size", "attention_window_size")

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
