"""A bundle's graphs in a repository: each reference leads to the same bytes, and to no file that does not go along."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from fake_engines import make_fake_bundle

from dpo_fast.bundle import POLICY, Bundle, hash_files, open_bundle, write_manifest
from dpo_fast.errors import BundleError
from dpo_fast.publish.graphs import collect_graphs

FILES = ("policy/model.safetensors", "base/model.safetensors", "engines/fake/policy.safetensors")
PLANS = ("engines/fake/policy.json", "engines/fake/policy.body.plan")


def graph_of(*locations: str) -> ir.Model:
    """A graph that adds up vectors of two floats, the n-th of which lies at byte 8 * n of its file."""
    values, nodes = [], []
    total: ir.Value | None = None
    for number, location in enumerate(locations):
        tensor = ir.ExternalTensor(location, 8 * number, 8, ir.DataType.FLOAT, shape=ir.Shape([2]), name=f"w{number}")
        value = ir.Value(name=f"w{number}", shape=ir.Shape([2]), type=ir.TensorType(ir.DataType.FLOAT))
        value.const_value = tensor
        values.append(value)
        if total is not None:
            nodes.append(ir.node("Add", [total, value]))
        total = nodes[-1].outputs[0] if nodes else value
    last = nodes[-1].outputs[0]
    last.name, last.shape, last.type = "sum", ir.Shape([2]), ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([], [last], nodes=nodes, initializers=values, name="sum", opset_imports={"": 20})
    return ir.Model(graph, ir_version=10)


def make_bundle(folder: Path, **changes: Any) -> Bundle:
    """A bundle whose graph needs its policy and a base, and whose engine's needs quantised weights; and plans."""
    make_fake_bundle(folder)
    for seed, name in enumerate(FILES):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(np.random.default_rng(seed).normal(size=8).astype(np.float32).tobytes())
    for name in PLANS:
        (folder / name).write_text(name)
    ir.save(graph_of(FILES[0], FILES[0], FILES[1]), folder / "policy.onnx")
    ir.save(graph_of(FILES[0], FILES[2]), folder / "policy.fake.onnx")
    manifest = open_bundle(folder).manifest
    entry = replace(manifest.models[POLICY], engine_graph="policy.fake.onnx", plan=PLANS[0], **changes)
    write_manifest(folder, replace(manifest, models={**manifest.models, POLICY: entry}, files=hash_files(folder)))
    return open_bundle(folder)


def run(graph: Path) -> np.ndarray:
    """The graph's sum, its references followed by hand."""
    tensors = []
    for tensor in onnx.load(graph, load_external_data=False).graph.initializer:
        place = {entry.key: entry.value for entry in tensor.external_data}
        content = (graph.parent / place["location"]).read_bytes()
        start = int(place.get("offset", 0))
        tensors.append(np.frombuffer(content[start : start + int(place["length"])], np.float32))
    return np.sum(tensors, axis=0)


def lay_out(folder: Path, files: dict[str, Path]) -> Path:
    for name, path in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(path.read_bytes())
    return folder


def test_graphs_say_in_the_repository_what_they_say_in_the_bundle(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    collected = collect_graphs(bundle, tmp_path / "working", exact=True, engines=True)

    assert set(collected.files) == {
        "policy.onnx", "policy.fake.onnx", "model.safetensors", "base/model.safetensors",
        "engines/fake/policy.safetensors", *PLANS,
    }  # fmt: skip
    repository = lay_out(tmp_path / "repository", collected.files)
    for graph in ("policy.onnx", "policy.fake.onnx"):
        np.testing.assert_array_equal(run(repository / graph), run(bundle.folder / graph))
        onnx.checker.check_model(str(repository / graph))
    assert [(graph.file, graph.is_exact) for graph in collected.graphs] == [
        ("policy.onnx", True),
        ("policy.fake.onnx", False),
    ]
    assert collected.foreign_weights == ["base/model.safetensors"]


def test_only_what_is_asked_for_goes(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")

    exact = collect_graphs(bundle, tmp_path / "exact", exact=True, engines=False)
    assert set(exact.files) == {"policy.onnx", "model.safetensors", "base/model.safetensors"}
    engines = collect_graphs(bundle, tmp_path / "engines", exact=False, engines=True)
    assert set(engines.files) == {
        "policy.fake.onnx", "model.safetensors", "engines/fake/policy.safetensors", *PLANS,
    }  # fmt: skip
    assert engines.foreign_weights == []


def test_a_graph_that_is_none_or_points_elsewhere_is_refused(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    graph = bundle.folder / "policy.onnx"

    for location in ("policy/other.safetensors", "../secret", "/etc/passwd"):
        ir.save(graph_of(FILES[0], location), graph)
        with pytest.raises(BundleError, match=r"points at .* which the bundle does not list"):
            collect_graphs(bundle, tmp_path / "working", exact=True, engines=False)
    graph.write_bytes(b"no graph")
    with pytest.raises(BundleError, match="is no ONNX graph"):
        collect_graphs(bundle, tmp_path / "working", exact=True, engines=False)


@pytest.mark.parametrize("name", ['x"); import os #.onnx', "{7*7}.onnx", "a b.onnx", "`.onnx"])
def test_a_name_that_would_be_code_on_the_card_is_refused(tmp_path: Path, name: str) -> None:
    bundle = make_bundle(tmp_path / "bundle", graph="policy.onnx")
    (bundle.folder / "policy.onnx").rename(bundle.folder / name)
    manifest = bundle.manifest
    entry = replace(manifest.models[POLICY], graph=name)
    hostile = Bundle(bundle.folder, replace(manifest, models={POLICY: entry}, files=hash_files(bundle.folder)))

    with pytest.raises(BundleError, match="the name of its graph"):
        collect_graphs(hostile, tmp_path / "working", exact=True, engines=False)
