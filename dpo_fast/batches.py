"""Token ids to an engine's inputs: rows of one prompt and its completions, in batches of a token budget.

With the prompt shared, all completions of one prompt are one row, whether they come from one pair or from several
(see `dpo_fast.export.graph` for the drawing)::

    shared   [prompt | chosen | rejected]            a pair
             [prompt | best | worst | middle]        two pairs of one prompt: best over worst, best over middle
    plain    [prompt | chosen]
             [prompt | rejected]

What is the same is computed once: a completion that two pairs have, and in the plain layout a whole row.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from dpo_fast.token_table import TokenTable
from dpo_fast.types import Int64Array

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
class Arrangement:
    """The rows of some pairs, the longest first, and where their pieces lie in the table's tokens.

    Attributes:
        row_lengths: (R,) int64 tokens.
        first_pieces: (R + 1,) int64: row r's pieces are those from `first_pieces[r]` up to `first_pieces[r + 1]`.
        pieces: (S, 5) int64, a prompt or a completion each: where it begins in `tokens`, its length, its segment
            (0 the prompt), and for a completion the pair's index and the branch.
        copies: (M, 4) int64: the pair and branch whose scores are those of another pair and branch.
    """

    table: TokenTable
    row_lengths: Int64Array
    first_pieces: Int64Array
    pieces: Int64Array
    copies: Int64Array


@dataclass(slots=True)
class _Row:
    """A row being filled: its pieces, and its length in tokens."""

    pieces: list[tuple[int, int, int, int, int]]
    length: int


def arrange(table: TokenTable, layout: Layout, token_budget: int) -> Arrangement:
    """Put pairs into rows, so that what they have in common is computed once.

    Args:
        table: P pairs.
        layout: whether completions of one prompt share a row.
        token_budget: in tokens; a row takes no further pair beyond it.

    Returns:
        The rows, the longest first; those of equal length in the pairs' order.
    """
    starts, lengths = table.starts.tolist(), table.lengths.tolist()
    rows: list[_Row] = []
    open_rows: dict[bytes, _Row] = {}  # by prompt: the row that takes further completions
    scored: dict[tuple[bytes, bytes], tuple[int, int]] = {}  # whose completion of which prompt is in a row already
    copies: list[tuple[int, int, int, int]] = []
    for pair, (prompt_start, *completion_starts) in enumerate(starts):
        prompt_length, *completion_lengths = lengths[pair]
        prompt = table.tokens[prompt_start : prompt_start + prompt_length].tobytes()
        wanted = []  # this pair's completions that no row has yet
        for branch, start, length in zip(BRANCHES, completion_starts, completion_lengths, strict=True):
            key = prompt, table.tokens[start : start + length].tobytes()
            if key in scored:
                copies.append((pair, branch, *scored[key]))
            else:
                scored[key] = pair, branch
                wanted.append((start, length, pair, branch))
        if not wanted:
            continue
        for group in [wanted] if layout == "shared" else [[completion] for completion in wanted]:
            added = sum(length for _, length, _, _ in group)
            row = open_rows.get(prompt) if layout == "shared" else None
            if row is None or row.length + added > token_budget:
                row = open_rows[prompt] = _Row([(prompt_start, prompt_length, 0, pair, -1)], prompt_length)
                rows.append(row)
            for start, length, *whose in group:
                row.pieces.append((start, length, len(row.pieces), *whose))
            row.length += added
    rows.sort(key=lambda row: -row.length)
    return Arrangement(
        table,
        np.array([row.length for row in rows], np.int64),
        np.cumsum([0, *(len(row.pieces) for row in rows)]),
        np.array([piece for row in rows for piece in row.pieces], np.int64).reshape(-1, 5),
        np.array(copies, np.int64).reshape(-1, 4),
    )


def longest_row(layout: Layout, max_length: int) -> int:
    """The most tokens that a row of one pair can have, where prompt and a completion have at most `max_length`."""
    return 2 * max_length if layout == "shared" else max_length


def make_batches(arrangement: Arrangement, token_budget: int) -> Iterator[Batch]:
    """Batches of at most `token_budget` tokens (B x T, padding included), longest rows first.

    Rows of similar length share a batch, so that little is padded; a row longer than the budget is a batch of its
    own. The longest come first, so that an engine that lacks the memory says so at once.

    Args:
        arrangement: of P pairs; a batch's `completions` name them by their index there.
        token_budget: in tokens.
    """
    for start, stop in batch_spans(arrangement.row_lengths, token_budget):
        yield _pack(arrangement, start, stop)


def batch_spans(row_lengths: Int64Array, token_budget: int) -> Iterator[tuple[int, int]]:
    """Which rows make a batch, from the first up to the last, exclusive; see `make_batches`.

    Args:
        row_lengths: (R,) tokens, the longest first.
        token_budget: in tokens.
    """
    start = 0
    while start < len(row_lengths):
        count = max(token_budget // max(int(row_lengths[start]), 1), 1)
        yield start, min(start + count, len(row_lengths))
        start += count


def _pack(arrangement: Arrangement, first: int, end: int) -> Batch:
    """Lay rows side by side, padded on the right to the first, which is the longest."""
    height, width = end - first, max(int(arrangement.row_lengths[first]), 1)
    offsets = arrangement.first_pieces[first : end + 1]
    pieces = arrangement.pieces[offsets[0] : offsets[-1]]
    starts, sizes, segments = pieces[:, 0], pieces[:, 1], pieces[:, 2]
    rows = np.repeat(np.arange(height), np.diff(offsets))
    prompts = sizes[offsets[:-1] - offsets[0]][rows]  # (S,) the length of each piece's prompt
    before = np.cumsum(sizes) - sizes  # tokens of the batch before each piece
    columns = before - before[offsets[:-1] - offsets[0]][rows]

    piece = np.repeat(np.arange(len(pieces)), sizes)  # (tokens,) the piece of each token
    within = np.arange(len(piece)) - before[piece]  # its place there
    place = (rows * width + columns)[piece] + within
    is_completion = segments > 0
    input_ids = np.zeros(height * width, np.int64)
    position_ids = np.zeros(height * width, np.int64)
    segment_ids = np.full(height * width, -1, np.int64)
    tokens = arrangement.table.tokens[starts[piece] + within]
    input_ids[place] = tokens
    position_ids[place] = within + np.where(is_completion, prompts, 0)[piece]
    segment_ids[place] = segments[piece]
    #  tokens      c0      c1  c2      the prompt's last state predicts the first token, each token's
    #  predicted   p-1     c0  c1      state the next one; without a prompt nothing predicts c0
    predicts = np.where(within == 0, (rows * width + prompts - 1)[piece], place - 1)
    scored = is_completion[piece] & ((within > 0) | (prompts > 0)[piece])
    counts = np.where(prompts > 0, sizes, np.maximum(sizes - 1, 0))
    shape = (height, width)
    return Batch(
        input_ids.reshape(shape),
        position_ids.reshape(shape),
        segment_ids.reshape(shape),
        predicts[scored],
        tokens[scored].astype(np.int64),
        np.column_stack([pieces[:, 3:], counts])[is_completion],
    )
