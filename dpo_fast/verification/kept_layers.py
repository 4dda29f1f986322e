"""Which layers suffer most from fewer bits, and what it costs to keep them exact.

Each layer is quantised alone, the rest exact, which ranks them. Then the worst 0, 1, 2, 4, … layers are kept exact and
everything else is quantised as the recipe has it. Both are graphs that `dpo_fast.export.precision` makes, by a recipe's
`exact_layers`, so that what is measured is what an export with that recipe gives.
"""

import copy
import json
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from dpo_fast.batches import Batch
from dpo_fast.bundle import POLICY, REFERENCE, Bundle
from dpo_fast.engines import load_engine
from dpo_fast.engines.base import Engine
from dpo_fast.engines.onnxruntime import CPU, OnnxRuntimeEngine, failed, gated_inputs, open_session, session_options
from dpo_fast.errors import UsageError
from dpo_fast.export.precision import layer_numbers, make_engine_graph
from dpo_fast.files import copy_file, make_folder, storage_errors
from dpo_fast.metrics.sums import segment_sums
from dpo_fast.recipes import COMMON, ENGINES, OPTIONAL, Recipe
from dpo_fast.scores import ScoredPairs, score_pairs
from dpo_fast.token_table import TokenTable, make_table
from dpo_fast.types import Float64Array, TokenizedPair, TokenScores

TIMED = 2  # passes over the pairs, of which the faster counts


@dataclass(frozen=True, slots=True)
class LayerCost:
    """What quantising one layer alone does.

    Attributes:
        layer: counted from 0.
        mean_error: absolute error of the tokens' log-probs, nats a token, over all models and both completions.
    """

    layer: int
    mean_error: float


@dataclass(frozen=True, slots=True)
class Trade:
    """What keeping some layers exact gives and costs.

    Attributes:
        exact_layers: those kept, in order.
        mean_error: absolute error of the tokens' log-probs against the exact graph's, nats a token.
        flips: pairs whose margin has another sign than the exact graph's.
        pairs: how many were scored.
        seconds_per_token: that the engine took for a token of a row, padding not counted; None where the engine itself
            does not run here, and something slower computed its numbers.
    """

    exact_layers: tuple[int, ...]
    mean_error: float
    flips: int
    pairs: int
    seconds_per_token: float | None


@dataclass(frozen=True, slots=True)
class KeptLayers:
    """What has been tried.

    Attributes:
        recipe: the bundle's, with no layer kept exact.
        ranking: every layer, the one that costs most first.
        trades: by how many layers are kept, from none to all.
    """

    recipe: Recipe
    ranking: tuple[LayerCost, ...]
    trades: tuple[Trade, ...]

    def worst(self, count: int) -> tuple[int, ...]:
        """The numbers of so many of the worst layers, in order.

        Raises:
            UsageError: the model has fewer.
        """
        if not 0 <= count <= len(self.ranking):
            raise UsageError(f"{count} layers cannot be kept exact: the model has {len(self.ranking)}")
        return tuple(sorted(cost.layer for cost in self.ranking[:count]))

    def recipe_text(self, count: int) -> str:
        """A recipe as TOML, ready to be exported with, that keeps so many of the worst layers exact.

        Raises:
            UsageError: the model has fewer.
        """
        return recipe_text(replace(self.recipe, exact_layers=self.worst(count)))


def recipe_text(recipe: Recipe) -> str:
    """A recipe as TOML; its name will be its file's."""
    optional = [key for key in OPTIONAL if getattr(recipe, key)]
    lines = []
    for key in (*COMMON, *ENGINES[recipe.engine][recipe.precision], *optional):
        # JSON's texts, numbers, booleans and lists of them are TOML's, but for one character.
        value = json.dumps(getattr(recipe, key), ensure_ascii=False).replace("\x7f", "\\u007f")
        lines.append(f"{key} = {value}\n")
    return "".join(lines)


def try_kept_layers(
    bundle: Bundle,
    pairs: Sequence[TokenizedPair],
    *,
    calibration: Sequence[TokenizedPair] | None = None,
    threads: int = 0,
    report: Callable[[str], None] = lambda step: None,
) -> KeptLayers:
    """Measure what each layer's quantisation costs, and what keeping the worst layers exact gives.

    Graphs and quantised weights are made in a temporary folder beside the bundle, one at a time; the bundle's own
    files are linked there, or copied where the disk takes no links. A bundle of L layers is scored some L + 2 log2 L
    times.

    Args:
        bundle: of a recipe in int8, int4 or fp8.
        pairs: a few, of the kind that the engine will score.
        calibration: pairs that fp8's scales are chosen from; None takes `pairs`.
        threads: as `dpo_fast.engines.load_engine`.
        report: called with a line at each step.

    Raises:
        UsageError: there are no pairs, or the recipe quantises nothing.
        StorageError: the disk refused.
        EngineOutputError: an engine failed, or returned what cannot be right.
        MissingDependencyError: the recipe's engine is not installed.
    """
    recipe = replace(Recipe(**bundle.manifest.recipe), exact_layers=())
    if recipe.precision not in OPTIONAL["exact_layers"]:
        raise UsageError(
            f"{bundle.folder}: its recipe, {recipe.name}, is in {recipe.precision}, which has no exact_layers; "
            f"export the bundle with a recipe in {', '.join(OPTIONAL['exact_layers'])}"
        )
    if not pairs:
        raise UsageError("layers are tried on pairs, and there are none; name a data set that has some")
    with _bench(bundle, pairs, calibration or pairs, threads) as bench:
        layers = bench.layers()
        costs = []
        for layer in layers:
            report(f"quantising layer {layer} of {len(layers)} alone")
            others = tuple(other for other in layers if other != layer)
            alone = replace(recipe, head_precision="fp32", exact_layers=others)
            costs.append(LayerCost(layer, bench.measure(alone, timed=False).mean_error))
        ranking = tuple(sorted(costs, key=lambda cost: -cost.mean_error))
        found = KeptLayers(recipe, ranking, ())
        trades = []
        for count in _counts(len(layers)):
            report(f"keeping {count} of {len(layers)} layers exact")
            trades.append(bench.measure(replace(recipe, exact_layers=found.worst(count)), timed=True))
    return replace(found, trades=tuple(trades))


def _counts(layers: int) -> list[int]:
    """None, the powers of two, all."""
    return [0, *(2**power for power in range(layers.bit_length()) if 2**power < layers), layers]


@dataclass(frozen=True, slots=True)
class _Scored:
    """All models' scores of the pairs.

    Attributes:
        log_probs: (N,) float64, nats, of the tokens of all models and branches.
        margins: (P,) float64, nats: the chosen completion's log-prob less the rejected one's, less the reference's.
        seconds: that scoring took.
        tokens: that were computed, padding not counted.
    """

    log_probs: Float64Array
    margins: Float64Array
    seconds: float
    tokens: int


class _Bench:
    """A folder with a bundle's exact graphs and weights, in which graphs of other recipes are made and run."""

    def __init__(
        self,
        bundle: Bundle,
        folder: Path,
        pairs: Sequence[TokenizedPair],
        calibration: Sequence[TokenizedPair],
        threads: int,
    ) -> None:
        self._bundle, self._folder, self._calibration, self._threads = bundle, folder, calibration, threads
        self._models = bundle.manifest.models
        self._table: TokenTable = make_table(pairs)
        self._made = 0
        self._exact = self._score(
            {
                graph: OnnxRuntimeEngine(folder / graph, gates=gates, threads=threads)
                for graph, gates in self._graphs().items()
            },
            passes=1,
        )

    def _graphs(self) -> dict[str, list[float] | None]:
        """The exact graphs, and any gates that each takes; roles of one base model share a graph."""
        return {entry.graph: entry.adapter_gates for entry in self._models.values()}

    def layers(self) -> list[int]:
        """The layers that all models have.

        Raises:
            UsageError: there are none.
        """
        numbers = [layer_numbers(ir.load(self._folder / graph).graph) for graph in self._graphs()]
        common = sorted(set.intersection(*numbers))
        if not common or any(found != numbers[0] for found in numbers):
            counts = " and ".join(str(len(found)) for found in numbers)
            raise UsageError(
                f"{self._bundle.folder}: policy and reference have {counts} "
                "numbered layers; what to keep exact can be tried where they have the same"
            )
        return common

    def measure(self, recipe: Recipe, *, timed: bool) -> Trade:
        """Make a recipe's graphs, score the pairs, and compare with the exact graphs' scores."""
        self._made += 1
        recipe = replace(recipe, name=f"tried-{self._made}")  # an engine may still have the last one's file mapped
        runs_here = recipe.precision != "fp8"
        engines: dict[str, Engine] = {}
        names = []
        for graph, gates in self._graphs().items():
            name = make_engine_graph(self._folder, Path(graph).stem, recipe, self._calibration)
            names.append(name)
            path = self._folder / name
            if runs_here:
                engines[graph] = load_engine(recipe.engine, recipe.precision, path, gates, threads=self._threads)
            else:
                engines[graph] = _Float8Engine(path, gates, self._threads)
        scored = self._score(engines, passes=1 + TIMED if timed and runs_here else 1)
        for name in names:
            (self._folder / name).unlink()
        shutil.rmtree(self._folder / "engines" / recipe.name, ignore_errors=True)
        return Trade(
            exact_layers=recipe.exact_layers,
            mean_error=float(np.abs(scored.log_probs - self._exact.log_probs).mean()),
            flips=int((np.sign(scored.margins) != np.sign(self._exact.margins)).sum()),
            pairs=len(self._table),
            seconds_per_token=scored.seconds / scored.tokens if timed and runs_here else None,
        )

    def _score(self, engines: dict[str, Engine], passes: int) -> _Scored:
        """Score the pairs under all models; of several passes the first warms up, and the fastest other one counts."""
        seconds = math.inf
        for number in range(passes):
            started = time.perf_counter()
            scored = {role: self._score_role(role, engines[entry.graph]) for role, entry in self._models.items()}
            if number > 0 or passes == 1:
                seconds = min(seconds, time.perf_counter() - started)
        margins = _margins(scored[POLICY]) - (_margins(scored[REFERENCE]) if REFERENCE in scored else 0.0)
        branches = [branch.log_probs for each in scored.values() for branch in (each.chosen, each.rejected)]
        return _Scored(
            np.concatenate(branches).astype(np.float64),
            margins,
            seconds,
            sum(each.tokens - each.padding for each in scored.values()),
        )

    def _score_role(self, role: str, engine: Engine) -> ScoredPairs:
        """One model's scores; `engine` may be that of several, which differ by their gates."""
        entry = self._models[role]
        gated = engine if entry.adapter_gates is None else engine.with_gates(entry.adapter_gates)
        budget = int(self._bundle.manifest.recipe["token_budget"])
        return score_pairs(self._table, gated, layout=entry.layout, token_budget=budget)


@contextmanager
def _bench(
    bundle: Bundle, pairs: Sequence[TokenizedPair], calibration: Sequence[TokenizedPair], threads: int
) -> Iterator[_Bench]:
    """A temporary bench beside a bundle.

    What is made there is never written through a link: only what a recipe's graph takes from elsewhere is linked.
    """
    manifest = bundle.manifest
    exact = {entry.graph for entry in manifest.models.values()}
    where = bundle.folder.resolve()
    with storage_errors(where.parent):
        folder = Path(tempfile.mkdtemp(prefix=f".{where.name}.kept-layers.", dir=where.parent))
        try:
            for name in manifest.files:
                if name in exact or (not name.startswith("engines/") and not name.endswith(".onnx")):
                    make_folder((folder / name).parent)
                    copy_file(where / name, folder / name, link=True)
            yield _Bench(bundle, folder, pairs, calibration, threads)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


class _Float8Engine:
    """A graph in float8 on ONNX Runtime's CPU provider: TensorRT's numbers, far from its speed."""

    precision = "fp8"

    def __init__(self, graph: Path, gates: Sequence[float] | None, threads: int) -> None:
        import onnxruntime

        options = session_options(threads)
        # The optimiser moves float8 past operators that do not take it.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        self._session = open_session(graph, options, {CPU: {}})
        self._gates = gates
        self.name = f"onnxruntime {onnxruntime.__version__} {CPU}, unoptimised"

    def with_gates(self, gates: Sequence[float]) -> "_Float8Engine":
        """See `dpo_fast.engines.base.Engine`."""
        other = copy.copy(self)
        other._gates = gates
        return other

    def score(self, batch: Batch) -> TokenScores:
        """See `dpo_fast.engines.base.Engine`."""
        names = [output.name for output in self._session.get_outputs()]
        try:
            values: list[Any] = self._session.run(names, gated_inputs(batch, self._gates))
        except Exception as error:  # onnxruntime's own exceptions share no public base class
            raise failed(batch, error) from error
        return TokenScores(**dict(zip(names, values, strict=True)))


def _margins(scored: ScoredPairs) -> Float64Array:
    """(P,) nats: the chosen completions' log-probs less the rejected ones'."""
    chosen, rejected = (
        segment_sums(branch.log_probs.astype(np.float64), branch.lengths) for branch in (scored.chosen, scored.rejected)
    )
    margins: Float64Array = chosen - rejected
    return margins
