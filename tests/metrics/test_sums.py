"""Sums of tokens against loops and hand values, and the same to the last bit whatever the parts are."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_fast.errors import EngineOutputError
from dpo_fast.metrics.sums import COMPLETIONS, concatenate, segment_sums, sum_tokens

from .build import assert_equal, completion, pair_scores, random_scores, slice_pairs


def test_sums_by_hand():
    """The first pair has 3 and 2 scored tokens, so of the chosen [-1, -2, -4] two are shared; the second 0 and 1."""
    chosen, rejected = completion([[-1.0, -2.0, -4.0], []]), completion([[-8.0, -16.0], [-32.0]])
    sums = sum_tokens(pair_scores(chosen, rejected))
    assert sums.policy_chosen.lengths.tolist() == [3, 0]
    assert sums.policy_chosen.log_probs.tolist() == [[-3.0, -4.0], [0.0, 0.0]]
    assert sums.policy_chosen.squares.tolist() == [[5.0, 16.0], [0.0, 0.0]]
    assert sums.policy_rejected.log_probs.tolist() == [[-24.0, 0.0], [0.0, -32.0]]
    assert sums.policy_rejected.squares.tolist() == [[64.0 + 256.0, 0.0], [0.0, 1024.0]]
    assert sums.reference_chosen is None


def test_segment_sums_gives_empty_segments_zero():
    values = np.array([1, 2, 4, 8], dtype=np.float32)
    assert segment_sums(values, np.array([0, 3, 0, 1, 0])).tolist() == [0.0, 7.0, 0.0, 8.0, 0.0]
    assert segment_sums(values[:0], np.array([0, 0])).tolist() == [0.0, 0.0]
    assert segment_sums(values[:0], np.array([], dtype=np.int64)).tolist() == []


def test_tokens_are_summed_in_float64():
    """2^24 + 1 + 1 is 2^24 in float32, in which neighbours there are 2 apart; 2^24 + 1 has no float32 square."""
    assert segment_sums(np.array([2**24, 1, 1], dtype=np.float32), np.array([3]))[0] == 2**24 + 2
    large = completion([[-(2.0**24), -1.0, -1.0]])
    sums = sum_tokens(pair_scores(large, large)).policy_chosen
    assert sums.log_probs.tolist() == [[-(2.0**24) - 2, 0.0]]
    assert sums.squares.tolist() == [[2.0**48 + 2, 0.0]]


@given(lengths=st.lists(st.integers(0, 6), max_size=12), seed=st.integers(0, 1000))
def test_segment_sums_equals_a_loop(lengths, seed):
    values = np.random.default_rng(seed).normal(size=sum(lengths)).astype(np.float32)
    ends = np.cumsum(lengths, dtype=np.int64)
    expected = [sum(float(x) for x in values[end - length : end]) for end, length in zip(ends, lengths, strict=True)]
    # Both add in float64, perhaps in another order.
    assert segment_sums(values, np.array(lengths, dtype=np.int64)) == pytest.approx(expected, rel=1e-12, abs=1e-12)


@given(seed=st.integers(0, 1000), pairs=st.integers(1, 12), size=st.integers(1, 13), reference=st.booleans())
def test_sums_are_the_same_whatever_the_parts(seed, pairs, size, reference):
    scores = random_scores(seed, pairs, groups=2)
    if not reference:
        scores = replace(scores, reference_chosen=None, reference_rejected=None)
    parts = [slice_pairs(scores, start, start + size) for start in range(0, pairs, size)]
    assert_equal(concatenate([sum_tokens(part) for part in parts]), sum_tokens(scores))


def test_long_completions_are_summed_the_same_in_parts_and_at_once():
    """Thousands of tokens each, where NumPy adds pairwise and by blocks, at every alignment of the array."""
    generator = np.random.default_rng(0)
    tokens = [generator.normal(-2.0, 1.0, 8000 + 13 * number).tolist() for number in range(6)]
    scores = pair_scores(completion(tokens), completion(tokens[::-1]))
    parts = [slice_pairs(scores, start, start + 1) for start in range(6)]
    assert_equal(concatenate([sum_tokens(part) for part in parts]), sum_tokens(scores))


def test_parts_without_pairs_add_nothing():
    """Such a part cannot say whether there are groups."""
    scores = random_scores(0, 4, groups=2)
    empty = replace(slice_pairs(scores, 0, 0), groups=None)
    assert_equal(concatenate([sum_tokens(part) for part in (empty, scores, empty)]), sum_tokens(scores))
    assert len(concatenate([sum_tokens(empty)] * 2).rows) == 0


def test_parts_must_agree():
    scores = random_scores(0, 4, groups=2)
    ungrouped, alone = replace(scores, groups=None), replace(scores, reference_chosen=None, reference_rejected=None)
    for other, name in ((ungrouped, "groups"), (alone, "reference_chosen")):
        with pytest.raises(ValueError, match=f"{name} is there in some parts"):
            concatenate([sum_tokens(scores), sum_tokens(other)])
    with pytest.raises(ValueError, match="no parts"):
        concatenate([])


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
@pytest.mark.parametrize("name", COMPLETIONS)
def test_a_token_that_is_not_finite_names_its_row(bad, name):
    """The 6th token belongs to row 4: row 3 has no scored token."""
    good = completion([[-1.0, -1.0], [-1.0, -1.0], [], [-1.0, -1.0]])
    scores = pair_scores(good, good, good, good)
    broken = replace(scores, **{name: completion([[-1.0, -1.0], [-1.0, -1.0], [], [-1.0, bad]])})
    with pytest.raises(EngineOutputError, match=rf"row 4: log_probs of {name} is {bad}"):
        sum_tokens(broken)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("field", ["entropy", "mean_logit", "log_sum_sq_prob"])
def test_a_sum_that_is_not_finite_names_its_row(bad, field):
    good = completion([[-1.0]] * 3)
    broken = replace(good, **{field: np.array([0.0, bad, 0.0])})
    with pytest.raises(EngineOutputError, match=rf"row 2: {field} of reference_rejected is {bad}"):
        sum_tokens(pair_scores(good, good, good, broken))


def test_slices_may_be_empty():
    scores = random_scores(0, 4)
    for start, stop in [(0, 0), (2, 2), (4, 4), (9, 12), (3, 1)]:
        part = slice_pairs(scores, start, stop)
        assert len(part.rows) == len(part.policy_chosen.lengths) == len(part.policy_chosen.log_probs) == 0
        assert len(sum_tokens(part).rows) == 0
