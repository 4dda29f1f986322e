"""Every shipped recipe, from export to metrics where its engine runs here, and to the graph where it does not."""

from collections.abc import Callable
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest

from dpo_fast.bundle import POLICY, REFERENCE, open_bundle
from dpo_fast.errors import DpoFastError, MissingDependencyError, UsageError
from dpo_fast.evaluate import evaluate
from dpo_fast.export.exporter import ExportOptions, export
from dpo_fast.export.refit import RefitOptions, refit
from dpo_fast.recipes import load_recipe, recipe_folder

Trace = Callable[..., ir.Model]
pytestmark = pytest.mark.slow
RECIPES = sorted(path.stem for path in recipe_folder().glob("*.toml"))
# Nats that a sequence's log-prob may be off, of some 10 tokens of models whose weights are random: bfloat16 has 8 bits,
# int8 7, int4 3. The exact recipe is the exact graph.
OFF = {"cpu-fp32": 0.0, "cpu-int8": 0.5, "cpu-int4": 5.0, "openvino-bf16": 0.5, "openvino-int8": 0.5}


def options(name: str, dataset: str) -> ExportOptions:
    return ExportOptions(recipe=name, calibration=dataset if load_recipe(name).precision == "fp8" else None)


def test_the_issue_of_recipes_is_complete() -> None:
    assert {
        "cpu-fp32", "cpu-int8", "cpu-int4", "openvino-bf16", "openvino-int8", "cuda-fp16", "cuda-bf16",
        "onnxruntime-tensorrt-fp16", "tensorrt-fp32", "tensorrt-fp16", "tensorrt-bf16", "tensorrt-fp8",
        "tensorrt-rtx-fp16", "tensorrt-rtx-bf16",
    } <= set(RECIPES)  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_from_export_to_metrics(tiny_pair: tuple[Path, Path], tmp_path: Path, dataset: str, name: str) -> None:
    policy, reference = map(str, tiny_pair)
    bundle = export(policy, reference, tmp_path / "bundle", options(name, dataset))
    opened = open_bundle(bundle)
    opened.verify()
    recipe = load_recipe(name)
    for role in (POLICY, REFERENCE):
        entry = opened.manifest.models[role]
        assert entry.self_check["passed"], "the exact graph is always there, and exact"
        graph = onnx.load(opened.engine_graph(role), load_external_data=False)
        domains = {node.domain for node in graph.graph.node}
        assert domains <= {"", "com.microsoft"} if name.startswith(("cpu", "cuda")) else domains == {""}
        quantised = [weights for weights in entry.weights if weights.startswith("engines/")]
        assert bool(quantised) == (recipe.precision in ("int8", "int4", "fp8"))
        assert all((bundle / weights).is_file() for weights in quantised)
    if name not in OFF:
        with pytest.raises(DpoFastError) as caught:
            evaluate(bundle, dataset, tmp_path / "run")
        assert isinstance(caught.value, MissingDependencyError) or "TensorRT" in str(caught.value)
        assert "\n" not in str(caught.value)
        return
    metrics = evaluate(bundle, dataset, tmp_path / "run")
    exact_bundle = export(policy, reference, tmp_path / "exact", ExportOptions(self_check=False, layout="shared"))
    exact = evaluate(exact_bundle, dataset, tmp_path / "exact run")
    for key in ("eval_logps/chosen", "eval_logps/rejected"):
        assert abs(metrics[key] - exact[key]) <= OFF[name]
        assert (metrics[key] == exact[key]) == (OFF[name] == 0), "another precision gives other numbers"
    checks = [entry.engine_check for entry in opened.manifest.models.values()]
    assert all((check is None) == (name == "cpu-fp32") for check in checks)
    assert metrics["provenance"]["recipe"] == name


@pytest.mark.parametrize("name", ["cpu-int8", "openvino-bf16", "tensorrt-fp8"])
def test_a_refit_makes_the_recipes_graph_anew(
    tiny_pair: tuple[Path, Path], tmp_path: Path, dataset: str, name: str
) -> None:
    """As a fresh export makes it, hash for hash."""
    policy, reference = map(str, tiny_pair)
    bundle = export(policy, reference, tmp_path / "bundle", options(name, dataset))
    fresh = export(reference, reference, tmp_path / "fresh", options(name, dataset))
    refit(bundle, reference, options=RefitOptions(calibration=options(name, dataset).calibration))
    assert open_bundle(bundle).manifest.files == open_bundle(fresh).manifest.files
    open_bundle(bundle).verify()


def test_calibration_where_it_is_needed_and_nowhere_else(
    tiny_pair: tuple[Path, Path], tmp_path: Path, dataset: str
) -> None:
    policy = str(tiny_pair[0])
    with pytest.raises(UsageError, match=r"fp8 needs pairs .* name some with --calibration DATASET"):
        export(policy, None, tmp_path / "bundle", ExportOptions(recipe="tensorrt-fp8"))
    with pytest.raises(UsageError, match="the recipe cpu-int8 has no scales to choose; leave it out"):
        export(policy, None, tmp_path / "bundle", ExportOptions(recipe="cpu-int8", calibration=dataset))
    assert not (tmp_path / "bundle").exists()
