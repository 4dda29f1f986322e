"""Inference engines: each turns a batch into per-token scores."""

from collections.abc import Sequence
from pathlib import Path

from dpo_fast.bundle import Bundle
from dpo_fast.engines.base import Engine
from dpo_fast.errors import BundleError
from dpo_fast.tensorrt.package import PACKAGES


def open_engine(bundle: Bundle, role: str, *, threads: int = 0) -> Engine:
    """Load the graph of a role that the bundle's recipe was made for.

    Args:
        bundle: whose graph is loaded.
        role: "policy" or "reference".
        threads: how many compute; 0 takes every physical core. On a GPU they only prepare.

    Raises:
        BundleError: the recipe's engine is not known, or cannot load the graph.
        MissingDependencyError: the engine's package is not installed.
    """
    recipe = bundle.manifest.recipe
    entry = bundle.manifest.models[role]
    gates = entry.adapter_gates
    if recipe["engine"] in PACKAGES:
        from dpo_fast.engines.tensorrt import TensorRtEngine

        if entry.plan is None:
            raise BundleError(
                f"{bundle.folder}: has no plans yet, which TensorRT runs; build them with `dpo-fast build "
                f"{bundle.folder}`, on the machine that is to run them or for its GPU (--target)"
            )
        return TensorRtEngine(bundle.folder / entry.plan, precision=recipe["precision"], gates=gates)
    return load_engine(recipe["engine"], recipe["precision"], bundle.engine_graph(role), gates, threads=threads)


def load_engine(
    engine: str, precision: str, graph: Path, gates: Sequence[float] | None = None, *, threads: int = 0
) -> Engine:
    """Load a graph on an engine.

    Args:
        engine: a recipe's.
        precision: a recipe's.
        graph: the .onnx file.
        gates: one for each adapter in the graph: 1 turns it on, 0 off; None for a graph without adapters.
        threads: as `open_engine`.

    Raises:
        BundleError: the engine is not known, or cannot load the graph.
        MissingDependencyError: the engine's package is not installed.
    """
    if engine == "onnxruntime":
        from dpo_fast.engines.onnxruntime import OnnxRuntimeEngine

        return OnnxRuntimeEngine(graph, precision=precision, gates=gates, threads=threads)
    if engine == "onnxruntime-cuda":
        from dpo_fast.engines.onnxruntime import CUDA, OnnxRuntimeEngine

        return OnnxRuntimeEngine(graph, precision=precision, gates=gates, provider=CUDA, threads=threads)
    if engine == "openvino":
        from dpo_fast.engines.openvino import OpenVinoEngine

        return OpenVinoEngine(graph, precision=precision, gates=gates, threads=threads)
    raise BundleError(f"{graph}: is made for the engine {engine!r}, which this version does not have")
