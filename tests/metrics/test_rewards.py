"""Sequence log-probs, divergences, reference-free scores and weights."""

from math import exp, log, sqrt

import numpy as np
import pytest

from dpo_fast.metrics.rewards import (
    completion_weights,
    divergence_scores,
    log_sigmoid,
    reduce_pairs,
    reference_free_scores,
    sequence_log_probs,
)
from dpo_fast.metrics.sums import sum_tokens
from dpo_fast.types import LossSettings

from .build import completion, pair_scores

# Scored tokens of the pairs: 3 and 2, none and 5, 1 and 1.
CHOSEN = completion([[-1.0, -2.0, -4.0], [], [-3.0]])
REJECTED = completion([[-2.0, -2.0], [-1.0] * 5, [-6.0]])
SUMS = sum_tokens(pair_scores(CHOSEN, REJECTED)).policy_chosen


def test_sequence_log_prob_is_the_sum():
    assert sequence_log_probs(SUMS).tolist() == [-7.0, 0.0, -3.0]


def test_ld_alpha_weighs_the_tokens_beyond_the_shared_length():
    """First pair: 2 of 3 tokens are shared, so -1 - 2 + 0.5 * (-4) = -5; the third pair has no tail."""
    assert sequence_log_probs(SUMS, 0.5).tolist() == [-5.0, 0.0, -3.0]
    assert sequence_log_probs(SUMS, 0.0).tolist() == [-3.0, 0.0, -3.0]
    assert sequence_log_probs(SUMS, 1.0).tolist() == [-7.0, 0.0, -3.0]


def test_reference_free_scores():
    """[-1, -2, -4]: the sum is -7, the average -7/3, the norm -sqrt(1 + 4 + 16)."""
    assert reference_free_scores(SUMS, "sum").tolist() == [-7.0, 0.0, -3.0]
    assert reference_free_scores(SUMS, "average").tolist() == [-7 / 3, 0.0, -3.0]
    assert reference_free_scores(SUMS, "norm").tolist() == [-sqrt(21), 0.0, -3.0]


def test_reference_free_scores_with_ld_alpha():
    """The third token counts half: -5, -5/3, -sqrt(1 + 4 + (4/2)^2)."""
    assert reference_free_scores(SUMS, "sum", 0.5)[0] == -5.0
    assert reference_free_scores(SUMS, "average", 0.5)[0] == -5 / 3
    assert reference_free_scores(SUMS, "norm", 0.5)[0] == -3.0


@pytest.mark.parametrize("kind", ["sum", "average", "norm"])
def test_reference_free_ignores_a_reference(kind):
    alone = sum_tokens(pair_scores(CHOSEN, REJECTED))
    with_reference = sum_tokens(pair_scores(CHOSEN, REJECTED, CHOSEN, REJECTED))
    settings = LossSettings(reference_free=kind)
    for branch, other in zip(reduce_pairs(alone, settings), reduce_pairs(with_reference, settings), strict=True):
        assert np.array_equal(branch.log_ratios, other.log_ratios)
        assert not branch.reference.any()
    chosen, _ = reduce_pairs(alone, settings)
    assert np.array_equal(chosen.log_ratios, reference_free_scores(SUMS, kind))
    assert chosen.log_probs.tolist() == [-7.0, 0.0, -3.0]  # logps stay log-probs


def test_no_reference_needs_reference_free():
    with pytest.raises(ValueError, match="no reference scores"):
        reduce_pairs(sum_tokens(pair_scores(CHOSEN, CHOSEN)), LossSettings())


@pytest.mark.parametrize(
    ("kind", "alpha", "expected"),
    [
        ("reverse_kl", 0.5, log(4)),
        ("forward_kl", 0.5, 1 - 1 / 4),
        ("js_divergence", 0.5, log(8 / 5)),
        ("alpha_divergence", 0.5, (4**-0.5 - 1) / -0.5),  # = 1
        ("alpha_divergence", 3.0, (4**2 - 1) / 2),
        ("alpha_divergence", 1.0, log(4)),  # the limit
        ("alpha_divergence", 1.0 + 9e-7, log(4)),  # within TRL's 1e-6 of it
    ],
)
def test_divergence_scores(kind, alpha, expected):
    """At a ratio of u = 4: log 4; 1 - 1/4; log(8 / 5); (4^(alpha - 1) - 1) / (alpha - 1). At u = 1 all are 0."""
    settings = LossSettings(f_divergence_type=kind, f_alpha_divergence_coef=alpha)
    scores = divergence_scores(np.array([log(4), 0.0]), settings)
    # A few roundings of float64.
    assert scores == pytest.approx([expected, 0.0], rel=1e-14, abs=1e-15)


def test_alpha_divergence_is_continuous_at_its_limit():
    settings = LossSettings(f_divergence_type="alpha_divergence", f_alpha_divergence_coef=1.0 + 2e-6)
    # (u^a - 1) / a = log u + a (log u)^2 / 2 + …, with a = 2e-6.
    assert divergence_scores(np.array([3.0]), settings)[0] == pytest.approx(3.0 + 2e-6 * 9 / 2, abs=1e-10)


def test_divergence_scores_are_cut_off_before_they_overflow():
    """TRL cuts the alpha-divergence's exponent at 80; forward_kl's is cut at 300, beyond float32's 88.7."""
    ratios = np.array([-1e6, 1e6])
    alpha = LossSettings(f_divergence_type="alpha_divergence", f_alpha_divergence_coef=2.0)
    assert divergence_scores(ratios, alpha) == pytest.approx([-1.0, exp(80.0)], rel=1e-14)
    forward = LossSettings(f_divergence_type="forward_kl")
    assert divergence_scores(ratios, forward) == pytest.approx([-exp(300.0), 1.0], rel=1e-14)
    jensen_shannon = LossSettings(f_divergence_type="js_divergence")
    assert divergence_scores(ratios, jensen_shannon) == pytest.approx([-1e6, log(2)], rel=1e-6)


def test_rewards_are_log_ratios_whatever_the_divergence():
    """Chosen: log-probs -7 under the policy, -4 under the reference: a log-ratio of -3, a reward of -0.3."""
    scores = pair_scores(
        completion([[-1.0, -6.0]]), completion([[-2.0]]), completion([[-2.0, -2.0]]), completion([[-2.0]])
    )
    for kind in ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"):
        chosen, rejected = reduce_pairs(sum_tokens(scores), LossSettings(f_divergence_type=kind))
        assert chosen.rewards(0.1)[0] == pytest.approx(-0.3, rel=1e-14)
        assert rejected.rewards(0.1)[0] == 0.0


def test_wpo_weights():
    """Log-probs -1 and -2, log sums of squares -0.5 each: (-3 + 1) / 2 = -1 nat a token; nothing scored weighs 1."""
    chosen = completion([[-1.0, -2.0], []], log_sum_sq_prob=[-1.0, 0.0])
    weights = completion_weights(sum_tokens(pair_scores(chosen, chosen)).policy_chosen)
    assert weights == pytest.approx([exp(-1), 1.0], rel=1e-14)


def test_log_sigmoid_at_the_extremes():
    assert log_sigmoid(np.array([-1000.0, 0.0, 1000.0])) == pytest.approx([-1000.0, -log(2), 0.0], abs=1e-15)


def test_log_sigmoid_equals_its_definition():
    """log1p and exp are good to a few units in the last place, and so is their sum: its two terms never cancel."""
    values = np.linspace(-40.0, 40.0, 4001)
    assert log_sigmoid(values) == pytest.approx(-np.logaddexp(0.0, -values), rel=1e-14)
