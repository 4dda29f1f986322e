"""Each loss against a value worked out by hand."""

from dataclasses import fields, replace
from math import log, sqrt

import numpy as np
import pytest

from dpo_fast.metrics.losses import LOSSES, total_losses
from dpo_fast.metrics.rewards import Branch
from dpo_fast.types import LOSS_TYPES, LossSettings

# The expected values are closed forms in float64, so only a few roundings of float64 lie between.
EXACT = pytest.approx


def branch(
    policy: list[float], reference: list[float], lengths: list[int], log_prob_sums: list[float] | None = None
) -> Branch:
    policy_side, reference_side = np.array(policy), np.array(reference)
    zeros = np.zeros(len(policy))
    return Branch(
        log_probs=policy_side,
        policy=policy_side,
        reference=reference_side,
        log_ratios=policy_side - reference_side,
        divergence_scores=policy_side - reference_side,
        weights=np.ones(len(policy)),
        lengths=np.array(lengths),
        scored_lengths=np.array(lengths) - 1,
        log_prob_sums=policy_side if log_prob_sums is None else np.array(log_prob_sums),
        entropy=zeros,
        mean_logit=zeros,
        top1=zeros.astype(np.int64),
    )


# One pair: h_w = log 9 over 2 tokens, h_l = -log 4 over 4 tokens. With beta = 1/2 the rewards are r_w = log 3 and
# r_l = -log 2, and z = r_w - r_l = log 6; so s(r_w) = 3/4, s(r_l) = 1/3, s(z) = 6/7.
CHOSEN = branch([-3.0], [-3.0 - log(9)], [2])
REJECTED = branch([-5.0], [-5.0 + log(4)], [4])

# Two pairs whose margins sort differently under policy and reference.
SORTED_CHOSEN = branch([log(36), log(4)], [0.0, log(9)], [2, 2])
SORTED_REJECTED = branch([0.0, 0.0], [0.0, 0.0], [2, 2])


def settings(loss: str, **changes: object) -> LossSettings:
    if loss == "exo_pair":
        changes = {"label_smoothing": 0.1, **changes}
    return LossSettings(beta=0.5, loss_type=(loss,), **changes)


def value(loss: str, chosen: Branch = CHOSEN, rejected: Branch = REJECTED, **changes: object) -> float:
    losses = LOSSES[loss](chosen, rejected, settings(loss, **changes))
    assert losses.shape == chosen.policy.shape
    assert losses.dtype == np.float64
    return float(losses.mean())


def test_every_loss_has_a_function_and_no_more():
    assert tuple(LOSSES) == LOSS_TYPES


def test_sigmoid():
    """-log s(log 6) = -log(6/7)."""
    assert value("sigmoid") == EXACT(log(7 / 6), rel=1e-13)


def test_hinge():
    """1 - log 6 < 0, so 0; with the completions swapped, 1 + log 6."""
    assert value("hinge") == 0.0
    assert value("hinge", REJECTED, CHOSEN) == EXACT(1 + log(6), rel=1e-13)


def test_ipo():
    """log 9 / 2 + log 4 / 4 = log 3 + log 2 / 2 = log(3 sqrt 2); the target is 1 / (2 beta) = 1."""
    assert value("ipo") == EXACT((log(3 * sqrt(2)) - 1) ** 2, rel=1e-13)


def test_exo_pair():
    """q = 6/7 against (0.9, 0.1): 6/7 log((6/7) / 0.9) + 1/7 log((1/7) / 0.1)."""
    assert value("exo_pair") == EXACT(6 / 7 * log(60 / 63) + 1 / 7 * log(10 / 7), rel=1e-12)


def test_nca_pair():
    """-log s(log 3) = log 4/3; -log s(-log 3) = log 4; -log s(log 2) = log 3/2: log 4/3 + log 6 / 2."""
    assert value("nca_pair") == EXACT(log(4 / 3) + log(6) / 2, rel=1e-13)


def test_robust():
    """Without smoothing it is sigmoid; with 0.1, (0.9 log 7/6 - 0.1 log 7) / 0.8, for -log s(-log 6) = log 7."""
    assert value("robust") == EXACT(log(7 / 6), rel=1e-13)
    assert value("robust", label_smoothing=0.1) == EXACT((0.9 * log(7 / 6) - 0.1 * log(7)) / 0.8, rel=1e-12)


def test_bco_pair():
    """-log s(log 3) - log s(log 2) = log 4/3 + log 3/2 = log 2."""
    assert value("bco_pair") == EXACT(log(2), rel=1e-13)


def test_sppo_hard():
    """The target is 1 / (2 beta) = 1: (log 9 - 1)^2 + (-log 4 + 1)^2."""
    assert value("sppo_hard") == EXACT((log(9) - 1) ** 2 + (1 - log(4)) ** 2, rel=1e-13)


def test_aot():
    """Sorted, the policy's margins are log 4, log 36 and the reference's log 1, log 9: the gaps are log 4 twice.

    beta halves them to log 2, and -log s(log 2) = log 3/2, -log s(-log 2) = log 3. Pair by pair the gaps would be
    log 36 and log 4/9, so the test sees whether the sorting happens.
    """
    assert value("aot", SORTED_CHOSEN, SORTED_REJECTED) == EXACT(log(3 / 2), rel=1e-13)
    smoothed = value("aot", SORTED_CHOSEN, SORTED_REJECTED, label_smoothing=0.1)
    assert smoothed == EXACT(0.9 * log(3 / 2) + 0.1 * log(3), rel=1e-13)


def test_aot_unpaired():
    """h_w = log 36, log 4 and h_l = log 1, log 9; sorted, the gaps are log 4 twice, as in aot."""
    chosen, rejected = branch([log(36), log(4)], [0.0, 0.0], [2, 2]), branch([0.0, log(9)], [0.0, 0.0], [2, 2])
    assert value("aot_unpaired", chosen, rejected) == EXACT(log(3 / 2), rel=1e-13)
    smoothed = value("aot_unpaired", chosen, rejected, label_smoothing=0.1)
    assert smoothed == EXACT(0.9 * log(3 / 2) + 0.1 * log(3), rel=1e-13)


def test_apo_zero():
    """1 - 3/4 + 1/3 = 7/12."""
    assert value("apo_zero") == EXACT(7 / 12, rel=1e-13)


def test_apo_down():
    """3/4 + 1 - 6/7 = 25/28."""
    assert value("apo_down") == EXACT(25 / 28, rel=1e-13)


def test_discopop():
    """With tau = 1/2, m = s(2 log 6) = 36/37: log 7/6 (1 - 36/37) + 1/6 * 36/37 = (log 7/6 + 6) / 37."""
    assert value("discopop", discopop_tau=0.5) == EXACT((log(7 / 6) + 6) / 37, rel=1e-12)


def test_sft():
    """Two completions of 2 and 4 scored tokens, log-probs -3 and -5: 8 nats over 6 tokens, not (3/2 + 5/4) / 2."""
    chosen = branch([-3.0, -5.0], [0.0, 0.0], [3, 5])
    assert value("sft", chosen, chosen) == EXACT(8 / 6, rel=1e-13)


def test_sft_of_no_tokens_is_zero():
    chosen = branch([0.0], [0.0], [1])
    assert value("sft", chosen, chosen) == 0.0


def test_sft_ignores_the_weight_of_verbose_tokens():
    """LD-DPO changes the sequence's log-prob (-3 here) and not the tokens' own (-4 over 1 scored token)."""
    chosen = branch([-3.0], [0.0], [2], log_prob_sums=[-4.0])
    assert value("sft", chosen, chosen) == EXACT(4.0, rel=1e-13)


def test_sigmoid_norm():
    """z = beta log(3 sqrt 2) = log 18^(1/4), so -log s(z) = log(1 + 18^(-1/4))."""
    assert value("sigmoid_norm") == EXACT(log(1 + 18**-0.25), rel=1e-13)


def test_several_losses_are_added_with_their_weights():
    """MPO: 0.8 sigmoid + 0.2 bco_pair + 1.0 sft = 0.8 log 7/6 + 0.2 log 2 + 3 nats over 1 scored token."""
    mpo = LossSettings(beta=0.5, loss_type=("sigmoid", "bco_pair", "sft"), loss_weights=(0.8, 0.2, 1.0))
    assert total_losses(CHOSEN, REJECTED, mpo)[0] == EXACT(0.8 * log(7 / 6) + 0.2 * log(2) + 3.0, rel=1e-13)
    unweighted = replace(mpo, loss_weights=None)
    assert total_losses(CHOSEN, REJECTED, unweighted)[0] == EXACT(log(7 / 6) + log(2) + 3.0, rel=1e-13)


def test_wpo_multiplies_a_pair_by_both_of_its_weights():
    """Weights 1/2 and 1/3: a sixth of log 7/6."""
    settings = LossSettings(beta=0.5, use_weighting=True)
    chosen, rejected = replace(CHOSEN, weights=np.array([1 / 2])), replace(REJECTED, weights=np.array([1 / 3]))
    assert total_losses(chosen, rejected, settings)[0] == EXACT(log(7 / 6) / 6, rel=1e-13)


def test_wpo_weighs_sft_by_pair():
    """3 nats a token for the batch, weights 1/2 and 1/4: 3 (1/2 + 1/4) / 2."""
    chosen = branch([-3.0, -3.0], [0.0, 0.0], [2, 2])
    weighted = replace(chosen, weights=np.array([1 / 2, 1 / 4]))
    settings = LossSettings(loss_type=("sft",), use_weighting=True)
    assert total_losses(weighted, chosen, settings).mean() == EXACT(3 * 3 / 8, rel=1e-13)


@pytest.mark.parametrize("loss", LOSS_TYPES)
@pytest.mark.parametrize("log_ratio", [-1e5, -800.0, 800.0, 1e5])
def test_no_loss_overflows(loss, log_ratio):
    """exp(800) is beyond float64; no loss may turn infinite or NaN there."""
    chosen = branch([log_ratio], [0.0], [2])
    with np.errstate(over="raise", invalid="raise"):
        assert np.isfinite(value(loss, chosen, REJECTED))


def test_branches_select_pairs_by_slice_and_by_indices():
    for field in fields(Branch):
        whole = getattr(SORTED_CHOSEN, field.name)
        assert np.array_equal(getattr(SORTED_CHOSEN.select(slice(1, 2)), field.name), whole[1:2])
        assert np.array_equal(getattr(SORTED_CHOSEN.select(np.array([1, 0])), field.name), whole[::-1])


@pytest.mark.parametrize("loss", LOSS_TYPES)
def test_batches_are_computed_apart(loss):
    """Two batches at once, (2, 2), give what each gives by itself: sorting and sft's mean stay within a batch."""
    generator = np.random.default_rng(0)
    chosen, rejected = (branch(*generator.normal(size=(2, 4)).tolist(), [2, 3, 4, 5]) for _ in range(2))
    mixed = LossSettings(beta=0.5, loss_type=(loss,), label_smoothing=0.1)
    at_once = total_losses(chosen.batches(2), rejected.batches(2), mixed)
    pieces = [slice(0, 2), slice(2, 4)]
    alone = [total_losses(chosen.select(piece), rejected.select(piece), mixed) for piece in pieces]
    assert np.array_equal(at_once, alone)
