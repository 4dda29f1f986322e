"""Batches through an engine, and what comes back put in the pairs' order.

An engine's word is checked here, whichever engine it is: as many values as were asked for, no NaN, no infinity, no
probability above one.
"""

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from dpo_fast.batches import BRANCHES, CHOSEN, REJECTED, Arrangement, Batch, Layout, arrange, make_batches
from dpo_fast.engines.base import Engine
from dpo_fast.errors import EngineOutputError
from dpo_fast.token_table import TokenTable
from dpo_fast.types import CompletionScores, Int64Array, TokenScores

# A log-prob is at most 0; log-sum-exp over a large vocabulary in float32 may round to a little more.
LOG_PROB_ROUNDING = 1e-3  # nats
SUMS = ("entropy", "mean_logit", "is_top1", "log_sum_sq_prob")  # what is kept as a sum over each completion


@dataclass(frozen=True, slots=True)
class ScoredPairs:
    """One model's scores of both branches of P pairs, and what the engine was given to do.

    Attributes:
        chosen, rejected: see `CompletionScores`.
        tokens: that the engine computed, padding included; 0 where the scores were taken from elsewhere.
        padding: of these, how many were padding.
    """

    chosen: CompletionScores
    rejected: CompletionScores
    tokens: int
    padding: int


class ScoreSheet:
    """One model's scores of P pairs, filled in batch by batch."""

    def __init__(self, arrangement: Arrangement) -> None:
        """An empty sheet for the pairs of an arrangement."""
        self._arrangement = arrangement
        self._lengths = arrangement.table.scored_lengths  # (P, 2)
        ends = np.cumsum(self._lengths.T.ravel())  # all chosen completions first, then all rejected ones
        self._starts = (ends - self._lengths.T.ravel()).reshape(2, -1).T  # (P, 2)
        self._log_probs = np.full(int(ends[-1]) if len(ends) else 0, np.nan, np.float32)
        self._sums = {name: np.zeros(self._lengths.shape) for name in SUMS}  # (P, 2) each
        self._tokens = self._padding = 0

    def add(self, batch: Batch, scores: TokenScores) -> None:
        """Take in what the engine says of a batch of this arrangement.

        Raises:
            EngineOutputError: the engine returned NaN, an infinity, or another number of values than was asked for.
        """
        check_scores(scores, batch, self._arrangement.table.rows)
        pairs, branches, counts = batch.completions.T
        ends = np.cumsum(counts)
        places = np.repeat(self._starts[pairs, branches] - (ends - counts), counts) + np.arange(len(scores.log_prob))
        self._log_probs[places] = scores.log_prob
        filled = counts > 0  # reduceat has no empty segments
        for name, sums in self._sums.items():
            values = np.add.reduceat(getattr(scores, name), (ends - counts)[filled], dtype=np.float64)
            sums[pairs[filled], branches[filled]] = values
        self._tokens += batch.input_ids.size
        self._padding += batch.padding

    def finish(self) -> ScoredPairs:
        """The scores of all pairs, when every batch has been added."""
        for pair, branch, source, source_branch in self._arrangement.copies.tolist():
            count = self._lengths[pair, branch]
            start, origin = self._starts[pair, branch], self._starts[source, source_branch]
            self._log_probs[start : start + count] = self._log_probs[origin : origin + count]
            for sums in self._sums.values():
                sums[pair, branch] = sums[source, source_branch]
        chosen, rejected = map(self._branch, BRANCHES)
        return ScoredPairs(chosen, rejected, self._tokens, self._padding)

    def _branch(self, branch: int) -> CompletionScores:
        """The scores of one branch."""
        lengths = self._lengths[:, branch]
        chosen_tokens = int(self._lengths[:, CHOSEN].sum())
        tokens = slice(chosen_tokens, None) if branch == REJECTED else slice(chosen_tokens)
        return CompletionScores(
            log_probs=self._log_probs[tokens],
            lengths=lengths,
            entropy=self._sums["entropy"][:, branch],
            mean_logit=self._sums["mean_logit"][:, branch],
            top1=self._sums["is_top1"][:, branch].astype(np.int64),
            log_sum_sq_prob=self._sums["log_sum_sq_prob"][:, branch],
        )


def score_pairs(table: TokenTable, engine: Engine, *, layout: Layout, token_budget: int) -> ScoredPairs:
    """Score both completions of P pairs under one model.

    Args:
        table: token ids.
        engine: one model's.
        layout: whether the completions share their prompt's computation; the scores are the same.
        token_budget: of a batch, in tokens.

    Raises:
        EngineOutputError: the engine returned NaN, an infinity, or another number of values than was asked for.
    """
    arrangement = arrange(table, layout, token_budget)
    sheet = ScoreSheet(arrangement)
    for batch in make_batches(arrangement, token_budget):
        sheet.add(batch, engine.score(batch))
    return sheet.finish()


def check_scores(scores: TokenScores, batch: Batch, rows: Int64Array) -> TokenScores:
    """Refuse an engine's output that cannot be right.

    Args:
        scores: what the engine says.
        batch: what it was asked.
        rows: (P,) int64, the pairs' rows in the data set.

    Returns:
        The same scores.

    Raises:
        EngineOutputError: with the output's name, the value and the row of the data set.
    """
    wanted = batch.target_ids.size
    for field in fields(scores):
        values = getattr(scores, field.name)
        if values.shape != (wanted,):
            raise EngineOutputError(
                f"row {rows[batch.completions[0, 0]]} and its batch: the engine returned {field.name} of shape "
                f"{list(values.shape)} for {wanted} tokens; nothing of this run can be trusted: export the bundle "
                "again, or use another engine"
            )
        wrong: NDArray[np.bool_] = ~np.isfinite(values)
        if field.name == "log_prob":
            wrong |= values > LOG_PROB_ROUNDING
        if wrong.any():
            position = int(wrong.argmax())
            completion = int(np.searchsorted(np.cumsum(batch.completions[:, 2]), position, side="right"))
            raise EngineOutputError(
                f"row {rows[batch.completions[completion, 0]]}: the engine returned {field.name} {values[position]} "
                f"for the token id {batch.target_ids[position]}; check the weights, or use an engine of higher "
                "precision"
            )
    return scores
