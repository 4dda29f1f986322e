"""In which batches the original is scored."""

import pytest

from dpo_fast.batches import arrange, make_batches
from dpo_fast.token_table import make_table
from dpo_fast.types import TokenizedPair
from dpo_fast.verification.original import BUDGET, MOST, several_rows


@pytest.mark.parametrize("length", [20, 600, 1500, 2048])
def test_the_longest_rows_are_not_alone(length: int) -> None:
    """Or their noise, the difference to the same rows alone, would be 0 by itself."""
    pair = TokenizedPair(1, [1] * (length // 2), [2] * (length - length // 2), [3] * (length // 4))
    table = make_table([pair] * 3)
    budget = several_rows(table)

    widest = max(make_batches(arrange(table, "plain", budget), budget), key=lambda batch: batch.input_ids.shape[1])

    assert BUDGET <= budget <= MOST
    rows, width = widest.input_ids.shape
    assert width >= length
    assert rows > 1


def test_memory_goes_first() -> None:
    pair = TokenizedPair(1, [1] * 3000, [2] * 1000, [3] * 1000)
    assert several_rows(make_table([pair])) == MOST
