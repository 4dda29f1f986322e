"""Layers kept exact: what a graph then has, who is ranked worst, and that a written recipe gives what was measured."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_fast.bundle import POLICY, REFERENCE, Bundle, open_bundle
from dpo_fast.engines import open_engine
from dpo_fast.engines.onnxruntime import OnnxRuntimeEngine
from dpo_fast.errors import UsageError
from dpo_fast.export.exporter import ExportOptions, export
from dpo_fast.export.precision import layer_number, make_engine_graph
from dpo_fast.recipes import Recipe, load_recipe
from dpo_fast.scores import score_pairs
from dpo_fast.token_table import make_table
from dpo_fast.verification.kept_layers import KeptLayers, LayerCost, recipe_text, try_kept_layers

from .layered_bundle import FP8, FP32, INT4, INT8, PAIRS, make_bundle, save_adapter, spoil_scales

pytestmark = pytest.mark.usefixtures("one_thread")
OPENVINO_INT8 = Recipe("ov8", "", "openvino", "int8", 128, 256, "int8")
WORST = 2


def log_probs(engine: OnnxRuntimeEngine, role_layout: str = "shared") -> tuple[np.ndarray, np.ndarray]:
    """All tokens' log-probs, and the chosen completions' less the rejected ones', pair by pair."""
    scored = score_pairs(make_table(PAIRS), engine, layout=role_layout, token_budget=256)
    sums = [
        [part.sum(dtype=np.float64) for part in np.split(branch.log_probs, np.cumsum(branch.lengths)[:-1])]
        for branch in (scored.chosen, scored.rejected)
    ]
    return np.concatenate([scored.chosen.log_probs, scored.rejected.log_probs]), np.subtract(*sums)


def measured(bundle: Bundle, graphs: dict[str, Path]) -> tuple[float, int]:
    """Mean error in nats a token, and flips, of graphs against a bundle's exact ones."""
    exact = {role: log_probs(OnnxRuntimeEngine(bundle.graph(role), threads=1)) for role in graphs}
    found = {role: log_probs(OnnxRuntimeEngine(path, threads=1)) for role, path in graphs.items()}
    errors = np.concatenate([np.abs(found[role][0].astype(np.float64) - exact[role][0]) for role in graphs])
    margins = [scored[POLICY][1] - scored[REFERENCE][1] for scored in (exact, found)]
    return float(errors.mean()), int((np.sign(margins[0]) != np.sign(margins[1])).sum())


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("spoilt") / "bundle"
    folder.mkdir()
    return make_bundle(folder, INT8, change=lambda model: spoil_scales(model, WORST), reference=True)


@pytest.fixture(scope="module")
def tried(spoilt: Bundle) -> KeptLayers:
    return try_kept_layers(spoilt, PAIRS, threads=1)


# -- the graph --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.3.mlp.experts.7.w1.weight", 3),
        ("policy/model.layers.12.self_attn.q_proj.weight", 12),
        ("policy/h.0.attn.c_attn.weight", 0),
        ("transformer.h.0.attn.c_attn.weight.int8", 0),
        ("0.weight", 0),
        ("model.embed_tokens.weight", None),
        ("lm_head.weight", None),
        ("model.norm2.weight", None),
        ("model.embed_tokens.weight.2", None),
    ],
)
def test_layers_by_name(name: str, layer: int | None) -> None:
    assert layer_number(name) == layer


@pytest.mark.parametrize("recipe", [INT8, INT4, FP8, OPENVINO_INT8])
def test_products_of_exact_layers_are_not_quantised(spoilt: Bundle, recipe: Recipe) -> None:
    recipe = replace(recipe, name=f"kept-{recipe.name}", exact_layers=(3, 1))
    name = make_engine_graph(spoilt.folder, POLICY, recipe, PAIRS)
    weights = set(ir.load(spoilt.folder / name).graph.initializers)
    for layer in range(4):
        for module in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"):
            exact = f"model.layers.{layer}.{module}.weight"
            assert (exact in weights) == (layer in (1, 3))
            assert any(weight.startswith(f"{exact}.") and weight.endswith(".scale") for weight in weights) == (
                layer in (0, 2)
            )


def test_all_layers_exact_is_the_exact_graph(spoilt: Bundle) -> None:
    recipe = replace(INT8, name="all", exact_layers=(0, 1, 2, 3))
    graph = spoilt.folder / make_engine_graph(spoilt.folder, POLICY, recipe)
    exact = OnnxRuntimeEngine(spoilt.graph(POLICY), threads=1)
    np.testing.assert_array_equal(log_probs(OnnxRuntimeEngine(graph, threads=1))[0], log_probs(exact)[0])


def test_layers_that_the_model_does_not_have(spoilt: Bundle) -> None:
    expected = r"--recipe int8: exact_layers = \[0, 4\]: the policy has no layer 4; its layers are 0 to 3"
    with pytest.raises(UsageError, match=expected):
        make_engine_graph(spoilt.folder, POLICY, replace(INT8, exact_layers=(0, 4)))


# -- what is measured -------------------------------------------------------------------------------------------------


def test_the_spoilt_layer_is_the_worst_and_keeping_it_helps(tried: KeptLayers) -> None:
    assert sorted(cost.layer for cost in tried.ranking) == [0, 1, 2, 3]
    errors = [cost.mean_error for cost in tried.ranking]
    assert tried.ranking[0].layer == WORST
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 3 * errors[1]
    assert [len(trade.exact_layers) for trade in tried.trades] == [0, 1, 2, 4]
    none, one, two, every = tried.trades
    assert one.exact_layers == (WORST,)
    assert set(two.exact_layers) == {cost.layer for cost in tried.ranking[:2]}
    assert one.mean_error < none.mean_error / 2
    assert (every.mean_error, every.flips) == (0, 0), "the head is float32, and nothing is left to quantise"
    assert all(trade.pairs == len(PAIRS) for trade in tried.trades)
    assert all(trade.seconds_per_token is not None and 0 < trade.seconds_per_token < 1 for trade in tried.trades)


def test_the_numbers_are_those_of_the_graphs(spoilt: Bundle, tried: KeptLayers) -> None:
    """Made here one by one, and scored by an engine of our own."""

    def graphs(recipe: Recipe) -> dict[str, Path]:
        return {role: spoilt.folder / make_engine_graph(spoilt.folder, role, recipe) for role in (POLICY, REFERENCE)}

    for trade in tried.trades:
        error, flips = measured(spoilt, graphs(replace(INT8, name="again", exact_layers=trade.exact_layers)))
        assert trade.mean_error == pytest.approx(error, rel=1e-6)
        assert trade.flips == flips
    worst = tried.ranking[0]
    alone = replace(INT8, name="again", exact_layers=tuple(layer for layer in range(4) if layer != worst.layer))
    assert worst.mean_error == pytest.approx(measured(spoilt, graphs(alone))[0], rel=1e-6)


def test_the_bundle_is_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    bundle = make_bundle(tmp_path / "bundle", replace(INT8, exact_layers=(1,)), layers=3)
    before = {path: (path.read_bytes(), path.stat().st_nlink) for path in tmp_path.rglob("*") if path.is_file()}
    said: list[str] = []
    tried = try_kept_layers(bundle, PAIRS[:2], threads=1, report=said.append)
    after = {path: (path.read_bytes(), path.stat().st_nlink) for path in tmp_path.rglob("*") if path.is_file()}
    assert after == before, "nothing is written, and no link is left"
    assert tried.trades[0].exact_layers == (), "what the recipe kept is tried anew"
    assert said == [
        *(f"quantising layer {layer} of 3 alone" for layer in range(3)),
        *(f"keeping {count} of 3 layers exact" for count in (0, 1, 2, 3)),
    ]


@pytest.mark.parametrize("recipe", [INT4, FP8, OPENVINO_INT8])
def test_the_other_forms(tmp_path: Path, recipe: Recipe) -> None:
    bundle = make_bundle(tmp_path, recipe, layers=3)
    tried = try_kept_layers(bundle, PAIRS[:3], threads=1)
    none, *_, every = tried.trades
    assert 0 <= every.mean_error < none.mean_error
    assert all((trade.seconds_per_token is None) == (recipe.precision == "fp8") for trade in tried.trades)


@pytest.mark.slow
def test_a_written_recipe_is_exported_and_gives_the_same_numbers(
    spoilt: Bundle, tried: KeptLayers, tmp_path: Path
) -> None:
    path = tmp_path / "kept.toml"
    path.write_text(tried.recipe_text(1), encoding="utf-8")
    assert load_recipe(str(path)) == replace(INT8, name="kept", exact_layers=(WORST,))
    policy, reference = (str(spoilt.folder / role) for role in (POLICY, REFERENCE))
    options = ExportOptions(recipe=str(path), self_check=False)
    exported = open_bundle(export(policy, reference, tmp_path / "exported", options))
    assert exported.manifest.recipe["exact_layers"] == [WORST]
    error, flips = measured(exported, {role: exported.engine_graph(role) for role in (POLICY, REFERENCE)})
    assert error == pytest.approx(tried.trades[1].mean_error, rel=1e-6)
    assert flips == tried.trades[1].flips
    assert open_engine(exported, POLICY, threads=1).precision == "int8"


@pytest.mark.slow
def test_roles_that_share_a_graph(tmp_path: Path, spoilt: Bundle) -> None:
    """An adapter and its base: one graph is made, and scored with the adapter on and off."""
    base = spoilt.folder / POLICY
    save_adapter(base, tmp_path / "adapter")
    (tmp_path / "eight.toml").write_text(recipe_text(INT8), encoding="utf-8")
    options = ExportOptions(self_check=False, base=str(base), recipe=str(tmp_path / "eight.toml"))
    bundle = open_bundle(export(str(tmp_path / "adapter"), "base", tmp_path / "bundle", options))
    assert bundle.graph(POLICY) == bundle.graph(REFERENCE)
    tried = try_kept_layers(bundle, PAIRS, threads=1)
    assert tried.ranking[0].layer == WORST
    gates = {role: entry.adapter_gates for role, entry in bundle.manifest.models.items()}
    scored = {}
    for name, graph in (("exact", bundle.graph(POLICY)), ("int8", bundle.engine_graph(POLICY))):
        engine = OnnxRuntimeEngine(graph, gates=gates[POLICY], threads=1)
        scored[name] = [log_probs(engine.with_gates(gates[role])) for role in (POLICY, REFERENCE)]
    margins = {name: policy[1] - reference[1] for name, (policy, reference) in scored.items()}
    assert tried.trades[0].flips == int((np.sign(margins["exact"]) != np.sign(margins["int8"])).sum())
    errors = [np.abs(one[0].astype(np.float64) - other[0]) for one, other in zip(*scored.values(), strict=True)]
    assert tried.trades[0].mean_error == pytest.approx(float(np.concatenate(errors).mean()), rel=1e-6)
    assert (tried.trades[-1].mean_error, tried.trades[-1].flips) == (0, 0)


# -- what is refused, and the recipe's text ---------------------------------------------------------------------------


def test_bundles_without_anything_to_try(tmp_path: Path, spoilt: Bundle) -> None:
    with pytest.raises(UsageError, match=r"in fp32, which has no exact_layers; export .* in int8, int4, fp8"):
        try_kept_layers(make_bundle(tmp_path, FP32), PAIRS)
    with pytest.raises(UsageError, match="there are none; name a data set"):
        try_kept_layers(spoilt, [])


def test_numbers_of_layers_to_keep(tried: KeptLayers) -> None:
    assert tried.worst(0) == ()
    assert tried.worst(4) == (0, 1, 2, 3)
    for count in (-1, 5):
        with pytest.raises(UsageError, match=f"{count} layers cannot be kept exact: the model has 4"):
            tried.worst(count)


def test_the_worst_layers_by_hand() -> None:
    ranking = tuple(LayerCost(layer, 1.0 / place) for place, layer in enumerate([5, 0, 3], start=1))
    kept = KeptLayers(INT8, ranking, ())
    assert [kept.worst(count) for count in range(4)] == [(), (5,), (0, 5), (0, 3, 5)]
    assert kept.recipe_text(2) == (
        'description = "8 bits"\nengine = "onnxruntime"\nprecision = "int8"\nvocabulary_tile = 128\n'
        'token_budget = 256\nhead_precision = "fp32"\nreduce_range = false\nexact_layers = [0, 5]\n'
    )


@pytest.fixture(scope="module")
def write(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    path = tmp_path_factory.mktemp("recipes") / "any.toml"

    def write(text: str) -> str:
        path.write_text(text, encoding="utf-8", newline="")
        return str(path)

    return write


@given(
    recipe=st.sampled_from([FP32, INT8, INT4, FP8, OPENVINO_INT8]),
    description=st.text(st.characters(codec="utf-8")),
    layers=st.lists(st.integers(0, 200), unique=True),
)
def test_any_recipe_is_read_as_it_was_written(
    write: Callable[[str], str], recipe: Recipe, description: str, layers: list[int]
) -> None:
    if recipe.precision != "fp32":
        recipe = replace(recipe, exact_layers=tuple(layers))
    recipe = replace(recipe, name="any", description=description)
    assert load_recipe(write(recipe_text(recipe))) == recipe
