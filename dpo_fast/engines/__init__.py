"""Inference engines: each turns a batch into per-token scores."""

from dpo_fast.bundle import Bundle
from dpo_fast.engines.base import Engine
from dpo_fast.errors import BundleError


def open_engine(bundle: Bundle, role: str) -> Engine:
    """Load a role's graph on the engine that the bundle's recipe names.

    Raises:
        BundleError: the recipe's engine is not known, or cannot load the graph.
        MissingDependencyError: the engine's package is not installed.
    """
    engine = bundle.manifest.recipe["engine"]
    if engine != "onnxruntime":
        raise BundleError(f"{bundle.folder}: is made for the engine {engine!r}, which this version does not have")
    from dpo_fast.engines.onnxruntime import OnnxRuntimeEngine

    return OnnxRuntimeEngine(bundle.graph(role))
