"""Attention as the traced graph computes it, in place of Transformers' own functions."""

from typing import Any

import torch

ATTENTION = "dpo_fast_grouped"  # its name among Transformers' attention functions

# What layers hand over and changes nothing here: nothing is dropped out in evaluation, the mask is there already, the
# rest is for kernels that pack rows. So are flags and sizes, whatever their names.
IGNORED = frozenset({"dropout", "position_ids", "cu_seq_lens_q", "cu_seq_lens_k"})


def grouped_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Scaled dot-product attention in which the query heads of one key head are rows of one matrix product.

    Keys and values are not repeated for grouped queries, as Transformers' own functions do.

    Args:
        module: the layer; not used.
        query: (B, heads, T, D).
        key: (B, key heads, T, D).
        value: (B, key heads, T, D of values).
        attention_mask: (B, 1, T, T) or (B, heads, T, T), added to the scores.
        scaling: of the scores; 1 / sqrt(D) by default.
        softcap: c of c · tanh(scores / c) (gemma2).
        s_aux: (heads,), the logits of a column that takes probability and gives nothing (gpt_oss).
        sinks: the same, as other layers name it.
        options: others that layers hand over.

    Returns:
        (B, T, heads, D of values), and None for the probabilities.

    Raises:
        NotImplementedError: a layer hands over something that would change the result.
    """
    for name, option in options.items():
        if isinstance(option, (torch.Tensor, float)) and name not in IGNORED:
            raise NotImplementedError(f"attention with {name} is unknown here")
    batch, heads, length, size = query.shape
    key_heads = key.shape[1]
    groups = heads // key_heads
    scaling = size**-0.5 if scaling is None else scaling
    # Scaled right before the product, where ONNX Runtime makes one operator of the two.
    query = query.reshape(batch, key_heads, groups * length, size) * scaling
    scores = (query @ key.transpose(2, 3)).reshape(batch, key_heads, groups, length, length)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if attention_mask.shape[1] == 1:
        scores = scores + attention_mask[:, :, None]
    else:
        scores = scores + attention_mask.reshape(batch, key_heads, groups, length, length)
    sink = sinks if s_aux is None else s_aux
    if sink is None:
        probability = scores.softmax(-1)
    else:
        column = sink.reshape(1, key_heads, groups, 1, 1).expand(batch, key_heads, groups, length, 1)
        probability = torch.cat([scores, column], -1).softmax(-1)[..., :-1]
    attended = probability.reshape(batch, key_heads, groups * length, length) @ value
    return attended.reshape(batch, heads, length, value.shape[-1]).transpose(1, 2).contiguous(), None
