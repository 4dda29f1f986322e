"""Token ids to an engine's inputs: rows of one prompt and its completions, in batches of a token budget.

With the prompt shared, a pair is one row (see `dpo_fast.export.graph` for the drawing)::

    shared   [prompt | chosen | rejected]
    plain    [prompt | chosen]
             [prompt | rejected]
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from dpo_fast.types import Int64Array, TokenizedPair

Layout = Literal["shared", "plain"]
LAYOUTS: tuple[str, ...] = get_args(Layout)
CHOSEN, REJECTED = 0, 1
BRANCHES = (CHOSEN, REJECTED)


@dataclass(frozen=True, slots=True)
class Batch:
    """An engine's inputs (the graph contract), and whose tokens they score.

    Attributes:
        input_ids, position_ids, segment_ids: (B, T) int64; segment -1 is padding.
        target_index: (N,) int64, row * T + column of the state that predicts the target.
        target_ids: (N,) int64.
        completions: (K, 3) int64, in the order of the targets: the pair's index, the branch, how many targets.
    """

    input_ids: Int64Array
    position_ids: Int64Array
    segment_ids: Int64Array
    target_index: Int64Array
    target_ids: Int64Array
    completions: Int64Array

    @property
    def inputs(self) -> dict[str, Int64Array]:
        """The five inputs by the graph's names."""
        return {
            "input_ids": self.input_ids,
            "position_ids": self.position_ids,
            "segment_ids": self.segment_ids,
            "target_index": self.target_index,
            "target_ids": self.target_ids,
        }

    @property
    def padding(self) -> int:
        """How many of the B x T tokens are padding."""
        return int((self.segment_ids < 0).sum())


@dataclass(frozen=True, slots=True)
class _Row:
    """One row before padding: a prompt and one or two completions of a pair, each with its branch."""

    pair: int
    prompt: list[int]
    completions: tuple[tuple[int, list[int]], ...]

    @property
    def length(self) -> int:
        return len(self.prompt) + sum(len(tokens) for _, tokens in self.completions)


def scored_length(pair: TokenizedPair, branch: int) -> int:
    """How many of a completion's tokens are scored: all, but the first where nothing precedes it."""
    tokens = pair.chosen_ids if branch == CHOSEN else pair.rejected_ids
    return len(tokens) if pair.prompt_ids else max(len(tokens) - 1, 0)


def make_batches(pairs: Sequence[TokenizedPair], layout: Layout, token_budget: int) -> Iterator[Batch]:
    """Batches of at most `token_budget` tokens (B x T, padding included), longest rows first.

    Rows of similar length share a batch, so that little is padded; a row longer than the budget is a batch of its
    own. The longest come first, so that an engine that lacks the memory says so at once.

    Args:
        pairs: P pairs; a batch's `completions` name them by their index here.
        layout: whether the two completions share a row.
        token_budget: in tokens.
    """
    rows = []
    for index, pair in enumerate(pairs):
        branches = ((CHOSEN, pair.chosen_ids), (REJECTED, pair.rejected_ids))
        if layout == "shared":
            rows.append(_Row(index, pair.prompt_ids, branches))
        else:
            rows.extend(_Row(index, pair.prompt_ids, (branch,)) for branch in branches)
    rows.sort(key=lambda row: -row.length)
    start = 0
    while start < len(rows):
        count = max(token_budget // max(rows[start].length, 1), 1)
        yield _pack(rows[start : start + count])
        start += count


def _pack(rows: Sequence[_Row]) -> Batch:
    """Lay rows side by side, padded on the right to the longest."""
    width = max(max(row.length for row in rows), 1)
    input_ids = np.zeros((len(rows), width), np.int64)
    position_ids = np.zeros((len(rows), width), np.int64)
    segment_ids = np.full((len(rows), width), -1, np.int64)
    target_index: list[Int64Array] = []
    target_ids: list[int] = []
    completions: list[tuple[int, int, int]] = []
    for number, row in enumerate(rows):
        prompt = len(row.prompt)
        input_ids[number, :prompt] = row.prompt
        position_ids[number, :prompt] = np.arange(prompt)
        segment_ids[number, :prompt] = 0
        column = prompt
        for segment, (branch, tokens) in enumerate(row.completions, start=1):
            end = column + len(tokens)
            input_ids[number, column:end] = tokens
            position_ids[number, column:end] = np.arange(prompt, prompt + len(tokens))
            segment_ids[number, column:end] = segment
            #  tokens      c0      c1  c2      the prompt's last state predicts the first token, each token's
            #  predicted   p-1     c0  c1      state the next one; without a prompt nothing predicts c0
            predicts = np.arange(column - 1, end - 1)
            if len(tokens):
                predicts[0] = prompt - 1
            scored = tokens if prompt else tokens[1:]
            target_index.append(number * width + (predicts if prompt else predicts[1:]))
            target_ids.extend(scored)
            completions.append((row.pair, branch, len(scored)))
            column = end
    return Batch(
        input_ids,
        position_ids,
        segment_ids,
        np.concatenate(target_index).astype(np.int64),
        np.array(target_ids, np.int64),
        np.array(completions, np.int64),
    )
