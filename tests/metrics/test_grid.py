"""Many settings at once against each by itself."""

import pytest

from dpo_fast.errors import UsageError
from dpo_fast.metrics.grid import grid_intervals, grid_values
from dpo_fast.metrics.losses import BATCH_LOSSES, total_losses
from dpo_fast.metrics.rewards import reduce_pairs
from dpo_fast.metrics.statistics import BLOCK
from dpo_fast.metrics.sums import sum_tokens
from dpo_fast.types import LOSS_TYPES, LossSettings

from .build import random_scores

SETTINGS = [
    LossSettings(beta=beta, loss_type=(name,), label_smoothing=0.1) for beta in (0.5, 0.1, 2.0) for name in LOSS_TYPES
]


@pytest.fixture(scope="module")
def branches():
    """More pairs than a block of the bootstrap holds."""
    return reduce_pairs(sum_tokens(random_scores(0, BLOCK + 100)), LossSettings())


@pytest.mark.parametrize("batch_size", [None, 1000])
def test_values_are_those_of_each_setting_alone(branches, batch_size):
    together = grid_values(*branches, SETTINGS, batch_size)
    assert list(together.by_beta) == [0.5, 0.1, 2.0]
    for setting, loss in zip(SETTINGS, together.losses, strict=True):
        alone = grid_values(*branches, [setting], batch_size)
        assert [loss] == alone.losses
        assert together.by_beta[setting.beta] == alone.by_beta[setting.beta]
        assert together.of_all == alone.of_all


def test_intervals_are_those_of_each_setting_alone(branches):
    """The draws are the same; a matrix product of more columns may only add in another order."""
    together = grid_intervals(*branches, SETTINGS, seed=5)
    for setting, interval in list(zip(SETTINGS, together.losses, strict=True))[::4]:
        alone = grid_intervals(*branches, [setting], seed=5)
        if BATCH_LOSSES.intersection(setting.loss_type):
            assert interval is None
            assert alone.losses == [None]
        else:
            assert interval == pytest.approx(alone.losses[0], rel=1e-12)
        for key, ends in alone.by_beta[setting.beta].items():
            assert together.by_beta[setting.beta][key] == pytest.approx(ends, rel=1e-12)


def test_losses_of_blocks_are_those_of_all_pairs(branches):
    """What the intervals are made from is cut out block by block, and must agree with the values to the last bit."""
    positions = (3, BLOCK + 8)
    for setting in SETTINGS:
        if BATCH_LOSSES.intersection(setting.loss_type):
            continue
        whole = total_losses(*branches, setting)
        for position in positions:
            one = slice(position, position + 1)
            assert total_losses(*(branch.select(one) for branch in branches), setting) == whole[one]


def test_an_overflow_names_the_metric_and_the_setting(branches):
    settings = [LossSettings(), LossSettings(beta=1e308, loss_type=("hinge",))]
    with pytest.raises(UsageError, match=r"eval_loss is inf with --beta 1e\+308 and --loss-type hinge"):
        grid_values(*branches, settings)
