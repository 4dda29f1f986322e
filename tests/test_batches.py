"""The layout of rows, against drawings made by hand, and what must hold of every batch."""

from itertools import pairwise

import numpy as np
import pytest
from fake_engines import make_pair, numbered, pairs_alike
from hypothesis import given
from hypothesis import strategies as st

from dpo_fast.batches import BRANCHES, CHOSEN, LAYOUTS, REJECTED, Arrangement, Batch, Layout, arrange, make_batches
from dpo_fast.token_table import make_table
from dpo_fast.types import TokenizedPair

TOKENS = st.integers(1, 99)
# As `dpo_fast.tokens` gives them: a completion has a token that can be scored. Random, or much alike.
PAIRS = st.one_of(
    st.lists(
        st.one_of(
            st.builds(
                make_pair,
                st.lists(TOKENS, min_size=1, max_size=6),
                st.lists(TOKENS, min_size=1, max_size=6),
                st.lists(TOKENS, min_size=1, max_size=6),
            ),
            st.builds(
                make_pair,
                st.just([]),
                st.lists(TOKENS, min_size=2, max_size=6),
                st.lists(TOKENS, min_size=2, max_size=6),
            ),
        ),
        min_size=1,
        max_size=12,
    ).map(numbered),
    pairs_alike(),
)
BUDGETS = st.integers(1, 60)


def arranged(pairs: list[TokenizedPair], layout: Layout, token_budget: int) -> Arrangement:
    return arrange(make_table(pairs), layout, token_budget)


def batches_of(pairs: list[TokenizedPair], layout: Layout, token_budget: int) -> list[Batch]:
    return list(make_batches(arranged(pairs, layout, token_budget), token_budget))


def one_batch(pairs: list[TokenizedPair], layout: Layout) -> Batch:
    [batch] = batches_of(pairs, layout, token_budget=1000)
    return batch


def completion(pair: TokenizedPair, branch: int) -> list[int]:
    return pair.rejected_ids if branch == REJECTED else pair.chosen_ids


def test_shared_layout_by_hand() -> None:
    """Prompt p = 11 12 13, chosen 21 22, rejected 31 32 33, in one row of eight columns::

        column      0  1  2  3  4  5  6  7
        token      11 12 13 21 22 31 32 33
        position    0  1  2  3  4  3  4  5     both completions go on from the prompt's end
        segment     0  0  0  1  1  2  2  2

    21 is predicted by 13 (column 2), 22 by 21 (3); 31 by 13 as well (2), 32 by 31 (5), 33 by 32 (6).
    """
    batch = one_batch([make_pair([11, 12, 13], [21, 22], [31, 32, 33])], "shared")

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
    batch = one_batch([make_pair([11, 12, 13], [21, 22], [31, 32, 33])], "plain")

    assert batch.input_ids.tolist() == [[11, 12, 13, 31, 32, 33], [11, 12, 13, 21, 22, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 0]]
    assert batch.segment_ids.tolist() == [[0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, -1]]
    assert batch.target_index.tolist() == [2, 3, 4, 8, 9]
    assert batch.target_ids.tolist() == [31, 32, 33, 21, 22]
    assert batch.completions.tolist() == [[0, REJECTED, 3], [0, CHOSEN, 2]]
    assert batch.padding == 1


def test_pairs_of_one_prompt_share_a_row() -> None:
    """Best 21 22 over worst 31, and best over middle 41 42 43, of the prompt 11 12; between them another prompt::

        column      0  1  2  3  4  5  6  7
        token      11 12 21 22 31 41 42 43     best stands there once
        position    0  1  2  3  2  2  3  4
        segment     0  0  1  1  2  3  3  3

    The prompt's last state (column 1) predicts 21, 31 and 41.
    """
    over_worst, over_middle = make_pair([11, 12], [21, 22], [31]), make_pair([11, 12], [21, 22], [41, 42, 43])
    pairs = [over_worst, make_pair([51], [61], [71]), over_middle]
    arrangement = arranged(pairs, "shared", 1000)
    [batch] = make_batches(arrangement, 1000)

    assert batch.input_ids.tolist() == [[11, 12, 21, 22, 31, 41, 42, 43], [51, 61, 71, 0, 0, 0, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 2, 2, 3, 4], [0, 1, 1, 0, 0, 0, 0, 0]]
    assert batch.segment_ids.tolist() == [[0, 0, 1, 1, 2, 3, 3, 3], [0, 1, 2, -1, -1, -1, -1, -1]]
    assert batch.target_index.tolist() == [1, 2, 1, 1, 5, 6, 8, 8]
    assert batch.target_ids.tolist() == [21, 22, 31, 41, 42, 43, 61, 71]
    first_row = [[0, CHOSEN, 2], [0, REJECTED, 1], [2, REJECTED, 3]]
    assert batch.completions.tolist() == [*first_row, [1, CHOSEN, 1], [1, REJECTED, 1]]
    assert arrangement.copies.tolist() == [[2, CHOSEN, 0, CHOSEN]]


def test_plain_rows_that_are_the_same_are_computed_once() -> None:
    pairs = [make_pair([11], [21], [31]), make_pair([11], [31], [21]), make_pair([11, 21], [31], [31])]
    arrangement = arranged(pairs, "plain", 1000)
    [batch] = make_batches(arrangement, 1000)

    assert batch.input_ids.tolist() == [[11, 21, 31], [11, 21, 0], [11, 31, 0]]
    assert batch.completions.tolist() == [[2, CHOSEN, 1], [0, CHOSEN, 1], [0, REJECTED, 1]]
    assert arrangement.copies.tolist() == [[1, CHOSEN, 0, REJECTED], [1, REJECTED, 0, CHOSEN], [2, REJECTED, 2, CHOSEN]]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_tokens_parted_elsewhere_are_another_completion(layout: Layout) -> None:
    """11 21 22 either way, but 21 is scored in one and a prompt's token in the other."""
    pairs = [make_pair([11], [21, 22], [31]), make_pair([11, 21], [22], [31])]

    assert len(arranged(pairs, layout, 1000).copies) == 0


def test_a_row_takes_no_pair_beyond_the_budget() -> None:
    """Prompt 1, and completions of two tokens: 5 tokens with the first pair, 9 with the second, 13 with the third."""
    pairs = [make_pair([1], [2 * row, 20], [2 * row + 1, 20]) for row in (1, 2, 3)]

    def row_lengths(token_budget: int) -> list[int]:
        return arranged(pairs, "shared", token_budget).row_lengths.tolist()

    assert row_lengths(13) == [13]
    assert row_lengths(12) == [9, 5]
    assert row_lengths(8) == [5, 5, 5]
    assert row_lengths(1) == [5, 5, 5]  # a pair is not parted


@pytest.mark.parametrize("token_budget", [1, 4, 1000])
def test_a_pair_seen_before_takes_no_row(token_budget: int) -> None:
    """An engine would be given a prompt of which nothing is asked."""
    pairs = [make_pair([1, 2, 3], [4], [5])] * 3

    assert arranged(pairs, "shared", token_budget).row_lengths.tolist() == [5]


def test_without_a_prompt_the_first_token_is_not_scored() -> None:
    """Chosen 21 22, rejected 31 32 33 and nothing before them: 22 by 21 (column 0), 32 by 31 (2), 33 by 32 (3)."""
    batch = one_batch([make_pair([], [21, 22], [31, 32, 33])], "shared")

    assert batch.input_ids.tolist() == [[21, 22, 31, 32, 33]]
    assert batch.position_ids.tolist() == [[0, 1, 0, 1, 2]]
    assert batch.segment_ids.tolist() == [[1, 1, 2, 2, 2]]
    assert batch.target_index.tolist() == [0, 2, 3]
    assert batch.target_ids.tolist() == [22, 32, 33]
    assert batch.completions.tolist() == [[0, CHOSEN, 1], [0, REJECTED, 2]]


def test_completions_of_one_token_are_both_predicted_by_the_prompt_s_last_state() -> None:
    batch = one_batch([make_pair([11, 12], [21], [31])], "shared")

    assert batch.position_ids.tolist() == [[0, 1, 2, 2]]
    assert batch.target_index.tolist() == [1, 1]
    assert batch.target_ids.tolist() == [21, 31]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_pairs_no_batches(layout: Layout) -> None:
    assert batches_of([], layout, 100) == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_longest_rows_come_first_and_equal_ones_in_their_order(layout: Layout) -> None:
    pairs = [make_pair([row], [2] * length, [3] * length, row) for row, length in enumerate((2, 5, 2, 5, 3), start=1)]

    order = [pair for batch in batches_of(pairs, layout, 1) for pair, _, _ in batch.completions.tolist()]

    assert list(dict.fromkeys(order)) == [1, 3, 4, 0, 2]


@given(PAIRS, st.sampled_from(LAYOUTS), BUDGETS)
def test_every_completion_is_scored_once_or_copied_from_one_that_is(
    pairs: list[TokenizedPair], layout: Layout, token_budget: int
) -> None:
    arrangement = arranged(pairs, layout, token_budget)
    found: dict[tuple[int, int], list[int]] = {}
    for batch in make_batches(arrangement, token_budget):
        ids = iter(batch.target_ids.tolist())
        for pair, branch, count in batch.completions.tolist():
            assert (pair, branch) not in found
            found[pair, branch] = [next(ids) for _ in range(count)]
        assert next(ids, None) is None
    scored = {(tuple(pairs[pair].prompt_ids), tuple(completion(pairs[pair], branch))) for pair, branch in found}
    assert len(scored) == len(found)  # none twice
    for pair, branch, source, source_branch in arrangement.copies.tolist():
        assert (pair, branch) not in found
        assert pairs[pair].prompt_ids == pairs[source].prompt_ids
        assert completion(pairs[pair], branch) == completion(pairs[source], source_branch)
        found[pair, branch] = found[source, source_branch]

    lengths = arrangement.table.scored_lengths
    for index, pair in enumerate(pairs):
        first = 0 if pair.prompt_ids else 1
        for branch in BRANCHES:
            targets = completion(pair, branch)[first:]
            assert found.pop((index, branch)) == targets
            assert lengths[index, branch] == len(targets)
    assert not found


@given(PAIRS, st.sampled_from(LAYOUTS), BUDGETS)
def test_sharing_computes_no_more_tokens(pairs: list[TokenizedPair], layout: Layout, token_budget: int) -> None:
    """Than a row of its own for each pair, or in the plain layout for each completion."""
    arrangement = arranged(pairs, layout, token_budget)
    lengths, first_pieces = arrangement.row_lengths, arrangement.first_pieces
    alone = [length for pair in pairs for length in arranged([pair], layout, token_budget).row_lengths.tolist()]

    assert lengths.sum() <= sum(alone)
    assert len(lengths) <= len(alone)
    # Above the budget there are only rows of a single pair.
    for row in np.flatnonzero(lengths > token_budget):
        assert len(set(arrangement.pieces[first_pieces[row] : first_pieces[row + 1], 3])) == 1


@given(PAIRS, BUDGETS)
def test_with_room_enough_no_prompt_is_there_twice(pairs: list[TokenizedPair], token_budget: int) -> None:
    arrangement = arranged(pairs, "shared", 10_000)

    prompts = {tuple(pair.prompt_ids) for pair in pairs}
    completions = {(tuple(pair.prompt_ids), tuple(completion(pair, branch))) for pair in pairs for branch in BRANCHES}
    assert len(arrangement.row_lengths) == len(prompts)
    assert arrangement.row_lengths.sum() == sum(map(len, prompts)) + sum(len(text) for _, text in completions)


@given(PAIRS, st.sampled_from(LAYOUTS), BUDGETS)
def test_batches_keep_to_the_budget_and_never_target_padding(
    pairs: list[TokenizedPair], layout: Layout, token_budget: int
) -> None:
    arrangement = arranged(pairs, layout, token_budget)
    batches = list(make_batches(arrangement, token_budget))
    for batch in batches:
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
        assert (batch.input_ids[batch.segment_ids < 0] == 0).all()
        assert batch.padding == int((segments < 0).sum())
        # Every row has something to be scored, in segments that count up from the prompt's.
        assert (batch.segment_ids.max(axis=1) >= 1).all()
        for segment_ids in batch.segment_ids:
            real = segment_ids[segment_ids >= 0]
            assert ((np.diff(real) == 0) | (np.diff(real) == 1)).all()
    widths = [(batch.segment_ids >= 0).sum(axis=1).tolist() for batch in batches]
    assert [width for of_batch in widths for width in of_batch] == arrangement.row_lengths.tolist()
    assert arrangement.row_lengths.tolist() == sorted(arrangement.row_lengths.tolist(), reverse=True)


@given(PAIRS, st.sampled_from(LAYOUTS), BUDGETS)
def test_a_batch_takes_as_many_rows_as_fit(pairs: list[TokenizedPair], layout: Layout, token_budget: int) -> None:
    """All rows of a batch are as wide as its first, so one row more would be as much over the budget."""
    batches = batches_of(pairs, layout, token_budget)

    for batch, following in pairwise(batches):
        rows, width = batch.input_ids.shape
        assert (rows + 1) * width > token_budget
        assert following.input_ids.shape[1] <= width
