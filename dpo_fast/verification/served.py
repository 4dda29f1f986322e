"""A table of pairs through a server that returns log-probs of the tokens that it is sent."""

from collections.abc import Callable

import numpy as np

from dpo_fast.batches import BRANCHES
from dpo_fast.engines.endpoint import EndpointEngine, ServedTokens
from dpo_fast.token_table import CHOSEN, PROMPT, TokenTable
from dpo_fast.verification.types import ScoredTokens


def score_served(
    table: TokenTable, endpoint: EndpointEngine, watch: Callable[[float, int], None] = lambda pairs, tokens: None
) -> tuple[ScoredTokens, ScoredTokens]:
    """Score both completions of P pairs by a server, token ids sent as they are.

    Args:
        table: token ids.
        endpoint: the server.
        watch: told of each sequence: half a pair, and its tokens.

    Returns:
        The chosen completions' tokens, and the rejected ones'; what servers do not say of them is None.

    Raises:
        UsageError, EngineOutputError: as `EndpointEngine.log_probs`.
    """
    chosen, rejected = (_score_branch(table, endpoint, branch, watch) for branch in BRANCHES)
    return chosen, rejected


def _score_branch(
    table: TokenTable, endpoint: EndpointEngine, branch: int, watch: Callable[[float, int], None]
) -> ScoredTokens:
    """One completion of each pair, behind its prompt."""

    def piece(pair: int, column: int) -> list[int]:
        start, length = int(table.starts[pair, column]), int(table.lengths[pair, column])
        ids: list[int] = table.tokens[start : start + length].tolist()
        return ids

    sequences = [
        (piece(pair, PROMPT) + piece(pair, CHOSEN + branch), int(table.lengths[pair, PROMPT]))
        for pair in range(len(table))
    ]
    served: list[ServedTokens] = endpoint.log_probs(sequences, progress=lambda tokens: watch(0.5, tokens))
    log_probs = [tokens.log_probs for tokens in served]
    top1 = [tokens.is_top1 for tokens in served]
    return ScoredTokens(
        # As many as came: whether they are enough is for the integrity check to say.
        offsets=np.concatenate([[0], np.cumsum([len(values) for values in log_probs])]).astype(np.int64),
        log_probs=np.concatenate(log_probs),
        is_top1=None if any(values is None for values in top1) else np.concatenate(top1),  # type: ignore[arg-type]
    )
