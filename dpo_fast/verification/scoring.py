"""A table of pairs through an engine, keeping what it says of every token."""

from collections.abc import Callable

import numpy as np

from dpo_fast.batches import BRANCHES, Layout, arrange, make_batches
from dpo_fast.engines.base import Engine, PipelinedEngine
from dpo_fast.scores import check_scores
from dpo_fast.token_table import TokenTable
from dpo_fast.types import Float32Array
from dpo_fast.verification.types import ScoredTokens

KEPT = {"log_probs": "log_prob", "is_top1": "is_top1", "entropy": "entropy", "log_sum_sq_prob": "log_sum_sq_prob"}


def score_tokens(
    table: TokenTable,
    engine: Engine,
    *,
    layout: Layout,
    token_budget: int,
    row_limit: int,
    watch: Callable[[float, int], None] = lambda pairs, tokens: None,
) -> tuple[ScoredTokens, ScoredTokens]:
    """Score both completions of P pairs under one model.

    Args:
        table: token ids.
        engine: one model's.
        layout: whether the completions share their prompt's computation.
        token_budget: of a batch, in tokens.
        row_limit: tokens up to which a row takes further pairs of its prompt.
        watch: told of each batch: pairs, of which a batch may finish fractions, and tokens without padding.

    Returns:
        The chosen completions' tokens, and the rejected ones'; a token that no batch had is NaN.

    Raises:
        EngineOutputError: the engine returned NaN, an infinity, or another number of values than was asked for.
    """
    lengths = table.scored_lengths  # (P, 2)
    offsets = [np.concatenate([[0], np.cumsum(lengths[:, branch])]) for branch in BRANCHES]
    kept: list[dict[str, Float32Array]] = [
        {name: np.full(int(offsets[branch][-1]), np.nan, np.float32) for name in KEPT} for branch in BRANCHES
    ]
    arrangement = arrange(table, layout, min(token_budget, row_limit))
    batches = list(make_batches(arrangement, token_budget))
    completions = max(sum(len(batch.completions) for batch in batches), 1)
    said_of_each = engine.score_all(batches) if isinstance(engine, PipelinedEngine) else map(engine.score, batches)
    for batch in batches:
        said = check_scores(next(said_of_each), batch, table.rows)
        end = 0
        for pair, branch, count in batch.completions.tolist():
            start, end = end, end + count
            place = int(offsets[branch][pair])
            for name, output in KEPT.items():
                kept[branch][name][place : place + count] = getattr(said, output)[start:end]
        watch(len(table) * len(batch.completions) / completions, batch.input_ids.size - batch.padding)
    for pair, branch, source, source_branch in arrangement.copies.tolist():
        place, origin = int(offsets[branch][pair]), int(offsets[source_branch][source])
        count = int(lengths[pair, branch])
        for name in KEPT:
            kept[branch][name][place : place + count] = kept[source_branch][name][origin : origin + count]
    chosen, rejected = (ScoredTokens(offsets=offsets[branch], **kept[branch]) for branch in BRANCHES)
    return chosen, rejected
