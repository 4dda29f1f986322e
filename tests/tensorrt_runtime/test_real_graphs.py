"""The halves of a real exported graph, as plans of the double: the builder's cut fits the runtime's contract."""

from pathlib import Path

import numpy as np
import onnx
import pytest

from dpo_fast.batches import Batch
from dpo_fast.bundle import open_bundle
from dpo_fast.engines.onnxruntime import OnnxRuntimeEngine
from dpo_fast.engines.tensorrt import OUTPUTS, TensorRtEngine
from dpo_fast.tensorrt.graphs import make_graphs, write_graph
from dpo_fast.tensorrt.plans import Plans, Profile, write_plans

from .double import Double, Profiles, write_plan

PROFILES = [Profile((1, 2, 3), (8, 16, 16), (1, 16, 40)), Profile((1, 1, 2), (24, 32, 32), (1, 16, 60))]
CHUNK = 64


def shapes(model: onnx.ModelProto, sizes: list[dict[str, tuple[int, int, int]]]) -> Profiles:
    """For each profile, what the graph's inputs are by the names of their dimensions."""
    found = []
    for named in sizes:
        of_inputs = {}
        for value in model.graph.input:
            dims = value.type.tensor_type.shape.dim
            ranges = [named[dim.dim_param] if dim.dim_param else (dim.dim_value,) * 3 for dim in dims]
            of_inputs[value.name] = tuple(zip(*ranges, strict=True))
        found.append(of_inputs)
    return found


def make_batch(seed: int, vocabulary: int, rows: int, width: int) -> Batch:
    """Rows of a prompt and two completions, as the layout with shared prompts has them."""
    rng = np.random.default_rng(seed)
    input_ids, position_ids = rng.integers(0, vocabulary, (rows, width)), np.zeros((rows, width), np.int64)
    segment_ids, index = np.full((rows, width), -1), []
    for row in range(rows):
        prompt, first, second = (int(size) for size in rng.integers(1, max(width // 3, 1) + 1, 3))
        second = min(second, width - prompt - first)
        places = np.arange(prompt + first + second)
        segment_ids[row, places] = np.repeat([0, 1, 2], [prompt, first, second])
        position_ids[row, places] = np.where(places < prompt + first, places, places - first)
        for start, length in ((prompt, first), (prompt + first, second)):
            index += [row * width + place for place in [prompt - 1, *range(start, start + length - 1)][:length]]
    target_ids = rng.integers(0, vocabulary, len(index))
    return Batch(input_ids, position_ids, segment_ids, np.array(index), target_ids, np.zeros((0, 3), np.int64))


@pytest.mark.slow
def test_halves_of_an_exported_graph_score_as_the_whole(tiny_bundle, tmp_path: Path):
    bundle = open_bundle(tiny_bundle)
    graph = bundle.engine_graph("policy")
    for part, model in make_graphs(graph).items():
        half = onnx.load(write_graph(model, tmp_path, part))
        named = [{"B": p.rows, "T": p.width, "N": p.targets} for p in PROFILES]
        sizes = named if part == "body" else [{"N": (1, CHUNK, CHUNK)}]
        write_plan(tmp_path / f"policy.{part}.plan", half, shapes(half, sizes))
    plans = Plans("tensorrt", "11.4.0.106", [], "policy.body.plan", "policy.head.plan", PROFILES, CHUNK, False, {})
    write_plans(tmp_path / "policy.json", plans)
    double = Double()
    engine = TensorRtEngine(tmp_path / "policy.json", precision="fp32", memory=double.memory, package=double)
    whole = OnnxRuntimeEngine(graph, threads=1)
    vocabulary = bundle.manifest.models["policy"].vocabulary
    batches = [make_batch(seed, vocabulary, 1 + seed % 5, 3 + 5 * seed % 29) for seed in range(12)]
    for batch, found in zip(batches, engine.score_all(batches), strict=True):
        wanted = whole.score(batch)
        for name in OUTPUTS:  # float32, in another order of sums
            np.testing.assert_allclose(getattr(found, name), getattr(wanted, name), rtol=0, atol=1e-5, err_msg=name)
