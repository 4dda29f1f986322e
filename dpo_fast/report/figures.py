"""What the figures show, as numbers: pure NumPy. `charts` draws them with Plotly, `images` with matplotlib.

P is the number of pairs, B the number of bins. A pair is right where its chosen completion has the larger reward; equal
rewards are wrong, as in TRL's accuracy.
"""

from dataclasses import dataclass
from math import ceil, floor, log10

import numpy as np

from dpo_fast.metrics.statistics import wilson_interval
from dpo_fast.metrics.summary import group_members
from dpo_fast.types import Float64Array, Int64Array

Interval = tuple[float, float]  # 95 %: the lower and the upper end

HISTOGRAM_BINS = 40  # over the middle 99 % of the values
MOST_HISTOGRAM_BINS = 200  # over all of them
LENGTH_BINS = 8
CALIBRATION_BINS = 10
SHOWN_SUBSETS = 40
SCATTER_PAIRS = 1500  # beyond these, a sample: more points would only hide each other


@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts of values between edges that are multiples of one width, so that 0 is an edge if it lies among them.

    Attributes:
        edges: (B + 1,) float64. A bin holds its lower edge; the last one its upper edge too.
        counts: (B,) int64; every value is counted.
    """

    edges: Float64Array
    counts: Int64Array


@dataclass(frozen=True, slots=True)
class Accuracy:
    """How often some of the pairs are right.

    Attributes:
        name: of these pairs.
        pairs: how many, at least one.
        correct: of these, how many are right.
        interval: Wilson's, of `correct / pairs`.
        margin: the mean margin.
    """

    name: str
    pairs: int
    correct: int
    interval: Interval
    margin: float

    @property
    def share(self) -> float:
        """The accuracy."""
        return self.correct / self.pairs


@dataclass(frozen=True, slots=True)
class LengthBias:
    """Whether the longer completion is preferred for its length.

    Attributes:
        bins: accuracy by length difference, chosen less rejected, in tokens; about equally many pairs each.
        sides: accuracy where the chosen completion is the shorter, of equal length, and the longer; those that occur.
        correlation: Pearson's, of the margin with the length difference; None where either is constant.
        longer_preferred: share of the pairs of unequal lengths whose longer completion has the larger reward; None
            where there are none.
        longer_chosen: share of the same pairs whose longer completion is the chosen one.
    """

    bins: list[Accuracy]
    sides: list[Accuracy]
    correlation: float | None
    longer_preferred: float | None
    longer_chosen: float | None


@dataclass(frozen=True, slots=True)
class Reliability:
    """One bin of the reliability diagram.

    Attributes:
        low, high: its ends; it holds the upper one, and the first bin the lower one too.
        confidence: mean probability of the completion that the model prefers.
        accuracy: how often that one is the chosen completion.
    """

    low: float
    high: float
    confidence: float
    accuracy: Accuracy


@dataclass(frozen=True, slots=True)
class Calibration:
    """How far sigmoid(margin) is the probability that it is read as; see `calibration`.

    Attributes:
        bins: that hold any pairs.
        brier: Brier's score, 0 to 1; a coin has 0.25.
        ece: expected calibration error, 0 to 1.
    """

    bins: list[Reliability]
    brier: float
    ece: float


@dataclass(frozen=True, slots=True)
class Scatter:
    """Some pairs' completions, point by point; S pairs.

    Attributes:
        pairs: (S,) int64, ascending: the positions of the pairs that are shown.
        of: how many there are.
    """

    pairs: Int64Array
    of: int


def histogram(values: Float64Array) -> Histogram:
    """Count values in some 40 bins of a round width.

    Args:
        values: (P,) finite, at least one.
    """
    return Histogram(edges := histogram_edges(values), counts_between(edges, values))


def histogram_edges(values: Float64Array) -> Float64Array:
    """(B + 1,) float64: multiples of a round width that enclose all of some finite values.

    The width is chosen by the middle 99 % of them, so that a few outliers do not squeeze the rest into one bin, as long
    as that makes no more than `MOST_HISTOGRAM_BINS`.
    """
    low, inner_low, inner_high, high = np.quantile(values, [0, 0.005, 0.995, 1]).tolist()
    width = max((inner_high - inner_low) / HISTOGRAM_BINS, (high - low) / MOST_HISTOGRAM_BINS)
    size = max(abs(low), abs(high))
    if width < max(1e-9 * size, 1e-12):  # all the same, or nearly: a bin that can be seen
        width = 0.1 * size if size > 1e-9 else 0.1
    width = _round_up(width)
    return np.arange(floor(low / width), floor(high / width) + 2) * width


def counts_between(edges: Float64Array, values: Float64Array) -> Int64Array:
    """(B,) int64: how many values each bin holds; one that rounding put outside is counted at the end."""
    counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
    return counts.astype(np.int64)


def accuracy(name: str, margins: Float64Array) -> Accuracy:
    """How often the pairs of these margins are right.

    Args:
        name: of these pairs.
        margins: (P,) float64, at least one.
    """
    pairs, correct = len(margins), int((margins > 0).sum())
    return Accuracy(name, pairs, correct, wilson_interval(correct, pairs), float(margins.mean()))


def accuracy_by_subset(margins: Float64Array, groups: list[str]) -> list[Accuracy]:
    """Accuracy by group, in alphabetical order.

    Args:
        margins: (P,) float64.
        groups: P names.
    """
    return [accuracy(name, margins[members]) for name, members in group_members(groups)]


def largest(subsets: list[Accuracy], most: int = SHOWN_SUBSETS) -> list[Accuracy]:
    """The subsets with the most pairs, in the order they have."""
    if len(subsets) <= most:
        return subsets
    smallest = sorted((each.pairs for each in subsets), reverse=True)[most - 1]
    return [each for each in subsets if each.pairs >= smallest][:most]


def length_bias(margins: Float64Array, chosen_lengths: Int64Array, rejected_lengths: Int64Array) -> LengthBias:
    """Accuracy by length difference.

    A model that has learned to like length is right where the chosen completion is the longer, and wrong where it is
    the shorter (arXiv:2310.03716; for DPO, arXiv:2403.19159).

    Args:
        margins: (P,) float64.
        chosen_lengths: (P,) int64 tokens of the chosen completions.
        rejected_lengths: (P,) int64 tokens of the rejected ones.
    """
    differences = chosen_lengths - rejected_lengths
    shares = np.arange(1, LENGTH_BINS + 1) / LENGTH_BINS
    uppers = np.unique(np.quantile(differences, shares, method="lower"))  # each is one of the differences
    bins = []
    for index, members in _members(np.searchsorted(uppers, differences)):
        low, high = int(differences[members].min()), int(uppers[index])
        bins.append(accuracy(f"{low:+d}" if low == high else f"{low:+d} to {high:+d}", margins[members]))
    names = ("chosen shorter", "equal length", "chosen longer")
    signs = np.sign(differences)
    sides = [accuracy(names[sign], margins[members]) for sign, members in _members(signs + 1)]
    unequal = signs != 0
    return LengthBias(
        bins=bins,
        sides=sides,
        correlation=_correlation(margins, differences),
        longer_preferred=float((margins * signs > 0)[unequal].mean()) if unequal.any() else None,
        longer_chosen=float((signs > 0)[unequal].mean()) if unequal.any() else None,
    )


def calibration(margins: Float64Array) -> Calibration:
    """Reliability of sigmoid(margin) as the probability that the chosen completion is the better one.

    That is the Bradley-Terry model, which DPO's loss is the likelihood of (arXiv:2305.18290, Eq. 1 and 7). The chosen
    completion always is the better one, so a pair is looked at from the side that the model prefers: its confidence is
    c = sigmoid(|margin|), between 0.5 and 1, and it is right or wrong.

    - Brier's score (Brier 1950, doi:10.1175/1520-0493(1950)078<0001:VOFEIT>2.0.CO;2, halved as is usual for two
      outcomes): the mean of (1 - sigmoid(margin))^2, which is the mean of (c - right)^2.
    - Expected calibration error (Naeini et al. 2015; Guo et al. 2017, arXiv:1706.04599, Eq. 3): over bins of c, the sum
      of pairs / P * |accuracy - mean c|, here with `CALIBRATION_BINS` bins of equal width from 0.5 to 1.

    Args:
        margins: (P,) float64, at least one.
    """
    edges = np.linspace(0.5, 1, CALIBRATION_BINS + 1)
    confidence = 1 / (1 + np.exp(-np.abs(margins)))
    places = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, CALIBRATION_BINS - 1)
    bins = []
    for index, members in _members(places):
        low, high = float(edges[index]), float(edges[index + 1])
        of_bin = accuracy(f"{low:.2f} to {high:.2f}", margins[members])
        bins.append(Reliability(low, high, float(confidence[members].mean()), of_bin))
    wrong_share = np.where(margins > 0, 1 - confidence, confidence)  # 1 - sigmoid(margin), without overflow
    gaps = [each.accuracy.pairs / len(margins) * abs(each.accuracy.share - each.confidence) for each in bins]
    return Calibration(bins, brier=float(np.square(wrong_share).mean()), ece=float(sum(gaps)))


def sample(pairs: int, most: int = SCATTER_PAIRS, seed: int = 0) -> Scatter:
    """Which pairs are drawn as points: all, or a sample without replacement.

    Args:
        pairs: P.
        most: how many are drawn.
        seed: of NumPy's generator.
    """
    if pairs <= most:
        return Scatter(np.arange(pairs), pairs)
    return Scatter(np.sort(np.random.default_rng(seed).choice(pairs, most, replace=False)), pairs)


def share_axis(low: float, high: float) -> tuple[float, float]:
    """An axis from 0.05 below the lowest share to 0.05 above the highest, within 0 and 1."""
    return max(0.0, floor(20 * low - 1) / 20), min(1.0, ceil(20 * high + 1) / 20)


def _members(places: Int64Array) -> list[tuple[int, Int64Array]]:
    """The places that occur, in order, each with the positions of the pairs there."""
    return [(int(place), np.flatnonzero(places == place)) for place in np.unique(places)]


def _correlation(values: Float64Array, others: Int64Array) -> float | None:
    """Pearson's correlation; None where there is none."""
    if np.ptp(values) == 0 or np.ptp(others) == 0:
        return None
    return float(np.corrcoef(values, others)[0, 1])


def _round_up(value: float) -> float:
    """The next number of 1, 2, 2.5 or 5 times a power of ten."""
    power = 10.0 ** floor(log10(value))
    step = next((step for step in (1, 2, 2.5, 5) if value <= step * power * (1 + 1e-9)), 10)
    return step * power
