"""Sequence log-probs, divergences, reference-free scores and slicing."""

from math import exp, log, sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as run_with
from hypothesis import strategies as st

from dpo_fast.metrics.rewards import (
    completion_weights,
    divergence_scores,
    log_sigmoid,
    reduce_pairs,
    reference_free_scores,
    segment_sums,
    sequence_log_probs,
)
from dpo_fast.types import LossSettings

from .build import completion, concatenate, pair_scores, random_scores, slice_pairs

CHOSEN = completion([[-1.0, -2.0, -4.0], [], [-3.0]])
SHARED = np.array([2, 0, 1])  # the rejected completions have 2, 5 and 1 scored tokens


def test_segment_sums_gives_empty_segments_zero():
    values = np.array([1, 2, 4, 8], dtype=np.float32)
    assert segment_sums(values, np.array([0, 3, 0, 1, 0])).tolist() == [0.0, 7.0, 0.0, 8.0, 0.0]
    assert segment_sums(values[:0], np.array([0, 0])).tolist() == [0.0, 0.0]
    assert segment_sums(values[:0], np.array([], dtype=np.int64)).tolist() == []


def test_segment_sums_adds_in_float64():
    """2^24 + 1 + 1 is 2^24 in float32, in which neighbours there are 2 apart."""
    assert segment_sums(np.array([2**24, 1, 1], dtype=np.float32), np.array([3]))[0] == 2**24 + 2


@run_with(deadline=None)  # a busy machine is no failure
@given(lengths=st.lists(st.integers(0, 6), max_size=12), seed=st.integers(0, 1000))
def test_segment_sums_equals_a_loop(lengths, seed):
    values = np.random.default_rng(seed).normal(size=sum(lengths)).astype(np.float32)
    ends = np.cumsum(lengths, dtype=np.int64)
    expected = [sum(float(x) for x in values[end - length : end]) for end, length in zip(ends, lengths, strict=True)]
    # Both add in float64, perhaps in another order.
    assert segment_sums(values, np.array(lengths, dtype=np.int64)) == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_sequence_log_prob_is_the_sum():
    assert sequence_log_probs(CHOSEN, SHARED).tolist() == [-7.0, 0.0, -3.0]


def test_ld_alpha_weighs_the_tokens_beyond_the_shared_length():
    """First pair: 2 of 3 tokens are shared, so -1 - 2 + 0.5 * (-4) = -5; the third pair has no tail."""
    assert sequence_log_probs(CHOSEN, SHARED, 0.5).tolist() == [-5.0, 0.0, -3.0]
    assert sequence_log_probs(CHOSEN, SHARED, 0.0).tolist() == [-3.0, 0.0, -3.0]
    assert sequence_log_probs(CHOSEN, SHARED, 1.0).tolist() == [-7.0, 0.0, -3.0]


def test_reference_free_scores():
    """[-1, -2, -4]: the sum is -7, the average -7/3, the norm -sqrt(1 + 4 + 16)."""
    assert reference_free_scores(CHOSEN, SHARED, "sum").tolist() == [-7.0, 0.0, -3.0]
    assert reference_free_scores(CHOSEN, SHARED, "average").tolist() == [-7 / 3, 0.0, -3.0]
    assert reference_free_scores(CHOSEN, SHARED, "norm").tolist() == [-sqrt(21), 0.0, -3.0]


def test_reference_free_scores_with_ld_alpha():
    """The third token counts half: -5, -5/3, -sqrt(1 + 4 + (4/2)^2)."""
    assert reference_free_scores(CHOSEN, SHARED, "sum", 0.5)[0] == -5.0
    assert reference_free_scores(CHOSEN, SHARED, "average", 0.5)[0] == -5 / 3
    assert reference_free_scores(CHOSEN, SHARED, "norm", 0.5)[0] == -3.0


@pytest.mark.parametrize("kind", ["sum", "average", "norm"])
def test_reference_free_ignores_a_reference(kind):
    rejected = completion([[-2.0, -2.0], [-1.0] * 5, [-6.0]])
    alone = pair_scores(CHOSEN, rejected)
    with_reference = pair_scores(CHOSEN, rejected, rejected, CHOSEN)
    settings = LossSettings(reference_free=kind)
    for branch, other in zip(reduce_pairs(alone, settings), reduce_pairs(with_reference, settings), strict=True):
        assert np.array_equal(branch.log_ratios, other.log_ratios)
        assert not branch.reference.any()
    chosen, _ = reduce_pairs(alone, settings)
    assert np.array_equal(chosen.log_ratios, reference_free_scores(CHOSEN, SHARED, kind))
    assert chosen.log_probs.tolist() == [-7.0, 0.0, -3.0]  # logps stay log-probs


def test_no_reference_needs_reference_free():
    with pytest.raises(ValueError, match="no reference scores"):
        reduce_pairs(pair_scores(CHOSEN, CHOSEN), LossSettings())


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
        chosen, rejected = reduce_pairs(scores, LossSettings(f_divergence_type=kind))
        assert chosen.rewards(0.1)[0] == pytest.approx(-0.3, rel=1e-14)
        assert rejected.rewards(0.1)[0] == 0.0


def test_wpo_weights():
    """Log-probs -1 and -2, log sums of squares -0.5 each: (-3 + 1) / 2 = -1 nat a token; nothing scored weighs 1."""
    weights = completion_weights(completion([[-1.0, -2.0], []], log_sum_sq_prob=[-1.0, 0.0]))
    assert weights == pytest.approx([exp(-1), 1.0], rel=1e-14)


def test_log_sigmoid_at_the_extremes():
    assert log_sigmoid(np.array([-1000.0, 0.0, 1000.0])) == pytest.approx([-1000.0, -log(2), 0.0], abs=1e-15)


def assert_equal(scores, others):
    """Field by field, dtypes included."""
    for name in scores.__slots__:
        one, other = getattr(scores, name), getattr(others, name)
        if isinstance(one, np.ndarray):
            assert one.dtype == other.dtype
            assert np.array_equal(one, other), name
        elif hasattr(one, "__slots__"):
            assert_equal(one, other)
        else:
            assert one == other


@run_with(deadline=None)  # a busy machine is no failure
@given(seed=st.integers(0, 1000), pairs=st.integers(1, 12), size=st.integers(1, 13), reference=st.booleans())
def test_concatenated_slices_give_the_whole(seed, pairs, size, reference):
    scores = random_scores(seed, pairs, groups=2)
    if not reference:
        scores = pair_scores(scores.policy_chosen, scores.policy_rejected)
    parts = [slice_pairs(scores, start, start + size) for start in range(0, pairs, size)]
    assert_equal(concatenate(parts), scores)


def test_slices_may_be_empty():
    scores = random_scores(0, 4)
    for start, stop in [(0, 0), (2, 2), (4, 4), (9, 12), (3, 1)]:
        part = slice_pairs(scores, start, stop)
        assert len(part.rows) == len(part.policy_chosen.lengths) == len(part.policy_chosen.log_probs) == 0
