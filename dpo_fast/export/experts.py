"""Mixtures of experts in which every expert computes every token: for engines that cannot gather tokens by expert.

TensorRT takes neither sizes that depend on the data (how many tokens chose an expert) nor scatters that add. The
products with all experts' weights take E / k times the operations of the k experts that a token chose of E.
"""

from typing import Any

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

DENSE = "dpo_fast_dense"


def dense_experts(
    experts: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The weighted sum of the chosen experts, as Transformers' `batched_mm_experts_forward` computes it.

    Args:
        experts: a layer's module; Transformers' `use_experts_implementation` says what it has.
        hidden_states: (N, H).
        top_k_index: the experts that each token chose, (N, k).
        top_k_weights: their weights, (N, k).

    Returns:
        (N, H).
    """
    projection = experts.gate_up_proj if experts.has_gate else experts.up_proj
    count = int(projection.shape[0])
    # (N, E): zero for the experts that a token has not chosen.
    chosen = top_k_index[:, :, None] == torch.arange(count)
    weights = torch.where(chosen, top_k_weights[:, :, None], 0.0).sum(1)

    hidden = hidden_states[None] @ _by_columns(experts, projection)  # (E, N, 2 I), or (E, N, I) without gates
    if experts.has_bias:
        bias = experts.gate_up_proj_bias if experts.has_gate else experts.up_proj_bias
        hidden = hidden + bias[:, None]
    hidden = experts._apply_gate(hidden) if experts.has_gate else experts.act_fn(hidden)  # (E, N, I)
    down = _by_columns(experts, experts.down_proj)  # (E, I, H)
    if experts.has_post_expert_norm:
        if experts.has_bias:
            raise NotImplementedError("experts with biases and a norm behind them are unknown here")
        normed: torch.Tensor = experts.post_expert_norm(hidden @ down) * weights.T[:, :, None]
        return normed.sum(0)
    # Weighted before the product, whose sum over I and E is one: (N, E I) @ (E I, H).
    weighted = (hidden * weights.T[:, :, None]).transpose(0, 1).reshape(hidden_states.shape[0], -1)
    result: torch.Tensor = weighted @ down.reshape(-1, down.shape[2])
    return result + weights @ experts.down_proj_bias if experts.has_bias else result


def _by_columns(experts: Any, weight: torch.Tensor) -> torch.Tensor:
    """Stacked matrices as (E, inputs, outputs), however the family stores them."""
    return weight if experts.is_transposed else weight.transpose(1, 2)


def register() -> None:
    """Make `DENSE` a name that Transformers' models take."""
    ALL_EXPERTS_FUNCTIONS.register(DENSE, dense_experts)
