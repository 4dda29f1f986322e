"""How often is the verdict of `dpo_fast.verification` wrong? False alarms and misses, by simulation.

A false alarm is a fail where the truth is within the limit, a miss a pass where it is beyond, or at it. Two tables,
each row of 1,000 draws or more:

1. The decisions' checks. Margins of standard deviation 1, of which 70 % are right; an engine whose margins are noisy,
   and whose true change of accuracy is known, from one of two causes: all margins are shifted a little, or a few pairs
   are turned over and the others left as they are. At most 1 point is allowed.
2. The errors' checks, on scores of every token of 100 pairs: engines of float32 and of bfloat16, with a fault whose
   true size is so many times what is allowed; 0 is a sound engine.

    python benchmarks/verdict.py [--draws 1000] [--json]
"""

import argparse
import itertools
import json
import os
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import cache
from statistics import NormalDist
from typing import Any

import numpy as np

from dpo_fast.types import Float64Array
from dpo_fast.verification.decisions import compare_decisions, count_changes
from dpo_fast.verification.drift import compare
from dpo_fast.verification.noise import RESOLUTION, measure_multiples
from dpo_fast.verification.types import COMPLETIONS, Outcome, Pairs, ScoredTokens, Scoring, Scorings
from dpo_fast.verification.verdict import (
    BIAS_SHARE,
    Check,
    Tolerance,
    check_decisions,
    check_errors,
    default_tolerance,
    judge,
)

ACCURACY = 0.7  # of the original
PAIRS = (50, 200, 1000, 5000)
CHANGES = (0.0, 0.005, 0.01, 0.02)  # true changes of accuracy, to the worse
NOISES = (0.01, 0.05, 0.2)  # standard deviation of a margin's error; the margins' is 1
CAUSES = ("shift", "turned over")
FAULTY_PAIRS = 100
TOKENS = 8  # of each completion, after prompts of as many tokens
NOISE = {"fp32": RESOLUTION, "bf16": 2e-2}  # mean error of the original's own scorings, nats a token
FAULTS = ("level", "bias", "growth")
SIZES = (0.0, 0.8, 1.25)  # of a fault, times what is allowed
OUTCOMES: tuple[Outcome, ...] = ("pass", "cannot tell", "fail")


def simulate_decisions(pairs: int, noise: float, cause: str, change: float, draws: int) -> Counter[str]:
    """Outcomes of the decisions' checks.

    Args:
        pairs: of a draw.
        noise: standard deviation of the error of a margin.
        cause: of the change, one of `CAUSES`.
        change: true loss of accuracy, a share of pairs.
        draws: how many.
    """
    normal, random = NormalDist(), np.random.default_rng(0)
    mean = normal.inv_cdf(ACCURACY)
    # Noise alone makes some margins cross zero: what the engine's margins must be shifted by for a true change.
    scale = (1 + noise**2) ** 0.5
    shift = scale * normal.inv_cdf(ACCURACY - (change if cause == "shift" else 0.0)) - mean
    share = change / ACCURACY if cause == "turned over" else 0.0  # of the pairs that the engine has right
    tolerance = default_tolerance("bf16")
    found: Counter[str] = Counter()
    for _ in range(draws):
        original = random.normal(mean, 1, pairs)
        margins = original + shift + random.normal(0, noise, pairs)
        margins[(margins > 0) & (random.random(pairs) < share)] *= -1
        clear = (np.sign(original) != np.sign(margins)) & (np.abs(original) > tolerance.near_tie * noise)
        found[_judge_counts(int(clear.sum()), *count_changes(original, margins), pairs, tolerance)] += 1
    return found


@cache
def _judge_counts(clear: int, gained: int, lost: int, pairs: int, tolerance: Tolerance) -> Outcome:
    """The decisions' verdict, which depends on counts alone; the same ones come up again and again."""
    original = np.full(pairs, 3.0)
    original[: gained + lost] = 0.5  # a near-tie
    original[:clear] = 2.0
    original[:gained] *= -1
    margins = original.copy()
    margins[: gained + lost] *= -1
    return judge(check_decisions(compare_decisions(original, margins, np.arange(pairs), None, 1.0), tolerance))[0]


def simulate_errors(precision: str, fault: str, size: float, draws: int) -> Counter[str]:
    """Outcomes of the errors' checks.

    Args:
        precision: of the engine, "fp32" or "bf16".
        fault: "level", all errors are larger; "bias", the chosen completions' log-probs are shifted; or "growth",
            errors grow along the sequence.
        size: of the fault, times what is allowed; 0 for none.
        draws: how many.
    """
    random, tolerance, noise = np.random.default_rng(0), default_tolerance(precision), NOISE[precision]
    found: Counter[str] = Counter()
    for number in range(draws):
        original = _draw_original(random)
        position = np.tile(np.arange(TOKENS), FAULTY_PAIRS)
        factor, shift = np.ones(len(position)), 0.0
        if size and fault == "level":
            factor *= size * tolerance.max_multiple
        elif size and fault == "growth":  # of the last position's errors over the first one's
            factor += (size * tolerance.max_growth - 1) * position / (TOKENS - 1)
        elif (
            size
        ):  # a reward's error is that of two completions' tokens, of which Laplace's rms is sqrt(2) times the mean
            shift = size * BIAS_SHARE * tolerance.max_multiple * noise * (2 * 2 * TOKENS) ** 0.5 / TOKENS
        rounded = _perturb(random, original, noise) if precision == "bf16" else None
        scorings = Scorings(
            pairs=_pairs(),
            original=original,
            reshaped=_perturb(random, original, RESOLUTION),
            rounded=rounded,
            engine=_perturb(random, original, noise * factor, shift),
        )
        noises = [compare(scorings, each) for each in (scorings.reshaped, rounded) if each is not None]
        floor, multiples = measure_multiples(compare(scorings, scorings.engine), noises, scorings, number)
        checks: tuple[Check, ...] = tuple(check_errors(multiples, floor, tolerance, FAULTY_PAIRS))
        found[judge(checks)[0]] += 1
    return found


def _pairs() -> Pairs:
    """Pairs of which all pieces have the same length."""
    lengths = np.full(FAULTY_PAIRS, TOKENS)
    return Pairs(np.arange(1, FAULTY_PAIRS + 1), lengths, lengths, lengths)


def _draw_original(random: np.random.Generator) -> Scoring:
    """Log-probs of 2 to 6 nats below zero, so that no error makes one positive."""
    offsets = np.arange(FAULTY_PAIRS + 1) * TOKENS
    drawn = {name: random.uniform(-6, -2, offsets[-1]).astype(np.float32) for name in COMPLETIONS}
    return Scoring(_pairs().rows, **{name: ScoredTokens(offsets, values) for name, values in drawn.items()})


def _perturb(random: np.random.Generator, scoring: Scoring, noise: float | Float64Array, shift: float = 0.0) -> Scoring:
    """The same with Laplace errors of a mean size, and the policy's chosen completions shifted."""
    changed = {}
    for name, tokens in scoring.completions().items():
        errors = noise * random.laplace(0, 1, len(tokens.log_probs)) + (shift if name == "policy_chosen" else 0.0)
        changed[name] = replace(tokens, log_probs=(tokens.log_probs + errors).astype(np.float32))
    return Scoring(scoring.rows, **changed)


def _rows_of_decisions(setting: tuple[int, float, str, float, int]) -> dict[str, Any]:
    """One row of the first table."""
    pairs, noise, cause, change, _ = setting
    names = {"pairs": pairs, "noise": noise, "cause": cause, "change": change}
    return names | _shares(simulate_decisions(*setting), change >= default_tolerance("bf16").max_accuracy_change)


def _rows_of_errors(setting: tuple[str, str, float, int]) -> dict[str, Any]:
    """One row of the second table."""
    precision, fault, size, _ = setting
    names = {"precision": precision, "fault": fault if size else "none", "size": size}
    return names | _shares(simulate_errors(*setting), size >= 1)


def _shares(found: Counter[str], is_wrong: bool) -> dict[str, Any]:
    """Shares of the outcomes, and of the draws that were judged wrongly."""
    draws = found.total()
    wrong = "miss" if is_wrong else "false_alarm"
    return {
        "draws": draws,
        **{outcome.replace(" ", "_"): found[outcome] / draws for outcome in OUTCOMES},
        "false_alarm": None,
        "miss": None,
        wrong: found["pass" if is_wrong else "fail"] / draws,
    }


def _table(rows: list[dict[str, Any]], names: dict[str, str]) -> str:
    """Rows as a Markdown table."""
    shares = ("pass", "cannot_tell", "fail", "false_alarm", "miss")
    heads = [*names.values(), *(name.replace("_", " ") for name in shares)]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in rows:
        cells = [f"{100 * row[name]:g}" if name == "change" else str(row[name]) for name in names]
        cells += ["" if row[name] is None else f"{row[name]:.1%}" for name in shares]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Simulate, and print two tables, or one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=1000, help="Of each setting.")
    parser.add_argument("--json", action="store_true", help="Print JSON instead of tables.")
    arguments = parser.parse_args()
    if arguments.draws < 1:
        sys.exit("--draws must be at least 1")
    draws, started = arguments.draws, time.perf_counter()
    of_decisions = [(*each, draws) for each in itertools.product(PAIRS, NOISES, CAUSES, CHANGES)]
    faults = [("level", 0.0), *itertools.product(FAULTS, SIZES[1:])]
    of_errors = [(precision, *fault, draws) for precision in NOISE for fault in faults]
    with ProcessPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        errors = list(pool.map(_rows_of_errors, of_errors))
        decisions = list(pool.map(_rows_of_decisions, of_decisions))
    seconds = time.perf_counter() - started
    if arguments.json:
        print(json.dumps({"decisions": decisions, "errors": errors, "seconds": seconds}))
        return
    print(_table(decisions, {"pairs": "pairs", "noise": "noise", "cause": "cause", "change": "true change, points"}))
    print()
    print(_table(errors, {"precision": "precision", "fault": "fault", "size": "size / limit"}))
    print(f"\n{draws} draws a row, {seconds:.0f} s")


if __name__ == "__main__":
    main()
