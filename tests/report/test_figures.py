"""The figures' numbers: by hand, against plain loops, and what must hold whatever the scores are."""

import math
from base64 import b64decode
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_engines import ROWS, FakeEngines, make_fake_bundle, write_rows
from hypothesis import given
from hypothesis import strategies as st

from dpo_fast.evaluate import EvaluateOptions, evaluate
from dpo_fast.report.charts import margins_chart
from dpo_fast.report.figures import (
    CALIBRATION_BINS,
    Accuracy,
    accuracy_by_subset,
    calibration,
    counts_between,
    histogram,
    histogram_edges,
    largest,
    length_bias,
    sample,
)
from dpo_fast.report.pairs import read_pairs
from dpo_fast.report.sweeps import BETAS, sweep
from dpo_fast.types import LOSS_TYPES, LossSettings

finite = st.floats(-1e6, 1e6, allow_subnormal=False)


def margins_of(count: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.random.default_rng(seed).normal(0.5, 2, count)


# Histograms.


def test_ties_are_not_drawn_as_right() -> None:
    """Of five pairs, two with a margin of 0 lie in the first bin above it, and count as wrong."""
    pytest.importorskip("plotly")
    bars = {bar["name"]: bar["y"] for bar in margins_chart(np.array([-1.0, 0.0, 0.0, 0.5, 2.0]))["data"]}
    counts = {name: int(np.frombuffer(b64decode(y["bdata"]), y["dtype"]).sum()) for name, y in bars.items()}

    assert counts == {"0: a tie, wrong": 2, "below 0: wrong": 1, "above 0: right": 2}
    assert [bar["name"] for bar in margins_chart(np.array([-1.0, 2.0]))["data"]] == ["below 0: wrong", "above 0: right"]


@given(st.lists(finite, min_size=1, max_size=60))
def test_a_histogram_counts_every_value(values: list[float]) -> None:
    counted = histogram(np.array(values))

    assert counted.counts.sum() == len(values)
    width = float(np.diff(counted.edges).min())
    assert width > 0
    assert counted.edges[0] - 1e-6 * width <= min(values)  # but for rounding, of which counting takes no notice
    assert max(values) <= counted.edges[-1] + 1e-6 * width
    assert len(counted.counts) <= 202  # 200 over the range, and one more where it does not begin at an edge


@pytest.mark.parametrize("value", [0.0, -0.7375, 1e6])
def test_pairs_that_are_all_alike_make_a_bar_that_can_be_seen(value: float) -> None:
    """One pair; or a policy that is its reference, whose margins are all 0."""
    edges = histogram_edges(np.full(3, value))

    assert len(edges) <= 3
    assert edges[-1] - edges[0] >= 0.05 * max(abs(value), 1)


def test_zero_is_an_edge_so_that_no_bin_is_right_and_wrong() -> None:
    edges = histogram_edges(margins_of(1000))

    assert 0 in edges
    assert 30 <= len(edges) <= 100


def test_outliers_do_not_squeeze_the_rest_into_one_bin() -> None:
    counted = histogram(np.append(margins_of(1000), 60.0))

    assert np.count_nonzero(counted.counts) > 20


def test_two_histograms_share_their_edges() -> None:
    chosen, rejected = margins_of(500), margins_of(500, seed=1)
    edges = histogram_edges(np.concatenate([chosen, rejected]))

    assert counts_between(edges, chosen).sum() == counts_between(edges, rejected).sum() == 500


# Accuracy.


def test_accuracy_by_subset_is_that_of_the_metrics(tmp_path: Path) -> None:
    bundle = make_fake_bundle(tmp_path / "bundle")
    run = tmp_path / "run"
    metrics = evaluate(
        bundle,
        write_rows(tmp_path / "pairs.jsonl", ROWS),
        run,
        EvaluateOptions(group_by="kind"),
        engine=FakeEngines(),
    )
    pairs = read_pairs(run)
    assert pairs.sums.groups is not None

    for each in accuracy_by_subset(pairs.margins, pairs.sums.groups):
        group = metrics["groups"][each.name]
        assert each.pairs == group["pairs"]
        assert each.share == group["eval_rewards/accuracies"]
        assert list(each.interval) == list(group["intervals"]["eval_rewards/accuracies"])
        assert each.margin == pytest.approx(group["eval_rewards/margins"], rel=1e-12)  # another order of summing
    assert float(pairs.margins.mean()) == pytest.approx(metrics["eval_rewards/margins"], rel=1e-12)


def test_accuracy_by_length_difference_is_that_of_a_plain_loop() -> None:
    generator = np.random.default_rng(3)
    chosen, rejected = generator.integers(1, 60, 500), generator.integers(1, 60, 500)
    margins = margins_of(500)
    margins[:5] = 0  # ties are wrong
    found = length_bias(margins, chosen, rejected)

    seen = 0
    for each in found.bins:
        low, high = map(int, each.name.replace("+", "").split(" to "))
        pairs = correct = 0
        for margin, more, less in zip(margins.tolist(), chosen.tolist(), rejected.tolist(), strict=True):
            if low <= more - less <= high:
                pairs += 1
                correct += margin > 0
        assert (each.pairs, each.correct) == (pairs, correct)
        seen += pairs
    assert seen == 500
    assert max(each.pairs for each in found.bins) < 2 * min(each.pairs for each in found.bins)

    of_side = {"chosen shorter": [0, 0], "equal length": [0, 0], "chosen longer": [0, 0]}
    longer_preferred = unequal = 0
    for margin, more, less in zip(margins.tolist(), chosen.tolist(), rejected.tolist(), strict=True):
        side = of_side["equal length" if more == less else "chosen longer" if more > less else "chosen shorter"]
        side[0] += 1
        side[1] += margin > 0
        unequal += more != less
        longer_preferred += (margin > 0 and more > less) or (margin < 0 and more < less)
    assert {each.name: [each.pairs, each.correct] for each in found.sides} == of_side
    assert found.longer_preferred == longer_preferred / unequal
    assert found.longer_chosen == of_side["chosen longer"][0] / unequal


def test_a_model_that_likes_length_is_found_out() -> None:
    """Margins that are the length difference: right where chosen is longer, wrong where it is shorter."""
    chosen, rejected = np.array([5, 9, 2, 4]), np.array([3, 1, 8, 6])
    found = length_bias((chosen - rejected) / 10, chosen, rejected)

    assert found.correlation == pytest.approx(1)
    assert found.longer_preferred == 1
    assert [(each.name, each.share) for each in found.sides] == [("chosen shorter", 0), ("chosen longer", 1)]


def test_lengths_that_are_all_equal_have_no_bias() -> None:
    found = length_bias(margins_of(10), np.full(10, 7), np.full(10, 7))

    assert (found.correlation, found.longer_preferred, found.longer_chosen) == (None, None, None)
    assert [each.name for each in found.bins] == ["+0"]


def test_of_many_subsets_the_largest_are_shown_in_their_order() -> None:
    subsets = [Accuracy(name, pairs, 1, (0, 1), 0) for name, pairs in (("a", 3), ("b", 9), ("c", 5), ("d", 5))]

    assert [each.name for each in largest(subsets, 2)] == ["b", "c"]
    assert largest(subsets, 4) == subsets


# Calibration.


def test_calibration_by_hand() -> None:
    """Four margins, of which the confidences are c = sigmoid(|margin|): log 3 -> 0.75, log 1.5 -> 0.6.

    log 3, log 3, -log 3, log 1.5: right, right, wrong, right.
    Bin (0.70, 0.75]: three pairs, accuracy 2/3, mean confidence 3/4. Bin (0.55, 0.60]: one, accuracy 1, confidence 0.6.
    ECE = 3/4 |2/3 - 3/4| + 1/4 |1 - 0.6| = 1/16 + 1/10 = 0.1625.
    Brier = ((1 - 0.75)^2 + (1 - 0.75)^2 + (1 - 0.25)^2 + (1 - 0.6)^2) / 4 = (0.0625 + 0.0625 + 0.5625 + 0.16) / 4.
    """
    # A little within the bins, for at their edges, 0.75 and 0.6, rounding would choose.
    margins = np.array([math.log(3), math.log(3), -math.log(3), math.log(1.5)]) * (1 - 1e-12)
    found = calibration(margins)

    assert found.ece == pytest.approx(0.1625, abs=1e-10)
    assert found.brier == pytest.approx(0.8475 / 4, abs=1e-10)
    assert [(each.accuracy.pairs, each.accuracy.correct) for each in found.bins] == [(1, 1), (3, 2)]


def test_calibration_against_plain_python() -> None:
    margins = margins_of(2000)
    found = calibration(margins)

    bins: dict[int, list[tuple[float, bool]]] = {}
    brier = 0.0
    for margin in margins.tolist():
        probability = 1 / (1 + math.exp(-margin))
        brier += (1 - probability) ** 2 / len(margins)
        confidence = max(probability, 1 - probability)
        place = min(math.ceil((confidence - 0.5) * 2 * CALIBRATION_BINS), CALIBRATION_BINS)
        bins.setdefault(place, []).append((confidence, margin > 0))
    ece = sum(
        len(each)
        / len(margins)
        * abs(sum(right for _, right in each) / len(each) - sum(c for c, _ in each) / len(each))
        for each in bins.values()
    )
    # float64 in both; what is left is the order of summing.
    assert found.brier == pytest.approx(brier, rel=1e-12)
    assert found.ece == pytest.approx(ece, rel=1e-9)
    assert [each.accuracy.pairs for each in found.bins] == [len(bins[place]) for place in sorted(bins)]


def test_calibration_of_coins_of_certainties_and_of_one_who_knows() -> None:
    assert calibration(np.zeros(4)).brier == 0.25
    assert calibration(np.array([1e4, 1e4])).ece == 0
    assert calibration(np.array([-1e4])).brier == 1  # certain, and wrong; no overflow on the way
    probabilities = np.random.default_rng(0).uniform(0.5, 1, 200_000)
    right = np.random.default_rng(1).random(200_000) < probabilities
    margins = np.where(right, 1, -1) * np.log(probabilities / (1 - probabilities))
    assert calibration(margins).ece < 0.005  # bins of 20,000: a standard deviation of at most 0.0035 each


@given(st.lists(st.floats(-50, 50), min_size=1, max_size=40))
def test_scores_lie_within_0_and_1_and_bins_hold_every_pair(margins: list[float]) -> None:
    found = calibration(np.array(margins))

    assert 0 <= found.ece <= 1
    assert 0 <= found.brier <= 1
    assert sum(each.accuracy.pairs for each in found.bins) == len(margins)
    assert all(each.low <= each.confidence <= each.high + 1e-12 for each in found.bins)


# Scatter and sweeps.


def test_a_sample_is_seeded_and_without_repetition() -> None:
    shown = sample(10_000, most=100)

    assert len(set(shown.pairs.tolist())) == len(shown.pairs) == 100
    assert (np.diff(shown.pairs) > 0).all()
    assert (shown.pairs == sample(10_000, most=100).pairs).all()
    assert sample(50, most=100).pairs.tolist() == list(range(50))


def test_a_sweep_has_every_loss_at_every_beta_and_the_runs_own_number(tmp_path: Path) -> None:
    bundle, run = make_fake_bundle(tmp_path / "bundle"), tmp_path / "run"
    settings = LossSettings(beta=0.3, loss_type=("ipo",))
    metrics = evaluate(
        bundle, write_rows(tmp_path / "pairs.jsonl", ROWS), run, EvaluateOptions(loss=settings), engine=FakeEngines()
    )
    pairs = read_pairs(run)
    found = sweep(run, pairs)

    assert found.betas == sorted({*BETAS, 0.3})
    assert found.losses[0] == "ipo"
    assert set(found.losses) == set(LOSS_TYPES)
    assert found.values["ipo", 0.3][0] == metrics["eval_loss"]
    assert len(found.values) == len(LOSS_TYPES) * len(found.betas)
    own = found.calibrations[found.betas.index(0.3)]
    assert own == calibration(pairs.margins)
