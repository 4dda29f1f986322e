"""The head of a bundle's graph alone: how long an engine takes from states to scores."""

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx.utils import Extractor

from dpo_fast.batches import Batch
from dpo_fast.bundle import POLICY, Bundle
from dpo_fast.engines.openvino import find_largest_by_comparing
from dpo_fast.types import Float32Array

TARGETS = ("target_index", "target_ids")


def open_head(bundle: Bundle) -> Callable[[Sequence[Batch]], float]:
    """The policy's head, cut out of the engine's graph, in a session of its own as the engine would run it.

    Returns:
        What scores random states in the place of each batch's, and returns the seconds that all batches took.
    """
    model = onnx.load(bundle.engine_graph(POLICY))
    states = find_states(model)
    outputs = [value.name for value in model.graph.output]
    head = Extractor(model).extract_model([states, *TARGETS], outputs)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "head.onnx"
        onnx.save(head, path)
        run = (_openvino if bundle.manifest.recipe["engine"] == "openvino" else _onnxruntime)(path)
    config = json.loads((bundle.model_folder(POLICY) / "config.json").read_text(encoding="utf-8"))
    random = np.random.default_rng(0)

    def seconds(batches: Sequence[Batch]) -> float:
        total = 0.0
        for batch in batches:
            values: Float32Array = random.standard_normal((batch.input_ids.size, config["hidden_size"]), np.float32)
            inputs = {states: values, **{name: batch.inputs[name] for name in TARGETS}}
            started = time.perf_counter()
            run(inputs)
            total += time.perf_counter() - started
        return total

    return seconds


def find_states(model: Any) -> str:
    """The one value, (B * T, H), that a graph's head, which is all that the targets reach, takes from what precedes."""
    reached, taken = set(TARGETS), set[str]()
    known = {value.name for value in model.graph.input}
    computed = set(known)
    for node in model.graph.node:
        if any(name in computed for name in node.input):
            computed.update(node.output)
        if any(name in reached for name in node.input):
            reached.update(node.output)
            taken.update(name for name in node.input if name in computed and name not in reached)
    (states,) = taken - known
    return states


def _onnxruntime(path: Path) -> Callable[[dict[str, Any]], Any]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda inputs: session.run(None, inputs)


def _openvino(path: Path) -> Callable[[dict[str, Any]], Any]:
    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    find_largest_by_comparing(model)
    hints = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    request = core.compile_model(model, "CPU", hints).create_infer_request()
    return lambda inputs: request.infer(inputs, share_inputs=True)
