"""How far a contender's log-probs are from PyTorch's in float32, and what it decides."""

from typing import Any

import numpy as np

from dpo_fast.types import Float64Array


def sequence_errors(log_probs: Float64Array, exact: Float64Array) -> dict[str, Any]:
    """Errors of the sequences' log-probs, in nats.

    Args:
        log_probs: (P, 4), as `gpu.turns.score_both` writes them.
        exact: (Q, 4) of the first Q pairs, Q at most P.
    """
    errors = np.abs(log_probs[: len(exact)] - exact)
    return {
        "sequences": errors.size,
        "mean_nats": float(errors.mean()),
        "p99_nats": float(np.quantile(errors, 0.99)),
        "largest_nats": float(errors.max()),
    }


def accuracy(log_probs: Float64Array) -> float:
    """The share of P pairs whose chosen completion has the larger reward; a tie is none, as TRL has it.

    Args:
        log_probs: (P, 4), as `gpu.turns.score_both` writes them.
    """
    policy_chosen, policy_rejected, reference_chosen, reference_rejected = log_probs.T
    return float((policy_chosen - reference_chosen > policy_rejected - reference_rejected).mean())
