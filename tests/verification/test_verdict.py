"""The verdict's rules: sound engines pass, faults fail though no preference flipped, too few pairs cannot tell."""

import json
from dataclasses import replace

import numpy as np
import pytest

from dpo_fast.verification.verdict import (
    LEAST,
    MOST,
    Check,
    Tolerance,
    default_tolerance,
    judge,
    verify_scores,
)

from .build import BFLOAT16_NOISE, FLOAT32_NOISE, draw_scorings, outcomes

FLOAT32, BFLOAT16, INT8 = map(default_tolerance, ("fp32", "bf16", "int8"))
CHECKS = (
    "integrity", "token error", "margin error", "worst completion", "margin bias", "reward bias", "growth",
    "clear flips", "accuracy change",
)  # fmt: skip


def bfloat16(seed=0, pairs=1000, noise=BFLOAT16_NOISE, **settings):
    """An engine of the checkpoint's precision, whose margins are well above its noise."""
    return draw_scorings(seed, pairs, engine_noise=noise, rounded_noise=BFLOAT16_NOISE, **settings)


@pytest.mark.parametrize("seed", range(20))
def test_a_sound_float32_engine_passes(seed):
    found = verify_scores(draw_scorings(seed), FLOAT32)
    assert found.verdict == "pass"
    assert tuple(outcomes(found)) == CHECKS
    assert len(found.reasons) == len(CHECKS)
    assert found.pairs_needed is None


def test_sound_bfloat16_engines_never_fail():
    """They pass where their near-ties are few enough to tell, which is mostly."""
    found = [verify_scores(bfloat16(seed, longest=12), BFLOAT16) for seed in range(20)]
    verdicts = [each.verdict for each in found]
    assert set(verdicts) <= {"pass", "cannot tell"}
    assert verdicts.count("pass") >= 10
    unsettled = {name for each in found for name, outcome in outcomes(each).items() if outcome == "cannot tell"}
    assert unsettled <= {"accuracy change"}


def shift(name, pair, within, random):
    """Each token of the policy's chosen completions is less likely."""
    return np.full(len(pair), -0.03 if name == "policy_chosen" else 0.0)


def grow(name, pair, within, random):
    """Errors of 20 times bfloat16's at the end of the longest completions, none at the beginning."""
    return random.laplace(0, BFLOAT16_NOISE * within, len(pair))


def rare(size):
    """One token of one completion in a hundred is off."""
    return lambda name, pair, within, random: np.where(
        (pair % 100 == 7) & (within == 0) & (name == "policy_rejected"), -size, 0.0
    )


def all_tokens(size):
    return lambda name, pair, within, random: random.normal(0, size, len(pair))


@pytest.mark.parametrize(
    ("fault", "precision", "check"),
    [
        (all_tokens(1e-4), "fp32", "token error"),
        (all_tokens(5e-3), "fp32", "margin error"),
        (lambda name, pair, within, random: np.full(len(pair), 2e-5), "fp32", "token error"),
        (lambda name, pair, within, random: -1e-5 * (name == "policy_rejected") + 0 * pair, "fp32", "margin bias"),
        (rare(0.01), "fp32", "worst completion"),
        (lambda name, pair, within, random: 2e-6 * within * random.normal(size=len(pair)), "fp32", "growth"),
        (all_tokens(0.2), "bf16", "token error"),
        (shift, "bf16", "margin bias"),
        (shift, "bf16", "reward bias"),
        (rare(12.0), "bf16", "worst completion"),
        (grow, "bf16", "growth"),
    ],
)
def test_faults_fail_though_no_preference_flipped(fault, precision, check):
    """Margins are made so large that nothing flips."""
    scorings = draw_scorings(1, 400, fault=fault) if precision == "fp32" else bfloat16(1, 400, fault=fault)
    opinion = np.float32(-3)  # nats a token that the policy thinks less of all rejected completions

    def clear(scoring):
        tokens = scoring.policy_rejected
        return replace(scoring, policy_rejected=replace(tokens, log_probs=tokens.log_probs + opinion))

    names = ("original", "reshaped", "engine") + (("rounded",) if scorings.rounded else ())
    found = verify_scores(
        replace(scorings, **{name: clear(getattr(scorings, name)) for name in names}), default_tolerance(precision)
    )
    assert found.decisions.flips == ()
    assert found.verdict == "fail"
    assert outcomes(found)[check] == "fail"
    assert outcomes(found)["accuracy change"] == "pass"


def test_bias_below_the_noise_of_single_pairs_is_seen():
    """Margins are off by one and a half times their noise, all to one side; their size alone is allowed."""
    found = verify_scores(bfloat16(2, fault=lambda name, *_: -0.025 * (name == "policy_chosen")), BFLOAT16)
    assert outcomes(found)["margin error"] == outcomes(found)["token error"] == "pass"
    assert found.verdict == "fail"


def test_turned_preferences_fail():
    """One pair in twenty turned over, all of them clearly: the accuracy and the flips tell."""

    def turn(name, pair, within, random):
        return np.where(pair % 20 == 0, (-8.0 if name == "policy_chosen" else -1e-3) * np.ones(len(pair)), 0.0)

    found = verify_scores(bfloat16(3, fault=turn), replace(BFLOAT16, max_multiple=1e6, max_growth=1e6))
    assert {name for name, outcome in outcomes(found).items() if outcome == "fail"} >= {"clear flips"}
    assert found.decisions.clear_flips > 20
    assert "no near-ties" in " ".join(found.reasons)


def test_too_few_pairs_cannot_tell():
    found = verify_scores(draw_scorings(0, 50), FLOAT32)
    assert found.verdict == "cannot tell"
    assert found.pairs_needed == 381
    assert all("381 pairs like these would do" in reason for reason in found.reasons)
    assert outcomes(found)["token error"] == "pass"
    assert verify_scores(draw_scorings(0, 380), FLOAT32).verdict == "cannot tell"
    assert verify_scores(draw_scorings(0, 381), FLOAT32).verdict == "pass"


def test_a_larger_change_needs_fewer_pairs():
    tolerance = replace(FLOAT32, max_accuracy_change=0.05)  # z^2 / (P + z^2) <= 0.05 from 73 pairs on
    assert verify_scores(draw_scorings(0, 72), tolerance).pairs_needed == 73
    assert verify_scores(draw_scorings(0, 73), tolerance).verdict == "pass"


def test_one_pair_cannot_tell():
    found = verify_scores(draw_scorings(0, 1), FLOAT32)
    assert found.verdict == "cannot tell"
    assert "one pair gives no interval" in " ".join(found.reasons)


def test_as_many_pairs_as_it_says_would_do():
    """The same pairs over and over, until there are so many: then it is settled."""
    found = verify_scores(bfloat16(4, 200), BFLOAT16)
    (check,) = [each for each in found.checks if each.name == "accuracy change"]
    assert found.decisions.flips
    assert check.outcome == "cannot tell"
    settled = verify_scores(bfloat16(4, 3 * check.pairs_needed), BFLOAT16)
    assert settled.decisions.change_interval[1] - settled.decisions.change_interval[0] < 0.02


def test_a_fault_below_the_checkpoints_rounding_needs_the_float32_floor():
    """A hundredth of bfloat16's noise: a float32 engine must not have it, one of bfloat16 may."""
    scorings = draw_scorings(0, 400, engine_noise=BFLOAT16_NOISE / 100, rounded_noise=BFLOAT16_NOISE)
    assert verify_scores(scorings, FLOAT32).verdict == "fail"
    assert verify_scores(scorings, BFLOAT16).verdict == "pass"


def test_without_a_rounded_original_the_floor_is_float32s():
    found = verify_scores(draw_scorings(0, engine_noise=1e-3), INT8)
    assert found.floor.kind == "float32"
    assert found.verdict == "fail"


def test_quantised_engines():
    """Three times bfloat16's noise is what int8 may have, and bfloat16 not; thirty times is too much."""
    three, thirty = (bfloat16(5, 2000, noise=times * BFLOAT16_NOISE) for times in (4, 30))
    assert outcomes(verify_scores(three, INT8))["token error"] == "pass"
    assert outcomes(verify_scores(three, BFLOAT16))["token error"] == "fail"
    assert outcomes(verify_scores(thirty, INT8))["token error"] == "fail"
    assert outcomes(verify_scores(thirty, replace(INT8, max_multiple=50)))["token error"] == "pass"


def test_an_engine_that_is_the_original():
    scorings = draw_scorings(0)
    found = verify_scores(replace(scorings, engine=scorings.original), FLOAT32)
    assert found.verdict == "pass"
    assert found.drift.tokens.mean_absolute == 0.0
    assert found.drift.margins.correlation == pytest.approx(1.0)


def test_outputs_that_an_engine_does_not_give():
    """A served engine says log-probs alone."""
    scorings = draw_scorings(0)
    branches = {
        name: replace(tokens, is_top1=None, entropy=None, log_sum_sq_prob=None)
        for name, tokens in scorings.engine.completions().items()
    }
    found = verify_scores(replace(scorings, engine=replace(scorings.engine, **branches)), FLOAT32)
    assert found.verdict == "pass"
    assert found.drift.tokens.top1_agreement is None


def without_reference(scoring):
    return replace(scoring, reference_chosen=None, reference_rejected=None)


def served(scorings):
    """The same pairs where the engine is a server, which has a policy and no reference."""
    rounded = scorings.rounded and without_reference(scorings.rounded)
    reshaped, engine = map(without_reference, (scorings.reshaped, scorings.engine))
    return replace(scorings, reshaped=reshaped, rounded=rounded, engine=engine, policy_alone=True)


def test_a_server_is_judged_as_strictly_as_an_engine():
    """Three and a half times the noise is too much, whether or not there is a reference that cannot be off."""
    scorings = bfloat16(0, 2000, noise=3.5 * BFLOAT16_NOISE)
    engine, server = (verify_scores(each, BFLOAT16) for each in (scorings, served(scorings)))
    of_engine, of_server = ({check.name: check.value for check in found.checks} for found in (engine, server))
    for name in ("token error", "margin error"):
        assert outcomes(server)[name] == outcomes(engine)[name] == "fail"
        # 2,000 pairs: half the tokens, or half of the margins' errors, are another sample of the same noise.
        assert of_server[name] == pytest.approx(of_engine[name], rel=0.05)
    assert server.drift.tokens.tokens == len(scorings.engine.policy_chosen.log_probs) + len(
        scorings.engine.policy_rejected.log_probs
    )
    assert server.drift.tokens.median_absolute == pytest.approx(engine.drift.tokens.median_absolute, rel=0.05)
    assert server.drift.reference_log_probs is None
    assert server.decisions.original_accuracy == engine.decisions.original_accuracy


@pytest.mark.parametrize("noise", [0.0, 1e-5])
def test_a_servers_noise_is_the_policys_own(noise):
    """At what float32 resolves as well: floors of the policy's tokens alone."""
    scorings = draw_scorings(0, 2000, engine_noise=noise)
    engine, server = (verify_scores(each, FLOAT32) for each in (scorings, served(scorings)))
    assert server.floor.token == pytest.approx(engine.floor.token, rel=0.05)
    assert server.floor.margin == pytest.approx(engine.floor.margin / np.sqrt(2), rel=0.05)
    assert outcomes(server) == outcomes(engine)


def test_a_server_that_leaves_a_branch_out():
    scorings = served(draw_scorings(0, 50))
    assert verify_scores(replace(scorings, policy_alone=False), FLOAT32).verdict == "fail"
    with_reference = replace(scorings, engine=scorings.original)
    assert "engine: scored policy_chosen" in verify_scores(with_reference, FLOAT32).reasons[0]


@pytest.mark.parametrize("reference_free", ["sum", "average", "norm"])
def test_without_a_reference(reference_free):
    scorings = draw_scorings(0, reference_free=reference_free)
    names = ("original", "reshaped", "engine")
    dropped = replace(scorings, **{name: without_reference(getattr(scorings, name)) for name in names})
    assert verify_scores(dropped, FLOAT32).verdict == "pass"


def test_the_same_seed_gives_the_same_json():
    scorings = bfloat16(6, 300)
    first, second = (json.dumps(verify_scores(scorings, BFLOAT16).as_dict(), allow_nan=False) for _ in range(2))
    assert first == second
    assert verify_scores(scorings, BFLOAT16, seed=1).verdict == json.loads(first)["verdict"]


def check(outcome, needed=None, interval=(0.0, 1.0)):
    return Check(f"{outcome} {needed}", 0.5, interval, 1.0, outcome, f"{outcome} {needed}", needed)


@pytest.mark.parametrize(
    ("checks", "verdict", "reasons", "needed"),
    [
        ([check("pass"), check("pass")], "pass", 2, None),
        ([check("pass"), check("cannot tell", 10), check("cannot tell", 20)], "cannot tell", 2, 20),
        ([check("cannot tell", 10), check("cannot tell")], "cannot tell", 2, None),
        ([check("cannot tell", 10), check("cannot tell", None, None)], "cannot tell", 2, 10),
        ([check("cannot tell", 10), check("fail"), check("pass")], "fail", 1, None),
    ],
)
def test_the_worst_check_decides(checks, verdict, reasons, needed):
    found = judge(tuple(checks))
    assert (found[0], len(found[1]), found[2]) == (verdict, reasons, needed)


@pytest.mark.parametrize(
    "limits",
    [
        {"floor": "bfloat16"}, {"max_multiple": 0.0}, {"max_multiple": np.nan}, {"max_accuracy_change": 1.0},
        {"max_accuracy_change": -0.01}, {"near_tie": np.inf}, {"max_growth": 0}, {"max_multiple": 1e308},
        {"max_accuracy_change": 1e-200},
    ],
)  # fmt: skip
def test_limits_that_are_none(limits):
    with pytest.raises(ValueError, match=next(iter(limits))):
        Tolerance(**({"floor": "float32", "max_multiple": 10.0} | limits))


@pytest.mark.parametrize("size", [LEAST, MOST])
def test_limits_and_betas_of_any_size_that_is_taken_give_finite_numbers(size):
    limits = dict.fromkeys(("max_multiple", "near_tie", "max_growth"), size)
    tolerance = replace(BFLOAT16, **limits, max_accuracy_change=min(size, 0.5))
    json.dumps(verify_scores(bfloat16(0, 50, beta=size), tolerance).as_dict(), allow_nan=False)


def test_defaults():
    assert (FLOAT32.floor, FLOAT32.max_multiple) == ("float32", 10.0)
    assert (BFLOAT16.floor, BFLOAT16.max_multiple) == ("checkpoint", 3.0)
    assert (INT8.floor, INT8.max_multiple) == ("checkpoint", 10.0)
    assert FLOAT32_NOISE < 1e-5
