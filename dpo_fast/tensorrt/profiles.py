"""Which shapes a plan is built for: a few narrow optimisation profiles, chosen from the lengths of a data set's rows.

A profile is a box of rows x width tokens. Its kernels are tuned for one shape and must be right for all of the box, so
several narrow boxes are faster than a wide one. Whatever a data set has, the last box ends at the longest row that two
completions of --max-length can make, so that no pair of the bundle's length is refused in the middle of a run.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from dpo_fast.batches import Arrangement, batch_spans
from dpo_fast.errors import UsageError
from dpo_fast.tensorrt.plans import WIDTH_STEP, Profile
from dpo_fast.types import Int64Array

HEADROOM = 1.25  # times the token budget: what a box may hold, so that its narrowest batches need not be split
SHORTEST = 64  # tokens; the narrowest box without a data set to go by


@dataclass(frozen=True, slots=True)
class BatchShapes:
    """The batches that a data set makes: an entry each.

    Attributes:
        rows: B.
        width: T in tokens, of the longest row.
        tokens: of the rows, without padding.
        targets: N.
    """

    rows: Int64Array
    width: Int64Array
    tokens: Int64Array
    targets: Int64Array


@dataclass(frozen=True, slots=True)
class Use:
    """What one profile has to do.

    Attributes:
        profile: the box.
        batches: how many it takes.
        rows: in these batches.
        tokens: of these rows, without padding.
        computed: tokens, with padding.
    """

    profile: Profile
    batches: int
    rows: int
    tokens: int
    computed: int


def batch_shapes(arrangements: Iterable[Arrangement], token_budget: int) -> BatchShapes:
    """The shapes of the batches that `dpo_fast.batches.make_batches` makes of some arrangements.

    Args:
        arrangements: of a data set's parts.
        token_budget: in tokens.
    """
    found = []
    for arrangement in arrangements:
        lengths = arrangement.row_lengths
        offsets = arrangement.first_pieces
        sizes, segments = arrangement.pieces[:, 1], arrangement.pieces[:, 2]
        completions = np.cumsum([0, *np.where(segments > 0, sizes, 0)])
        for start, stop in batch_spans(lengths, token_budget):
            targets = completions[offsets[stop]] - completions[offsets[start]]
            found.append((stop - start, lengths[start], lengths[start:stop].sum(), targets))
    return BatchShapes(*np.array(found, np.int64).reshape(-1, 4).T)


def choose_profiles(shapes: BatchShapes | None, *, token_budget: int, longest_row: int, count: int) -> list[Profile]:
    """Choose optimisation profiles.

    The boundaries between widths are those at which batches are fewest tokens, in sum, narrower than what their
    profile's kernels are tuned for; found by dynamic programming.

    Args:
        shapes: of a data set's batches; without any, widths grow by a constant factor.
        token_budget: tokens of a batch.
        longest_row: in tokens, that any data set may have.
        count: how many profiles there may be, beside one for rows that are longer than all of the data set's.

    Returns:
        The profiles, the narrowest first.

    Raises:
        UsageError: a row may be longer than a batch.
    """
    if longest_row > token_budget:
        raise UsageError(
            f"a row of a prompt and two completions may have {longest_row} tokens, and the recipe's token_budget is "
            f"{token_budget}; lower --max-length to {token_budget // 2}, or raise token_budget in a recipe of your own"
        )
    end = _ceil(longest_row)
    if shapes is None or not len(shapes.width):
        factor = (end / SHORTEST) ** (1 / count)
        edges = sorted({min(_ceil(round(SHORTEST * factor**power)), end) for power in range(1, count + 1)})
        smallest, share = SHORTEST, 0.5
    else:
        widths = _ceil_all(shapes.width)
        edges = _best_edges(widths, shapes.rows, count)
        smallest = int(widths.min())
        share = float(shapes.targets.sum() / shapes.tokens.sum())
    if edges[-1] < end:
        edges.append(end)
    profiles = []
    for low, high in zip([smallest, *(edge + WIDTH_STEP for edge in edges[:-1])], edges, strict=True):
        low = min(low, high)
        rows = max(1, min(token_budget // low, int(token_budget * HEADROOM) // high))
        tuned = min(rows, max(1, token_budget // high))
        most = rows * high  # every token but the prompts' is a target at most
        profiles.append(
            Profile(
                rows=(1, tuned, rows),
                width=(low, high, high),
                targets=(1, max(1, min(most, round(tuned * high * share))), most),
            )
        )
    return profiles


def uses_of(profiles: Sequence[Profile], shapes: BatchShapes) -> list[Use]:
    """What each profile has to do for a data set; the engine's own rules of padding and splitting are followed."""
    widths = _ceil_all(shapes.width)
    ends = np.array([profile.width[2] for profile in profiles])
    chosen = np.searchsorted(ends, widths)
    uses = []
    for number, profile in enumerate(profiles):
        mine = chosen == number
        padded = np.maximum(widths[mine], profile.width[0])
        uses.append(
            Use(
                profile,
                batches=int(np.ceil(shapes.rows[mine] / profile.rows[2]).sum()),
                rows=int(shapes.rows[mine].sum()),
                tokens=int(shapes.tokens[mine].sum()),
                computed=int((shapes.rows[mine] * padded).sum()),
            )
        )
    return uses


def describe(uses: Sequence[Use]) -> list[str]:
    """A line for each profile, and one for all, for people."""
    tokens, computed = sum(use.tokens for use in uses), sum(use.computed for use in uses)
    lines = []
    for use in uses:
        low, _, high = use.profile.width
        has = (
            f"{use.batches} batches, {use.rows} rows, {use.tokens / tokens:.1%} of the tokens, "
            f"padding {1 - use.tokens / use.computed:.1%}"
            if use.computed
            else "none of these rows; for longer ones"
        )
        lines.append(f"profile {low}…{high} tokens, up to {use.profile.rows[2]} rows: {has}")
    narrow = sum(use.tokens for use in uses if use.profile.width[2] <= 2 * use.profile.width[0])
    lines.append(
        f"all {sum(use.batches for use in uses)} batches fit; {narrow / max(tokens, 1):.1%} of the tokens are in "
        f"profiles whose widths differ by a factor of two at most; padding {1 - tokens / max(computed, 1):.1%}"
    )
    return lines


def _best_edges(widths: Int64Array, weights: Int64Array, count: int) -> list[int]:
    """At most `count` right edges, multiples of `WIDTH_STEP`, with the least sum of weight x (edge - width)."""
    edges = np.unique(widths)
    weight = np.array([weights[widths == edge].sum() for edge in edges], np.float64)
    # cost(i, j): of edges i … j - 1 in one profile that ends at edge j - 1.
    total, moment = np.cumsum([0.0, *weight]), np.cumsum([0.0, *(weight * edges)])
    number = len(edges)
    best = np.full((min(count, number) + 1, number + 1), math.inf)
    best[0, 0] = 0.0
    origin = np.zeros(best.shape, np.int64)
    for used in range(1, len(best)):
        for end in range(1, number + 1):
            starts = np.arange(end)
            narrower = edges[end - 1] * (total[end] - total[starts]) - (moment[end] - moment[starts])
            costs = best[used - 1, :end] + narrower
            origin[used, end] = int(costs.argmin())
            best[used, end] = costs[origin[used, end]]
    used, end, chosen = int(best[:, number].argmin()), number, []
    while end > 0:
        chosen.append(int(edges[end - 1]))
        end, used = int(origin[used, end]), used - 1
    return chosen[::-1]


def _ceil(width: int) -> int:
    return -(-width // WIDTH_STEP) * WIDTH_STEP


def _ceil_all(widths: Int64Array) -> Int64Array:
    ceiled: Int64Array = -(-widths // WIDTH_STEP) * WIDTH_STEP
    return ceiled
