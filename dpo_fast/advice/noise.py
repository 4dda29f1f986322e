"""Noisy labels: pairs that are wrong however large the margin is.

A policy that has learned to tell good from bad is rarely wrong where its margin is large. If a share e of the labels is
swapped at random, it is wrong that often there too: P(right) = e + (1 - 2e) s(k |r|), the model of conservative and
robust DPO (arXiv:2403.00409), with r the margin and k free. Both are fitted by maximum likelihood on a grid; the
interval is the profile likelihood's, p the likelihood ratio's against e = `LABELS`.

Confident errors have other causes too. They are not called noise where accuracy does not rise with the margin's size by
`INFORMATIVE`, nor where the policy has overfit or goes by length (`advise` sees to that); and without the accuracy on
training pairs, overfitting cannot be ruled out: the hint is "possible" at most.
"""

from math import sqrt
from statistics import NormalDist

import numpy as np

from dpo_fast.advice.evidence import Evidence
from dpo_fast.advice.hints import FEWEST_PAIRS, Hint, Z, difference_of_shares, interval_text, sureness_of
from dpo_fast.metrics.rewards import log_sigmoid
from dpo_fast.types import Float64Array

LABELS = 0.1  # share of swapped labels up to which nothing is said
INFORMATIVE = 0.05  # by which the accuracy of the half with the larger margins is better
BINS = 256  # pairs of about one margin are counted together
SHARES = np.arange(0.0, 0.4501, 0.005)  # e
STEEPNESS = np.exp(np.arange(-4.0, 4.01, 0.05))  # k, in units of one over the median margin


def find_noise(evidence: Evidence) -> Hint | None:
    """The hint, if the evidence speaks for it."""
    margins = evidence.held_out.margins
    margins = margins[margins != 0]
    if len(margins) < 2 * FEWEST_PAIRS:
        return None
    sizes, right = np.abs(margins), margins > 0
    large = sizes > np.median(sizes)
    gain = difference_of_shares(
        int(right[large].sum()), int(large.sum()), int(right[~large].sum()), int((~large).sum())
    )
    if gain.p_above(INFORMATIVE) >= 0.05:
        return None
    share, interval, p = fit_swapped_share(sizes, right)
    sureness = sureness_of(p, "possible" if evidence.training is None else "sure")
    if sureness is None:
        return None
    top = sizes >= np.quantile(sizes, 0.9)
    wrong = 1 - float(right[top].mean())
    return Hint(
        "noisy_labels",
        sureness,
        f"Of the tenth of the pairs with the largest margins, {wrong:.1%} are wrong. Over all pairs, errors do not die "
        f"out as margins grow: as if a share of {interval_text(share, interval)} of the labels were swapped.",
        "Look at the pairs with the most negative margins, and correct or drop those whose labels are wrong; or train "
        f"with --loss-type robust and a label smoothing of about {share:.2g}.",
        {
            "swapped_share": share, "swapped_share_interval": interval, "wrong_in_top_tenth": wrong, "p": p,
            "pairs": len(margins),
        },
    )  # fmt: skip


def fit_swapped_share(sizes: Float64Array, right: np.ndarray) -> tuple[float, list[float], float]:
    """Fit the share of swapped labels.

    Args:
        sizes: (P,) absolute margins, none 0.
        right: (P,) bool.

    Returns:
        The most likely share, its 95 % interval, and the one-sided p-value of "at most `LABELS`".
    """
    order = np.argsort(sizes)
    bins = np.array_split(order, min(BINS, len(order)))
    counts = np.array([len(each) for each in bins])
    wins = np.array([right[each].sum() for each in bins])
    means = np.array([sizes[each].mean() for each in bins]) / np.median(sizes)
    without_noise = np.exp(log_sigmoid(STEEPNESS[:, None] * means))  # (k, bins)
    profile = np.array([_best_likelihood(share, without_noise, wins, counts) for share in SHARES])
    best = int(profile.argmax())
    inside = SHARES[2 * (profile[best] - profile) <= Z * Z]
    at_limit = profile[int(np.argmin(np.abs(SHARES - LABELS)))]
    p = 1.0 if SHARES[best] <= LABELS else 1 - NormalDist().cdf(sqrt(2 * (profile[best] - at_limit)))
    return float(SHARES[best]), [float(inside.min()), float(inside.max())], p


def _best_likelihood(share: float, without_noise: Float64Array, wins: np.ndarray, counts: np.ndarray) -> float:
    """The largest log-likelihood over all k, given the share."""
    chance = np.clip(share + (1 - 2 * share) * without_noise, 1e-12, 1 - 1e-12)
    return float((np.log(chance) @ wins + np.log1p(-chance) @ (counts - wins)).max())
