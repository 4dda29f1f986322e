"""Pairs as flat arrays, and back."""

import numpy as np
from fake_engines import make_pair, numbered, pairs_alike
from hypothesis import given
from hypothesis import strategies as st

from dpo_fast.token_table import TokenTable, concatenate, make_table
from dpo_fast.types import TokenizedPair

IDS = st.lists(st.integers(0, 2**31 - 1), max_size=4)
GROUPS = st.one_of(st.none(), st.text(max_size=3))
PAIRS = st.lists(
    st.builds(TokenizedPair, st.integers(1, 2**40), IDS, IDS, IDS, truncated=st.booleans(), group=GROUPS), max_size=6
)


def as_lists(table: TokenTable) -> list[object]:
    arrays = (table.rows, table.lengths, table.tokens, table.truncated)
    return [*(array.tolist() for array in arrays), table.groups]


def test_by_hand() -> None:
    """Two pairs::

    tokens  1 2 3 4 5 6 | 7 8 9
    starts  0   2 3       6 6 8     the second has no prompt
    """
    pairs = [
        TokenizedPair(4, [1, 2], [3], [4, 5, 6], truncated=True, group="a"),
        TokenizedPair(9, [], [7, 8], [9]),
    ]
    table = make_table(pairs)

    assert len(table) == 2
    assert table.tokens.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert table.lengths.tolist() == [[2, 1, 3], [0, 2, 1]]
    assert table.starts.tolist() == [[0, 2, 3], [6, 6, 8]]
    assert table.scored_lengths.tolist() == [[1, 3], [1, 0]]  # nothing precedes 7 and 9
    assert table.rows.tolist() == [4, 9]
    assert table.truncated.tolist() == [True, False]
    assert table.groups == ["a", None]
    types = [array.dtype for array in (table.rows, table.lengths, table.tokens, table.truncated)]
    assert types == [np.int64, np.int64, np.int32, np.bool_]


def test_a_completion_of_nothing_has_no_scored_token() -> None:
    assert make_table([make_pair([], [], [1])]).scored_lengths.tolist() == [[0, 0]]


@given(PAIRS)
def test_pairs_come_back(pairs: list[TokenizedPair]) -> None:
    table = make_table(pairs)
    found = list(table.pairs())

    assert found == pairs
    assert [type(value) for pair in found for value in pair.prompt_ids] == [int] * table.lengths[:, 0].sum()
    assert all(type(pair.row) is int and type(pair.truncated) is bool for pair in found)


@given(PAIRS)
def test_where_pieces_lie(pairs: list[TokenizedPair]) -> None:
    table = make_table(pairs)

    assert table.starts.shape == table.lengths.shape == (len(pairs), 3)
    assert table.scored_lengths.shape == (len(pairs), 2)
    for pair, starts, lengths, scored in zip(
        pairs, table.starts, table.lengths, table.scored_lengths.tolist(), strict=True
    ):
        pieces = [table.tokens[start : start + length].tolist() for start, length in zip(starts, lengths, strict=True)]
        assert pieces == [pair.prompt_ids, pair.chosen_ids, pair.rejected_ids]
        sequences = [len(pair.prompt_ids) + len(ids) for ids in (pair.chosen_ids, pair.rejected_ids)]
        # A sequence's first token is the only one that nothing precedes.
        assert scored == [max(length - max(len(pair.prompt_ids), 1), 0) for length in sequences]


@given(PAIRS, st.integers(0, 8), st.integers(0, 8))
def test_a_slice_is_the_table_of_the_sliced_pairs(pairs: list[TokenizedPair], start: int, length: int) -> None:
    table = make_table(pairs)
    part = table.slice(start, start + length)

    assert as_lists(part) == as_lists(make_table(pairs[start : start + length]))
    for name in ("rows", "lengths", "tokens", "truncated"):
        array, whole = getattr(part, name), getattr(table, name)
        assert array.dtype == whole.dtype
        assert array.size == 0 or np.shares_memory(array, whole)


@given(st.lists(PAIRS, min_size=1, max_size=4))
def test_tables_are_joined_in_order(parts: list[list[TokenizedPair]]) -> None:
    joined = concatenate([make_table(pairs) for pairs in parts])

    assert as_lists(joined) == as_lists(make_table([pair for pairs in parts for pair in pairs]))
    assert joined.tokens.dtype == np.int32


@given(pairs_alike(), st.data())
def test_slices_of_any_cut_join_to_the_whole(pairs: list[TokenizedPair], data: st.DataObject) -> None:
    table = make_table(pairs)
    cut = data.draw(st.integers(0, len(pairs)))

    assert as_lists(concatenate([table.slice(0, cut), table.slice(cut, len(pairs))])) == as_lists(table)


def test_a_single_table_is_not_copied() -> None:
    table = make_table(numbered([make_pair([1], [2], [3])]))

    assert concatenate([table]) is table
