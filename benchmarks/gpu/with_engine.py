"""A recipe's engine on a bundle of both models: batches laid out, scored and put in order, as an evaluation does."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dpo_fast.batches import arrange, longest_row, make_batches
from dpo_fast.bundle import POLICY, REFERENCE, Bundle, open_bundle
from dpo_fast.engines import open_engine
from dpo_fast.engines.base import Engine, PipelinedEngine
from dpo_fast.scores import ScoreSheet
from dpo_fast.token_table import TokenTable
from dpo_fast.types import CompletionScores, Float64Array
from gpu.pairs import read_pairs
from gpu.turns import score_both, timed_turns


def run(*, bundle: str, data: str, pairs: int, turns: int, log_probs: str, started: float) -> Iterator[dict[str, Any]]:
    """Score a preference set under both models.

    Args:
        bundle: with plans, where its engine runs such.
        data: the preference set.
        pairs: of which so many are scored.
        turns: timed ones.
        log_probs: file to write, as `gpu.turns.score_both`.
        started: when the process was, in seconds since the epoch.
    """
    opened = open_bundle(Path(bundle))
    table = read_pairs(opened.model_folder(POLICY), Path(data), pairs)
    names: list[str] = []

    def score_role(role: str) -> tuple[Float64Array, list[float]]:
        engine = open_engine(opened, role)
        names.append(engine.name)
        return timed_turns(partial(score, engine, opened, role, table), turns)

    result = score_both(score_role, (POLICY, REFERENCE), Path(log_probs), started)
    recipe = opened.manifest.recipe
    yield {**result, "engine": names[0], "token_budget": recipe["token_budget"]}


def score(engine: Engine, bundle: Bundle, role: str, table: TokenTable) -> Float64Array:
    """The log-prob of each completion, (P, 2), in nats: chosen and rejected."""
    layout = bundle.manifest.models[role].layout
    token_budget = bundle.manifest.recipe["token_budget"]
    # Rows of many pairs are no wider than rows of one may be: engines are built for widths.
    arrangement = arrange(table, layout, min(token_budget, longest_row(layout, bundle.manifest.max_length)))
    batches = list(make_batches(arrangement, token_budget))
    sheet = ScoreSheet(arrangement)
    said_of_each = engine.score_all(batches) if isinstance(engine, PipelinedEngine) else map(engine.score, batches)
    for batch, said in zip(batches, said_of_each, strict=True):
        sheet.add(batch, said)
    scored = sheet.finish()
    return np.column_stack([sum_log_probs(scored.chosen), sum_log_probs(scored.rejected)])


def sum_log_probs(scores: CompletionScores) -> Float64Array:
    """The log-prob of each completion, (P,), in nats."""
    ends = np.concatenate([[0], np.cumsum(scores.log_probs, dtype=np.float64)])
    last = np.cumsum(scores.lengths)
    sums: Float64Array = ends[last] - ends[last - scores.lengths]
    return sums
