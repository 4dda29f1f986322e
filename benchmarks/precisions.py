"""What each precision gains and costs on the CPU: seconds, and errors against cpu-fp32, in one run on real pairs.

    python benchmarks/precisions.py [--limit 64] [--turns 5] [--recipes cpu-fp32 cpu-int8 …] [--work build/precisions]

It needs `make_model.py` and the preference data, which lie beside the project. Weights are random, so that the speed is
a real model's and the errors are not: they say how the precisions compare, not what they will be. `--policy` and
`--reference` name a trained model instead.

Recipes take turns at all pairs, several times over, and each batch counts with its fastest turn: what other processes
take of the machine falls on all alike, and mostly out. Prints a table, then one JSON line.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from dpo_fast.batches import Batch
from dpo_fast.bundle import POLICY, REFERENCE, Bundle, open_bundle
from dpo_fast.engines import open_engines
from dpo_fast.engines.base import Engine
from dpo_fast.preferences import load_preferences
from dpo_fast.provenance import hardware
from dpo_fast.scores import ScoredPairs, score_pairs
from dpo_fast.tokens import load_tokenizer, tokenize
from dpo_fast.types import Float64Array, TokenizedPair, TokenScores

PROJECT = Path(__file__).parents[1]
EXACT = "cpu-fp32"
RECIPES = (EXACT, "cpu-int8", "cpu-int4", "openvino-bf16", "openvino-int8")


def main() -> None:
    """Export with each recipe, race them, compare their scores and print both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=64, help="pairs")
    parser.add_argument("--turns", type=int, default=5, help="how often each recipe scores all pairs")
    parser.add_argument("--recipes", nargs="+", default=RECIPES, help=f"names or files, {EXACT} among them")
    parser.add_argument("--shape", default="smollm2-135m", help="of the random models")
    parser.add_argument("--policy", help="a trained model instead, with --reference")
    parser.add_argument("--reference")
    parser.add_argument("--baselines", type=Path, default=PROJECT.parent / "shared" / "bench")
    parser.add_argument("--data", type=Path, default=PROJECT.parent / "shared/data/hh-harmless-base-test.jsonl.gz")
    parser.add_argument("--work", type=Path, default=PROJECT / "build" / "precisions")
    arguments = parser.parse_args()
    if EXACT not in arguments.recipes:
        parser.error(f"--recipes: {EXACT} is what the others are compared with")
    if (arguments.policy is None) != (arguments.reference is None):
        parser.error("--policy and --reference belong together")
    if not arguments.data.exists():
        sys.exit(f"{arguments.data}: not found; name it with --data")

    models = arguments.work / arguments.shape
    policy, reference = arguments.policy or models / "policy", arguments.reference or models / "reference"
    if arguments.policy is None and not models.exists():
        call(
            [
                arguments.baselines / "make_model.py",
                "--shape",
                arguments.shape,
                "--data",
                arguments.data,
                "--out",
                models,
            ]
        )
    bundles = {}
    for recipe in arguments.recipes:
        folder = arguments.work / f"{Path(policy).resolve().parent.name}-{Path(recipe).stem}"
        if not folder.exists():
            roles = ["--policy", policy, "--reference", reference]
            call(["-m", "dpo_fast.export", *roles, "--output", folder, "--recipe", recipe])
        bundles[recipe] = open_bundle(folder)
    pairs = read_pairs(bundles[EXACT], arguments.data, arguments.limit)
    runs: dict[str, Run] = {}
    for turn in range(arguments.turns):
        for recipe, bundle in bundles.items():
            print(f"turn {turn + 1} of {arguments.turns}: {recipe}", file=sys.stderr, flush=True)
            runs[recipe] = score(bundle, pairs, runs.get(recipe))
    results = {
        recipe: {
            "engine": run.engine,
            "score_seconds": run.seconds,
            "speed_ratio_to_cpu_fp32": runs[EXACT].seconds / run.seconds,
            **compare(run.scores, runs[EXACT].scores),
        }
        for recipe, run in runs.items()
    }
    title = f"{len(pairs)} real pairs, {arguments.policy or arguments.shape}, both models"
    Console(width=120).print(draw(results, title))
    if arguments.policy is None:
        print("Random weights: the speed is a real model's, the errors are not.")
    print(json.dumps({"pairs": len(pairs), "turns": arguments.turns, "recipes": results, "hardware": hardware()}))


def call(arguments: list[Any]) -> None:
    """Run Python with arguments, or stop with what it says."""
    shown = " ".join(Path(str(part)).name for part in arguments)
    print(f"running {shown} …", file=sys.stderr, flush=True)
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, env=environment, check=False)
    if done.returncode != 0:
        sys.exit(f"{done.stderr.decode()}\nfailed: {shown}")


def read_pairs(bundle: Bundle, data: Path, limit: int) -> list[TokenizedPair]:
    """The first pairs of a data set as token ids."""
    tokenizer = load_tokenizer(bundle.model_folder(POLICY))
    rows = load_preferences(str(data), limit=limit).rows()
    tokenized = tokenize(rows, tokenizer, max_length=bundle.manifest.max_length)
    return [pair for pair in tokenized if isinstance(pair, TokenizedPair)]


@dataclass(frozen=True, slots=True)
class Run:
    """What a recipe said of all pairs, and how fast.

    Attributes:
        engine: its name and version.
        scores: by role.
        fastest: the fastest time of each batch so far in seconds, the policy's batches first.
    """

    engine: str
    scores: dict[str, ScoredPairs]
    fastest: Float64Array

    @property
    def seconds(self) -> float:
        """To score all pairs under both models: the sum of each batch's fastest turn."""
        return float(self.fastest.sum())


class Stopwatch:
    """An engine, and how long each batch took it, in seconds."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.name, self.precision = engine.name, engine.precision
        self.seconds: list[float] = []

    def score(self, batch: Batch) -> TokenScores:
        """Score a batch, and note the time."""
        started = time.perf_counter()
        scores = self._engine.score(batch)
        self.seconds.append(time.perf_counter() - started)
        return scores

    def with_gates(self, gates: Sequence[float]) -> "Stopwatch":
        """The engine with other adapters turned on."""
        return Stopwatch(self._engine.with_gates(gates))


def score(bundle: Bundle, pairs: list[TokenizedPair], before: Run | None) -> Run:
    """One recipe's turn. Its engines are loaded for it alone: idle ones would keep threads and memory."""
    engines = {role: Stopwatch(engine) for role, engine in open_engines(bundle, [POLICY, REFERENCE]).items()}
    manifest = bundle.manifest
    budget = manifest.recipe["token_budget"]
    scores = {
        role: score_pairs(pairs, engine, layout=manifest.models[role].layout, token_budget=budget)
        for role, engine in engines.items()
    }
    seconds = np.concatenate([engine.seconds for engine in engines.values()])
    fastest = seconds if before is None else np.minimum(before.fastest, seconds)
    return Run(engines[POLICY].name, scores, fastest)


def compare(found: dict[str, ScoredPairs], exact: dict[str, ScoredPairs]) -> dict[str, float]:
    """Absolute errors in nats: of tokens, of sequences, of margins of log-ratios; and what they do to the accuracy."""
    tokens = np.concatenate(
        [
            np.abs(getattr(found[role], branch).log_probs - getattr(exact[role], branch).log_probs)
            for role in found
            for branch in ("chosen", "rejected")
        ]
    )
    sums, exact_sums = sequence_log_probs(found), sequence_log_probs(exact)
    sequences = np.concatenate([np.abs(sums[key] - exact_sums[key]) for key in sums])
    margin, exact_margin = margins(sums), margins(exact_sums)
    of_margins = np.abs(margin - exact_margin)
    return {
        "token_error_mean_nats": float(tokens.mean()),
        "token_error_largest_nats": float(tokens.max()),
        **spread("sequence_error", sequences),
        **spread("margin_error", of_margins),
        "margin_magnitude_mean_nats": float(np.abs(exact_margin).mean()),
        "accuracy": float((margin > 0).mean()),
        "accuracy_change": float((margin > 0).mean() - (exact_margin > 0).mean()),
        "share_of_pairs_decided_otherwise": float(((margin > 0) != (exact_margin > 0)).mean()),
    }


def sequence_log_probs(scores: dict[str, ScoredPairs]) -> dict[tuple[str, str], Float64Array]:
    """The log-prob of each completion, in nats, by role and branch."""
    sums = {}
    for role, scored in scores.items():
        for branch in ("chosen", "rejected"):
            completions = getattr(scored, branch)
            ends = np.concatenate([[0], np.cumsum(completions.log_probs, dtype=np.float64)])
            last = np.cumsum(completions.lengths)
            sums[role, branch] = ends[last] - ends[last - completions.lengths]
    return sums


def margins(sums: dict[tuple[str, str], Float64Array]) -> Float64Array:
    """Log-ratio of chosen minus log-ratio of rejected, in nats: the reward margin at beta 1."""
    return (sums[POLICY, "chosen"] - sums[REFERENCE, "chosen"]) - (
        sums[POLICY, "rejected"] - sums[REFERENCE, "rejected"]
    )


def spread(name: str, errors: Float64Array) -> dict[str, float]:
    """Mean, 99th percentile and largest."""
    return {
        f"{name}_mean_nats": float(errors.mean()),
        f"{name}_p99_nats": float(np.quantile(errors, 0.99)),
        f"{name}_largest_nats": float(errors.max()),
    }


def draw(results: dict[str, dict[str, Any]], title: str) -> Table:
    """One table: what is gained, and what it costs."""
    table = Table(title=title, caption="errors in nats: mean / 99th percentile / largest", title_justify="left")
    for column in ("recipe", "scoring s", "times fp32", "token", "sequence log-prob", "margin", "accuracy"):
        table.add_column(column, justify="left" if column == "recipe" else "right")
    for recipe, result in results.items():
        table.add_row(
            recipe,
            f"{result['score_seconds']:.2f}",
            f"{result['speed_ratio_to_cpu_fp32']:.2f}",
            f"{result['token_error_mean_nats']:.2g} / {result['token_error_largest_nats']:.2g}",
            " / ".join(f"{result[f'sequence_error_{each}_nats']:.2g}" for each in ("mean", "p99", "largest")),
            " / ".join(f"{result[f'margin_error_{each}_nats']:.2g}" for each in ("mean", "p99", "largest")),
            f"{result['accuracy']:.3f} ({result['accuracy_change']:+.3f})",
        )
    return table


if __name__ == "__main__":
    main()
