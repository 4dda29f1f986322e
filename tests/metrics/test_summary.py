"""The whole summary: hand values, invariants, and what it refuses."""

import json
from dataclasses import replace
from math import exp, log

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as run_with
from hypothesis import strategies as st

from dpo_fast.errors import UsageError
from dpo_fast.metrics.summary import compute_metrics
from dpo_fast.metrics.sums import concatenate, sum_tokens
from dpo_fast.types import F_DIVERGENCE_LOSSES, LOSS_TYPES, LossSettings, PairScores

from .build import completion, metrics_of, pair_scores, random_scores, slice_pairs

REWARD_KEYS = ("eval_rewards/chosen", "eval_rewards/rejected", "eval_rewards/margins", "eval_rewards/accuracies")
PER_PAIR_KEYS = ("eval_loss", *REWARD_KEYS, "eval_logps/chosen", "eval_logps/rejected")
TRL_KEYS = (*PER_PAIR_KEYS, "eval_logits/chosen", "eval_logits/rejected", "eval_entropy", "eval_mean_token_accuracy")

# Sums of at most some hundred float64 numbers of size 100, in another order: far below this.
REORDERED = {"rel": 1e-10, "abs": 1e-10}

seeds = st.integers(0, 10_000)
sizes = st.integers(1, 15)
losses = st.sampled_from(LOSS_TYPES)


def settings(loss: str = "sigmoid", **changes: object) -> LossSettings:
    return LossSettings(loss_type=(loss,), label_smoothing=0.1, **changes)


def three_pairs() -> PairScores:
    """Log-ratios of 2, 1, 0 (chosen) and 1, 3, 0 (rejected); the third pair is a tie. The last chosen one is longer."""
    return pair_scores(
        completion([[-1.0], [-2.0], [-1.0, -3.0]], entropy=[1.0, 2.0, 6.0], mean_logit=[3.0, 0.0, 3.0], top1=[1, 0, 1]),
        completion([[-4.0], [-1.0], [-2.0]], entropy=[0.0, 4.0, 1.0], mean_logit=[1.0, 2.0, 3.0], top1=[0, 0, 0]),
        completion([[-3.0], [-3.0], [-2.0, -2.0]]),
        completion([[-5.0], [-4.0], [-2.0]]),
        prompt_lengths=[5, 6, 7],
        groups=["b", "a", "b"],
        unscored=0,
    )


def test_exact_metrics_by_hand():
    """With beta 1/2: rewards 1, 1/2, 0 and 1/2, 3/2, 0; margins 1/2, -1, 0.

    Accuracy 1/3 (a tie is no win). Log-probs -1, -2, -4 and -4, -1, -2: means -7/3 both. Logits: 6 over 4 tokens,
    6 over 3. Entropy: 9 + 5 over 7 tokens. Top-1: 2 of 4 chosen tokens. Loss: the mean of -log s(margin).
    """
    metrics = metrics_of(three_pairs(), LossSettings(beta=0.5))
    expected = {
        "eval_loss": (log(1 + exp(-0.5)) + log(1 + exp(1.0)) + log(2)) / 3,
        "eval_rewards/chosen": 0.5,
        "eval_rewards/rejected": 2 / 3,
        "eval_rewards/margins": -0.5 / 3,
        "eval_rewards/accuracies": 1 / 3,
        "eval_logps/chosen": -7 / 3,
        "eval_logps/rejected": -7 / 3,
        "eval_logits/chosen": 1.5,
        "eval_logits/rejected": 2.0,
        "eval_entropy": 2.0,
        "eval_mean_token_accuracy": 0.5,
    }
    # A few roundings of float64.
    assert {key: metrics[key] for key in TRL_KEYS} == pytest.approx(expected, rel=1e-14)
    assert metrics["counts"] == {
        "pairs": 3,
        "ties": 1,
        "truncated": 0,
        "tokens": {"prompt": 18, "chosen": 4, "rejected": 3},
    }
    assert metrics["completion_lengths"]["chosen"] == {"mean": 4 / 3, "median": 1.0, "max": 2}
    assert metrics["completion_lengths"]["rejected"] == {"mean": 1.0, "median": 1.0, "max": 1}


def test_trl_aggregate_by_hand():
    """Batches of two: pairs 1 and 2, then pair 3 alone, which counts as much as the two, but for the loss.

    Margins: batch means -1/4 and 0. Accuracy: 1/2 and 0. Logits of the chosen: 3/2 and 3/2. Entropy: (3 + 4) / 4 and
    (6 + 1) / 3. Top-1: 1/2 and 1/2. Loss: weighted by pairs, so the exact mean.
    """
    metrics = metrics_of(three_pairs(), LossSettings(beta=0.5), aggregate="trl", batch_size=2)
    assert metrics["eval_rewards/margins"] == pytest.approx(-1 / 8, rel=1e-14)
    assert metrics["eval_rewards/accuracies"] == 0.25
    assert metrics["eval_logits/chosen"] == 1.5
    assert metrics["eval_entropy"] == pytest.approx((7 / 4 + 7 / 3) / 2, rel=1e-14)
    assert metrics["eval_mean_token_accuracy"] == 0.5
    exact = metrics_of(three_pairs(), LossSettings(beta=0.5))
    assert metrics["eval_loss"] == pytest.approx(exact["eval_loss"], rel=1e-14)


@run_with(max_examples=40)  # a busy machine is no failure
@given(seed=seeds, pairs=sizes, loss=losses, batch_size=sizes)
def test_trl_aggregate_is_the_mean_over_a_loop_of_batches(seed, pairs, loss, batch_size):
    """All full batches are computed at once; one by one, each by itself, they give the same."""
    scores = random_scores(seed, pairs)
    batches = [slice_pairs(scores, start, start + batch_size) for start in range(0, pairs, batch_size)]
    alone = [metrics_of(batch, settings(loss)) for batch in batches]
    expected = {key: np.mean([metrics[key] for metrics in alone]) for key in TRL_KEYS}
    weights = [metrics["counts"]["pairs"] for metrics in alone]
    expected["eval_loss"] = np.average([metrics["eval_loss"] for metrics in alone], weights=weights)
    metrics = metrics_of(scores, settings(loss), aggregate="trl", batch_size=batch_size)
    assert {key: metrics[key] for key in TRL_KEYS} == pytest.approx(expected, **REORDERED)


def test_groups_are_their_pairs_alone():
    scores = three_pairs()
    metrics = metrics_of(scores, LossSettings(beta=0.5))
    assert list(metrics["groups"]) == ["a", "b"]
    only_a = metrics_of(slice_pairs(scores, 1, 2), LossSettings(beta=0.5))
    pairs_of_b = concatenate([sum_tokens(slice_pairs(scores, 0, 1)), sum_tokens(slice_pairs(scores, 2, 3))])
    only_b = compute_metrics(pairs_of_b, LossSettings(beta=0.5))
    for group, alone in (("a", only_a), ("b", only_b)):
        expected = {key: alone[key] for key in (*TRL_KEYS, "intervals")}
        expected |= {key: alone["counts"][key] for key in ("pairs", "ties")}
        assert metrics["groups"][group] == expected


def test_a_sorting_loss_sorts_the_whole_set_or_the_batch():
    scores = random_scores(3, 12)
    exact = metrics_of(scores, settings("aot"))["eval_loss"]
    whole_batch = metrics_of(scores, settings("aot"), aggregate="trl", batch_size=12)["eval_loss"]
    small_batches = metrics_of(scores, settings("aot"), aggregate="trl", batch_size=2)["eval_loss"]
    assert whole_batch == pytest.approx(exact, rel=1e-12)
    assert abs(small_batches - exact) > 1e-3


def test_intervals_hold_the_means():
    """At 400 pairs every 95 % interval lies around its estimate, and is not wide."""
    metrics = metrics_of(random_scores(5, 400), settings())
    assert set(metrics["intervals"]) == set(PER_PAIR_KEYS)
    for key, (low, high) in metrics["intervals"].items():
        assert low < metrics[key] < high
    low, high = metrics["intervals"]["eval_rewards/accuracies"]
    assert high - low < 2 * 1.96 * 0.5 / 20  # at most ± 1.96 sqrt(1/4 / 400)


@pytest.mark.parametrize("loss", ["aot", "aot_unpaired", "sft"])
def test_no_interval_of_a_loss_that_is_not_per_pair(loss):
    metrics = metrics_of(random_scores(5, 20), LossSettings(loss_type=("sigmoid", loss)))
    assert set(metrics["intervals"]) == {*REWARD_KEYS, "eval_logps/chosen", "eval_logps/rejected"}


def test_intervals_depend_on_the_seed_alone():
    scores = random_scores(6, 30, groups=3)
    assert metrics_of(scores, settings(), seed=1) == metrics_of(scores, settings(), seed=1)
    one, other = (metrics_of(scores, settings(), seed=seed)["intervals"] for seed in (1, 2))
    assert one["eval_rewards/margins"] != other["eval_rewards/margins"]
    assert one["eval_rewards/accuracies"] == other["eval_rewards/accuracies"]


@pytest.mark.parametrize("kind", ["sum", "average", "norm"])
@pytest.mark.parametrize("loss", LOSS_TYPES)
def test_reference_free_is_a_reference_that_scores_zero(kind, loss):
    """[-1, -1] against [-3]: scores -2, -1, -sqrt 2 against -3, so the margin is 0.1 times 1, 2, 3 - sqrt 2."""
    scores = pair_scores(completion([[-1.0, -1.0]]), completion([[-3.0]]))
    metrics = metrics_of(scores, settings(loss, reference_free=kind))
    margin = {"sum": 0.1, "average": 0.2, "norm": 0.1 * (3 - 2**0.5)}[kind]
    assert metrics["eval_rewards/margins"] == pytest.approx(margin, rel=1e-12)
    assert metrics["eval_logps/chosen"] == -2.0
    if kind == "sum":
        zero = pair_scores(completion([[-1.0, -1.0]]), completion([[-3.0]]), completion([[0, 0]]), completion([[0]]))
        assert metrics == metrics_of(zero, settings(loss))


@given(seed=seeds, pairs=sizes)
def test_swapping_the_completions_negates_the_margin(seed, pairs):
    scores = random_scores(seed, pairs)
    swapped = replace(
        scores,
        chosen_lengths=scores.rejected_lengths,
        rejected_lengths=scores.chosen_lengths,
        policy_chosen=scores.policy_rejected,
        policy_rejected=scores.policy_chosen,
        reference_chosen=scores.reference_rejected,
        reference_rejected=scores.reference_chosen,
    )
    one, other = metrics_of(scores, settings()), metrics_of(swapped, settings())
    assert other["eval_rewards/margins"] == pytest.approx(-one["eval_rewards/margins"], **REORDERED)
    assert other["counts"]["ties"] == one["counts"]["ties"]
    expected = 1 - one["eval_rewards/accuracies"] - one["counts"]["ties"] / pairs
    assert other["eval_rewards/accuracies"] == pytest.approx(expected, abs=1e-12)


@given(seed=seeds, pairs=sizes, loss=losses, batch_size=sizes)
def test_exact_metrics_do_not_depend_on_batch_size(seed, pairs, loss, batch_size):
    scores = random_scores(seed, pairs)
    assert metrics_of(scores, settings(loss), batch_size=batch_size) == metrics_of(scores, settings(loss))


@given(seed=seeds, pairs=sizes, loss=losses, data=st.data())
def test_exact_metrics_do_not_depend_on_the_order_of_pairs(seed, pairs, loss, data):
    scores = random_scores(seed, pairs)
    order = data.draw(st.permutations(range(pairs)))
    shuffled = concatenate([sum_tokens(slice_pairs(scores, position, position + 1)) for position in order])
    one, other = metrics_of(scores, settings(loss)), compute_metrics(shuffled, settings(loss))
    assert [other[key] for key in TRL_KEYS] == pytest.approx([one[key] for key in TRL_KEYS], **REORDERED)
    assert other["counts"] == one["counts"]


@given(seed=seeds, pairs=sizes, extra=st.integers(0, 5), loss=losses)
def test_one_batch_of_trl_is_exact(seed, pairs, extra, loss):
    scores = random_scores(seed, pairs)
    trl = metrics_of(scores, settings(loss), aggregate="trl", batch_size=pairs + extra)
    assert trl == metrics_of(scores, settings(loss))


@given(seed=seeds, pairs=sizes, loss=losses, aggregate=st.sampled_from(["exact", "trl"]))
def test_the_result_is_json_without_nan(seed, pairs, loss, aggregate):
    """Whatever is scored, rows without a scored token included."""
    scores = random_scores(seed, pairs, groups=2)
    for use_weighting in {False, loss not in ("aot", "aot_unpaired")}:
        metrics = metrics_of(scores, settings(loss, use_weighting=use_weighting), aggregate=aggregate, batch_size=2)
        assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics


def test_unusable_arguments():
    scores = random_scores(0, 3)
    with pytest.raises(ValueError, match="no pairs"):
        metrics_of(slice_pairs(scores, 0, 0), settings())
    with pytest.raises(ValueError, match="aggregate 'mean'"):
        metrics_of(scores, settings(), aggregate="mean")
    with pytest.raises(ValueError, match="batch_size 0"):
        metrics_of(scores, settings(), aggregate="trl", batch_size=0)
    with pytest.raises(ValueError, match="no reference scores"):
        metrics_of(replace(scores, reference_chosen=None, reference_rejected=None), settings())


@pytest.mark.parametrize("kind", ["forward_kl", "js_divergence", "alpha_divergence"])
@pytest.mark.parametrize("loss", sorted(F_DIVERGENCE_LOSSES))
def test_no_divergence_overflows(loss, kind):
    """Log-ratios of 900 nats and more, where exp leaves float64 and TRL's float32 is long infinite."""
    far, near = completion([[-1000.0], [-1.0], [-1000.0]]), completion([[-1.0], [-900.0], [-2000.0]])
    metrics = metrics_of(pair_scores(far, near, near, far), settings(loss, f_divergence_type=kind))
    assert all(np.isfinite(metrics[key]) for key in TRL_KEYS)


def test_an_overflowing_beta_is_refused():
    with pytest.raises(UsageError, match="--beta 1e\\+308 and --loss-type sigmoid"):
        metrics_of(random_scores(0, 30), LossSettings(beta=1e308))
