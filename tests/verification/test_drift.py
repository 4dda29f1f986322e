"""Errors by token, sequence and pair: by hand, against plain loops, and the bounds against real distributions."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_fast.metrics.rewards import reduce_pairs
from dpo_fast.metrics.sums import sum_tokens
from dpo_fast.types import CompletionScores, LossSettings, PairScores
from dpo_fast.verification.drift import Place, compare, kl_lower_bounds, measure_growth, position_edges, summarise
from dpo_fast.verification.types import ScoredTokens, Scoring

from .build import draw_scorings, make_scoring, make_scorings, make_tokens

# Two pairs, a policy and its reference. In exact binary fractions, so that errors are exact in float32.
CHOSEN, REJECTED = [[-1.0, -2.0], [-0.5]], [[-1.5], [-4.0, -1.0, -2.0]]
BASE_CHOSEN, BASE_REJECTED = [[-2.0, -2.0], [-1.0]], [[-1.0], [-3.0, -1.0, -1.0]]
OTHER_CHOSEN, OTHER_REJECTED = [[-1.25, -2.0], [-0.5]], [[-1.5], [-4.0, -1.5, -1.75]]


@pytest.fixture(scope="module")
def by_hand():
    original = make_scoring([5, 8], CHOSEN, REJECTED, BASE_CHOSEN, BASE_REJECTED)
    engine = make_scoring([5, 8], OTHER_CHOSEN, OTHER_REJECTED, BASE_CHOSEN, BASE_REJECTED)
    return make_scorings(original, engine, beta=0.5, prompt=3, subsets=["b", "a"])


def test_tokens_by_hand(by_hand):
    """14 tokens, errors -0.25, -0.5 and 0.25, the others 0; the largest is in row 8's rejected completion."""
    found = summarise(compare(by_hand, by_hand.engine)).tokens
    assert found.tokens == 14
    assert found.mean_absolute == pytest.approx(1.0 / 14, rel=1e-15)
    assert found.bias == pytest.approx(-0.5 / 14, rel=1e-15)
    assert found.median_absolute == 0.0
    assert found.rms == pytest.approx(np.sqrt((0.0625 + 0.25 + 0.0625) / 14), rel=1e-15)
    # The 0.99 quantile of 14 lies at 12.87 of 0 to 13: 0.25 + 0.87 (0.5 - 0.25).
    assert found.p99_absolute == pytest.approx(0.4675, rel=1e-12)
    assert (found.largest, found.largest_at) == (-0.5, Place(8, "policy_rejected", 1))
    assert found.top1_agreement is None


def test_sequences_and_pairs_by_hand(by_hand):
    """Log-probs are off by -0.25, 0; 0, -0.25. Rewards by half of that, margins by -0.125 and 0.125."""
    errors = compare(by_hand, by_hand.engine)
    found = summarise(errors)
    assert errors.original_rewards.tolist() == [[0.5, -0.25], [0.25, -1.0]]
    assert errors.original_margins.tolist() == [0.75, 1.25]
    assert errors.margins.tolist() == [0.625, 1.375]
    of_log_probs = found.policy_log_probs
    assert (of_log_probs.count, of_log_probs.bias, of_log_probs.mean_absolute) == (4, -0.125, 0.125)
    assert (of_log_probs.spread, of_log_probs.largest, of_log_probs.largest_row) == (0.125, -0.25, 5)
    assert found.reference_log_probs.rms == 0.0
    assert (found.rewards.bias, found.rewards.rms) == (-0.0625, pytest.approx(np.sqrt(2) / 16, rel=1e-15))
    margins = found.margins
    assert (margins.count, margins.bias, margins.spread, margins.rms) == (2, 0.0, 0.125, 0.125)
    # Two errors of 0.125 to either side: standard deviation 0.125 sqrt(2), over sqrt(2) pairs.
    assert margins.bias_interval == pytest.approx((-0.125 * 1.959964, 0.125 * 1.959964), rel=1e-6)
    assert margins.correlation == pytest.approx(1.0)


def test_slices_by_hand(by_hand):
    """Subset a is row 8: a chosen completion of one token and a rejected one of three, under two models."""
    found = summarise(compare(by_hand, by_hand.engine))
    assert [(each.name, each.pairs, each.tokens) for each in found.by_subset] == [("a", 1, 8), ("b", 1, 6)]
    assert found.by_subset[0].token_mean_absolute == 0.75 / 8
    assert found.by_subset[0].token_bias == -0.25 / 8
    assert (found.by_subset[0].margin_bias, found.by_subset[1].margin_bias) == (0.125, -0.125)
    assert [(each.name, each.pairs) for each in found.by_length] == [("2-2", 1), ("3-3", 1)]


def test_positions_by_hand(by_hand):
    """After prompts of three tokens: eight tokens at position 3, four at 4, two at 5, too few for a bin."""
    errors = compare(by_hand, by_hand.engine)
    assert np.bincount(errors.position).tolist() == [0, 0, 0, 8, 4, 2]
    found = summarise(errors).by_position
    assert [(each.first, each.last, each.tokens) for each in found] == [(3, 3, 8), (4, 5, 6)]
    assert [each.mean_absolute for each in found] == [0.25 / 8, 0.75 / 6]
    assert [each.bias for each in found] == [-0.25 / 8, -0.25 / 6]


def test_positions_where_nothing_precedes_the_first_token():
    """The one token that is scored is the second of its completion."""
    scorings = make_scorings(make_scoring([1], [[-1.0]], [[-1.0]]), make_scoring([1], [[-1.0]], [[-2.0]]), prompt=0)
    pairs = replace(scorings.pairs, chosen_lengths=np.array([2]), rejected_lengths=np.array([2]))
    errors = compare(replace(scorings, pairs=pairs, reference_free="sum"), scorings.engine)
    assert errors.position.tolist() == [1, 1]
    assert summarise(errors).tokens.largest_at == Place(1, "policy_rejected", 1)


@pytest.mark.parametrize("reference_free", [None, "sum", "average", "norm"])
def test_rewards_are_those_of_the_metrics(reference_free):
    """The same scores by way of `reduce_pairs`, which evaluation takes."""
    scorings = replace(draw_scorings(3, 30), reference_free=reference_free)

    def completion(tokens):
        nothing = np.zeros(30)
        return CompletionScores(tokens.log_probs, tokens.lengths, nothing, nothing, nothing.astype(int), nothing)

    pairs, scoring = scorings.pairs, scorings.original
    lengths = pairs.prompt_lengths, pairs.chosen_lengths, pairs.rejected_lengths
    branches = (completion(tokens) for tokens in scoring.completions().values())
    sums = sum_tokens(PairScores(pairs.rows, *lengths, np.zeros(30, bool), None, *branches))
    expected = reduce_pairs(sums, LossSettings(reference_free=reference_free))
    found = compare(scorings, scorings.engine).original_rewards
    # The same numbers in float64, added up in another order.
    np.testing.assert_allclose(found, np.stack([each.rewards(0.1) for each in expected], axis=1), rtol=1e-12)


def test_no_reference_and_no_way_without():
    scoring = make_scoring([1], [[-1.0]], [[-2.0]])
    with pytest.raises(ValueError, match="no reference scores"):
        compare(make_scorings(scoring, scoring), scoring)


def test_top1():
    """Of four tokens: both first choice, only the original's, only the other's, neither."""
    log_probs = [[-1.0, -1.0], [-1.0, -1.0]]
    original = make_tokens(log_probs, is_top1=[[1, 1], [0, 0]])
    other = make_tokens(log_probs, is_top1=[[1, 0], [1, 0]])
    rows = np.array([1, 2])
    scorings = make_scorings(Scoring(rows, original, original), Scoring(rows, other, other), reference_free="sum")
    found = summarise(compare(scorings, scorings.engine)).tokens
    assert (found.top1_agreement, found.top1_kept) == (0.5, 0.5)


@given(st.integers(0, 1000), st.floats(0.0, 3.0), st.integers(2, 40))
def test_kl_bounds_hold(seed, distance, vocabulary):
    """Over random distributions, the bounds from each token's outputs are never more than the divergence."""
    random = np.random.default_rng(seed)
    logits = random.normal(0, 2, vocabulary)
    others = logits + distance * random.normal(size=vocabulary)
    p, q = (np.exp(each - np.logaddexp.reduce(each)) for each in (logits, others))
    divergence = float((p * np.log(p / q)).sum())

    def outputs(each):
        squares = np.full(vocabulary, np.log(np.square(each).sum()), np.float32)
        return ScoredTokens(np.array([0, vocabulary]), np.log(each).astype(np.float32), log_sum_sq_prob=squares)

    # float32's rounding of log-probs of up to 30 nats.
    assert (kl_lower_bounds(outputs(p), outputs(q)) <= divergence + 1e-5).all()


def test_kl_bound_of_two_outcomes_is_the_divergence():
    """With two tokens nothing is left unknown: 0.75 log(0.75 / 0.5) + 0.25 log(0.25 / 0.5) = 0.130812."""
    p, q = (ScoredTokens(np.array([0, 1]), np.log([share]).astype(np.float32)) for share in (0.75, 0.5))
    assert kl_lower_bounds(p, q) == pytest.approx([0.130812], abs=1e-6)


def test_kl_bound_of_the_norms():
    """Where the target's log-prob stays and the norm goes from 0.5 to 0.25: (0.5 - 0.25)^2."""
    squares = [[[2 * np.log(norm)]] for norm in (0.5, 0.25)]
    p, q = (make_tokens([[-3.0]], log_sum_sq_prob=square) for square in squares)
    assert kl_lower_bounds(p, q) == pytest.approx([0.0625], rel=1e-6)


def test_kl_bound_of_certain_tokens():
    """A float32 log-prob of 0 may be a probability just below 1: no infinity comes of it."""
    p, q = make_tokens([[-1e-3, 0.0, 0.0]]), make_tokens([[0.0, 0.0, -1e-3]])
    assert np.isfinite(kl_lower_bounds(p, q)).all()


def test_growth_is_least_squares_with_clusters():
    """Slope as NumPy's polyfit has it; each token its own cluster gives White's errors (HC0) times N / (N - 1)."""
    random = np.random.default_rng(0)
    position = random.integers(0, 200, 500)
    errors = random.normal(0, 0.01 + 0.01 * np.log1p(position))
    found = measure_growth(errors, position, np.arange(500))
    x, y = np.log1p(position), np.abs(errors)
    slope, constant = np.polyfit(x, y, 1)
    assert found.slope == pytest.approx(slope, rel=1e-9)
    residuals, design = y - constant - slope * x, np.column_stack([np.ones(500), x])
    bread = np.linalg.inv(design.T @ design)
    white = bread @ (design.T * residuals**2) @ design @ bread * 500 / 499
    reach = 1.959963984540054 * np.sqrt(white[1, 1])
    assert found.interval == pytest.approx((slope - reach, slope + reach), rel=1e-9)


def test_growth_covers_with_clusters():
    """Errors that a pair's tokens have in common: of 400 samples, 95 % hold the true slope; standard error 1.1 %."""
    random, held = np.random.default_rng(0), []
    pair = np.repeat(np.arange(100), 20)
    for _ in range(400):
        position = np.repeat(random.integers(0, 100, 100), 20) + np.tile(np.arange(20), 100)
        sizes = 1 + 0.05 * np.log1p(position) + np.repeat(random.uniform(-0.3, 0.3, 100), 20)
        low, high = measure_growth(sizes, position, pair).interval
        held.append(low <= 0.05 <= high)
    assert 0.91 < np.mean(held) < 0.985


def test_growth_needs_positions_and_pairs():
    assert measure_growth(np.ones(3), np.ones(3, int), np.arange(3)) is None
    assert measure_growth(np.ones(3), np.arange(3), np.zeros(3, int)).interval is None


@given(st.lists(st.integers(0, 30), min_size=1, max_size=60), st.integers(1, 10))
def test_edges_hold_every_position_once(positions, bins):
    edges = position_edges(np.array(positions), bins)
    found = np.searchsorted(edges, positions, side="right") - 1
    assert len(edges) <= bins + 1
    assert (np.diff(edges) > 0).all()
    assert found.min() == 0
    assert found.max() <= len(edges) - 2


@given(st.integers(0, 10**6))
def test_swapping_the_branches_turns_the_margins(seed):
    """What is said of sizes stays; margins and their bias change their sign."""
    scorings = draw_scorings(seed, 12)

    def swap(scoring):
        chosen, rejected, base_chosen, base_rejected = scoring.completions().values()
        return Scoring(scoring.rows, rejected, chosen, base_rejected, base_chosen)

    pairs = scorings.pairs
    turned = replace(
        scorings,
        pairs=replace(pairs, chosen_lengths=pairs.rejected_lengths, rejected_lengths=pairs.chosen_lengths),
        original=swap(scorings.original),
        engine=swap(scorings.engine),
    )
    found, other = (summarise(compare(each, each.engine)) for each in (scorings, turned))
    assert found.margins.bias == pytest.approx(-other.margins.bias, abs=1e-15)
    assert found.margins.rms == pytest.approx(other.margins.rms, rel=1e-12)
    for name in ("mean_absolute", "rms", "kl_bound_mean", "p99_absolute"):
        assert getattr(found.tokens, name) == pytest.approx(getattr(other.tokens, name), rel=1e-12)


@given(st.integers(0, 10**6), st.sampled_from([0.5, 2.0]))
def test_beta_scales_rewards_and_margins(seed, scale):
    scorings = draw_scorings(seed, 12)
    found, other = (
        summarise(compare(each, each.engine)) for each in (scorings, replace(scorings, beta=scale * scorings.beta))
    )
    assert found.tokens == other.tokens
    assert other.margins.rms == pytest.approx(scale * found.margins.rms, rel=1e-12)
    assert other.rewards.bias == pytest.approx(scale * found.rewards.bias, rel=1e-9, abs=1e-18)
