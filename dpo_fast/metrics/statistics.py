"""How sure a number is: 95 % intervals of a share and of means."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from math import sqrt
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from dpo_fast.types import Float64Array, Int64Array

CONFIDENCE = 0.95
# Percentile intervals want 1,000 or more (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 19).
RESAMPLES = 1000
# Pairs worked on at a time, a power of two up to 2^16: enough to keep NumPy busy, little enough for a cache.
BLOCK = 2**13
# A block's counts are multiplied in pieces of `ROWS` resamples by `TILE` pairs, so small that a BLAS library gives none
# of them to threads of its own: with the threads here they would only wait for each other.
ROWS, TILE = 16, 128
THREADS = 2


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


def bootstrap_intervals(
    values: Callable[[slice], Float64Array], pairs: int, seed: int = 0, resamples: int = RESAMPLES
) -> Float64Array:
    """95 % percentile bootstrap intervals of the means of M quantities of the same P pairs.

    The 2.5 % and 97.5 % quantiles of the resampled means (Efron and Tibshirani 1993, chapter 13). A single pair, or
    values that are all the same, give an interval of no width, but for rounding.

    Args:
        values: see `bootstrap_means`.
        pairs: P >= 1.
        seed: of NumPy's seed sequence.
        resamples: how many draws.

    Returns:
        (M, 2) float64: the lower and the upper end of each mean.

    Raises:
        ValueError: there are no pairs, or `resamples` is not positive.
    """
    tail = (1 - CONFIDENCE) / 2
    return np.quantile(bootstrap_means(values, pairs, seed, resamples), [tail, 1 - tail], axis=0).T


def bootstrap_means(
    values: Callable[[slice], Float64Array],
    pairs: int,
    seed: int = 0,
    resamples: int = RESAMPLES,
    threads: int = THREADS,
) -> Float64Array:
    """The means of M quantities of P pairs that are drawn with replacement (Efron 1979, doi:10.1214/aos/1176344552).

    Pairs are drawn in two steps, which give the same distribution as one: how many of a resample's P draws fall into
    each block of pairs is multinomial, and within a block they are uniform. A draw is kept as how often each pair came
    up, so that a block's part of the sums is a matrix product, counts (resamples, block) @ values (block, M); the M
    quantities share the draws. No more than a few MiB a thread are needed beside the result.

    The means depend on the values, their order and the seed; not on the number of threads, for each block has a
    generator of its own, spawned from the seed, and the blocks are added up in their order.

    Args:
        values: gives the quantities of some consecutive pairs, (pairs of the slice, M) float64; called once a block,
            in several threads.
        pairs: P >= 1.
        seed: of NumPy's seed sequence.
        resamples: how many draws.
        threads: how many blocks are worked on at once.

    Returns:
        (resamples, M) float64.

    Raises:
        ValueError: there are no pairs, or `resamples` is not positive.
    """
    if pairs < 1 or resamples < 1:
        raise ValueError(f"{resamples} resamples of {pairs} pairs: no mean to give an interval of")
    blocks = [slice(start, min(start + BLOCK, pairs)) for start in range(0, pairs, BLOCK)]
    of_draws, *of_blocks = map(np.random.default_rng, np.random.SeedSequence(seed).spawn(1 + len(blocks)))
    shares = [(block.stop - block.start) / pairs for block in blocks]
    draws = of_draws.multinomial(pairs, shares, size=resamples)  # (resamples, blocks)

    def block_sums(block: slice, draws: Int64Array, generator: np.random.Generator) -> Float64Array:
        return _resampled_sums(values(block), draws, generator)

    with ThreadPoolExecutor(threads) as pool:
        sums: Float64Array = reduce(np.add, pool.map(block_sums, blocks, draws.T, of_blocks))
    return sums / pairs


def _resampled_sums(values: Float64Array, draws: Int64Array, generator: np.random.Generator) -> Float64Array:
    """The sums of some of a block's pairs, drawn with replacement, once a resample.

    Args:
        values: (B, M) of the block's B pairs.
        draws: (R,) how many pairs each resample draws.
        generator: draws them.

    Returns:
        (R, M) float64.
    """
    size, quantities = values.shape
    tiles = -(-size // TILE)
    padded = np.zeros((tiles * TILE, quantities))
    padded[:size] = values
    tiled = padded.reshape(tiles, TILE, quantities)
    sums = np.empty((len(draws), quantities))
    for start in range(0, len(draws), ROWS):
        of_rows = draws[start : start + ROWS]
        counts = np.empty((tiles, len(of_rows), TILE))
        ends = np.cumsum(of_rows)
        drawn = _uniform(generator, size, int(ends[-1]))
        for row, (end, count) in enumerate(zip(ends, of_rows, strict=True)):
            counted = np.bincount(drawn[end - count : end], minlength=tiles * TILE)
            counts[:, row] = counted.reshape(tiles, TILE)
        sums[start : start + ROWS] = (counts @ tiled).sum(axis=0)
    return sums


def _uniform(generator: np.random.Generator, size: int, count: int) -> NDArray[np.uint16]:
    """`count` numbers from 0 up to, but without, `size`, which is at most `BLOCK`."""
    if size < BLOCK:
        return generator.integers(size, size=count, dtype=np.uint16)
    # A whole block's size is a power of two: four draws are cut out of 64 random bits, in a quarter of the time.
    bits = generator.integers(2**64, size=-(-count // 4), dtype=np.uint64).view(np.uint16)
    return bits[:count] & np.uint16(BLOCK - 1)
