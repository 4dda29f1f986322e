"""Scores that cannot be compared fail with reasons, each fault with its own."""

from dataclasses import replace

import numpy as np
import pytest

from dpo_fast.verification.integrity import check_integrity
from dpo_fast.verification.types import ScoredTokens
from dpo_fast.verification.verdict import default_tolerance, verify_scores

from .build import draw_scorings, make_scoring, make_scorings, make_tokens, replace_branch


def with_value(scorings, scoring, column, token, value):
    """One value of the policy's rejected completions replaced."""
    values = getattr(getattr(scorings, scoring).policy_rejected, column).copy()
    values[token] = value
    return replace(
        scorings, **{scoring: replace_branch(getattr(scorings, scoring), "policy_rejected", **{column: values})}
    )


@pytest.fixture(scope="module")
def sound():
    return draw_scorings(0, 40, rounded_noise=0.02)


def test_sound_scores_have_nothing_wrong(sound):
    assert check_integrity(sound) == []


@pytest.mark.parametrize("scoring", ["original", "reshaped", "rounded", "engine"])
@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("log_probs", np.nan), ("log_probs", -np.inf), ("log_probs", 0.5), ("is_top1", 2), ("is_top1", np.nan),
        ("entropy", -1), ("log_sum_sq_prob", 0.1), ("log_sum_sq_prob", np.nan),
    ],
)  # fmt: skip
def test_values_that_cannot_be(sound, scoring, column, value):
    token = int(sound.original.policy_rejected.offsets[7])  # the first one of the eighth pair
    (reason,) = check_integrity(with_value(sound, scoring, column, token, value))
    assert scoring.removesuffix("d") in reason or scoring == "rounded"
    assert column in reason
    assert reason.endswith("row 8")
    assert "policy_rejected" in reason


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (lambda rows: rows[:-1], "1 of 40 pairs have no scores, the first is row 40"),
        (lambda rows: np.append(rows, 5), "1 rows were scored repeatedly, the first is row 5"),
        (lambda rows: np.append(rows, 99), "1 rows were scored that were not asked for, the first is row 99"),
        (lambda rows: rows[::-1], "another order"),
    ],
)
def test_rows(sound, rows, said):
    engine = replace(sound.engine, rows=rows(sound.engine.rows))
    (reason,) = check_integrity(replace(sound, engine=engine))
    assert reason.startswith("engine: ")
    assert said in reason


def test_a_row_that_is_twice_among_the_pairs(sound):
    rows = sound.pairs.rows.copy()
    rows[3] = rows[2]
    assert "row 3 is 2 times among the pairs" in check_integrity(replace(sound, pairs=replace(sound.pairs, rows=rows)))


def test_counts_of_the_pairs(sound):
    reasons = check_integrity(replace(sound, pairs=replace(sound.pairs, subsets=["one"])))
    assert reasons == ["40 pairs and 1 subsets"]


def test_counts_of_tokens(sound):
    short = sound.engine.policy_chosen
    offsets = short.offsets.copy()
    offsets[1:] -= 1
    cut = replace_branch(sound.engine, "policy_chosen", offsets=offsets)
    (reason,) = check_integrity(replace(sound, engine=cut))
    assert reason.startswith("engine, policy_chosen: row 1 has ")
    (reason,) = check_integrity(
        replace(sound, engine=replace_branch(sound.engine, "policy_chosen", is_top1=short.is_top1[:-2]))
    )
    assert "values of is_top1 for" in reason
    (reason,) = check_integrity(
        replace(sound, engine=replace_branch(sound.engine, "policy_chosen", offsets=offsets[:-1]))
    )
    assert "40 offsets do not part the scores of 40 pairs" in reason


def test_a_model_that_is_missing(sound):
    engine = replace(sound.engine, reference_chosen=None, reference_rejected=None)
    (reason,) = check_integrity(replace(sound, engine=engine))
    assert "policy_chosen, policy_rejected, and the original policy_chosen, policy_rejected, reference_chosen" in reason


def test_stale_scores(sound):
    """Two completions of one length, of which the second gets the first one's scores."""
    random = np.random.default_rng(0)
    branches = [random.uniform(-5, -1, (3, 6)).tolist() for _ in range(2)]
    original = make_scoring([1, 2, 3], *branches)
    stale = [branches[0], [branches[1][0], branches[0][1], branches[1][2]]]
    engine = make_scoring([1, 2, 3], *stale)
    (reason,) = check_integrity(make_scorings(original, engine))
    assert "1 completions have the very scores of another one" in reason
    assert "policy_rejected of row 2, with those of policy_chosen of row 2" in reason


def test_completions_that_are_the_same_are_not_stale():
    """The same completion twice, which the original scored in two batches that differ by rounding."""
    same, nearly = [-1.0, -2.0, -3.0, -4.0, -5.0], [-1.000001, -2.0, -3.0, -4.0, -5.000001]
    original, engine = make_scoring([1], [same], [nearly]), make_scoring([1], [same], [same])
    assert check_integrity(make_scorings(original, engine)) == []


def test_nothing_to_verify():
    empty = make_scoring([], [], [])
    assert "nothing was verified" in check_integrity(make_scorings(empty, empty))[0]
    unscored = make_scoring([1], [[]], [[]])
    assert "nothing was verified" in check_integrity(make_scorings(unscored, unscored))[0]


def test_first_tokens_that_nothing_precedes():
    """Without a prompt, a completion of three tokens has two scores."""
    original = make_scoring([1], [[-1.0, -2.0]], [[-3.0]])
    scorings = make_scorings(original, original, prompt=0)
    pairs = replace(scorings.pairs, chosen_lengths=np.array([3]), rejected_lengths=np.array([2]))
    assert check_integrity(replace(scorings, pairs=pairs)) == []
    assert check_integrity(scorings) != []


def test_what_fails_is_not_compared(sound):
    verification = verify_scores(with_value(sound, "engine", "log_probs", 3, np.nan), default_tolerance("bf16"))
    assert verification.verdict == "fail"
    assert "nan" in verification.reasons[0]
    assert verification.drift is None
    assert [check.name for check in verification.checks] == ["integrity"]


def test_shapes_are_refused():
    with pytest.raises(ValueError, match=r"log_probs has shape \(2, 2\)"):
        ScoredTokens(np.array([0, 2]), np.zeros((2, 2), np.float32))
    assert make_tokens([[-1.0], []]).lengths.tolist() == [1, 0]
