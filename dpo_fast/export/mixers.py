"""Layers that carry a state from token to token, as a scan over the sequence.

Transformers' own functions for the CPU loop over the sequence in Python, which a trace would fix to one length. These
take their places while a model is traced. Each step is the recurrence as it is published, so a row of any length is
exact; the state is all that is kept between steps.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch._higher_order_ops.scan import scan
from torch.nn import functional as F


def selective_scan(
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,  # noqa: N803 (the names of the function that it replaces)
    B: torch.Tensor,  # noqa: N803
    C: torch.Tensor,  # noqa: N803
    D: torch.Tensor | None = None,  # noqa: N803
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    **_: Any,
) -> torch.Tensor:
    """Mamba's selective state space: h = exp(dt A) h + dt B x, y = C h + D x (arXiv:2312.00752, algorithm 2).

    Args:
        hidden_states: x, (B, I, T).
        dt: step sizes (B, I, T).
        A: (I, S), of a state of S numbers in each of the I channels.
        B: (B, S, T).
        C: (B, S, T).
        D: (I,).
        z: gate (B, I, T).
        delta_bias: (I,), added to the step sizes.
        delta_softplus: whether softplus is applied to them.

    Returns:
        y, (B, I, T).
    """
    if delta_bias is not None:
        dt = dt + delta_bias[:, None]
    if delta_softplus:
        dt = F.softplus(dt)

    def step(state: torch.Tensor, now: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        x, dt, b, c = now  # (B, I), (B, I), (B, S), (B, S)
        state = torch.exp(dt[:, :, None] * A) * state + (dt * x)[:, :, None] * b[:, None]
        return state, (state @ c[:, :, None])[:, :, 0]

    y = _scan(step, hidden_states.new_zeros(*hidden_states.shape[:2], A.shape[1]), hidden_states, dt, B, C, dim=2)
    if D is not None:
        y = y + hidden_states * D[:, None]
    return y if z is None else y * F.silu(z)


def gated_delta_rule(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    *,
    use_qk_l2norm_in_kernel: bool = False,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """The gated delta rule: S = e^g S, then S = S + k (beta (v - k S)), o = q S (arXiv:2412.06464, equation 10).

    Args:
        query: (B, T, key heads, K).
        key: (B, T, key heads, K).
        value: (B, T, heads, V); each key head serves consecutive heads.
        g: logs of the decay, (B, T, heads).
        beta: strengths of writing (B, T, heads).
        use_qk_l2norm_in_kernel: whether queries and keys are normalised to length 1 first.

    Returns:
        o, (B, T, heads, V), and None for the last state.
    """
    if use_qk_l2norm_in_kernel:  # as flash-linear-attention's l2norm, with its epsilon
        query, key = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (query, key))
    served = value.shape[2] // key.shape[2]
    query, key = (x.repeat_interleave(served, 2) for x in (query * query.shape[-1] ** -0.5, key))

    def step(state: torch.Tensor, now: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v, g, beta = now  # (B, heads, K), the same, (B, heads, V), (B, heads), the same
        state = state * g.exp()[:, :, None, None]  # (B, heads, K, V)
        written = (v - (k[:, :, None] @ state)[:, :, 0]) * beta[:, :, None]
        state = state + k[:, :, :, None] * written[:, :, None]
        return state, (q[:, :, None] @ state)[:, :, 0]

    start = value.new_zeros(value.shape[0], value.shape[2], key.shape[3], value.shape[3])
    return _scan(step, start, query, key, value, g, beta, dim=1), None


# By the names that they replace in the modules of Transformers' models.
SCANS: dict[str, Callable[..., Any]] = {
    "mamba_selective_scan": selective_scan,
    "torch_chunk_gated_delta_rule": gated_delta_rule,
}


def _scan(
    step: Callable[..., tuple[torch.Tensor, torch.Tensor]], start: torch.Tensor, *sequences: torch.Tensor, dim: int
) -> torch.Tensor:
    """Carry a state along a dimension of the sequences; what the steps put out, stacked along it."""
    _, outputs = scan(step, start, tuple(sequence.movedim(dim, 0).contiguous() for sequence in sequences), dim=0)
    stacked: torch.Tensor = outputs.movedim(0, dim)
    return stacked
