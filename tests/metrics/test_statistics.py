"""Intervals against hand values, the normal approximation and simulation."""

import tracemalloc
from math import sqrt

import numpy as np
import pytest

from dpo_fast.metrics.statistics import bootstrap_intervals, wilson_interval


def test_wilson_by_hand():
    """8 of 10, z = 1.959964, z^2 = 3.841459.

    Centre: 0.8 + 3.841459 / 20 = 0.9920729. Spread: 1.959964 sqrt(0.8 * 0.2 / 10 + 3.841459 / 400)
    = 1.959964 sqrt(0.016 + 0.009603647) = 1.959964 * 0.1600114 = 0.3136167. Divided by 1 + 0.3841459:
    (0.9920729 - 0.3136167) / 1.3841459 = 0.4901624, (0.9920729 + 0.3136167) / 1.3841459 = 0.9433179.
    """
    # The derivation carries 7 digits.
    assert wilson_interval(8, 10) == pytest.approx((0.4901624, 0.9433179), abs=5e-7)


@pytest.mark.parametrize(
    ("successes", "total", "expected"),
    [
        # Where all fail the upper end is z^2 / (n + z^2), where all succeed the lower one n / (n + z^2).
        (0, 10, (0.0, 3.8414588206941254 / 13.8414588206941254)),
        (10, 10, (10 / 13.8414588206941254, 1.0)),
        (0, 1, (0.0, 3.8414588206941254 / 4.8414588206941254)),
        (1, 1, (1 / 4.8414588206941254, 1.0)),
    ],
)
def test_wilson_at_the_ends(successes, total, expected):
    low, high = wilson_interval(successes, total)
    assert (low, high) == pytest.approx(expected, rel=1e-12)
    assert 0.0 <= low <= high <= 1.0


def test_wilson_is_symmetric_and_holds_the_share():
    for total in (1, 2, 7, 1000):
        for successes in range(total + 1):
            low, high = wilson_interval(successes, total)
            mirrored_low, mirrored_high = wilson_interval(total - successes, total)
            assert (low, high) == pytest.approx((1 - mirrored_high, 1 - mirrored_low), abs=1e-14)
            assert low <= successes / total <= high


@pytest.mark.parametrize(("successes", "total"), [(0, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_what_is_no_share(successes, total):
    with pytest.raises(ValueError, match="no share"):
        wilson_interval(successes, total)


def test_wilson_covers():
    """Of 2,000 samples of 40 with a share of 0.9, 95 % hold it; the standard error of that count is 0.5 %."""
    wins = np.random.default_rng(0).binomial(40, 0.9, 2000)
    covered = np.mean([low <= 0.9 <= high for low, high in (wilson_interval(int(n), 40) for n in wins)])
    # The binomial is discrete, so the coverage at this n and p is not 95 % to the point.
    assert 0.93 < covered < 0.98


def test_bootstrap_agrees_with_the_normal_approximation():
    """For a mean of many values the interval is mean ± 1.96 sd / sqrt(n).

    The 2.5 % quantile of 4,000 normal draws has a standard error of 0.042 sd, 2 % of the half width: 6 % is three.
    """
    values = np.random.default_rng(1).gamma(2.0, 3.0, size=(5000, 1))
    ((low, high),) = bootstrap_intervals(values, seed=3, resamples=4000)
    half_width = 1.96 * values.std() / sqrt(5000)
    assert low == pytest.approx(values.mean() - half_width, abs=0.06 * half_width)
    assert high == pytest.approx(values.mean() + half_width, abs=0.06 * half_width)


def test_bootstrap_draws_pairs_with_replacement():
    """Of the values 0 and 1 a draw of two has the mean 0 or 1 in a quarter of the cases each: the ends are 0 and 1."""
    assert bootstrap_intervals(np.array([[0.0], [1.0]])).tolist() == [[0.0, 1.0]]


def test_bootstrap_shares_the_draws_between_columns():
    values = np.random.default_rng(2).normal(size=(50, 1))
    first, second = bootstrap_intervals(np.hstack([values, 10.0 - values]))
    assert first == pytest.approx(10.0 - second[::-1], rel=1e-12)


def test_bootstrap_is_deterministic_for_a_seed():
    values = np.random.default_rng(4).normal(size=(300, 3))
    assert np.array_equal(bootstrap_intervals(values, seed=7), bootstrap_intervals(values, seed=7))
    assert not np.array_equal(bootstrap_intervals(values, seed=7), bootstrap_intervals(values, seed=8))


def test_bootstrap_covers():
    """Of 300 samples of 60 values, about 94 % of the intervals hold the mean; three standard errors are 4 %."""
    generator = np.random.default_rng(5)
    samples = generator.normal(2.0, 1.0, size=(300, 60, 1))
    bounds = [bootstrap_intervals(sample, seed, resamples=500)[0] for seed, sample in enumerate(samples)]
    covered = np.mean([low <= 2.0 <= high for low, high in bounds])
    assert 0.90 <= covered <= 0.98


def test_bootstrap_of_one_pair_has_no_width():
    assert bootstrap_intervals(np.array([[3.5]])).tolist() == [[3.5, 3.5]]


@pytest.mark.parametrize(("pairs", "resamples"), [(0, 10), (10, 0)])
def test_bootstrap_refuses_nothing(pairs, resamples):
    with pytest.raises(ValueError, match="no mean"):
        bootstrap_intervals(np.zeros((pairs, 1)), resamples=resamples)


def test_bootstrap_memory_is_bounded():
    """All 200 draws of 20,000 pairs at once would take 32 MB; chunks of 2^18 counts take three arrays of 2 MB."""
    values = np.random.default_rng(6).normal(size=(20_000, 2))
    tracemalloc.start()
    bootstrap_intervals(values, resamples=200)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10e6


def test_bootstrap_takes_more_pairs_than_a_chunk_holds():
    values = np.random.default_rng(7).normal(1.0, 1.0, size=(2**18 + 1, 1))
    ((low, high),) = bootstrap_intervals(values, resamples=20)
    # Within 5 standard errors of the mean, 1 / 512 each.
    assert values.mean() - 5 / 512 < low < values.mean() < high < values.mean() + 5 / 512
