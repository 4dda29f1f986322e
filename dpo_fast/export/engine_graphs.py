"""The graphs that a recipe's engine runs, made from the exact ones and compared with them."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from dpo_fast.bundle import ModelEntry
from dpo_fast.engines import load_engine
from dpo_fast.engines.onnxruntime import OnnxRuntimeEngine
from dpo_fast.errors import MissingDependencyError, SelfCheckError
from dpo_fast.export.drift import measure_drift
from dpo_fast.export.precision import make_engine_graph
from dpo_fast.export.probes import make_probes
from dpo_fast.recipes import Recipe
from dpo_fast.tensorrt.package import PACKAGES
from dpo_fast.types import TokenizedPair


def make_engine_graphs(
    folder: Path,
    entries: dict[str, ModelEntry],
    recipe: Recipe,
    *,
    calibration: Sequence[TokenizedPair] | None,
    check: bool,
    report: Callable[[str], None] = lambda step: None,
) -> dict[str, ModelEntry]:
    """Make what the recipe's engine runs beside the exact graphs of a bundle.

    Args:
        folder: the bundle that is being made; holds the exact graphs and their weights.
        entries: the manifest's, by role.
        recipe: what the bundle is made for.
        calibration: pairs that the scales of activations are chosen from, where the recipe has such.
        check: whether the engine's graphs are compared with the exact ones; they are where the engine runs here.
        report: called with a line at each step.

    Returns:
        The entries with `engine_graph`, `weights` and `engine_check` filled in.

    Raises:
        SelfCheckError: an engine's graph is another model.
    """
    made: dict[str, ModelEntry] = {}
    of_graph: dict[str, str] = {}  # roles of one exact graph, an adapter's and its base's, share the engine's too
    for role, entry in entries.items():
        if entry.graph not in of_graph:
            if recipe.precision != "fp32":
                report(f"{role}: making the graph in {recipe.precision}")
            of_graph[entry.graph] = make_engine_graph(folder, Path(entry.graph).stem, recipe, calibration)
        engine_graph = of_graph[entry.graph]
        quantised = f"engines/{recipe.name}/{Path(entry.graph).stem}.safetensors"
        weights = [*entry.weights, *([quantised] if (folder / quantised).is_file() else [])]
        made[role] = replace(entry, engine_graph=engine_graph, weights=weights)
        if check and recipe.precision != "fp32":
            made[role] = _checked(folder, role, made[role], recipe, report)
    return made


def _checked(folder: Path, role: str, entry: ModelEntry, recipe: Recipe, report: Callable[[str], None]) -> ModelEntry:
    """Compare an engine's graph with the exact one, if the engine runs on this machine."""
    name = recipe.engine
    if name in PACKAGES:
        if recipe.precision != "fp16":
            report(f"{role}: {entry.engine_graph} was not run: ONNX Runtime's CPU provider has no {recipe.precision}")
            return entry
        name = "onnxruntime"  # computes what the plans are built from
    try:
        engine = load_engine(name, recipe.precision, folder / entry.engine_graph, entry.adapter_gates)
    except MissingDependencyError as error:
        report(f"{role}: {entry.engine_graph} was not run in {recipe.precision}: {error}")
        return entry
    exact = OnnxRuntimeEngine(folder / entry.graph, gates=entry.adapter_gates)
    probes = make_probes(entry.vocabulary, positions=entry.max_positions)
    try:
        drift = measure_drift(exact, engine, probes, entry.layout)
    except SelfCheckError as error:
        raise SelfCheckError(f"{entry.engine_graph}: {error}") from error
    report(f"{role}: {drift}")
    return replace(entry, engine_check=drift.as_dict())
