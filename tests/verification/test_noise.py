"""The noise floor: which of the original's scorings it is, and what float32 resolves."""

from dataclasses import replace

import numpy as np
import pytest

from dpo_fast.verification.drift import compare
from dpo_fast.verification.noise import RESOLUTION, measure_multiples
from dpo_fast.verification.types import Scorings

from .build import draw_original, draw_pairs, draw_scorings, make_scoring, make_scorings, perturb


def floors(scorings, *noise, engine="engine"):
    """The floor of the named scorings of the original, and the multiples of the named engine."""
    measured, *others = (compare(scorings, getattr(scorings, name)) for name in (engine, *noise))
    return measure_multiples(measured, others, scorings)


def test_floor_by_hand():
    """One token a completion: noise of 0.25 in one of the four, so 1/16 a token; in the margin beta times 0.25 once."""
    original = make_scoring([1], [[-1.0]], [[-2.0]], [[-1.0]], [[-2.0]])
    reshaped = make_scoring([1], [[-1.25]], [[-2.0]], [[-1.0]], [[-2.0]])
    engine = make_scoring([1], [[-1.0]], [[-2.5]], [[-1.5]], [[-2.0]])
    floor, found = floors(make_scorings(original, engine, reshaped=reshaped, beta=0.5), "reshaped")
    assert (floor.kind, floor.token, floor.worst_completion, floor.margin) == ("float32", 0.0625, 0.25, 0.125)
    assert floor.reward == pytest.approx(0.125 / np.sqrt(2), rel=1e-15)
    assert floor.at_resolution == ()
    # The engine is off by 1/4 a token; both its rewards by 0.25, of which 0.25 - (-0.25) is left in the margin.
    assert found["token error"].value == 4.0
    assert found["worst completion"].value == 2.0
    assert found["margin error"].value == found["margin bias"].value == 4.0
    assert abs(found["reward bias"].value) == pytest.approx(2 * np.sqrt(2), rel=1e-15)
    assert all(multiple.interval is None for multiple in found.values())  # one pair says nothing of others


def test_no_noise_is_what_float32_resolves():
    """Scorings that agree to the last bit: RESOLUTION a token, its root over a margin's tokens, 12 of them here."""
    original = make_scoring([1, 2], *[[[-1.0] * 3, [-2.0] * 3]] * 4)
    floor, found = floors(make_scorings(original, original), "reshaped")
    assert floor.token == floor.worst_completion == RESOLUTION
    assert floor.margin == pytest.approx(0.1 * RESOLUTION * np.sqrt(12), rel=1e-12)
    assert floor.reward == pytest.approx(0.1 * RESOLUTION * np.sqrt(6), rel=1e-12)
    assert floor.at_resolution == ("token", "margin", "reward")
    assert found["token error"].value == 0.0


@pytest.mark.parametrize("reference_free", [None, "sum", "average", "norm"])
def test_resolution_is_what_simulated_rounding_gives(reference_free):
    """Normal errors of a standard deviation of RESOLUTION, times 1,000 to be above float32's own rounding."""
    random = np.random.default_rng(0)
    pairs = draw_pairs(random, 2000)
    original = draw_original(random, pairs)
    floor, _ = floors(Scorings(pairs, original, original, None, original, 0.1, reference_free), "reshaped")

    def rounded(name, pair, within, random):
        return random.normal(0, 1000 * RESOLUTION, len(pair))

    other = perturb(random, pairs, original, 0.0, rounded)
    errors = compare(Scorings(pairs, original, original, None, other, 0.1, reference_free), other)
    # 2,000 pairs: the standard error of a root mean square is 1.6 %.
    assert np.sqrt(np.square(errors.margin_errors).mean()) == pytest.approx(1000 * floor.margin, rel=0.07)
    of_rewards = np.square(errors.reward_errors).mean()
    assert np.sqrt(of_rewards) == pytest.approx(1000 * floor.reward, rel=0.07)


def test_the_checkpoints_floor_is_the_larger_one():
    scorings = draw_scorings(0, 100, rounded_noise=0.02)
    small, _ = floors(scorings, "reshaped")
    large, found = floors(scorings, "reshaped", "rounded")
    assert (small.kind, large.kind) == ("float32", "checkpoint")
    assert small.token == RESOLUTION
    assert large.token == pytest.approx(0.02, rel=0.1)
    assert len(large.positions) == 8
    assert found["token error"].value < 1e-3  # float32, measured in bfloat16's noise


def test_a_scoring_is_one_floor_from_the_original():
    """The rounded original as the engine: every size is once the floor, and so is every resample's."""
    scorings = draw_scorings(1, 50, rounded_noise=0.02)
    _, found = floors(scorings, "reshaped", "rounded", engine="rounded")
    for name in ("token error", "margin error", "growth"):
        assert found[name].value == pytest.approx(1.0, rel=1e-12)
        assert found[name].interval == pytest.approx((1.0, 1.0), rel=1e-12)
    assert found["worst completion"].value == 1.0


def test_the_order_of_pairs_does_not_matter():
    """For the values; the draws of the intervals take other pairs."""
    scorings = draw_scorings(2, 30, rounded_noise=0.02)
    order = np.random.default_rng(0).permutation(30)

    def shuffle_tokens(tokens):
        kept = np.concatenate([np.arange(tokens.offsets[pair], tokens.offsets[pair + 1]) for pair in order])
        names = ("log_probs", "is_top1", "entropy", "log_sum_sq_prob")
        columns = {name: getattr(tokens, name)[kept] for name in names}
        return replace(tokens, offsets=np.cumsum([0, *tokens.lengths[order]]), **columns)

    def shuffle(scoring):
        branches = {name: shuffle_tokens(tokens) for name, tokens in scoring.completions().items()}
        return replace(scoring, rows=scoring.rows[order], **branches)

    names = ("rows", "prompt_lengths", "chosen_lengths", "rejected_lengths")
    pairs = replace(scorings.pairs, subsets=None, **{name: getattr(scorings.pairs, name)[order] for name in names})
    scored = {name: shuffle(getattr(scorings, name)) for name in ("original", "reshaped", "rounded", "engine")}
    floor, found = floors(scorings, "reshaped", "rounded")
    other_floor, other = floors(replace(scorings, pairs=pairs, **scored), "reshaped", "rounded")
    assert floor.margin == pytest.approx(other_floor.margin, rel=1e-12)
    for name, multiple in found.items():
        assert multiple.value == pytest.approx(other[name].value, rel=1e-9, abs=1e-12)


def test_intervals_cover():
    """Of 200 engines of twice the noise, 95 % of the intervals hold 2; the standard error is 1.5 %."""
    held = []
    for seed in range(200):
        scorings = draw_scorings(seed, 60, engine_noise=0.04, rounded_noise=0.02, longest=6)
        low, high = floors(scorings, "reshaped", "rounded")[1]["token error"].interval
        held.append(low <= 2 <= high)
    assert 0.89 < np.mean(held) <= 0.99
