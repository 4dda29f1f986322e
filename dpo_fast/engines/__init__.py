"""Inference engines: each turns a batch into per-token scores."""

from collections.abc import Sequence
from pathlib import Path

from dpo_fast.batches import longest_row
from dpo_fast.bundle import Bundle
from dpo_fast.engines.base import Engine
from dpo_fast.errors import BundleError
from dpo_fast.tensorrt.package import PACKAGES
from dpo_fast.tensorrt.plans import Profile
from dpo_fast.tensorrt.profiles import choose_profiles


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
    profile = None
    if recipe["engine"] == "onnxruntime-tensorrt":  # whose provider has one profile, as wide as the longest row
        longest = longest_row(entry.layout, bundle.manifest.max_length)
        (profile,) = choose_profiles(None, token_budget=recipe["token_budget"], longest_row=longest, count=1)
    graph = bundle.engine_graph(role)
    return load_engine(recipe["engine"], recipe["precision"], graph, gates, profile=profile, threads=threads)


def load_engine(
    engine: str,
    precision: str,
    graph: Path,
    gates: Sequence[float] | None = None,
    *,
    profile: Profile | None = None,
    threads: int = 0,
) -> Engine:
    """Load a graph on an engine.

    Args:
        engine: a recipe's.
        precision: a recipe's.
        graph: the .onnx file.
        gates: one for each adapter in the graph: 1 turns it on, 0 off; None for a graph without adapters.
        profile: the shapes that ONNX Runtime builds a TensorRT engine for.
        threads: as `open_engine`.

    Raises:
        BundleError: the engine is not known, or cannot load the graph.
        MissingDependencyError: the engine's package is not installed.
    """
    if engine == "onnxruntime":
        from dpo_fast.engines.onnxruntime import OnnxRuntimeEngine

        return OnnxRuntimeEngine(graph, precision=precision, gates=gates, threads=threads)
    if engine in ("onnxruntime-cuda", "onnxruntime-tensorrt"):
        from dpo_fast.engines.onnxruntime_gpu import PROVIDERS, OnnxRuntimeGpuEngine

        return OnnxRuntimeGpuEngine(
            graph, precision=precision, gates=gates, provider=PROVIDERS[engine], profile=profile, threads=threads
        )
    if engine == "openvino":
        from dpo_fast.engines.openvino import OpenVinoEngine

        return OpenVinoEngine(graph, precision=precision, gates=gates, threads=threads)
    raise BundleError(f"{graph}: is made for the engine {engine!r}, which this version does not have")
