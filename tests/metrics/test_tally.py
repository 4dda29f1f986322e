"""Metrics of parts, in little memory, are the metrics of all pairs at once."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_fast.metrics import tally
from dpo_fast.metrics.losses import BATCH_LOSSES
from dpo_fast.metrics.summary import compute_metrics, length_statistics
from dpo_fast.metrics.sums import concatenate, sum_tokens
from dpo_fast.metrics.tally import metrics_of_parts
from dpo_fast.types import LOSS_TYPES, LossSettings

from .build import random_scores

# Sums that are made part by part: another order of additions in float64.
BY_PART = ("eval_logits/chosen", "eval_logits/rejected", "eval_entropy")


def random_sums(pairs, seed):
    return sum_tokens(random_scores(seed, pairs))


def settings_of(name):
    return LossSettings(loss_type=(name,), label_smoothing=0.1)


SETTINGS = {name: settings_of(name) for name in LOSS_TYPES} | {
    "sum": LossSettings(loss_type=("sigmoid", "hinge"), loss_weights=(0.5, 2.0), beta=0.7),
    "LD": LossSettings(ld_alpha=0.3),
    "weighted": LossSettings(use_weighting=True),
    "forward KL": LossSettings(f_divergence_type="forward_kl"),
    "reference-free": LossSettings(reference_free="norm"),
}


def assert_same(found, expected):
    assert list(found) == list(expected)
    for name, value in expected.items():
        if name in BY_PART:
            assert found[name] == pytest.approx(value, rel=1e-13)
        else:
            assert found[name] == value, name


@pytest.mark.parametrize("name", SETTINGS)
def test_parts_are_as_good_as_all_pairs(name):
    parts = [random_sums(pairs, seed=pairs) for pairs in (5, 1, 30, 17)]
    expected = compute_metrics(concatenate(parts), SETTINGS[name], seed=3)
    assert_same(metrics_of_parts(iter(parts), SETTINGS[name], seed=3), expected)


@pytest.mark.parametrize("aggregate", ["exact", "trl"])
@pytest.mark.parametrize("grouped", [False, True])
def test_groups_and_batch_means(aggregate, grouped):
    parts = [random_sums(pairs, seed=pairs) for pairs in (5, 12)]
    if grouped:
        parts = [replace(part, groups=[f"g{n % 3}" for n in range(len(part.rows))]) for part in parts]
    expected = compute_metrics(concatenate(parts), LossSettings(), aggregate=aggregate, batch_size=4)
    assert_same(metrics_of_parts(parts, LossSettings(), aggregate=aggregate, batch_size=4), expected)


def test_parts_without_pairs_add_nothing():
    parts = [random_sums(pairs, seed=1) for pairs in (0, 7, 0, 3)]
    expected = compute_metrics(concatenate(parts), LossSettings())
    assert_same(metrics_of_parts(parts, LossSettings()), expected)
    with pytest.raises(ValueError, match="no p"):
        metrics_of_parts([], LossSettings())


def test_sums_are_kept_only_where_they_must_be(monkeypatch):
    """The pairs of a loss that can be traced are never put together."""
    monkeypatch.setattr(tally, "concatenate", lambda parts: pytest.fail("all sums at once"))
    for name in sorted(set(LOSS_TYPES) - BATCH_LOSSES):
        metrics_of_parts(iter([random_sums(9, seed=2), random_sums(4, seed=3)]), settings_of(name))


@given(st.lists(st.integers(0, 40), min_size=1, max_size=60))
def test_lengths_from_counts(lengths):
    found = length_statistics(np.bincount(lengths))
    assert found["mean"] == pytest.approx(np.mean(lengths), rel=1e-15)
    assert (found["median"], found["max"]) == (np.median(lengths), max(lengths))
