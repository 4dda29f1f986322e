"""ModelOpt's scales and the exact graph's: the same largest magnitudes by two implementations, and the same graphs."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from fake_engines import ROWS, write_rows
from tiny_models import make_config, make_model, save_model

from dpo_fast.errors import CheckFailedError, CheckpointError, MissingDependencyError, UsageError
from dpo_fast.export import exporter
from dpo_fast.export.calibration import largest_magnitudes, measure_activations, read_calibration
from dpo_fast.export.checkpoint import ADAPTER_CONFIG
from dpo_fast.export.exporter import ExportOptions, export
from dpo_fast.export.modelopt_calibration import measure_by_modelopt
from dpo_fast.export.precision import make_engine_graph
from dpo_fast.export.probes import make_probes
from dpo_fast.export.products import Product, find_products, split_gemms
from dpo_fast.recipes import Recipe, load_recipe, recipe_folder

from .binding import bind_folder

Trace = Callable[..., ir.Model]

LARGEST = Recipe("fp8", "", "tensorrt", "fp8", 128, 256, "fp32", head_chunk=256, calibrator="largest")
MODELOPT = replace(LARGEST, calibrator="modelopt")
PAIRS = make_probes(500, positions=256)
# Two float32 orders of summation, two layers deep: some 1e-6 of the magnitude.
SAME = 1e-5

# In float16, casts lie between a weight and its product; GPT-2's `Conv1D` is no `Linear`, its weights lie transposed.
FAMILIES = {"llama": torch.float32, "qwen2": torch.float16, "gpt2": torch.float32}


def make_exact(folder: Path, traced: Trace, model_type: str, dtype: torch.dtype = torch.float32) -> Path:
    """A folder with a tiny policy and its exact graph, as a bundle has them."""
    config = make_config(model_type)
    save_model(make_model(config).to(dtype), folder / "policy")
    bind_folder(folder / "policy", traced(config, vocabulary_tile=128))
    return folder


@pytest.fixture(scope="module", params=FAMILIES)
def exact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, traced: Trace) -> Path:
    return make_exact(tmp_path_factory.mktemp(request.param), traced, request.param, FAMILIES[request.param])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory, traced: Trace) -> Path:
    return make_exact(tmp_path_factory.mktemp("one"), traced, "llama")


def body(folder: Path) -> list[Product]:
    """The products whose activations have scales."""
    model = ir.load(folder / "policy.onnx")
    split_gemms(model)
    return [product for product in find_products(model.graph) if not product.is_head]


def by_graph(folder: Path, products: list[Product]) -> dict[ir.Value, float]:
    names = {product.activation: str(product.activation.name) for product in products}
    largest = largest_magnitudes(folder / "policy.onnx", names.values(), PAIRS)
    return {value: largest[name] for value, name in names.items()}


def assert_same(found: dict[ir.Value, float], expected: dict[ir.Value, float]) -> None:
    assert found.keys() == expected.keys()
    for value, magnitude in found.items():
        assert magnitude == pytest.approx(expected[value], rel=SAME), value.name


def files(folder: Path) -> dict[str, bytes]:
    """What a recipe made beside the exact graph."""
    made = [folder / "policy.fp8.onnx", folder / "engines" / "fp8" / "policy.safetensors"]
    return {path.name: path.read_bytes() for path in made}


@pytest.mark.slow
def test_both_find_the_same_magnitudes(exact: Path) -> None:
    """For every activation: four of each of two layers, one of them of three products (of one in GPT-2)."""
    products = body(exact)
    found = measure_by_modelopt(exact / "policy", products, PAIRS)
    assert len(found) == 2 * 4
    assert_same(found, by_graph(exact, products))
    assert len({round(magnitude, 4) for magnitude in found.values()}) == len(found), "no two of them are mistaken"


@pytest.mark.slow
def test_both_make_the_same_graph(exact: Path) -> None:
    made = []
    for recipe in (LARGEST, MODELOPT):
        assert make_engine_graph(exact, "policy", recipe, PAIRS) == "policy.fp8.onnx"
        made.append(files(exact))
    assert made[0] == made[1]


@pytest.mark.slow
def test_other_pairs_give_other_scales(llama: Path) -> None:
    """What shows that scales are of these pairs: half of them, and a graph that differs by it."""
    products = body(llama)
    expected = by_graph(llama, products)
    fewer = measure_by_modelopt(llama / "policy", products, PAIRS[:1])
    assert all(magnitude <= expected[value] * (1 + SAME) for value, magnitude in fewer.items())
    assert any(magnitude < expected[value] * 0.99 for value, magnitude in fewer.items())
    with pytest.raises(AssertionError):
        assert_same(fewer, expected)
    made = []
    for pairs in (PAIRS, PAIRS[:1]):
        make_engine_graph(llama, "policy", MODELOPT, pairs)
        made.append(files(llama))
    assert made[0]["policy.safetensors"] == made[1]["policy.safetensors"], "weights have their own scales"
    assert made[0]["policy.fp8.onnx"] != made[1]["policy.fp8.onnx"]


@pytest.mark.slow
def test_the_magnitudes_are_of_the_folders_own_weights(llama: Path, tmp_path: Path) -> None:
    """A checkpoint whose first layer's second normalisation is larger: what comes before it stays as it is."""
    model = make_model(make_config("llama"))
    with torch.no_grad():
        model.model.layers[0].post_attention_layernorm.weight.mul_(2)
    save_model(model, tmp_path / "policy")
    products = body(llama)
    before, after = (measure_by_modelopt(folder / "policy", products, PAIRS) for folder in (llama, tmp_path))
    same = {product.name for product in products if after[product.activation] == before[product.activation]}
    assert same == {f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkvo"}


@pytest.mark.slow
def test_what_modelopt_does_not_quantise_is_the_exact_graphs(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from modelopt.torch import quantization

    own = quantization.FP8_DEFAULT_CFG
    without = {**own, "quant_cfg": [*own["quant_cfg"], {"quantizer_name": "*down_proj*", "enable": False}]}
    monkeypatch.setattr(quantization, "FP8_DEFAULT_CFG", without)
    products = body(llama)
    found = measure_by_modelopt(llama / "policy", products, PAIRS)
    left_out = {product.activation for product in products if "down_proj" in product.name}
    assert found.keys() == {product.activation for product in products} - left_out
    completed = measure_activations(llama / "policy.onnx", llama / "policy", products, MODELOPT, PAIRS)
    assert_same(completed, by_graph(llama, products))
    assert {value: completed[value] for value in found} == found, "what ModelOpt found is kept, bit for bit"


@pytest.mark.slow
def test_a_weight_of_several_activations_is_left_to_the_exact_graph(llama: Path) -> None:
    """ModelOpt would have one magnitude for both. An activation that another weight multiplies has that one's."""
    query, *others, last = body(llama)
    shared = replace(last, weight=query.weight)
    found = measure_by_modelopt(llama / "policy", [query, *others, shared], PAIRS)
    assert query.activation in {other.activation for other in others}
    assert found.keys() == {product.activation for product in (query, *others)}


@pytest.mark.slow
def test_experts_are_left_to_the_exact_graph(tmp_path: Path, traced: Trace) -> None:
    """Stacks are no products; the attention of a mixture has the same magnitudes as ever."""
    folder = make_exact(tmp_path, traced, "mixtral")
    products = body(folder)
    assert not [product for product in products if "experts" in product.name]
    assert_same(measure_by_modelopt(folder / "policy", products, PAIRS), by_graph(folder, products))


@pytest.mark.slow
def test_an_infinite_activation_is_one_line(tmp_path: Path, llama: Path) -> None:
    model = make_model(make_config("llama"))
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.fill_(3e38)
    save_model(model, tmp_path / "policy")
    with pytest.raises(
        CheckFailedError, match=r"^policy: ModelOpt cannot calibrate .*; take calibrator = \"largest\"$"
    ):
        measure_by_modelopt(tmp_path / "policy", body(llama), PAIRS)


@pytest.mark.slow
def test_a_folder_that_cannot_be_loaded_is_one_line(tmp_path: Path, llama: Path) -> None:
    with pytest.raises(CheckpointError, match=r"^policy: Transformers cannot load this checkpoint \(.*\)$"):
        measure_by_modelopt(tmp_path / "policy", body(llama), PAIRS)


@pytest.mark.slow
def test_nothing_is_printed(llama: Path, capfd: pytest.CaptureFixture[str]) -> None:
    measure_by_modelopt(llama / "policy", body(llama), PAIRS[:1])
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_a_whole_export(tiny_pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Both roles, each by its own model; what the manifest says apart, the same bundle by either calibrator."""
    policy, reference = map(str, tiny_pair)
    dataset = write_rows(tmp_path / "pairs.jsonl", ROWS)
    shipped = (recipe_folder() / "tensorrt-fp8.toml").read_text(encoding="utf-8")
    made = []
    for calibrator in ("largest", "modelopt"):
        recipe = tmp_path / calibrator / "mine.toml"
        recipe.parent.mkdir()
        changed = shipped.replace('calibrator = "largest"', f'calibrator = "{calibrator}"')
        assert (changed == shipped) == (calibrator == "largest")
        recipe.write_text(changed, encoding="utf-8")
        options = ExportOptions(recipe=str(recipe), calibration=dataset)
        bundle = export(policy, reference, tmp_path / calibrator / "bundle", options)
        made.append({path.name: path.read_bytes() for path in bundle.glob("*.onnx")})
    assert len(made[0]) == 4
    assert made[0] == made[1]


# -- where it cannot be -----------------------------------------------------------------------------------------------


def test_an_adapter_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / ADAPTER_CONFIG).write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    said = (
        r'^--recipe fp8: calibrator = "modelopt" takes whole models, and policy is a PEFT adapter; take calibrator = '
    )
    with pytest.raises(UsageError, match=said):
        make_engine_graph(tmp_path, "policy", MODELOPT, PAIRS)
    with pytest.raises(UsageError, match=said):
        read_calibration("no-such.jsonl", MODELOPT, tmp_path / "policy", 100, trust_remote_code=False)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.fixture
def without_modelopt(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("modelopt", "modelopt.torch.quantization"):
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.usefixtures("without_modelopt")
def test_without_the_package(tmp_path: Path) -> None:
    """Said before pairs are read or graphs are looked at: neither is there."""
    said = r"""^calibrator = "modelopt" needs the package 'nvidia-modelopt': pip install 'dpo-fast\[modelopt\]'$"""
    with pytest.raises(MissingDependencyError, match=said):
        make_engine_graph(tmp_path, "policy", MODELOPT, PAIRS)
    with pytest.raises(MissingDependencyError, match=said):
        read_calibration("no-such.jsonl", MODELOPT, tmp_path, 100, trust_remote_code=False)


@pytest.mark.slow
@pytest.mark.usefixtures("without_modelopt")
def test_the_other_calibrator_does_without_the_package(llama: Path) -> None:
    assert make_engine_graph(llama, "policy", LARGEST, PAIRS) == "policy.fp8.onnx"


@pytest.mark.usefixtures("without_modelopt")
def test_without_the_package_an_export_leaves_nothing(
    tiny_pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trace(*given: Any, **options: Any) -> None:
        raise AssertionError("nothing is traced")

    monkeypatch.setattr(exporter, "trace", trace)
    recipe = tmp_path / "mine.toml"
    shipped = (recipe_folder() / "tensorrt-fp8.toml").read_text(encoding="utf-8")
    recipe.write_text(shipped.replace('calibrator = "largest"', 'calibrator = "modelopt"'), encoding="utf-8")
    assert load_recipe(str(recipe)).calibrator == "modelopt"
    with pytest.raises(MissingDependencyError, match="nvidia-modelopt"):
        export(str(tiny_pair[0]), None, tmp_path / "bundle", ExportOptions(recipe=str(recipe), calibration="x.jsonl"))
    assert sorted(tmp_path.iterdir()) == [recipe]


@pytest.mark.slow
def test_largest_magnitudes_are_of_tokens_alone(llama: Path) -> None:
    """Whichever pairs are beside it, a pair's magnitudes are the same: padding is not among them."""
    products = body(llama)
    names = sorted({str(product.activation.name) for product in products})
    together = largest_magnitudes(llama / "policy.onnx", names, PAIRS)
    alone = [largest_magnitudes(llama / "policy.onnx", names, [pair]) for pair in PAIRS]
    for name in names:
        np.testing.assert_allclose(together[name], max(each[name] for each in alone), rtol=SAME)
