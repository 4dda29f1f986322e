"""Batches through an engine, and what comes back put in the pairs' order.

An engine's word is checked here, whichever engine it is: as many values as were asked for, no NaN, no infinity, no
probability above one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np

from dpo_fast.batches import BRANCHES, Batch, Layout, make_batches, scored_length
from dpo_fast.engines.base import Engine
from dpo_fast.errors import EngineOutputError
from dpo_fast.types import CompletionScores, TokenizedPair, TokenScores

# A log-prob is at most 0; log-sum-exp over a large vocabulary in float32 may round to a little more.
LOG_PROB_ROUNDING = 1e-3  # nats


@dataclass(frozen=True, slots=True)
class ScoredPairs:
    """One model's scores of both branches of P pairs, and what the engine was given to do.

    Attributes:
        chosen, rejected: see `CompletionScores`.
        tokens: that the engine computed, padding included.
        padding: of these, how many were padding.
    """

    chosen: CompletionScores
    rejected: CompletionScores
    tokens: int
    padding: int


def score_pairs(
    pairs: Sequence[TokenizedPair],
    engine: Engine,
    *,
    layout: Layout,
    token_budget: int,
    on_batch: Callable[[Batch], None] | None = None,
) -> ScoredPairs:
    """Score both completions of P pairs under one model.

    Args:
        pairs: token ids.
        engine: one model's.
        layout: whether the completions share their prompt's computation; the scores are the same.
        token_budget: of a batch, in tokens.
        on_batch: called after each batch, for progress.

    Raises:
        EngineOutputError: the engine returned NaN, an infinity, or another number of values than was asked for.
    """
    lengths = [np.array([scored_length(pair, branch) for pair in pairs], np.int64) for branch in BRANCHES]
    # Where each completion's tokens begin among all of its branch.
    offsets = [np.concatenate([[0], np.cumsum(of_branch)]) for of_branch in lengths]
    log_probs = [np.full(int(of_branch[-1]), np.nan, np.float32) for of_branch in offsets]
    names = ("entropy", "mean_logit", "is_top1", "log_sum_sq_prob")
    sums = [{name: np.zeros(len(pairs)) for name in names} for _ in BRANCHES]
    tokens = padding = 0
    for batch in make_batches(pairs, layout, token_budget):
        scores = check_scores(engine.score(batch), batch, pairs)
        end = 0
        for pair, branch, count in batch.completions.tolist():
            start, end = end, end + count
            first = offsets[branch][pair]
            log_probs[branch][first : first + count] = scores.log_prob[start:end]
            for name in names:
                sums[branch][name][pair] = getattr(scores, name)[start:end].sum(dtype=np.float64)
        tokens += batch.input_ids.size
        padding += batch.padding
        if on_batch is not None:
            on_batch(batch)
    chosen, rejected = (
        CompletionScores(
            log_probs=log_probs[branch],
            lengths=lengths[branch],
            entropy=sums[branch]["entropy"],
            mean_logit=sums[branch]["mean_logit"],
            top1=sums[branch]["is_top1"].astype(np.int64),
            log_sum_sq_prob=sums[branch]["log_sum_sq_prob"],
        )
        for branch in BRANCHES
    )
    return ScoredPairs(chosen, rejected, tokens, padding)


def check_scores(scores: TokenScores, batch: Batch, pairs: Sequence[TokenizedPair]) -> TokenScores:
    """Refuse an engine's output that cannot be right.

    Raises:
        EngineOutputError: with the output's name, the value and the row of the data set.
    """
    wanted = batch.target_ids.size
    for field in fields(scores):
        values = getattr(scores, field.name)
        if values.shape != (wanted,):
            first = pairs[int(batch.completions[0, 0])].row
            raise EngineOutputError(
                f"row {first} and its batch: the engine returned {field.name} of shape {list(values.shape)} for "
                f"{wanted} tokens; nothing of this run can be trusted: export the bundle again, or use another engine"
            )
        wrong = ~np.isfinite(values)
        if field.name == "log_prob":
            wrong |= values > LOG_PROB_ROUNDING
        if wrong.any():
            position = int(wrong.argmax())
            completion = int(np.searchsorted(np.cumsum(batch.completions[:, 2]), position, side="right"))
            row = pairs[int(batch.completions[completion, 0])].row
            raise EngineOutputError(
                f"row {row}: the engine returned {field.name} {values[position]} for the token id "
                f"{batch.target_ids[position]}; check the weights, or use an engine of higher precision"
            )
    return scores
