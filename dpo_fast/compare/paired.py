"""Tests of two runs on the same pairs: McNemar's for the accuracy, the paired bootstrap for means; Holm's correction.

Shapes use P (pairs), M (quantities) and R (resamples).
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dpo_fast.metrics.statistics import BLOCK, CONFIDENCE, bootstrap_means
from dpo_fast.types import Float64Array
from dpo_fast.verification.decisions import change_interval, count_changes, detectable_change, mcnemar

# Below this, percentile intervals of a mean are much too narrow, and no p-value is given.
FEWEST_PAIRS = 20
LEAST_RESAMPLES, MOST_RESAMPLES = 2_000, 20_000
RESAMPLES_A_TEST = 200  # p-values then reach down to 0.01 after the correction for that many tests


def compare_accuracies(margins: Float64Array, against: Float64Array) -> dict[str, Any]:
    """The change of the accuracy, and whether it can be chance: McNemar's exact test.

    Args:
        margins: (P,) of the run, P >= 1; only their signs matter, and a tie is wrong.
        against: (P,) of the run that it is compared with.

    Returns:
        `difference` of the shares of right pairs; `interval`, 95 %, Tango's; `gained`, `lost`: pairs that only the one
        or only the other gets right; `p`; `detectable`: the smallest change that so many pairs show with 80 % power.
    """
    gained, lost = count_changes(against, margins)
    pairs = len(margins)
    return {
        "difference": (gained - lost) / pairs,
        "interval": list(change_interval(gained, lost, pairs)),
        "gained": gained,
        "lost": lost,
        "p": mcnemar(gained, lost),
        "detectable": detectable_change(pairs, (gained + lost) / pairs),
    }


def compare_means(
    differences: Callable[[slice], Float64Array], pairs: int, seed: int, resamples: int
) -> list[dict[str, Any]]:
    """The means of M differences of the same P pairs, and whether they can be 0: the paired bootstrap.

    Pairs are drawn with replacement, both runs' values with them. The interval is the percentile interval; the p-value
    is two-sided and inverts it: twice the smaller share of resampled means on either side of 0, both counting those at
    0, with the sample itself as one more resample (Davison and Hinkley, Bootstrap Methods and their Application, 1997,
    equation 4.11). So it is at least 2 / (R + 1), and 1 where nothing differs.

    Args:
        differences: of some consecutive pairs, (pairs of the slice, M) float64: one run's value minus the other's.
        pairs: P >= 1.
        seed: of the bootstrap.
        resamples: R.

    Returns:
        For each quantity its mean `difference`; `interval`, 95 %, and `p`, both None below `FEWEST_PAIRS` pairs.
    """
    # Block by block, for all pairs' differences of many runs need not fit into memory.
    blocks = (slice(start, min(start + BLOCK, pairs)) for start in range(0, pairs, BLOCK))
    means = sum(differences(block).sum(axis=0) for block in blocks) / pairs
    if pairs < FEWEST_PAIRS:
        return [{"difference": float(mean), "interval": None, "p": None} for mean in means]
    resampled = bootstrap_means(differences, pairs, seed, resamples)  # (R, M)
    tail = (1 - CONFIDENCE) / 2
    intervals = np.quantile(resampled, [tail, 1 - tail], axis=0).T
    smaller = np.minimum((resampled <= 0).sum(axis=0), (resampled >= 0).sum(axis=0))
    p_values = np.minimum(2 * (smaller + 1) / (resamples + 1), 1.0)
    return [
        {"difference": float(mean), "interval": interval.tolist(), "p": float(p)}
        for mean, interval, p in zip(means, intervals, p_values, strict=True)
    ]


def resamples_for(tests: int) -> int:
    """How many resamples let a p-value that is corrected for so many tests reach 0.01, within bounds."""
    return min(max(RESAMPLES_A_TEST * tests, LEAST_RESAMPLES), MOST_RESAMPLES)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: the chance of any false claim among all stays below the level (Holm 1979).

    The k-th smallest of m p-values is multiplied by m - k + 1, and none is smaller than the one before it
    (Scandinavian Journal of Statistics 6, 65-70). It needs no independence.

    Args:
        p_values: of the tests of one family.

    Returns:
        The corrected p-values, in the same order, at most 1.
    """
    values = np.array(p_values, dtype=np.float64)
    order = np.argsort(values, kind="stable")
    corrected = np.minimum(np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1)), 1.0)
    result = np.empty_like(values)
    result[order] = corrected
    return [float(value) for value in result]
