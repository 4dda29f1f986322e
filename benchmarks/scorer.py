"""The scorer at a million pairs: every loss at five betas, with every metric and interval, from the parts on disk.

    python benchmarks/scorer.py [--pairs 1000000] [--tokens 100] [--work build/scorer]

Writes a run of random scores, once; its completions have `--tokens` scored tokens each on average, from half to one
and a half of that, and are scored by policy and reference. Then `dpo-fast rescore` runs in a process of its own, whose
wall time includes start-up and output. The parts come from the page cache if memory holds them, as they do after an
evaluation. Prints a table, then one JSON line.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from dpo_fast.bundle import POLICY, REFERENCE
from dpo_fast.files import write_json
from dpo_fast.provenance import hardware
from dpo_fast.run_folder import METRICS, SCORES
from dpo_fast.scores import ScoredPairs
from dpo_fast.store import PART_ROWS, PartRecord, ScoreStore
from dpo_fast.token_table import TokenTable
from dpo_fast.types import CompletionScores, Float32Array, Int64Array, LossSettings

PROJECT = Path(__file__).parents[1]
VOCABULARY = 50_000
BETAS = "0.01,0.05,0.1,0.2,0.5"
PHASES = {
    "read_seconds": "reading and summing the parts",
    "loss_seconds": "losses and rewards",
    "interval_seconds": "intervals",
    "group_seconds": "groups",
}


def main() -> None:
    """Write the run, if it is not there, rescore it, and print what that took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=1_000_000)
    parser.add_argument("--tokens", type=int, default=100, help="of a completion, on average")
    parser.add_argument("--work", type=Path, default=PROJECT / "build" / "scorer")
    arguments = parser.parse_args()
    run = arguments.work / f"{arguments.pairs}x{arguments.tokens}"
    if not (run / METRICS).exists():
        write_run(run, arguments.pairs, arguments.tokens)

    command = ["rescore", str(run), "--beta", BETAS, "--loss-type", "all", "--json"]
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "dpo_fast", *command], capture_output=True, check=False)
    wall_seconds = time.perf_counter() - started
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != 0:
        sys.exit(done.stderr.decode())
    rescored = json.loads(done.stdout)
    timing = rescored["timing"]
    tokens = sum(rescored["counts"]["tokens"][branch] for branch in ("chosen", "rejected"))
    result = {
        "pairs": arguments.pairs,
        "log_prob_bytes": 2 * 4 * tokens,
        "part_bytes": sum(path.stat().st_size for path in (run / SCORES).glob("part-*.parquet")),
        "results": len(rescored["results"]),
        "intervals": sum(each["interval"] is not None for each in rescored["results"]),
        "wall_seconds": wall_seconds,
        **{phase: timing[phase] for phase in PHASES},
        "start_and_output_seconds": wall_seconds - timing["total_seconds"],
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "peak_memory_bytes": used.ru_maxrss * 1024,
        "hardware": hardware(),
    }
    title = f"{arguments.pairs:,} pairs, {result['results']} results at betas {BETAS}"
    Console(width=110).print(draw(result, title))
    print(json.dumps(result))


def draw(result: dict[str, Any], title: str) -> Table:
    """What the time went to, and the memory."""
    table = Table(title=title, title_justify="left")
    table.add_column("phase")
    table.add_column("", justify="right")
    for phase, name in PHASES.items():
        table.add_row(name, f"{result[phase]:.1f} s")
    table.add_row("start and output", f"{result['start_and_output_seconds']:.1f} s", end_section=True)
    table.add_row("wall time", f"{result['wall_seconds']:.1f} s")
    table.add_row("processor time", f"{result['cpu_seconds']:.1f} s")
    table.add_row("peak memory", f"{result['peak_memory_bytes'] / 1e9:.2f} GB", end_section=True)
    table.add_row("log-probs read", f"{result['log_prob_bytes'] / 1e9:.2f} GB")
    table.add_row("size of the parts", f"{result['part_bytes'] / 1e9:.2f} GB")
    return table


def write_run(run: Path, pairs: int, tokens: int) -> None:
    """A finished run of random scores, part by part; metrics.json comes last and says no more than a rescore needs."""
    store = ScoreStore(run / SCORES)
    store.clear()
    for part, start in enumerate(tqdm(range(0, pairs, PART_ROWS), desc="writing", unit=" parts", disable=None)):
        stop = min(start + PART_ROWS, pairs)
        generator = np.random.default_rng([part, tokens])
        lengths = generator.integers(tokens // 2, tokens + tokens // 2 + 1, (stop - start, 3))
        table = TokenTable(
            rows=np.arange(start + 1, stop + 1),
            lengths=lengths,
            tokens=generator.integers(VOCABULARY, size=int(lengths.sum()), dtype=np.int32),
            truncated=generator.random(stop - start) < 0.01,
            groups=[None] * (stop - start),
        )
        record = PartRecord(fingerprints={}, rows=(start, stop), tokens=0, padding=0, token_budget=0)
        store.write(part, table, make_scores(table, generator), record)
    provenance = {"dataset": {"name": f"synthetic {pairs:,} x {tokens}"}, "settings": asdict(LossSettings())}
    write_json(run / METRICS, {"counts": {"pairs": pairs, "skipped": 0}, "provenance": provenance})


def make_scores(table: TokenTable, generator: np.random.Generator) -> dict[str, ScoredPairs]:
    """Scores by both models, which differ by some 0.1 nats a token; the policy mostly prefers the chosen completion."""
    branches: dict[str, list[CompletionScores]] = {POLICY: [], REFERENCE: []}
    for lengths, preference in zip(table.scored_lengths.T, (0.01, -0.01), strict=True):
        count = int(lengths.sum())
        reference = -2.0 * generator.standard_exponential(count, np.float32)
        moved = preference + 0.1 * generator.standard_normal(count, np.float32)
        branches[REFERENCE].append(completions(reference, lengths, generator))
        branches[POLICY].append(completions(np.minimum(reference + moved, np.float32(0)), lengths, generator))
    return {role: ScoredPairs(chosen, rejected, 0, 0) for role, (chosen, rejected) in branches.items()}


def completions(log_probs: Float32Array, lengths: Int64Array, generator: np.random.Generator) -> CompletionScores:
    """Log-probs, and random sums that go with them."""
    pairs = len(lengths)
    return CompletionScores(
        log_probs=log_probs,
        lengths=lengths,
        entropy=lengths * generator.uniform(0.0, 4.0, pairs),
        mean_logit=lengths * generator.normal(0.0, 3.0, pairs),
        top1=generator.integers(0, lengths + 1),
        log_sum_sq_prob=-lengths * generator.uniform(0.0, 3.0, pairs),
    )


if __name__ == "__main__":
    main()
