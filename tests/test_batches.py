"""The layout of rows, against drawings made by hand, and what must hold of every batch."""

import numpy as np
import pytest
from fake_engines import make_pair
from hypothesis import given
from hypothesis import strategies as st

from dpo_fast.batches import CHOSEN, LAYOUTS, REJECTED, Batch, Layout, make_batches, scored_length
from dpo_fast.types import TokenizedPair

TOKENS = st.integers(1, 99)
# As `dpo_fast.tokens` gives them: a completion has a token that can be scored.
PAIRS = st.lists(
    st.one_of(
        st.builds(
            make_pair,
            st.lists(TOKENS, min_size=1, max_size=6),
            st.lists(TOKENS, min_size=1, max_size=6),
            st.lists(TOKENS, min_size=1, max_size=6),
        ),
        st.builds(
            make_pair, st.just([]), st.lists(TOKENS, min_size=2, max_size=6), st.lists(TOKENS, min_size=2, max_size=6)
        ),
    ),
    min_size=1,
    max_size=12,
)


def one_batch(pair: TokenizedPair, layout: Layout) -> Batch:
    [batch] = make_batches([pair], layout, token_budget=1000)
    return batch


def test_shared_layout_by_hand() -> None:
    """Prompt p = 11 12 13, chosen 21 22, rejected 31 32 33, in one row of eight columns::

        column      0  1  2  3  4  5  6  7
        token      11 12 13 21 22 31 32 33
        position    0  1  2  3  4  3  4  5     both completions go on from the prompt's end
        segment     0  0  0  1  1  2  2  2

    21 is predicted by 13 (column 2), 22 by 21 (3); 31 by 13 as well (2), 32 by 31 (5), 33 by 32 (6).
    """
    batch = one_batch(make_pair([11, 12, 13], [21, 22], [31, 32, 33]), "shared")

    assert batch.input_ids.tolist() == [[11, 12, 13, 21, 22, 31, 32, 33]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 4, 5]]
    assert batch.segment_ids.tolist() == [[0, 0, 0, 1, 1, 2, 2, 2]]
    assert batch.target_index.tolist() == [2, 3, 2, 5, 6]
    assert batch.target_ids.tolist() == [21, 22, 31, 32, 33]
    assert batch.completions.tolist() == [[0, CHOSEN, 2], [0, REJECTED, 3]]
    assert batch.padding == 0
    assert all(value.dtype == np.int64 for value in (*batch.inputs.values(), batch.completions))


def test_plain_layout_by_hand() -> None:
    """The same pair in two rows of six columns, the longer first; targets count row * 6 + column::

    column      0  1  2  3  4  5
    rejected   11 12 13 31 32 33     31, 32, 33 predicted by columns 2, 3, 4
    chosen     11 12 13 21 22  .     21, 22 predicted by columns 2, 3 of row 1: 6 + 2, 6 + 3
    """
    batch = one_batch(make_pair([11, 12, 13], [21, 22], [31, 32, 33]), "plain")

    assert batch.input_ids.tolist() == [[11, 12, 13, 31, 32, 33], [11, 12, 13, 21, 22, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 0]]
    assert batch.segment_ids.tolist() == [[0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, -1]]
    assert batch.target_index.tolist() == [2, 3, 4, 8, 9]
    assert batch.target_ids.tolist() == [31, 32, 33, 21, 22]
    assert batch.completions.tolist() == [[0, REJECTED, 3], [0, CHOSEN, 2]]
    assert batch.padding == 1


def test_without_a_prompt_the_first_token_is_not_scored() -> None:
    """Chosen 21 22, rejected 31 32 33 and nothing before them: 22 by 21 (column 0), 32 by 31 (2), 33 by 32 (3)."""
    pair = make_pair([], [21, 22], [31, 32, 33])
    batch = one_batch(pair, "shared")

    assert batch.input_ids.tolist() == [[21, 22, 31, 32, 33]]
    assert batch.position_ids.tolist() == [[0, 1, 0, 1, 2]]
    assert batch.segment_ids.tolist() == [[1, 1, 2, 2, 2]]
    assert batch.target_index.tolist() == [0, 2, 3]
    assert batch.target_ids.tolist() == [22, 32, 33]
    assert batch.completions.tolist() == [[0, CHOSEN, 1], [0, REJECTED, 2]]
    assert (scored_length(pair, CHOSEN), scored_length(pair, REJECTED)) == (1, 2)


def test_completions_of_one_token_are_both_predicted_by_the_prompt_s_last_state() -> None:
    batch = one_batch(make_pair([11, 12], [21], [31]), "shared")

    assert batch.position_ids.tolist() == [[0, 1, 2, 2]]
    assert batch.target_index.tolist() == [1, 1]
    assert batch.target_ids.tolist() == [21, 31]


def test_no_pairs_no_batches() -> None:
    assert list(make_batches([], "shared", 100)) == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_longest_rows_come_first_and_equal_ones_in_their_order(layout: Layout) -> None:
    pairs = [make_pair([1], [2] * length, [3] * length, row) for row, length in enumerate((2, 5, 2, 5, 3), start=1)]

    order = [pair for batch in make_batches(pairs, layout, 1) for pair, _, _ in batch.completions.tolist()]

    assert list(dict.fromkeys(order)) == [1, 3, 4, 0, 2]


@given(PAIRS, st.sampled_from(LAYOUTS), st.integers(1, 60))
def test_every_completion_token_is_scored_exactly_once(
    pairs: list[TokenizedPair], layout: Layout, token_budget: int
) -> None:
    found: dict[tuple[int, int], list[int]] = {}
    for batch in make_batches(pairs, layout, token_budget):
        ids = iter(batch.target_ids.tolist())
        for pair, branch, count in batch.completions.tolist():
            assert (pair, branch) not in found
            found[pair, branch] = [next(ids) for _ in range(count)]
        assert next(ids, None) is None

    for index, pair in enumerate(pairs):
        first = 0 if pair.prompt_ids else 1
        assert found.pop((index, CHOSEN)) == pair.chosen_ids[first:]
        assert found.pop((index, REJECTED)) == pair.rejected_ids[first:]
        assert scored_length(pair, CHOSEN) == len(pair.chosen_ids) - first
        assert scored_length(pair, REJECTED) == len(pair.rejected_ids) - first
    assert not found


@given(PAIRS, st.sampled_from(LAYOUTS), st.integers(1, 60))
def test_batches_keep_to_the_budget_and_never_target_padding(
    pairs: list[TokenizedPair], layout: Layout, token_budget: int
) -> None:
    for batch in make_batches(pairs, layout, token_budget):
        rows, width = batch.input_ids.shape
        assert rows == 1 or rows * width <= token_budget
        segments = batch.segment_ids.ravel()
        assert (segments[batch.target_index] >= 0).all()
        # A target is predicted by the token before it in its own segment, or by the prompt's last.
        positions = batch.position_ids.ravel()
        for index, target in zip(batch.target_index.tolist(), batch.target_ids.tolist(), strict=True):
            row = index // width
            same_row = slice(row * width, (row + 1) * width)
            follows = (batch.input_ids.ravel()[same_row] == target) & (positions[same_row] == positions[index] + 1)
            allowed = (segments[same_row] == segments[index]) | (segments[index] == 0)
            assert (follows & allowed & (segments[same_row] >= 1)).any()
        # No column is padding for all rows, and padding stands on the right.
        assert (batch.segment_ids >= 0).any(axis=0).all()
        assert (np.diff((batch.segment_ids < 0).astype(int), axis=1) >= 0).all()
        assert batch.padding == int((segments < 0).sum())
