"""Runs whose scores are drawn, not computed: any number of pairs in seconds, in the files that `evaluate` writes."""

from dataclasses import asdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dpo_fast.bundle import POLICY, REFERENCE, open_bundle
from dpo_fast.evaluate import EvaluateOptions, metrics_of
from dpo_fast.metrics.sums import segment_sums
from dpo_fast.run_folder import SCORES, write_results
from dpo_fast.scores import ScoredPairs
from dpo_fast.store import PART_ROWS, PartRecord, ScoreStore
from dpo_fast.token_table import TokenTable
from dpo_fast.types import CompletionScores, LossSettings


def make_run(
    folder: Path, bundle: Path, table: TokenTable, settings: LossSettings | None = None, seed: int = 0
) -> Path:
    """Write a finished run of these pairs: the policy likes chosen tokens a little, and length a little."""
    settings = settings or LossSettings()
    generator = np.random.default_rng(seed)
    store = ScoreStore(folder / SCORES)
    for part, start in enumerate(range(0, len(table), PART_ROWS)):
        rows = table.slice(start, start + PART_ROWS)
        scores = {}
        chosen, rejected = (
            reference_log_probs(generator, int(rows.scored_lengths[:, branch].sum())) for branch in (0, 1)
        )
        if settings.reference_free is None:
            scores[REFERENCE] = scored(rows, chosen, rejected)
        scores[POLICY] = scored(rows, moved(generator, chosen, 0.06), moved(generator, rejected, -0.02))
        store.write(part, rows, scores, PartRecord({}, (start, start + len(rows)), 0, 0, 512))
    store.finish()
    groups = all(group is not None for group in table.groups)
    metrics = metrics_of(store.read(), EvaluateOptions(loss=settings))
    metrics["counts"]["skipped"] = 0
    metrics["timing"] = {}
    opened = open_bundle(bundle)
    metrics["provenance"] = {
        "versions": {"dpo-fast": "0.1.0"},
        "hardware": {"processor": "none", "cores": 2, "system": "Linux x86_64"},
        "engine": "fake 1.0",
        "precision": "fp32",
        "recipe": "fake",
        "models": {
            role: {"source": role, "revision": None, "weights_and_graph_sha256": opened.role_hashes(role)}
            for role in (POLICY, REFERENCE)
            if role in scores
        },
        "dataset": {"name": "pairs.jsonl", "split": None, "fingerprint": "none", "rows": len(table)},
        "settings": asdict(settings),
        "aggregate": "exact",
        "batch_size": None,
        "bootstrap_seed": 0,
        "group_by": "kind" if groups else None,
        "max_length": 64,
    }
    write_results(folder, metrics, [])
    return folder


def reference_log_probs(generator: np.random.Generator, tokens: int) -> NDArray[np.float32]:
    return -generator.gamma(1.0, 2.0, tokens).astype(np.float32)


def moved(generator: np.random.Generator, log_probs: NDArray[np.float32], by: float) -> NDArray[np.float32]:
    """What training did to them; a log-prob stays at most 0."""
    step = generator.standard_t(4, len(log_probs)) * 0.25 + by
    return np.minimum(log_probs + step.astype(np.float32), 0)


def scored(table: TokenTable, chosen: NDArray[np.float32], rejected: NDArray[np.float32]) -> ScoredPairs:
    def branch(log_probs: NDArray[np.float32], number: int) -> CompletionScores:
        lengths = table.scored_lengths[:, number]
        sums = segment_sums(log_probs, lengths)
        return CompletionScores(log_probs, lengths, -sums, sums * 0, lengths // 2, sums)

    return ScoredPairs(branch(chosen, 0), branch(rejected, 1), 0, 0)


def make_table(pairs: int, ids: NDArray[np.int32], *, tokens: int = 8, subsets: int = 4, seed: int = 0) -> TokenTable:
    """Pairs of some `tokens` tokens a piece, drawn from `ids`."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(tokens // 2, 3 * tokens // 2 + 1, (pairs, 3))
    return TokenTable(
        rows=np.arange(1, pairs + 1),
        lengths=lengths,
        tokens=generator.choice(ids, int(lengths.sum())).astype(np.int32),
        truncated=generator.random(pairs) < 0.02,
        groups=[f"subset {number}" for number in generator.integers(0, subsets, pairs)],
    )
