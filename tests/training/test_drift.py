"""Log-ratios and k3, against values derived by hand."""

from math import exp

import numpy as np
import pytest

from dpo_fast.training.drift import measure_drift
from dpo_fast.types import CompletionScores, PairScores


def scores(log_probs: list[float]) -> CompletionScores:
    zeros = np.zeros(1)
    tokens = np.array(log_probs, np.float32)
    return CompletionScores(tokens, np.array([len(tokens)]), zeros, zeros, np.zeros(1, np.int64), zeros)


def part(chosen: list[float], rejected: list[float], reference: tuple[list[float], list[float]]) -> PairScores:
    one = np.ones(1, np.int64)
    return PairScores(
        one, one, one, one, np.zeros(1, np.bool_), None, scores(chosen), scores(rejected), *map(scores, reference)
    )


def test_by_hand() -> None:
    """d = 1, -2 and, in another part, 0 on the chosen tokens; -1 on the rejected ones.

    k3 of d is exp(-d) - 1 + d: e^-1 for 1, e^2 - 3 for -2, 0 for 0, and e - 2 for -1. Means are over tokens, whatever
    the parts.
    """
    parts = [part([-1, -3], [-2], ([-2, -1], [-1])), part([-4], [-3], ([-4], [-2]))]

    drift = measure_drift(parts)

    assert drift == {
        "log_ratio/chosen": pytest.approx(-1 / 3),
        "log_ratio/rejected": pytest.approx(-1),
        "k3/chosen": pytest.approx((exp(-1) + exp(2) - 3) / 3),
        "k3/rejected": pytest.approx(exp(1) - 2),
    }


def test_a_policy_that_is_its_reference_has_not_moved() -> None:
    assert set(measure_drift([part([-1, -30], [-2], ([-1, -30], [-2]))]).values()) == {0.0}


def test_what_has_no_value_is_none() -> None:
    """exp(800) is beyond float64; JSON has no infinity, and a branch without tokens has no mean."""
    drift = measure_drift([part([-801], [], ([-1], []))])

    assert drift == {"log_ratio/chosen": -800.0, "log_ratio/rejected": None, "k3/chosen": None, "k3/rejected": None}
