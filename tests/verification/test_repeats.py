"""Pairs that are there several times."""

from dataclasses import replace

import numpy as np
from fake_engines import make_pair, numbered

from dpo_fast.token_table import make_table
from dpo_fast.verification.repeats import without_repeats


def test_the_first_of_each_is_kept():
    """A pair that is turned round, or cut at other places, is another one."""
    pair = make_pair([1, 2], [3], [4, 5])
    others = [make_pair([1, 2], [4, 5], [3]), make_pair([1], [2, 3], [4, 5]), make_pair([], [7, 8], [7, 9])]
    rows = [pair, others[0], pair, others[1], replace(pair, group="other"), others[2], others[0]]
    table = make_table(numbered(rows))
    found = without_repeats(table)
    assert found.rows.tolist() == [1, 2, 4, 6]
    assert list(found.pairs()) == [each for each in table.pairs() if each.row in (1, 2, 4, 6)]


def test_pairs_that_all_differ_stay_as_they_are():
    table = make_table(numbered([make_pair([number], [1], [2], group=str(number)) for number in range(5)]))
    found = without_repeats(table)
    for name in ("rows", "lengths", "tokens", "truncated", "groups"):
        np.testing.assert_array_equal(getattr(found, name), getattr(table, name))
    empty = without_repeats(make_table([]))
    assert (len(empty), len(empty.tokens)) == (0, 0)
