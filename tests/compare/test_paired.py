"""McNemar's test, the paired bootstrap and Holm's correction: by hand, by other implementations, by simulation."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dpo_fast.compare.paired import FEWEST_PAIRS, compare_accuracies, compare_means, holm, resamples_for

MARGINS = st.lists(st.tuples(*[st.sampled_from([-2.0, -0.5, 0.0, 0.5, 2.0])] * 2), min_size=1, max_size=60)
P_VALUES = st.lists(st.floats(0, 1), min_size=1, max_size=12)


def means_of(values: np.ndarray, *, seed: int = 0, resamples: int = 500) -> list[dict]:
    """The means of (P, M) differences."""
    return compare_means(lambda block: values[block], len(values), seed, resamples)


@given(MARGINS)
def test_mcnemar_is_the_binomial_test_of_the_pairs_that_changed(pairs):
    against, margins = np.array(pairs).T
    found = compare_accuracies(margins, against)

    only_one = int(((margins > 0) & (against <= 0)).sum())
    only_other = int(((margins <= 0) & (against > 0)).sum())
    expected = stats.binomtest(only_one, only_one + only_other).pvalue if only_one + only_other else 1.0
    assert found["p"] == pytest.approx(expected, rel=1e-9)  # logarithms of factorials, added up
    assert (found["gained"], found["lost"]) == (only_one, only_other)
    assert found["difference"] == pytest.approx((margins > 0).mean() - (against > 0).mean(), abs=1e-15)


def test_holm_by_hand():
    """Sorted 0.005, 0.01, 0.03, 0.04, times 4, 3, 2, 1: 0.02, 0.03, 0.06, 0.04; the last may not fall below 0.06."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02], rel=1e-15)
    assert holm([0.7, 0.6]) == [1.0, 1.0]
    assert holm([]) == []


@given(P_VALUES, st.sampled_from([0.01, 0.05, 0.2]))
def test_holm_rejects_what_stepping_down_rejects(p_values, level):
    """The procedure as Holm states it: from the smallest on, p <= level / (m - k), until one is not."""
    rejected = set()
    for step, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        if p_values[index] * (len(p_values) - step) > level:
            break
        rejected.add(index)
    assert {i for i, p in enumerate(holm(p_values)) if p <= level} == rejected


def test_the_bootstrap_against_a_plain_one():
    """Two independent bootstraps of 4,000 resamples: their quantiles differ by some hundredths of a standard error."""
    generator = np.random.default_rng(1)
    values = np.stack([generator.exponential(1, 300) - 0.9, generator.normal(0.3, 1, 300)], axis=1)
    found = means_of(values, resamples=4000)

    plain = values[generator.integers(300, size=(4000, 300))].mean(axis=1)
    for column, each in enumerate(found):
        error = values[:, column].std() / 300**0.5
        assert each["difference"] == pytest.approx(values[:, column].mean(), rel=1e-12)
        np.testing.assert_allclose(each["interval"], np.quantile(plain[:, column], [0.025, 0.975]), atol=0.15 * error)
        p = 2 * min((plain[:, column] <= 0).mean(), (plain[:, column] >= 0).mean())
        assert each["p"] == pytest.approx(p, abs=0.03)  # a standard error of p from 4,000 resamples is below 0.01


def test_coverage_and_level_of_the_paired_bootstrap():
    """400 samples of 60 skewed differences whose mean is 0, as four quantities of 100 samples each.

    95 % intervals hold it, and p is below 0.05, in about 95 and 5 %; percentile intervals are a little narrow, and 400
    draws have a standard error of 1.1 %, so 90 to 98 % is asked for.
    """
    covered, rejected = [], []
    for seed in range(100):
        values = np.random.default_rng(seed).exponential(1, (60, 4)) - 1
        for each in means_of(values, seed=seed):
            covered.append(each["interval"][0] <= 0 <= each["interval"][1])
            rejected.append(each["p"] < 0.05)
    assert 0.90 <= np.mean(covered) <= 0.98
    assert 0.02 <= np.mean(rejected) <= 0.10


@settings(max_examples=30)
@given(st.integers(0, 2**32), st.integers(FEWEST_PAIRS, 200))
def test_swapping_the_runs_negates_the_difference(seed, pairs):
    values = np.random.default_rng(seed).normal(0.1, 1, (pairs, 2))
    for one, other in zip(means_of(values), means_of(-values), strict=True):
        assert one["difference"] == -other["difference"]
        assert one["p"] == other["p"]
        # Quantiles are interpolated from either side, so the last bits may differ.
        np.testing.assert_allclose(
            one["interval"], [-end for end in reversed(other["interval"])], rtol=1e-9, atol=1e-12
        )


@given(MARGINS)
def test_swapping_the_runs_negates_the_change_of_accuracy(pairs):
    against, margins = np.array(pairs).T
    one, other = compare_accuracies(margins, against), compare_accuracies(against, margins)
    assert one["difference"] == -other["difference"]
    assert one["p"] == other["p"]
    np.testing.assert_allclose(one["interval"], [-end for end in reversed(other["interval"])], atol=1e-9)


def test_what_does_not_differ_has_a_p_of_one():
    [found] = means_of(np.zeros((50, 1)))
    assert found == {"difference": 0.0, "interval": [0.0, 0.0], "p": 1.0}


def test_too_few_pairs_get_a_difference_alone():
    [found] = means_of(np.ones((FEWEST_PAIRS - 1, 1)))
    assert found == {"difference": 1.0, "interval": None, "p": None}


def test_the_smallest_p_is_that_of_the_sample_itself():
    """No resample is on the other side, the sample being one more: 2 / (R + 1)."""
    [found] = means_of(np.ones((50, 1)), resamples=999)
    assert found["p"] == pytest.approx(2 / 1000, rel=1e-12)


@pytest.mark.parametrize(("tests", "expected"), [(1, 2_000), (30, 6_000), (10**6, 20_000)])
def test_resamples_for_a_family(tests, expected):
    """200 a test: the smallest p, 2 / (R + 1), times the tests is then below 0.01."""
    assert resamples_for(tests) == expected
