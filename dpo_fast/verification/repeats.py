"""Pairs that a data set has several times: more rows, and no more evidence."""

import numpy as np

from dpo_fast.token_table import PROMPT, TokenTable


def without_repeats(table: TokenTable) -> TokenTable:
    """The pairs that repeat no earlier one, token by token, in the data set's order.

    A pair that is there again is scored again the same, and would make every interval narrower than what is known.
    """
    sizes = table.lengths.sum(axis=1)
    firsts: dict[tuple[bytes, bytes], int] = {}
    for index, (start, size) in enumerate(zip(table.starts[:, PROMPT].tolist(), sizes.tolist(), strict=True)):
        pieces = table.tokens[start : start + size].tobytes()
        firsts.setdefault((table.lengths[index].tobytes(), pieces), index)
    is_first = np.zeros(len(table), np.bool_)
    is_first[list(firsts.values())] = True
    return TokenTable(
        rows=table.rows[is_first],
        lengths=table.lengths[is_first],
        tokens=table.tokens[np.repeat(is_first, sizes)],
        truncated=table.truncated[is_first],
        groups=[table.groups[index] for index in np.flatnonzero(is_first)],
    )
