"""How near the engines come to the processor's own speed: each CPU recipe's scoring against matrix products alone.

    python benchmarks/roofline.py [--limit 64] [--turns 3] [--recipes cpu-fp32 cpu-int8 …] [--work build/benchmarks]

The needed operations are those that no evaluation can do without: two for each weight and token, the prompt shared, the
embedding (tied to the head) for the targets alone; attention's own products are stated, and not counted. Their time at
the peak of one product (512 rows, the model's hidden by its intermediate size), measured in the same turn, on the same
engine and in the same precision, is the least that scoring can take: the share is that over the time that it took. The
head is timed by itself, cut out of the graph, over the time of its own product: a batch's targets by the vocabulary.

Recipes take turns at all batches; each counts with its fastest turn, and the peak with its highest. Prints a table,
then one JSON line.
"""

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gemm
import numpy as np
from bundles import DATA, WORK, find_bundles, find_models, read_table
from heads import open_head
from rich.console import Console
from rich.table import Table

from dpo_fast.batches import Batch, arrange, make_batches
from dpo_fast.bundle import POLICY, Bundle
from dpo_fast.engines import open_engine
from dpo_fast.engines.base import Engine
from dpo_fast.provenance import hardware
from dpo_fast.recipes import load_recipe

RECIPES = ("cpu-fp32", "cpu-int8", "openvino-bf16")


@dataclass(frozen=True, slots=True)
class Work:
    """What one model is to compute for a list of batches.

    Attributes:
        batches: all pairs.
        body_flop: of the weights before the head.
        head_flop: of the head.
        attention_flop: of attention's products over what each state may see; stated, not counted.
        inner: the hidden size.
        columns: the intermediate size.
        vocabulary: the head's columns.
    """

    batches: Sequence[Batch]
    body_flop: float
    head_flop: float
    attention_flop: float
    inner: int
    columns: int
    vocabulary: int

    @property
    def padding_share(self) -> float:
        """The share of the batches' tokens that is padding."""
        return sum(batch.padding for batch in self.batches) / sum(batch.input_ids.size for batch in self.batches)

    @property
    def targets(self) -> int:
        """Of a batch of middling size."""
        return int(np.median([batch.target_ids.size for batch in self.batches]))


def main() -> None:
    """Race the recipes against their own products, and print how they did."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=64, help="pairs")
    parser.add_argument("--turns", type=int, default=3, help="how often each recipe scores all pairs")
    parser.add_argument("--recipes", nargs="+", default=RECIPES, help="names or files")
    parser.add_argument("--shape", default="smollm2-135m", help="of the random models")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--work", type=Path, default=WORK / "benchmarks")
    arguments = parser.parse_args()

    roles = find_models(arguments.work, arguments.shape, arguments.data)
    bundles = find_bundles(arguments.work, arguments.recipes, roles)
    works = {recipe: plan(bundle, arguments.data, arguments.limit) for recipe, bundle in bundles.items()}
    measured: dict[str, list[dict[str, float]]] = defaultdict(list)
    for turn in range(arguments.turns):
        for recipe, bundle in bundles.items():
            print(f"turn {turn + 1} of {arguments.turns}: {recipe}", file=sys.stderr, flush=True)
            measured[recipe].append(measure(bundle, works[recipe]))
    results = {recipe: summarise(works[recipe], turns) for recipe, turns in measured.items()}
    Console(width=120).print(draw(results, f"{arguments.limit} real pairs, {arguments.shape}, the policy alone"))
    print(json.dumps({"pairs": arguments.limit, "turns": arguments.turns, "recipes": results, "hardware": hardware()}))


def plan(bundle: Bundle, data: Path, limit: int) -> Work:
    """The batches that a bundle's recipe makes of a data set's first pairs, and what they need."""
    config = json.loads((bundle.model_folder(POLICY) / "config.json").read_text(encoding="utf-8"))
    entry, budget = bundle.manifest.models[POLICY], bundle.manifest.recipe["token_budget"]
    batches = list(make_batches(arrange(read_table(bundle, data, limit), entry.layout, budget), budget))
    tokens = sum(batch.input_ids.size - batch.padding for batch in batches)
    targets = sum(batch.target_ids.size for batch in batches)
    hidden: int = config["hidden_size"]
    head = hidden * entry.vocabulary  # tied to the embedding, and counted once among the parameters
    attended = config["num_attention_heads"] * config.get("head_dim", hidden // config["num_attention_heads"])
    return Work(
        batches,
        body_flop=2.0 * (entry.parameters - head) * tokens,
        head_flop=2.0 * head * targets,
        attention_flop=4.0 * config["num_hidden_layers"] * attended * sum(map(visible, batches)),
        inner=hidden,
        columns=config["intermediate_size"],
        vocabulary=entry.vocabulary,
    )


def visible(batch: Batch) -> int:
    """How many states the states of a batch see: themselves, what precedes them in their segment, and the prompt."""
    real = batch.segment_ids >= 0
    return int((batch.position_ids[real] + 1).sum())


def measure(bundle: Bundle, work: Work) -> dict[str, float]:
    """One turn: seconds of all batches, and of their heads alone; the products' speeds in operations a second."""
    recipe = bundle.manifest.recipe
    engine_name, body, head = recipe["engine"], *precisions(recipe)
    peaks = {
        "body": gemm.peak(engine_name, body, work.inner, work.columns),
        "head": gemm.peak(engine_name, head, work.inner, work.columns),
        "head_product": gemm.peak(engine_name, head, work.inner, work.vocabulary, rows=work.targets),
    }
    engine, head_alone = open_engine(bundle, POLICY), open_head(bundle)
    middle = work.batches[len(work.batches) // 2]
    engine.score(middle)  # the first one sets up what later ones find
    head_alone([middle])
    return {"score": seconds(engine, work.batches), "head": head_alone(work.batches)} | {
        f"{name}_peak": value for name, value in peaks.items()
    }


def precisions(recipe: dict[str, Any]) -> tuple[str, str]:
    """In which the products before the head are computed, and in which the head's."""
    if recipe["engine"] == "openvino":  # the head is float32; int8 weights are widened
        return ("fp32" if recipe["precision"] == "fp32" else "bf16"), "fp32"
    integers = recipe["precision"] == "int8"
    return ("int8" if integers else "fp32"), ("int8" if integers and recipe["head_precision"] == "int8" else "fp32")


def seconds(engine: Engine, batches: Sequence[Batch]) -> float:
    """To score all batches once."""
    started = time.perf_counter()
    for batch in batches:
        engine.score(batch)
    return time.perf_counter() - started


def summarise(work: Work, turns: list[dict[str, float]]) -> dict[str, float]:
    """A recipe's result: its fastest turn against the highest peaks."""
    score, head = (min(turn[name] for turn in turns) for name in ("score", "head"))
    peaks = {name: max(turn[f"{name}_peak"] for turn in turns) for name in ("body", "head", "head_product")}
    least = work.body_flop / peaks["body"] + work.head_flop / peaks["head"]
    return {
        "score_seconds": score,
        "needed_tflop": (work.body_flop + work.head_flop) / 1e12,
        "attention_tflop_not_counted": work.attention_flop / 1e12,
        "gemm_peak_gflop_per_second": peaks["body"] / 1e9,
        "seconds_at_gemm_peak": least,
        "share_of_gemm_peak": least / score,
        "head_seconds": head,
        "head_product_gflop_per_second": peaks["head_product"] / 1e9,
        "head_time_over_its_product": head / (work.head_flop / peaks["head_product"]),
        "padding_share": work.padding_share,
        "batches": len(work.batches),
    }


def draw(results: dict[str, dict[str, float]], title: str) -> Table:
    """One table, a row a recipe."""
    table = Table(title=title, title_justify="left")
    columns = ("recipe", "scoring s", "peak GFLOP/s", "s at peak", "share", "head s", "head / product", "padding")
    for column in columns:
        table.add_column(column, justify="left" if column == "recipe" else "right")
    for recipe, result in results.items():
        table.add_row(
            load_recipe(recipe).name,
            f"{result['score_seconds']:.2f}",
            f"{result['gemm_peak_gflop_per_second']:.0f}",
            f"{result['seconds_at_gemm_peak']:.2f}",
            f"{result['share_of_gemm_peak']:.0%}",
            f"{result['head_seconds']:.2f}",
            f"{result['head_time_over_its_product']:.2f}",
            f"{result['padding_share']:.1%}",
        )
    return table


if __name__ == "__main__":
    main()
