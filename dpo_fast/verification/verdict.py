"""The verdict: does the engine still make the original's decisions?

**The rule.** Each check compares one number with a limit. It passes if the number's whole 95 % interval is within the
limit, fails if the whole interval is beyond it, and cannot tell otherwise; it then names the number of pairs that would
do. The verdict fails if any check fails; else it cannot tell if any cannot; else it passes. So an engine whose true
number is beyond a limit passes about once in forty times at most by the luck of the pairs, and one within it fails as
rarely; `benchmarks/verdict.py` measures it.

==================  ====================================================  =====================
check               number                                                limit
==================  ====================================================  =====================
integrity           what forbids a comparison (`check_integrity`)         nothing
token error         mean error of a token's log-prob, in noise floors     `max_multiple`
margin error        root-mean-square error of a margin, in noise floors   `max_multiple`
worst completion    largest mean error of a completion, in floors of it   2 `max_multiple`
margin bias         signed mean error of a margin, in noise floors of     `max_multiple` / 3
                    the margin error
reward bias         the same of the chosen or the rejected reward         `max_multiple` / 3
growth              noise floors of the last positions over those of      `max_growth`
                    the first (less than 1 counts as 1)
clear flips         share of pairs whose preference flipped, and was      `max_accuracy_change`
                    no near-tie
accuracy change     change of the share of pairs that are right           `max_accuracy_change`
==================  ====================================================  =====================

All but the last two see a fault though no preference flipped. The worst completion is a fact about these pairs and has
no interval. Drift within its limits is no promise for the accuracy of other pairs, so the last two must be settled as
well, however small the drift: a fault that touches one pair in a hundred is most likely not among fifty. Where no pair
changed, 381 pairs exclude a change of 1 point.

**Why these limits.** See `Tolerance`.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from dpo_fast.metrics.statistics import wilson_interval
from dpo_fast.verification.decisions import Decisions, change_interval, compare_decisions, pairs_to_detect, pairs_until
from dpo_fast.verification.drift import Drift, Errors, compare, summarise
from dpo_fast.verification.integrity import check_integrity
from dpo_fast.verification.noise import FLOORS, Floor, Multiple, NoiseFloor, measure_multiples
from dpo_fast.verification.types import Interval, Outcome, Scorings

# Noise averages out over pairs and a bias does not, so a bias is allowed a third of what noise is.
BIAS_SHARE = 1 / 3
# The largest of many errors is a matter of luck, and has no interval that would say how much: it is allowed twice.
WORST_SHARE = 2
# Beyond these, squares of limits and of margins leave float64: nothing is meant by such a number.
LEAST, MOST = 1e-30, 1e30


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far an engine may be from the original; see `default_tolerance`.

    Attributes:
        floor: what is meant by noise, "float32" or "checkpoint"; see `noise`. Without a rounded original the
            float32 floor is taken.
        max_multiple: how many noise floors an error may be.
        max_accuracy_change: a share of pairs. Of the accuracy, and of clear flips: under other labels each of them
            could be a change of accuracy. One point is what people compare models by; and it costs few enough pairs
            to be shown.
        near_tie: up to how many noise floors of the margin error a margin is a near-tie. Normal noise goes beyond
            four times its root mean square once in 16,000 pairs.
        max_growth: by what factor errors, in noise floors, may grow from the first eighth of all tokens, by position,
            to the last. Noise grows along the sequence too, and is divided out, so that a sound engine stays near 1;
            four leaves room for kernels that add up long sums in another order.

    Raises:
        ValueError: a number is not within `LEAST` and `MOST`, `max_accuracy_change` is not below 1, or there is no such
            floor.
    """

    floor: Floor
    max_multiple: float
    max_accuracy_change: float = 0.01
    near_tie: float = 4.0
    max_growth: float = 4.0

    def __post_init__(self) -> None:
        """Refuse what is no limit."""
        if self.floor not in FLOORS:
            raise ValueError(f"floor {self.floor!r} is not one of {', '.join(FLOORS)}")
        for name in ("max_multiple", "max_accuracy_change", "near_tie", "max_growth"):
            if not LEAST <= getattr(self, name) <= MOST:
                raise ValueError(f"{name} {getattr(self, name)} must be a positive number, {LEAST:g} to {MOST:g}")
        if self.max_accuracy_change >= 1:
            raise ValueError(f"max_accuracy_change {self.max_accuracy_change} must be below 1, for it is a share")


def default_tolerance(precision: str) -> Tolerance:
    """The limits that suit what an engine claims to be.

    - fp32: ten float32 floors. Another library adds up in another order, by other kernels: ONNX Runtime was 1.4
      floors from PyTorch on a tiny model, of which 1 % more on one weight tensor was thousands.
    - fp16, bf16: three checkpoint floors. The original in the checkpoint's precision is one floor off by definition;
      three leaves room for other kernels, which round at other places.
    - int8, int4, fp8 and whatever else: ten checkpoint floors. A quantised engine is another model on purpose, so no
      measurement says what is allowed; this is a choice. In a model of 135 million weights the sequences' log-probs
      were three times as far off with int8 as in bfloat16, and thirty times with int4: one decimal order parts the
      two. Set `max_multiple` to what you would give for speed, and `max_accuracy_change` to what you could bear.

    Args:
        precision: of the engine's matrix products, as recipes name it.
    """
    if precision == "fp32":
        return Tolerance("float32", 10.0)
    return Tolerance("checkpoint", 3.0 if precision in ("fp16", "bf16") else 10.0)


@dataclass(frozen=True, slots=True)
class Check:
    """One number against its limit.

    Attributes:
        name: see the module.
        value: the number; None for the integrity.
        interval: 95 %; None where there is none.
        limit: that its size may have.
        outcome: "pass", "fail" or "cannot tell".
        reason: a sentence.
        pairs_needed: how many pairs would settle it if they were like these; None if it is settled, or if no number
            would do, for the value is the limit.
    """

    name: str
    value: float | None
    interval: Interval | None
    limit: float
    outcome: Outcome
    reason: str
    pairs_needed: int | None = None


@dataclass(frozen=True, slots=True)
class Verification:
    """The verdict, and everything it is made of.

    Attributes:
        verdict: "pass", "fail" or "cannot tell".
        reasons: a sentence for each check that decided it; if it passed, for each check.
        pairs_needed: how many pairs like these would settle what cannot be told; None if nothing, or if no number.
        tolerance: the limits.
        checks: all of them, in the module's order; the integrity alone if it failed.
        floor: the noise floor that was taken; this and all below are None if the integrity failed.
        drift: of the engine; `decisions`: the engine's.
        noise_reshaped, noise_rounded: drift of the original's own scorings, `noise_rounded` None without one;
            `decisions_reshaped`, `decisions_rounded`: theirs.
        pairs_to_detect: how many pairs would show a change of accuracy of `max_accuracy_change` with 80 % power.
    """

    verdict: Outcome
    reasons: tuple[str, ...]
    pairs_needed: int | None
    tolerance: Tolerance
    checks: tuple[Check, ...]
    floor: NoiseFloor | None = None
    drift: Drift | None = None
    noise_reshaped: Drift | None = None
    noise_rounded: Drift | None = None
    decisions: Decisions | None = None
    decisions_reshaped: Decisions | None = None
    decisions_rounded: Decisions | None = None
    pairs_to_detect: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON: plain numbers, all of them finite."""
        return asdict(self)


def verify_scores(scorings: Scorings, tolerance: Tolerance, *, seed: int = 0) -> Verification:
    """Compare an engine's scores with the original's, and judge.

    Args:
        scorings: of P pairs.
        tolerance: the limits.
        seed: of the bootstrap that gives the intervals of errors.

    Returns:
        Numbers and verdict; scores that cannot be compared fail, with the reasons, and are not compared.

    Raises:
        ValueError: an array is not one-dimensional, or there is no reference and `reference_free` is None.
    """
    problems = check_integrity(scorings)
    if problems:
        checks = tuple(Check("integrity", None, None, 0.0, "fail", problem) for problem in problems)
        return Verification("fail", tuple(problems), None, tolerance, checks)
    engine, reshaped = compare(scorings, scorings.engine), compare(scorings, scorings.reshaped)
    rounded = None if scorings.rounded is None else compare(scorings, scorings.rounded)
    floors = [reshaped] if rounded is None or tolerance.floor == "float32" else [reshaped, rounded]
    floor, multiples = measure_multiples(engine, floors, scorings, seed)

    def decide(errors: Errors) -> Decisions:
        return compare_decisions(
            errors.original_margins,
            errors.margins,
            scorings.pairs.rows,
            scorings.pairs.subsets,
            tolerance.near_tie * floor.margin,
        )

    decisions = decide(engine)
    integrity = Check("integrity", None, None, 0.0, "pass", "the scores are complete, finite and not stale")
    checks = (
        integrity,
        *check_errors(multiples, floor, tolerance, len(scorings.pairs.rows)),
        *check_decisions(decisions, tolerance),
    )
    verdict, reasons, needed = judge(checks)
    return Verification(
        verdict=verdict,
        reasons=reasons,
        pairs_needed=needed,
        tolerance=tolerance,
        checks=checks,
        floor=floor,
        drift=summarise(engine),
        noise_reshaped=summarise(reshaped),
        noise_rounded=None if rounded is None else summarise(rounded),
        decisions=decisions,
        decisions_reshaped=decide(reshaped),
        decisions_rounded=None if rounded is None else decide(rounded),
        pairs_to_detect=pairs_to_detect(tolerance.max_accuracy_change, decisions.discordant),
    )


def judge(checks: tuple[Check, ...]) -> tuple[Outcome, tuple[str, ...], int | None]:
    """The verdict from its checks: the worst of their outcomes, their reasons, and the pairs that all of them need."""
    outcomes: tuple[Outcome, ...] = ("fail", "cannot tell", "pass")
    verdict = next(outcome for outcome in outcomes if outcome in {check.outcome for check in checks})
    deciding = [check for check in checks if check.outcome == verdict]
    needed = [check.pairs_needed for check in deciding if check.interval is not None]
    known = [number for number in needed if number is not None]
    answer = max(known) if verdict == "cannot tell" and known and len(known) == len(needed) else None
    return verdict, tuple(check.reason for check in deciding), answer


def check_decisions(decisions: Decisions, tolerance: Tolerance) -> tuple[Check, Check]:
    """Clear flips, and the change of accuracy."""
    limit, pairs = tolerance.max_accuracy_change, decisions.pairs
    clear, gained, lost = decisions.clear_flips, decisions.gained, decisions.lost

    def settled(ends: Callable[[float], Interval]) -> Callable[[float], bool]:
        return lambda number: _settle(ends(number), limit) != "cannot tell"

    def more_changes(number: float) -> Interval:
        return change_interval(gained * number / pairs, lost * number / pairs, number)

    def more_flips(number: float) -> Interval:
        return wilson_interval(round(clear * number / pairs), round(number))

    flips = wilson_interval(clear, pairs)
    return (
        _check(
            "clear flips",
            clear / pairs,
            flips,
            limit,
            f"{clear} of {pairs} preferences flipped that were no near-ties, {_points(flips)}; allowed is "
            f"{limit:.2%} of the pairs",
            settled(more_flips),
            pairs,
        ),
        _check(
            "accuracy change",
            decisions.change,
            decisions.change_interval,
            limit,
            f"the accuracy changed by {100 * decisions.change:+.2f} points, {_points(decisions.change_interval)} "
            f"({gained} pairs became right, {lost} wrong); allowed are {100 * limit:g}",
            settled(more_changes),
            pairs,
        ),
    )


def check_errors(multiples: dict[str, Multiple], floor: NoiseFloor, tolerance: Tolerance, pairs: int) -> list[Check]:
    """The checks of errors, in multiples of the noise floor."""
    noise = f"the original's own {floor.kind} noise"
    bias = tolerance.max_multiple * BIAS_SHARE
    rules = (
        ("token error", tolerance.max_multiple, f"a token's log-prob is {{:.3g}} times {noise} off"),
        ("margin error", tolerance.max_multiple, f"a margin is {{:.3g}} times {noise} off"),
        (
            "worst completion",
            tolerance.max_multiple * WORST_SHARE,
            f"in the worst completion, a token is {{:.3g}} times {noise} off",
        ),
        ("margin bias", bias, f"margins are shifted by {{:.3g}} times {noise}"),
        ("reward bias", bias, f"rewards of one branch are shifted by {{:.3g}} times {noise}"),
        ("growth", tolerance.max_growth, f"in multiples of {noise}, errors grow {{:.3g}} times along the sequence"),
    )
    checks = []
    for name, limit, meaning in rules:
        value, interval = multiples[name].value, multiples[name].interval
        if name == "worst completion":
            outcome: Outcome = "pass" if value <= limit else "fail"
            reason = f"{meaning.format(value)}; allowed is {limit:.3g}"
            checks.append(Check(name, value, None, limit, outcome, reason))
            continue
        known = "one pair gives no" if interval is None else f"{interval[0]:.3g} … {interval[1]:.3g}, 95 %"
        reason = f"{meaning.format(value)} ({known} interval); allowed is {limit:.3g}"
        settled = _narrowing(value, interval or (value, value), limit, pairs)
        checks.append(_check(name, value, interval, limit, reason, settled, pairs))
    return checks


def _narrowing(value: float, interval: Interval, limit: float, pairs: int) -> Callable[[float], bool]:
    """Whether a number of pairs settles a check, where the interval narrows with its root."""

    def settled(number: float) -> bool:
        narrower = (pairs / number) ** 0.5
        low, high = (value + narrower * (end - value) for end in interval)
        return _settle((low, high), limit) != "cannot tell"

    return settled


def _check(
    name: str,
    value: float,
    interval: Interval | None,
    limit: float,
    reason: str,
    settled: Callable[[float], bool],
    pairs: int,
) -> Check:
    """A check of a number with an interval; `settled` says whether more pairs than `pairs` would do."""
    outcome = "cannot tell" if interval is None else _settle(interval, limit)
    if outcome != "cannot tell":
        return Check(name, value, interval, limit, outcome, reason)
    needed = None if interval is None else pairs_until(settled, pairs)
    if needed is not None:
        reason += f"; {needed} pairs like these would do"
    return Check(name, value, interval, limit, outcome, reason, needed)


def _settle(interval: Interval, limit: float) -> Outcome:
    """Whether an interval lies within a limit to both sides of 0, beyond it, or across it."""
    low, high = interval
    if -limit <= low and high <= limit:
        return "pass"
    return "fail" if low > limit or high < -limit else "cannot tell"


def _points(interval: Interval) -> str:
    """An interval of a share, in percentage points."""
    return f"95 % interval {100 * interval[0]:.2f} … {100 * interval[1]:.2f} points"
