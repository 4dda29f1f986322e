"""Flips, McNemar's test, Tango's interval and the power: by hand, by brute force, and by simulation."""

from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize, stats

from dpo_fast.verification.decisions import (
    change_interval,
    compare_decisions,
    detectable_change,
    mcnemar,
    pairs_to_detect,
    pairs_until,
)

Z = 1.959963984540054
MARGINS = st.lists(
    st.tuples(*[st.sampled_from([-2.0, -0.5, 0.0, 0.5, 2.0])] * 2), min_size=1, max_size=30
)  # of the original and of the other


def decide(original, margins, near=0.5, subsets=None):
    return compare_decisions(
        np.array(original, float), np.array(margins, float), np.arange(10, 10 + len(original)), subsets, near
    )


def test_decisions_by_hand():
    """Five pairs: kept; lost, clearly; gained, from a near-tie; a tie that becomes right; and a tie that stays one."""
    found = decide([1.0, 0.8, -0.2, 0.0, 0.0], [2.0, -0.1, 0.3, 0.1, 0.0], near=0.5, subsets=list("abcde"))
    assert [(flip.row, flip.subset, flip.near_tie) for flip in found.flips] == [
        (11, "b", False), (12, "c", True), (13, "d", True),
    ]  # fmt: skip
    assert (found.flips[0].original_margin, found.flips[0].margin) == (0.8, -0.1)
    assert (found.pairs, found.ties, found.near_ties, found.clear_flips) == (5, 2, 3, 1)
    assert (found.original_accuracy, found.accuracy) == (2 / 5, 3 / 5)
    assert (found.gained, found.lost, found.change) == (2, 1, 1 / 5)
    assert found.discordant == 3 / 5
    assert found.mcnemar_p == 1.0  # 2 of 3: nothing could be less telling


def test_a_tie_that_is_lost_flips_and_leaves_the_accuracy():
    found = decide([0.0], [-1.0])
    assert (len(found.flips), found.gained, found.lost) == (1, 0, 0)


@given(MARGINS)
def test_swapping_chosen_and_rejected(pairs):
    """The same preferences flip, and where there are no ties, gains and losses change places."""
    original, margins = np.array(pairs).T
    found, swapped = decide(original, margins), decide(-original, -margins)
    assert {flip.row for flip in found.flips} == {flip.row for flip in swapped.flips}
    assert found.clear_flips == swapped.clear_flips
    if (original != 0).all() and (margins != 0).all():
        assert (found.gained, found.lost) == (swapped.lost, swapped.gained)
        assert found.mcnemar_p == swapped.mcnemar_p
        # Bisected to 2e-15.
        assert found.change_interval == pytest.approx([-end for end in swapped.change_interval[::-1]], abs=1e-12)


@given(MARGINS, st.randoms(use_true_random=False), st.sampled_from([0.25, 8.0]))
def test_order_and_scale_do_not_matter(pairs, random, scale):
    shuffled = random.sample(pairs, len(pairs))
    found = decide(*np.array(pairs).T)
    other = compare_decisions(*(scale * np.array(shuffled).T), np.arange(len(pairs)), None, 0.5 * scale)
    for name in ("ties", "near_ties", "clear_flips", "gained", "lost", "change", "change_interval", "mcnemar_p"):
        assert getattr(found, name) == getattr(other, name)
    assert len(found.flips) == len(other.flips)


def test_mcnemar_by_hand():
    """1 of 9: (1 + 9) / 2^9, twice."""
    assert mcnemar(1, 8) == pytest.approx(20 / 512, rel=1e-12)
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(0, 5) == pytest.approx(2 / 32, rel=1e-12)


def test_mcnemar_is_the_sum_over_outcomes_as_unlikely():
    """Brute force in whole numbers: rounding of lgamma is all that parts the two."""
    for changed in range(1, 41):
        for gained in range(changed + 1):
            unlikely = sum(comb(changed, k) for k in range(changed + 1) if comb(changed, k) <= comb(changed, gained))
            assert mcnemar(gained, changed - gained) == pytest.approx(unlikely / 2**changed, rel=1e-11)


@pytest.mark.parametrize(("gained", "lost"), [(0, 30), (430, 500), (5000, 5400)])
def test_mcnemar_is_scipys(gained, lost):
    # lgamma of 10,400 is known to 1e-16 of 86,000.
    assert mcnemar(gained, lost) == pytest.approx(stats.binomtest(gained, gained + lost).pvalue, rel=1e-9)


def test_tango_where_nothing_changed():
    """With no change the score is -P D / sqrt(P D (1 - D)), so the ends are z^2 / (P + z^2) to either side."""
    for pairs in (1, 50, 380, 381):
        end = Z**2 / (pairs + Z**2)
        assert change_interval(0, 0, pairs) == pytest.approx((-end, end), abs=1e-12)
    assert change_interval(0, 0, 380)[1] > 0.01 > change_interval(0, 0, 381)[1]


def test_tango_of_symmetric_changes():
    """With as many gains as losses, the interval lies evenly around 0."""
    low, high = change_interval(20, 20, 200)
    assert low == pytest.approx(-high, abs=1e-12)


@pytest.mark.parametrize(("gained", "lost", "pairs"), [(1, 9, 50), (12, 3, 100), (0, 4, 30), (25, 40, 1000)])
def test_tango_by_brute_force(gained, lost, pairs):
    """At each end, the score computed from a share of losses that is found by maximising the likelihood is z."""

    def score(change):
        def unlikelihood(q):
            logs = [(gained, q + change), (lost, q), (pairs - gained - lost, 1 - 2 * q - change)]
            return -sum(count * np.log(max(share, 1e-300)) for count, share in logs if count)

        bounds = max(0.0, -change), (1 - change) / 2
        q = optimize.minimize_scalar(unlikelihood, bounds=bounds, method="bounded", options={"xatol": 1e-12}).x
        return (gained - lost - pairs * change) / np.sqrt(pairs * (2 * q + change * (1 - change)))

    low, high = change_interval(gained, lost, pairs)
    assert low < (gained - lost) / pairs < high
    # The maximiser finds q to a millionth or so.
    assert (score(low), score(high)) == pytest.approx((Z, -Z), abs=1e-4)


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 60))
def test_tango_holds_the_estimate_and_narrows(gained, lost, unchanged):
    pairs = gained + lost + unchanged
    if not pairs:
        return
    low, high = change_interval(gained, lost, pairs)
    assert -1 <= low <= (gained - lost) / pairs + 1e-12
    assert (gained - lost) / pairs - 1e-12 <= high <= 1
    more_low, more_high = change_interval(4 * gained, 4 * lost, 4 * pairs)
    assert more_high - more_low < high - low


@pytest.mark.parametrize(
    ("gain", "loss", "pairs"), [(0.02, 0.03, 200), (0.005, 0.015, 400), (0.1, 0.1, 100), (0, 0.01, 500)]
)
def test_tango_covers(gain, loss, pairs):
    """Of 4,000 samples 95 % should hold the truth, standard error 0.3 %; counts are coarse, so it may be some more."""
    drawn = np.random.default_rng(0).multinomial(pairs, [gain, loss, 1 - gain - loss], 4000)
    ends = {counts: change_interval(*counts, pairs) for counts in {(int(g), int(b)) for g, b, _ in drawn}}
    held = [low <= gain - loss <= high for low, high in (ends[int(g), int(b)] for g, b, _ in drawn)]
    assert 0.935 < np.mean(held) <= 1.0


def test_power_by_hand():
    """D = 0.1, d = 0.2: (1.959964 sqrt(0.2) + 0.841621 sqrt(0.19))^2 / 0.01 = 1.243375^2 / 0.01 = 154.6."""
    assert pairs_to_detect(0.1, 0.2) == 155
    assert pairs_to_detect(0.1, 0.0) == pairs_to_detect(0.1, 0.1)  # no fewer pairs can change than make the change


def test_detectable_change_turns_pairs_to_detect_around():
    for pairs in (50, 200, 1000, 5000):
        for discordant in (0.0, 0.01, 0.1):
            change = detectable_change(pairs, discordant)
            assert pairs_to_detect(change, discordant) <= pairs < pairs_to_detect(change * 0.99, discordant)
    assert detectable_change(3, 0.0) == 1.0  # three pairs never give p < 0.05


@pytest.mark.parametrize(("pairs", "discordant"), [(1000, 0.0), (1000, 0.04), (5000, 0.02)])
def test_the_exact_test_has_about_that_power(pairs, discordant):
    """By simulation: the exact test is a little more careful than the formula, which is for the approximate one."""
    change = detectable_change(pairs, discordant)
    changed = max(discordant, change)
    shares = [(changed + change) / 2, (changed - change) / 2, 1 - changed]
    drawn = np.random.default_rng(1).multinomial(pairs, np.maximum(shares, 0), 2000)
    power = np.mean([mcnemar(int(gained), int(lost)) < 0.05 for gained, lost, _ in drawn])
    assert 0.74 < power < 0.84  # the standard error is 0.9 %


def test_pairs_until():
    assert pairs_until(lambda number: number >= 777, 5) == 777
    assert pairs_until(lambda number: False, 5) is None
