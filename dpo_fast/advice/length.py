"""Length: the margin goes by which completion is longer, or shorter, rather than by which is better.

Known for DPO (arXiv:2403.19159). Two things must hold: the rank correlation between the difference in length and the
margin is beyond `CORRELATION`, and pairs in which length speaks against the chosen completion are right less often, by
more than `GAP`. p is the larger one's. If the policy's accuracy is better than that of "the longer one wins" (or the
shorter) by more than `BETTER`, over all of Tango's interval, length explains the margin only in part, and the hint is
"likely" at most.
"""

from math import atanh, sqrt, tanh

import numpy as np

from dpo_fast.advice.evidence import Evidence
from dpo_fast.advice.hints import FEWEST_PAIRS, Estimate, Hint, Z, difference_of_shares, interval_text, sureness_of
from dpo_fast.compare.paired import compare_accuracies
from dpo_fast.types import Float64Array, Int64Array

CORRELATION = 0.4
GAP = 0.2
BETTER = 0.05


def find_length(evidence: Evidence) -> Hint | None:
    """The hint, if the evidence speaks for it."""
    run = evidence.held_out
    longer = run.chosen_lengths - run.rejected_lengths
    differing = longer != 0
    longer, margins = longer[differing], run.margins[differing]
    if len(margins) < FEWEST_PAIRS or margins.std() == 0 or longer.std() == 0:
        return None
    correlation = rank_correlation(longer, margins)
    # Fisher's z, with the variance of a rank correlation (Bonett and Wright 2000, doi:10.1007/BF02294183).
    z = Estimate(atanh(correlation), sqrt((1 + correlation**2 / 2) / (len(margins) - 3)))
    direction = 1 if correlation > 0 else -1
    helped = direction * longer > 0
    right = margins > 0
    if helped.all() or not helped.any():
        return None
    of_helped, of_others = right[helped], right[~helped]
    gap = difference_of_shares(int(of_helped.sum()), len(of_helped), int(of_others.sum()), len(of_others))
    p = max(Estimate(abs(z.value), z.error).p_above(atanh(CORRELATION)), gap.p_above(GAP))
    rule = compare_accuracies(margins, direction * longer.astype(np.float64))
    sureness = sureness_of(p, "likely" if rule["interval"][0] > BETTER else "sure")
    if sureness is None:
        return None
    interval = [tanh(z.value - Z * z.error), tanh(z.value + Z * z.error)]
    word = "longer" if direction > 0 else "shorter"
    rule_accuracy = float(helped.mean())
    return Hint(
        "length",
        sureness,
        f"The margin goes with length: a rank correlation of {interval_text(correlation, interval)} between it and the "
        f"difference in tokens. Where the chosen completion is the {word} one, {of_helped.mean():.1%} of the pairs are "
        f"right, elsewhere {of_others.mean():.1%}; to prefer the {word} one is right for {rule_accuracy:.1%}, the "
        f"policy for {right.mean():.1%}.",
        "Balance the lengths in the training pairs, or train with ld_alpha (LD-DPO) or sigmoid_norm; judge the policy "
        "on pairs of like length.",
        {
            "rank_correlation": correlation, "rank_correlation_interval": interval,
            "accuracy_helped": float(of_helped.mean()), "accuracy_others": float(of_others.mean()),
            "gap": gap.value, "gap_interval": gap.interval, "length_rule_accuracy": rule_accuracy,
            "accuracy": float(right.mean()), "better_than_rule_interval": rule["interval"], "p": p,
            "pairs": len(margins),
        },
    )  # fmt: skip


def rank_correlation(one: Float64Array | Int64Array, other: Float64Array) -> float:
    """Spearman's correlation of (P,) values, neither of them constant; equal values share their ranks' mean."""
    return float(np.clip(np.corrcoef(_ranks(one), _ranks(other))[0, 1], -1 + 1e-12, 1 - 1e-12))


def _ranks(values: Float64Array | Int64Array) -> Float64Array:
    """(P,) from 1 to P."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: Float64Array = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return ranks
