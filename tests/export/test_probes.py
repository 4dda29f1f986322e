"""Probes fit the model, go past its window, and have a prompt and a completion in common."""

import pytest

from dpo_fast.batches import REJECTED, arrange
from dpo_fast.export.probes import PROBES, make_probes
from dpo_fast.token_table import make_table
from dpo_fast.types import TokenizedPair

LAST = 1  # pair that has the first one's prompt


def longest(pairs: list[TokenizedPair]) -> int:
    return max((len(p.prompt_ids) + max(len(p.chosen_ids), len(p.rejected_ids)) for p in pairs), default=0)


def test_probes_fit_the_model_and_pass_its_window() -> None:
    for window in (8, 40, 100):
        pairs = make_probes(500, window=window, positions=130)
        assert window < longest(pairs) <= 130
    assert max(max(p.prompt_ids + p.chosen_ids + p.rejected_ids) for p in make_probes(500)) < 500


@pytest.mark.parametrize("positions", [1, 2, 3, 6, 7, 11, 12, 33, 42, 93, 94])
def test_no_probe_is_longer_than_the_model_has_positions(positions: int) -> None:
    pairs = make_probes(500, positions=positions)

    assert longest(pairs) <= positions
    assert bool(pairs) == (positions >= 2)  # the shortest has two tokens


def test_a_window_too_long_to_pass_is_left_to_others() -> None:
    assert len(make_probes(500, window=4096)) == len(PROBES) + LAST
    assert len(make_probes(500, window=100)) == len(PROBES) + 1 + LAST


@pytest.mark.parametrize("positions", [None, 130, 40, 8])
def test_the_last_shares_the_first_one_s_prompt_and_rejected_completion(positions: int | None) -> None:
    """So three completions share a row, and a graph that tells only two apart is found out."""
    pairs = make_probes(500, positions=positions)
    table = make_table(pairs)
    first, last = pairs[0], pairs[-1]

    assert first.prompt_ids == last.prompt_ids
    assert first.rejected_ids == last.rejected_ids
    assert last.chosen_ids not in (first.chosen_ids, first.rejected_ids)
    assert len({pair.row for pair in pairs}) == len(pairs)
    arrangement = arrange(table, "shared", table.tokens.size)
    assert arrangement.pieces[:, 2].max() == 3  # segments: the prompt's is 0
    assert arrangement.copies.tolist() == [[len(pairs) - 1, REJECTED, 0, REJECTED]]
