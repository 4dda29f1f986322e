"""How far a policy has moved from its reference, told by the tokens of a preference set.

With d = log p_policy(token) - log p_reference(token), in nats:

- the mean log-ratio is the mean of d. Over tokens that the policy has sampled it would estimate the Kullback-Leibler
  divergence KL(policy || reference) a token; over the data's it is what the policy has gained on them: in DPO, it grows
  on the chosen completions' tokens and falls on the rejected ones', or falls on both.
- k3 is the mean of exp(-d) - 1 + d (Schulman, "Approximating KL Divergence", 2020, http://joschu.net/blog/kl-approx.html;
  TRL's GRPOTrainer takes it too). It is never negative, and 0 only where both models agree on every token. Over tokens
  that the policy has sampled it is an unbiased estimate of KL(policy || reference) a token. The data's tokens are not
  the policy's, so here it is no such estimate, but a measure of drift on fixed text: the same for every checkpoint.
"""

from collections.abc import Iterable

import numpy as np

from dpo_fast.types import CompletionScores, Float64Array, PairScores

BRANCHES = ("chosen", "rejected")


def measure_drift(parts: Iterable[PairScores]) -> dict[str, float | None]:
    """The mean log-ratio and k3 over all scored tokens of each branch.

    Args:
        parts: scores under both models.

    Returns:
        `log_ratio/chosen`, `log_ratio/rejected`, `k3/chosen`, `k3/rejected`, in nats a token; None where no token is
        scored, or where a token that the reference expects has so little probability left that k3 overflows.
    """
    tokens = dict.fromkeys(BRANCHES, 0)
    sums = {f"{name}/{branch}": 0.0 for name in ("log_ratio", "k3") for branch in BRANCHES}
    for scores in parts:
        pairs = {
            "chosen": (scores.policy_chosen, scores.reference_chosen),
            "rejected": (scores.policy_rejected, scores.reference_rejected),
        }
        for branch, (policy, reference) in pairs.items():
            difference = _log_ratios(policy, reference)
            tokens[branch] += len(difference)
            sums[f"log_ratio/{branch}"] += float(difference.sum())
            with np.errstate(over="ignore"):
                sums[f"k3/{branch}"] += float((np.expm1(-difference) + difference).sum())
    means = {key: value / max(tokens[key.split("/")[1]], 1) for key, value in sums.items()}
    return {key: value if tokens[key.split("/")[1]] and np.isfinite(value) else None for key, value in means.items()}


def _log_ratios(policy: CompletionScores, reference: CompletionScores | None) -> Float64Array:
    """The d of each scored token, (C,) float64."""
    if reference is None:
        raise ValueError("scores without a reference")
    return policy.log_probs.astype(np.float64) - reference.log_probs.astype(np.float64)
