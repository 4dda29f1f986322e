"""Finished runs without a model: what `dpo-fast evaluate` would have written for scores that a test makes up."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from dpo_fast.scores import ScoredPairs
from dpo_fast.store import PAIRS, PartRecord, ScoreStore, row_hash, token_hash
from dpo_fast.token_table import make_table
from dpo_fast.types import CompletionScores, LossSettings, TokenizedPair


def pairs_of(
    count: int,
    *,
    lengths: Any = None,
    groups: Sequence[str] | None = None,
    first_row: int = 1,
    salt: int = 0,
) -> list[TokenizedPair]:
    """Pairs of which no two have a prompt in common; `lengths` (count, 2) tokens of the two completions, 2 and 3."""
    sizes = np.broadcast_to([2, 3], (count, 2)) if lengths is None else np.asarray(lengths)
    return [
        TokenizedPair(
            row=first_row + i,
            prompt_ids=[salt, i],
            chosen_ids=[1] * int(sizes[i, 0]),
            rejected_ids=[2] * int(sizes[i, 1]),
            group=None if groups is None else groups[i],
        )
        for i in range(count)
    ]


def write_run(
    folder: Path,
    pairs: Sequence[TokenizedPair],
    chosen: Any,
    rejected: Any,
    *,
    reference_chosen: Any = None,
    reference_rejected: Any = None,
    loss: LossSettings = LossSettings(),  # noqa: B008, for it is frozen
    part_size: int = 1024,
    group_by: str | None = "kind",
    **provenance: Any,
) -> Path:
    """A run of P pairs: its parts, and as much of metrics.json as is read of a finished run.

    Args:
        folder: to write.
        pairs: the tokens.
        chosen, rejected: (P,) the policy's log-probs of the completions, in nats; kept in float32.
        reference_chosen, reference_rejected: (P,) the reference's; -50 for all where nothing is said.
        loss: what it was evaluated with.
        part_size: pairs of a part.
        group_by: in the provenance.
        provenance: what else shall be there, or there otherwise.
    """
    sides = {
        "policy": (chosen, rejected),
        "reference": tuple(
            np.full(len(pairs), -50.0) if values is None else values
            for values in (reference_chosen, reference_rejected)
        ),
    }
    store = ScoreStore(folder / "scores")
    for part, start in enumerate(range(0, len(pairs), part_size)):
        table = make_table(pairs[start : start + part_size])
        here = slice(start, start + part_size)
        scores = {
            role: ScoredPairs(
                *(completions(values[here], table.lengths[:, 1 + i]) for i, values in enumerate(branches)), 0, 0
            )
            for role, branches in sides.items()
        }
        rows = (start, start + len(table))
        fingerprints = {
            PAIRS: {"token ids": token_hash(table), "row numbers, truncation or groups": row_hash(table, rows)}
        }
        store.write(part, table, scores, PartRecord(fingerprints, rows, 0, 0, 1))
    store.finish()
    metrics = {
        "counts": {"pairs": len(pairs), "skipped": 0},
        "provenance": {
            "settings": asdict(loss),
            "dataset": {"name": "pairs.jsonl", "split": None, "fingerprint": "f", "rows": len(pairs)},
            "engine": "fake 1.0",
            "precision": "fp32",
            "models": {"reference": {"weights_and_graph_sha256": ["r"]}},
            "group_by": group_by,
            **provenance,
        },
    }
    (folder / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    return folder


def completions(log_probs: Any, lengths: Any) -> CompletionScores:
    """One branch: each completion's log-prob spread evenly over its tokens."""
    values = np.asarray(log_probs, np.float64)
    zeros = np.zeros(len(values))
    return CompletionScores(
        log_probs=np.repeat(values / lengths, lengths).astype(np.float32),
        lengths=np.asarray(lengths, np.int64),
        entropy=zeros,
        mean_logit=zeros,
        top1=np.zeros(len(values), np.int64),
        log_sum_sq_prob=zeros,
    )
