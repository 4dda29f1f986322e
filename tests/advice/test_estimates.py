"""The numbers behind the hints, by hand and against other implementations."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from dpo_fast.advice.hints import Estimate, difference_of_shares, mean_of, share_above, sureness_of
from dpo_fast.advice.length import rank_correlation
from dpo_fast.advice.noise import fit_swapped_share


def test_p_and_interval_agree():
    """A limit at the lower end of a 95 % interval has a one-sided p of 2.5 %."""
    estimate = Estimate(0.3, 0.1)
    low, high = estimate.interval
    assert (low, high) == pytest.approx((0.3 - 0.1959964, 0.3 + 0.1959964), abs=1e-7)
    assert estimate.p_above(low) == pytest.approx(0.025, rel=1e-9)
    assert estimate.p_above(0.3) == 0.5
    assert (Estimate(0.3, 0).p_above(0.2), Estimate(0.3, 0).p_above(0.3)) == (0, 1)


def test_the_mean_is_the_t_tests():
    values = np.random.default_rng(0).normal(1, 2, 100)
    found = stats.ttest_1samp(values, 0)
    assert mean_of(values).value / mean_of(values).error == pytest.approx(found.statistic, rel=1e-12)


def test_difference_of_shares_by_hand():
    """Agresti and Caffo: (8 + 1) / (10 + 2) - (2 + 1) / (10 + 2) = 0.5, variance 2 * 0.75 * 0.25 / 12."""
    found = difference_of_shares(8, 10, 2, 10)
    assert found.value == pytest.approx(0.5, rel=1e-12)
    assert found.error == pytest.approx((2 * 0.75 * 0.25 / 12) ** 0.5, rel=1e-12)


def test_share_above_is_near_the_binomial_test():
    """The score test without a correction for continuity: within that correction of the exact test."""
    exact = [stats.binomtest(count, 1000, 0.1, "greater").pvalue for count in (115, 116)]
    assert exact[1] < share_above(115, 1000, 0.1) < exact[0]


@pytest.mark.parametrize(
    ("p", "at_most", "expected"),
    [
        (0.0005, "sure", "sure"), (0.001, "sure", "likely"), (0.02, "sure", "possible"), (0.05, "sure", None),
        (0.0005, "likely", "likely"), (0.02, "likely", "possible"), (0.0, "possible", "possible"),
        (0.1, "possible", None),
    ],
)  # fmt: skip
def test_how_sure(p, at_most, expected):
    assert sureness_of(p, at_most) == expected


@given(st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=3, max_size=40))
def test_rank_correlation_is_spearmans(pairs):
    one, other = np.array(pairs).T
    if one.std() == 0 or other.std() == 0:
        return
    assert rank_correlation(one, other.astype(float)) == pytest.approx(stats.spearmanr(one, other).statistic, abs=1e-9)


@pytest.mark.parametrize("share", [0.0, 0.15, 0.3])
def test_the_share_of_swapped_labels_is_found(share):
    """Labels drawn from the very model: the interval holds it, and p tells it from 10 %."""
    generator = np.random.default_rng(3)
    sizes = generator.exponential(20, 20_000)
    right = generator.random(20_000) < share + (1 - 2 * share) / (1 + np.exp(-0.2 * sizes))
    found, (low, high), p = fit_swapped_share(sizes, right)
    assert found == pytest.approx(share, abs=0.015)
    assert low - 0.005 <= share <= high + 0.005  # the grid's step
    assert (p < 0.001) == (share > 0.1)


def test_the_level_of_the_swapped_share():
    """At the limit itself, 10 % of the labels swapped, p is below 0.05 in about 5 of 100 draws (11: 0.6 % likely)."""
    below = 0
    for seed in range(100):
        generator = np.random.default_rng(seed)
        sizes = generator.exponential(20, 500)
        right = generator.random(500) < 0.1 + 0.8 / (1 + np.exp(-0.2 * sizes))
        below += fit_swapped_share(sizes, right)[2] < 0.05
    assert below <= 10
