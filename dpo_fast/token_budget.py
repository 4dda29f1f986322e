"""How many tokens a batch should have: measured, on the engine and the pairs at hand."""

import time
from collections.abc import Iterator

from dpo_fast.batches import Batch, Layout, arrange, make_batches
from dpo_fast.engines.base import Engine
from dpo_fast.errors import EngineOutputError
from dpo_fast.token_table import TokenTable

SMALLEST, LARGEST = 256, 65_536  # tokens
TURNS = 3
WORSE = 1.05  # times the best time a token: larger budgets are not tried
AS_GOOD = 1.02  # times the best: the smallest such budget is taken, for it needs the least memory


def tune_token_budget(engine: Engine, table: TokenTable, layout: Layout) -> int:
    """The token budget at which an engine is fastest.

    Budgets are doubled until the time a token rises. Each is timed on the batch in the middle, of those from the
    longest to the shortest; padding is not counted as work; best of three, after one that is not timed.

    Args:
        engine: the one to be tuned for.
        table: pairs that it will score, such as a run's first part.
        layout: of the rows.

    Returns:
        The smallest budget that is within 2 % of the fastest, in tokens.

    Raises:
        EngineOutputError: the engine fails at the smallest budget.
    """
    seconds: dict[int, float] = {}  # a token, by budget
    for budget in _candidates(table):
        batch = _middle(table, layout, budget)
        try:
            engine.score(batch)
            seconds[budget] = min(_time(engine, batch) for _ in range(TURNS)) / (batch.input_ids.size - batch.padding)
        except EngineOutputError:  # most likely for want of memory
            if not seconds:
                raise
            break
        if seconds[budget] > WORSE * min(seconds.values()):
            break
    fastest = min(seconds.values())
    return min(budget for budget, time_of_token in seconds.items() if time_of_token <= AS_GOOD * fastest)


def _candidates(table: TokenTable) -> Iterator[int]:
    """Powers of two up to the first that takes in half of the pairs: of a larger one there is nothing to measure."""
    budget = SMALLEST
    yield budget
    while budget < LARGEST and budget * 2 <= table.tokens.size // 2:
        budget *= 2
        yield budget


def _middle(table: TokenTable, layout: Layout, budget: int) -> Batch:
    """The batch in the middle, of those that the pairs make from the longest to the shortest."""
    batches = list(make_batches(arrange(table, layout, budget), budget))
    return batches[len(batches) // 2]


def _time(engine: Engine, batch: Batch) -> float:
    """Seconds for one batch."""
    started = time.perf_counter()
    engine.score(batch)
    return time.perf_counter() - started
