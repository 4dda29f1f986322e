"""Intervals against hand values, the normal approximation and simulation."""

import tracemalloc
from math import exp, sqrt

import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as run_with
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dpo_fast.metrics import statistics
from dpo_fast.metrics.statistics import bootstrap_intervals, bootstrap_means, wilson_interval


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


# Bootstrap. Small blocks, so that some pairs are several blocks of which the last is not full.


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(statistics, "BLOCK", 8)


def means(values, seed=0, **options):
    return bootstrap_means(lambda block: values[block], len(values), seed, **options)


def intervals(values, seed=0, **options):
    return bootstrap_intervals(lambda block: values[block], len(values), seed, **options)


@pytest.mark.parametrize("pairs", [1, 7, 8, 9, 29])
@pytest.mark.usefixtures("small_blocks")
def test_bootstrap_draws_are_multinomial(pairs):
    """With the unit vectors as values, P times the means are the counts: whole, P in all, and multinomial.

    Their covariance is 1 - 1/P on the diagonal and -1/P beside it. Each of up to 29^2 entries is estimated from 20,000
    draws with a standard error of at most sqrt(E(n - 1)^4 / 20,000) < sqrt(5 / 20,000) = 0.016; 5 of them are 0.08. A
    fixed number of draws in each block, say, would make the blocks' covariances differ by 1/8.
    """
    counts = pairs * means(np.eye(pairs), resamples=20_000)
    assert counts == pytest.approx(np.round(counts), abs=1e-9)  # roundings of float64
    assert counts.sum(axis=1) == pytest.approx(pairs, abs=1e-9)
    assert counts.min() >= 0
    assert counts.mean(axis=0) == pytest.approx(np.ones(pairs), abs=5 / sqrt(20_000))  # 5 standard errors
    covariance = np.cov(counts, rowvar=False).reshape(pairs, pairs)
    assert covariance == pytest.approx(np.eye(pairs) - 1 / pairs, abs=0.08)
    # Poisson(1) in the limit: P(0) = (1 - 1/P)^P, here over all pairs' counts, which vary less together than apart.
    assert (np.round(counts) == 0).mean() == pytest.approx((1 - 1 / pairs) ** pairs, abs=5 * 0.5 / sqrt(20_000))


def test_bootstrap_draws_are_multinomial_in_whole_blocks():
    """A whole block's draws are cut out of random bits: 8,192 pairs of a full and 100 of a short block.

    Pairs are drawn over the whole range: the mean position of N draws has a standard error of P / sqrt(12 N). A count n
    is nearly Poisson(1), for which (n - 1)^2 has a mean of 1, exactly 1 - 1/P here, and a variance of 3.
    """
    pairs = statistics.BLOCK + 100
    positions = np.arange(pairs, dtype=np.float64)
    drawn = means(positions[:, None], resamples=20)
    assert drawn.mean() == pytest.approx((pairs - 1) / 2, abs=5 * pairs / sqrt(12 * 20 * pairs))
    counts = pairs * means((positions[:, None] == positions[::16]).astype(np.float64), resamples=200)
    assert ((counts - 1) ** 2).mean() == pytest.approx(1 - 1 / pairs, abs=5 * sqrt(3 / counts.size))
    assert (np.round(counts) == 0).mean() == pytest.approx(exp(-1), abs=5 * 0.5 / sqrt(counts.size))


@pytest.mark.usefixtures("small_blocks")
def test_bootstrap_agrees_with_the_normal_approximation():
    """For a mean of many values the interval is mean ± 1.96 sd / sqrt(n), also where most of the spread is between
    blocks: the values grow with their position.

    The 2.5 % quantile of 4,000 normal draws has a standard error of 0.042 sd, 2 % of the half width: 6 % is three.
    """
    values = np.random.default_rng(1).gamma(2.0, 3.0, size=(1003, 1)) + np.linspace(0.0, 30.0, 1003)[:, None]
    ((low, high),) = intervals(values, seed=3, resamples=4000)
    half_width = 1.96 * values.std() / sqrt(1003)
    assert low == pytest.approx(values.mean() - half_width, abs=0.06 * half_width)
    assert high == pytest.approx(values.mean() + half_width, abs=0.06 * half_width)


def test_bootstrap_draws_pairs_with_replacement():
    """Of the values 0 and 1 a draw of two has the mean 0 or 1 in a quarter of the cases each: the ends are 0 and 1."""
    assert intervals(np.array([[0.0], [1.0]])).tolist() == [[0.0, 1.0]]


@pytest.mark.usefixtures("small_blocks")
def test_bootstrap_shares_the_draws_between_columns():
    values = np.random.default_rng(2).normal(size=(50, 1))
    both = means(np.hstack([values, 10.0 - values]))
    assert both[:, 0] == pytest.approx(10.0 - both[:, 1], rel=1e-12)
    # Other columns beside it change nothing but the order in which float64 adds.
    assert both[:, :1] == pytest.approx(means(values), rel=1e-12)


@pytest.mark.usefixtures("small_blocks")
@run_with(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)  # the fixture holds for all
@given(pairs=st.integers(1, 60), quantities=st.integers(1, 5), seed=st.integers(0, 1000), threads=st.integers(1, 4))
def test_bootstrap_does_not_depend_on_the_number_of_threads(pairs, quantities, seed, threads):
    values = np.random.default_rng(seed).normal(size=(pairs, quantities))
    one, several = (means(values, seed, resamples=30, threads=count) for count in (1, threads))
    assert np.array_equal(one, several)


def test_bootstrap_is_deterministic_for_a_seed():
    values = np.random.default_rng(4).normal(size=(300, 3))
    assert np.array_equal(intervals(values, seed=7), intervals(values, seed=7))
    assert not np.array_equal(intervals(values, seed=7), intervals(values, seed=8))


@pytest.mark.usefixtures("small_blocks")
@run_with(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    values=arrays(np.float64, st.tuples(st.integers(1, 20), st.integers(1, 3)), elements=st.floats(-1e6, 1e6)),
    seed=st.integers(0, 1000),
)
def test_bootstrap_intervals_are_ordered_and_within_the_values(values, seed):
    """But for the rounding of sums of 20 values of up to 10^6."""
    bounds = intervals(values, seed, resamples=40)
    assert (bounds[:, 0] <= bounds[:, 1]).all()
    assert (bounds[:, 0] >= values.min(axis=0) - 1e-8).all()
    assert (bounds[:, 1] <= values.max(axis=0) + 1e-8).all()


@pytest.mark.usefixtures("small_blocks")
@run_with(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(value=st.floats(-1e6, 1e6), pairs=st.integers(1, 40))
def test_bootstrap_of_a_constant_has_no_width(value, pairs):
    bounds = intervals(np.full((pairs, 2), value), resamples=40)
    assert bounds == pytest.approx(np.full((2, 2), value), rel=1e-12)


def test_bootstrap_covers():
    """Of 300 samples of 60 values, about 94 % of the intervals hold the mean; three standard errors are 4 %."""
    generator = np.random.default_rng(5)
    samples = generator.normal(2.0, 1.0, size=(300, 60, 1))
    bounds = [intervals(sample, seed, resamples=500)[0] for seed, sample in enumerate(samples)]
    covered = np.mean([low <= 2.0 <= high for low, high in bounds])
    assert 0.90 <= covered <= 0.98


def test_bootstrap_of_one_pair_has_no_width():
    assert intervals(np.array([[3.5]])).tolist() == [[3.5, 3.5]]


@pytest.mark.parametrize(("pairs", "resamples"), [(0, 10), (10, 0)])
def test_bootstrap_refuses_nothing(pairs, resamples):
    with pytest.raises(ValueError, match="no mean"):
        intervals(np.zeros((pairs, 1)), resamples=resamples)


def test_bootstrap_asks_for_each_pair_once_and_keeps_little():
    """100,000 pairs of 40 quantities are 32 MB, and all 100 draws of them as much as 80 MB; a block and its counts
    take some 3 MB a thread.
    """
    asked = []

    def quantities(block):
        asked.append(block)
        return np.ones((block.stop - block.start, 40))

    tracemalloc.start()
    drawn = bootstrap_means(quantities, 100_000, resamples=100)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 16e6
    assert drawn == pytest.approx(np.ones((100, 40)), rel=1e-12)
    covered = sorted((block.start, block.stop) for block in asked)
    assert [start for start, _ in covered] == [0, *(stop for _, stop in covered[:-1])]
    assert covered[-1][1] == 100_000
