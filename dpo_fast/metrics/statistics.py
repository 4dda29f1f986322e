"""How sure a number is: 95 % intervals of a share and of means."""

from math import sqrt
from statistics import NormalDist

import numpy as np

from dpo_fast.types import Float64Array

CONFIDENCE = 0.95
# Percentile intervals want 1,000 or more (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 19).
RESAMPLES = 1000
# Counts held at a time, 2 MiB of int64 and as much of float64: enough to keep NumPy busy, little enough for a cache.
_COUNTS_PER_CHUNK = 2**18


def wilson_interval(successes: int, total: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a share (Wilson 1927, doi:10.1080/01621459.1927.10502953).

    With p = successes / total, n = total and z the normal distribution's 97.5 % quantile:
    (p + z^2 / 2n ± z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n). Unlike p ± z sqrt(p (1 - p) / n) it keeps to
    [0, 1] and does not shrink to nothing at 0 and 1 (Brown, Cai and DasGupta 2001, doi:10.1214/ss/1009213286).

    Args:
        successes: how often it happened, 0 to `total`.
        total: how often it could have happened.

    Returns:
        The lower and the upper end; exactly 0 or 1 where all failed or all succeeded.

    Raises:
        ValueError: `total` is not positive, or `successes` is not within 0 and `total`.
    """
    if total < 1 or not 0 <= successes <= total:
        raise ValueError(f"{successes} successes of {total}: no share to give an interval of")
    z = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)
    share = successes / total
    centre = share + z * z / (2 * total)
    spread = z * sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    # At the ends the formula gives 0 and 1 but for rounding.
    low = 0.0 if successes == 0 else (centre - spread) / scale
    high = 1.0 if successes == total else (centre + spread) / scale
    return low, high


def bootstrap_intervals(values: Float64Array, seed: int = 0, resamples: int = RESAMPLES) -> Float64Array:
    """95 % percentile bootstrap intervals of the means of M quantities of the same P pairs.

    Draws P pairs with replacement `resamples` times and takes the 2.5 % and 97.5 % quantiles of the means (Efron
    1979, doi:10.1214/aos/1176344552; Efron and Tibshirani 1993, chapter 13). The M quantities share the draws. A draw
    is kept as how often each pair came up, so that its means are one matrix product; draws are made in chunks of
    about 2^18 counts (one draw at a time where P is larger): a few MiB and, for 160,000 pairs, a second or two.

    The intervals depend on the values, their order and the seed, and on nothing else. A single pair, or values that
    are all the same, give an interval of no width, but for rounding.

    Args:
        values: (P, M) float64, P >= 1.
        seed: of NumPy's default generator (PCG64).
        resamples: how many draws.

    Returns:
        (M, 2) float64: the lower and the upper end of each mean.

    Raises:
        ValueError: `values` has no rows, or `resamples` is not positive.
    """
    pairs = len(values)
    if pairs < 1 or resamples < 1:
        raise ValueError(f"{resamples} resamples of {pairs} pairs: no mean to give an interval of")
    generator = np.random.default_rng(seed)
    draws_per_chunk = max(1, _COUNTS_PER_CHUNK // pairs)
    means = np.empty((resamples, values.shape[1]))
    for start in range(0, resamples, draws_per_chunk):
        draws = min(draws_per_chunk, resamples - start)
        drawn = generator.integers(pairs, size=(draws, pairs))
        drawn += pairs * np.arange(draws)[:, None]  # one range of numbers a draw, so that one bincount counts them all
        counts = np.bincount(drawn.ravel(), minlength=draws * pairs).reshape(draws, pairs)
        means[start : start + draws] = counts.astype(np.float64) @ values / pairs
    tail = (1 - CONFIDENCE) / 2
    return np.quantile(means, [tail, 1 - tail], axis=0).T
