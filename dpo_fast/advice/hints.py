"""A hint: what a run's numbers speak for, on what evidence, and how sure that is.

How sure follows one rule. Each hint claims that something (a gap of accuracies, a share, a correlation) is larger than
a stated limit, below which it would not matter, and p is the one-sided p-value of "it is not":

========  =========
sure      p < 0.001
likely    p < 0.01
possible  p < 0.05
========  =========

and nothing is said above that. Where the evidence at hand leaves another explanation open, the hint says no more than
"likely" or "possible", however small p is; its module says when.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import sqrt
from statistics import NormalDist
from typing import Any, Literal

from rich.console import Console
from rich.text import Text

from dpo_fast.metrics.statistics import CONFIDENCE, wilson_interval
from dpo_fast.text import one_line
from dpo_fast.types import Float64Array

Kind = Literal["overfit", "beta_too_high", "noisy_labels", "chosen_falls", "length", "duplicates", "contradictions"]
Sureness = Literal["sure", "likely", "possible"]
LIMITS: tuple[tuple[Sureness, float], ...] = (("sure", 0.001), ("likely", 0.01), ("possible", 0.05))
FEWEST_PAIRS = 50  # fewer say too little, and p-values by the normal distribution are not to be trusted
Z = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)


@dataclass(frozen=True, slots=True)
class Hint:
    """One cause that a run's numbers speak for.

    Attributes:
        kind: the cause.
        sureness: see the module.
        evidence: the numbers that speak for it, with their 95 % intervals, in a sentence.
        advice: what to do about it.
        numbers: the same numbers by name, ready for JSON; intervals are [low, high].
    """

    kind: Kind
    sureness: Sureness
    evidence: str
    advice: str
    numbers: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number that is normally distributed around what is true, near enough.

    Attributes:
        value: the estimate.
        error: its standard error.
    """

    value: float
    error: float

    @property
    def interval(self) -> list[float]:
        """95 %, [low, high]."""
        return [self.value - Z * self.error, self.value + Z * self.error]

    def p_above(self, limit: float) -> float:
        """The one-sided p-value of "what is true is at most `limit`"."""
        return _upper_tail(self.value - limit, self.error)


def mean_of(values: Float64Array) -> Estimate:
    """The mean of (P,) values of independent pairs."""
    return Estimate(float(values.mean()), float(values.std(ddof=1)) / sqrt(len(values)))


def difference_of_shares(right: int, pairs: int, other_right: int, other_pairs: int) -> Estimate:
    """The share of one set minus that of another set of other pairs.

    With one success and one failure added to each set, which makes the normal interval hold in small sets and at the
    ends (Agresti and Caffo 2000, doi:10.1080/00031305.2000.10474560).
    """
    shares = [(right + 1) / (pairs + 2), (other_right + 1) / (other_pairs + 2)]
    variance = sum(share * (1 - share) / (count + 2) for share, count in zip(shares, (pairs, other_pairs), strict=True))
    return Estimate(shares[0] - shares[1], sqrt(variance))


def share_above(count: int, total: int, limit: float) -> float:
    """The one-sided p-value of "the share is at most `limit`", by the score test."""
    return _upper_tail(count / total - limit, sqrt(limit * (1 - limit) / total))


def share_text(count: int, total: int) -> str:
    """A share with its interval (Wilson's), as percentages."""
    low, high = wilson_interval(count, total)
    return f"{count / total:.1%} ({low:.1%} … {high:.1%})"


def interval_text(value: float, interval: Sequence[float]) -> str:
    """A number with its interval."""
    return f"{value:.3f} ({interval[0]:.3f} … {interval[1]:.3f})"


def sureness_of(p: float, at_most: Sureness = "sure") -> Sureness | None:
    """How sure a p-value makes one, no surer than `at_most`; None where nothing is to be said."""
    allowed = LIMITS[[name for name, _ in LIMITS].index(at_most) :]
    return next((name for name, limit in allowed if p < limit), None)


def hints_as_json(hints: Sequence[Hint]) -> list[dict[str, Any]]:
    """The hints as plain values."""
    return [asdict(hint) for hint in hints]


def print_hints(hints: Sequence[Hint], console: Console) -> None:
    """Print each hint: how sure it is and what it is, its evidence, and what to do; nothing where there are none.

    Args:
        hints: what `advise` returned.
        console: where to.
    """
    for hint in hints:
        console.print(Text(f"hint, {hint.sureness}: {hint.kind.replace('_', ' ')}", "bold"))
        for sentence in (hint.evidence, hint.advice):
            console.print(Text(f"  {one_line(sentence, 1000)}"), soft_wrap=True)


def _upper_tail(distance: float, error: float) -> float:
    """P(Z >= distance / error); without any error, whatever is beyond is certain."""
    if error == 0:
        return 0.0 if distance > 0 else 1.0
    return 1 - NormalDist().cdf(distance / error)
