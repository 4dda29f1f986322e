"""Which preferences changed, and what so many pairs can say about the accuracy.

A preference is the sign of a margin: the chosen completion is preferred, or the rejected one, or neither. The accuracy
counts pairs whose chosen completion is preferred, a tie as wrong, as TRL does. Two accuracies on the same pairs differ
only by the pairs that one got right and the other did not: `gained` and `lost`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, copysign, exp, fsum, inf, lgamma, log, sqrt
from statistics import NormalDist

import numpy as np

from dpo_fast.metrics.statistics import CONFIDENCE
from dpo_fast.types import Float64Array, Int64Array
from dpo_fast.verification.types import Interval

POWER = 0.8  # the usual one (Cohen, Statistical Power Analysis for the Behavioral Sciences, 1988, section 2.4)
HALVINGS = 50  # of an interval of at most 2: to 2e-15
MOST_PAIRS = 2**40  # beyond this, no number of pairs is named


@dataclass(frozen=True, slots=True)
class Flip:
    """A pair whose preference changed.

    Attributes:
        row: 1-based row number in the data set.
        subset: of the pair, or None.
        original_margin, margin: in units of the reward.
        near_tie: whether the original's margin is within reach of its own noise.
    """

    row: int
    subset: str | None
    original_margin: float
    margin: float
    near_tie: bool


@dataclass(frozen=True, slots=True)
class Decisions:
    """Preferences of the original and of another scoring of the same P pairs.

    Attributes:
        pairs: P.
        ties: pairs whose original margin is exactly 0.
        near_ties: pairs whose original margin is at most `near_tie_margin` from 0, ties among them.
        near_tie_margin: in units of the reward.
        flips: the pairs whose preference changed, those with the largest original margin first.
        clear_flips: how many of these are no near-ties.
        original_accuracy, accuracy: shares of pairs.
        gained, lost: pairs that became right, and that became wrong.
        change: of the accuracy: (gained - lost) / P.
        change_interval: 95 %, see `change_interval`.
        mcnemar_p: see `mcnemar`.
        detectable_change: the smallest change that so many pairs show with 80 % power, see `detectable_change`.
    """

    pairs: int
    ties: int
    near_ties: int
    near_tie_margin: float
    flips: tuple[Flip, ...]
    clear_flips: int
    original_accuracy: float
    accuracy: float
    gained: int
    lost: int
    change: float
    change_interval: Interval
    mcnemar_p: float
    detectable_change: float

    @property
    def discordant(self) -> float:
        """Share of pairs that one scoring gets right and the other does not."""
        return (self.gained + self.lost) / self.pairs


def compare_decisions(
    original: Float64Array, margins: Float64Array, rows: Int64Array, subsets: list[str] | None, near_tie_margin: float
) -> Decisions:
    """Compare the preferences of two scorings.

    Args:
        original: (P,) float64: the original's margins, in units of the reward; P >= 1.
        margins: (P,) float64: the other scoring's.
        rows: (P,) int64 row numbers.
        subsets: one text a pair, or None.
        near_tie_margin: up to where a margin is a near-tie.
    """
    pairs = len(rows)
    flipped = np.flatnonzero(np.sign(original) != np.sign(margins))
    flipped = flipped[np.argsort(-np.abs(original[flipped]), kind="stable")]
    near = np.abs(original) <= near_tie_margin
    gained, lost = count_changes(original, margins)
    return Decisions(
        pairs=pairs,
        ties=int((original == 0).sum()),
        near_ties=int(near.sum()),
        near_tie_margin=near_tie_margin,
        flips=tuple(
            Flip(int(rows[i]), subsets[i] if subsets else None, float(original[i]), float(margins[i]), bool(near[i]))
            for i in flipped
        ),
        clear_flips=int((~near[flipped]).sum()),
        original_accuracy=float((original > 0).mean()),
        accuracy=float((margins > 0).mean()),
        gained=gained,
        lost=lost,
        change=(gained - lost) / pairs,
        change_interval=change_interval(gained, lost, pairs),
        mcnemar_p=mcnemar(gained, lost),
        detectable_change=detectable_change(pairs, (gained + lost) / pairs),
    )


def count_changes(original: Float64Array, margins: Float64Array) -> tuple[int, int]:
    """How many pairs became right, and how many became wrong."""
    return int(((original <= 0) & (margins > 0)).sum()), int(((original > 0) & (margins <= 0)).sum())


def mcnemar(gained: int, lost: int) -> float:
    """McNemar's test, two-sided and exact: could the accuracies be the same (McNemar 1947, doi:10.1007/BF02295996)?

    Given that n pairs changed, as many gains as losses are expected: gains are binomial (n, 1/2). The p-value is twice
    the smaller tail, at most 1; the distribution is symmetric, so that is also the sum over all outcomes that are as
    unlikely.

    Args:
        gained: pairs that became right.
        lost: pairs that became wrong.

    Returns:
        The p-value; 1 where nothing changed.
    """
    changed = gained + lost
    log_terms = (
        lgamma(changed + 1) - lgamma(k + 1) - lgamma(changed - k + 1) - changed * log(2)
        for k in range(min(gained, lost) + 1)
    )
    return min(1.0, 2 * fsum(map(exp, log_terms)))


def change_interval(gained: float, lost: float, pairs: float) -> Interval:
    """Tango's 95 % score interval of a difference of paired shares (Tango 1998).

    doi:10.1002/(SICI)1097-0258(19980430)17:8<891::AID-SIM780>3.0.CO;2-B. All changes D that a score test does not
    reject: |gained - lost - P D| <= z sqrt(P (2 q + D (1 - D))), where q is the most likely share of losses if the
    change is D: q = (sqrt(B^2 - 4 A C) - B) / 2A with A = 2P, B = (2P - gained + lost) D - gained - lost and
    C = -lost D (1 - D). Unlike Wald's interval it does not shrink to nothing where no pair changed: it is then
    z^2 / (P + z^2) to either side.

    Args:
        gained: pairs that became right; need not be whole, so that it can be asked what more pairs would give.
        lost: pairs that became wrong.
        pairs: P.

    Returns:
        The lower and the upper end, within -1 and 1.
    """
    z = _quantile(0.5 + CONFIDENCE / 2)

    def score(change: float) -> float:
        linear = (2 * pairs - gained + lost) * change - gained - lost
        root = sqrt(max(linear * linear + 8 * pairs * lost * change * (1 - change), 0.0))
        # Of the two ways to write the root, the one that does not subtract what is nearly the same.
        losses = (root - linear) / (4 * pairs) if linear <= 0 else 2 * lost * change * (1 - change) / (root + linear)
        distance, variance = gained - lost - pairs * change, pairs * (2 * losses + change * (1 - change))
        if variance <= 0:
            return copysign(inf, distance) if distance else 0.0
        return distance / sqrt(variance)

    estimate = (gained - lost) / pairs
    low = _cross(lambda change: score(change) > z, -1.0, estimate)
    high = _cross(lambda change: score(change) >= -z, estimate, 1.0)
    return low, high


def pairs_to_detect(change: float, discordant: float) -> int:
    """How many pairs show a change of accuracy, at a level of 5 % with a power of 80 %.

    Connor's formula for McNemar's test (Connor 1987, doi:10.2307/2531961): (z_a sqrt(d) + z_b sqrt(d - D^2))^2 / D^2
    for a change D where a share d of pairs is right in one scoring only. It is approximate: the exact test has a
    little less power.

    Args:
        change: D, a share of pairs, positive.
        discordant: d; taken as D where it is less, for it cannot be.
    """
    level, power = _quantile(0.5 + CONFIDENCE / 2), _quantile(POWER)
    discordant = max(discordant, change)
    return ceil((level * sqrt(discordant) + power * sqrt(max(discordant - change**2, 0.0))) ** 2 / change**2)


def detectable_change(pairs: int, discordant: float) -> float:
    """The smallest change of accuracy that so many pairs show with a power of 80 %: `pairs_to_detect`, turned around.

    Args:
        pairs: P.
        discordant: share of pairs that is right in one scoring only, as observed; more if the change itself is more.

    Returns:
        A share of pairs; 1 where not even that would show.
    """
    return _cross(lambda change: change <= 0 or pairs_to_detect(change, discordant) > pairs, 0.0, 1.0)


def pairs_until(settled: Callable[[float], bool], pairs: int) -> int | None:
    """The smallest number of pairs with which something is settled that is not with so many; None if with none.

    Args:
        settled: of a number of pairs; stays true for larger ones.
        pairs: with which it is not settled.
    """
    low, high = pairs, 2 * pairs
    while not settled(high):
        low, high = high, 2 * high
        if high > MOST_PAIRS:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if settled(middle) else (middle, high)
    return high


def _cross(before: Callable[[float], bool], low: float, high: float) -> float:
    """Where a property that holds from `low` on ends; at most `high`."""
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if before(middle) else (low, middle)
    return high


def _quantile(probability: float) -> float:
    """Of the standard normal distribution."""
    return NormalDist().inv_cdf(probability)
