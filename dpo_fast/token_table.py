"""Many pairs' token ids as a few flat arrays: what a cache file holds, and what batches are cut from.

Each pair's three pieces lie one after another, which is also the order of a row of the shared layout::

    tokens   p p p c c r r r | p p c c c r | …
    lengths  3     2   3       2   3     1
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpo_fast.types import Int64Array, TokenizedPair

PROMPT, CHOSEN, REJECTED = 0, 1, 2  # columns of `lengths`


@dataclass(frozen=True, slots=True)
class TokenTable:
    """P pairs' token ids, in the data set's order.

    Attributes:
        rows: (P,) int64, 1-based row numbers in the data set.
        lengths: (P, 3) int64, tokens of the prompt, the chosen and the rejected completion.
        tokens: (T,) int32, all of them, pair by pair.
        truncated: (P,) bool, whether `max_length` cut tokens off either completion.
        groups: one text or None a pair.
    """

    rows: Int64Array
    lengths: Int64Array
    tokens: NDArray[np.int32]
    truncated: NDArray[np.bool_]
    groups: list[str | None]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def starts(self) -> Int64Array:
        """(P, 3) int64: where each piece begins in `tokens`."""
        flat = self.lengths.ravel()
        starts: Int64Array = (np.cumsum(flat) - flat).reshape(-1, 3)
        return starts

    @property
    def scored_lengths(self) -> Int64Array:
        """(P, 2) int64: scored tokens of the chosen and the rejected completion.

        All of them, but for the first token of all, which nothing precedes where the prompt is empty.
        """
        unscored = (self.lengths[:, PROMPT] == 0)[:, None]
        scored: Int64Array = np.maximum(self.lengths[:, CHOSEN:] - unscored, 0)
        return scored

    def slice(self, start: int, stop: int) -> "TokenTable":
        """The pairs from `start` up to `stop`; views, no copies."""
        sizes = self.lengths.sum(axis=1)
        ends = np.concatenate([[0], np.cumsum(sizes)])
        pairs = slice(start, stop)
        return TokenTable(
            self.rows[pairs],
            self.lengths[pairs],
            self.tokens[ends[min(start, len(self))] : ends[min(stop, len(self))]],
            self.truncated[pairs],
            self.groups[pairs],
        )

    def pairs(self) -> Iterator[TokenizedPair]:
        """The pairs one by one."""
        for index, starts in enumerate(self.starts.tolist()):
            prompt, chosen, rejected = (
                self.tokens[start : start + length].tolist()
                for start, length in zip(starts, self.lengths[index].tolist(), strict=True)
            )
            truncated, group = bool(self.truncated[index]), self.groups[index]
            yield TokenizedPair(int(self.rows[index]), prompt, chosen, rejected, truncated, group)


def make_table(pairs: Sequence[TokenizedPair]) -> TokenTable:
    """The pairs as one table."""
    pieces = [piece for pair in pairs for piece in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)]
    tokens = [token for piece in pieces for token in piece]
    return TokenTable(
        rows=np.array([pair.row for pair in pairs], np.int64),
        lengths=np.array([len(piece) for piece in pieces], np.int64).reshape(-1, 3),
        tokens=np.array(tokens, np.int32),
        truncated=np.array([pair.truncated for pair in pairs], np.bool_),
        groups=[pair.group for pair in pairs],
    )


def concatenate(tables: Sequence[TokenTable]) -> TokenTable:
    """Tables one after another; a single one is given back as it is."""
    if len(tables) == 1:
        return tables[0]

    def joined(name: str) -> NDArray[Any]:
        return np.concatenate([getattr(table, name) for table in tables])

    groups = [group for table in tables for group in table.groups]
    return TokenTable(joined("rows"), joined("lengths"), joined("tokens"), joined("truncated"), groups)
