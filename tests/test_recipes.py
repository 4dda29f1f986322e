"""Recipes: what is shipped loads and is documented, and what is wrong is named."""

import json
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_fast.errors import UsageError
from dpo_fast.recipes import COMMON, DEFAULT, ENGINES, OPTIONAL, Recipe, load_recipe, recipe_folder

PROJECT = Path(__file__).parent.parent
README = (PROJECT / "export" / "README.md").read_text(encoding="utf-8")
SHIPPED = sorted(path.stem for path in (PROJECT / "export").glob("*.toml"))
GOOD: dict[str, Any] = {
    "description": "one",
    "engine": "onnxruntime",
    "precision": "fp32",
    "vocabulary_tile": 4096,
    "token_budget": 512,
}
INT8 = {**GOOD, "precision": "int8", "head_precision": "fp32", "reduce_range": False}
INT4 = {**GOOD, "precision": "int4", "head_precision": "int4", "block_size": 64, "symmetric": True}
FP8 = {**GOOD, "engine": "tensorrt", "precision": "fp8", "head_precision": "fp32", "head_chunk": 256,
       "calibrator": "largest"}  # fmt: skip
OWN_KEYS = {key for precisions in ENGINES.values() for own in precisions.values() for key in own} | {*OPTIONAL}


def as_toml(keys: dict[str, Any]) -> str:
    # JSON's texts, numbers, booleans and lists of them are TOML's.
    return "\n".join(f"{key} = {json.dumps(value)}" for key, value in keys.items())


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Writes a recipe with some keys changed, or left out where None."""

    def write(keys: dict[str, Any] = GOOD, **changes: Any) -> str:
        path = tmp_path / "mine.toml"
        path.write_text(as_toml({k: v for k, v in {**keys, **changes}.items() if v is not None}), encoding="utf-8")
        return str(path)

    return write


def readme_tables() -> list[list[list[str]]]:
    """The cells of each table's rows below its head, without the marks of code."""
    tables = re.findall(r"\|---.*\n((?:\|.*\n?)+)", README)
    return [
        [[cell.strip().replace("`", "") for cell in row.strip("|").split("|")] for row in table.splitlines()]
        for table in tables
    ]


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_load(name: str) -> None:
    assert load_recipe(name).name == name


def test_the_issues_recipes_are_shipped() -> None:
    assert set(SHIPPED) >= {
        "cpu-fp32", "cpu-int8", "cpu-int4", "openvino-bf16", "openvino-int8", "cuda-fp16", "cuda-bf16",
        "tensorrt-fp16", "tensorrt-fp8",
    }  # fmt: skip


def test_the_readme_documents_each_recipe_and_no_other() -> None:
    rows = readme_tables()[0]
    assert [row[0].removesuffix(" (the default)") for row in rows] == SHIPPED
    assert [row[0] for row in rows if row[0].endswith("(the default)")] == [f"{DEFAULT} (the default)"]


def test_the_readme_documents_each_key_and_no_other() -> None:
    _, common, own = readme_tables()
    assert [row[0] for row in common] == list(COMMON)
    assert {row[0] for row in own} == OWN_KEYS
    assert {*COMMON, *OWN_KEYS} == {key for key in Recipe.__dataclass_fields__ if key != "name"}


def test_the_readme_documents_what_each_engine_runs() -> None:
    rows = {row[0]: row[1] for row in readme_tables()[1]}
    for engine, precisions in ENGINES.items():
        assert engine in rows["engine"]
        assert f"{engine}: {', '.join(precisions)}" in rows["precision"]


def test_the_shipped_folder_is_the_projects() -> None:
    assert recipe_folder() == PROJECT / "export"
    assert DEFAULT in SHIPPED


def test_a_recipe_by_file(write: Callable[..., str]) -> None:
    assert load_recipe(write()) == Recipe("mine", "one", "onnxruntime", "fp32", 4096, 512)
    assert load_recipe(write(INT8)) == Recipe("mine", "one", "onnxruntime", "int8", 4096, 512, "fp32", False)
    expected = Recipe("mine", "one", "onnxruntime", "int4", 4096, 512, "int4", block_size=64, symmetric=True)
    assert load_recipe(write(INT4)) == expected
    expected = Recipe("mine", "one", "tensorrt", "fp8", 4096, 512, "fp32", head_chunk=256, calibrator="modelopt")
    assert load_recipe(write(FP8, calibrator="modelopt")) == expected


@pytest.mark.parametrize("keys", [INT8, INT4, FP8])
def test_layers_that_stay_exact_may_be_named(write: Callable[..., str], keys: dict[str, Any]) -> None:
    assert load_recipe(write(keys)).exact_layers == ()
    assert load_recipe(write(keys, exact_layers=[])) == load_recipe(write(keys))
    recipe = load_recipe(write(keys, exact_layers=[29, 0]))
    assert recipe.exact_layers == (29, 0)
    # A bundle's manifest is JSON, whose lists are lists.
    assert Recipe(**json.loads(json.dumps(asdict(recipe)))) == recipe


@pytest.mark.parametrize(
    ("keys", "changes", "expected"),
    [
        (GOOD, {"vocab_tile": 3}, "the key 'vocab_tile' is not known; a recipe has description, engine"),
        (GOOD, {"name": "x"}, "the key 'name' is not known"),
        (GOOD, {"precision": None}, "the key 'precision' is missing; a recipe has description, engine"),
        (GOOD, {"token_budget": "512"}, "token_budget = '512' must be a whole number"),
        (GOOD, {"token_budget": 512.0}, "token_budget = 512.0 must be a whole number"),
        (GOOD, {"token_budget": True}, "token_budget = True must be a whole number"),
        (GOOD, {"description": 3}, "description = 3 must be text"),
        (GOOD, {"engine": ["onnxruntime"]}, "engine = ['onnxruntime'] must be text"),
        (GOOD, {"engine": "tensorflow"}, "engine = 'tensorflow' is not known; choose from onnxruntime, onnxruntime-"),
        (GOOD, {"precision": "int3"}, "onnxruntime cannot run precision = 'int3'; choose from fp32, int8, int4"),
        (GOOD, {"precision": "bf16"}, "onnxruntime cannot run precision = 'bf16'; choose from fp32, int8, int4"),
        (INT8, {"engine": "tensorrt"}, "tensorrt cannot run precision = 'int8'; choose from fp32, fp16, bf16, fp8"),
        (GOOD, {"vocabulary_tile": 0}, "vocabulary_tile = 0 must be at least 1"),
        (GOOD, {"token_budget": -1}, "token_budget = -1 must be at least 1"),
        (GOOD, {"block_size": 32}, "'block_size' is of no use for onnxruntime in fp32, which takes none of its own"),
        (INT8, {"block_size": 32}, "'block_size' is of no use for onnxruntime in int8, which takes head_precision, re"),
        (INT8, {"reduce_range": None}, "the key 'reduce_range' is missing; choose from false, true"),
        (INT8, {"reduce_range": 1}, "reduce_range = 1 is not possible; choose from false, true"),
        (INT8, {"head_precision": "fp16"}, "head_precision = 'fp16' is not possible; choose from fp32, int8"),
        (INT8, {"engine": "openvino"}, "'reduce_range' is of no use for openvino in int8, which takes head_precision"),
        (INT4, {"block_size": 48}, "block_size = 48 is not possible; choose from 16, 32, 64, 128, 256"),
        (INT4, {"block_size": 32.0}, "block_size = 32.0 is not possible"),
        (INT4, {"symmetric": [True]}, "symmetric = [True] is not possible; choose from false, true"),
        (INT4, {"reduce_range": True}, "'reduce_range' is of no use for onnxruntime in int4"),
        (FP8, {"calibrator": None}, "the key 'calibrator' is missing; choose from largest, modelopt"),
        (FP8, {"calibrator": "entropy"}, "calibrator = 'entropy' is not possible; choose from largest, modelopt"),
        (FP8, {"precision": "fp16"}, "'calibrator' is of no use for tensorrt in fp16, which takes head_precision"),
        (INT8, {"exact_layers": 3}, "exact_layers = 3 must be a list of whole numbers, such as [0, 29]"),
        (INT8, {"exact_layers": [0, "1"]}, "exact_layers = [0, '1'] must be a list of whole numbers"),
        (INT4, {"exact_layers": [0, 1.0]}, "exact_layers = [0, 1.0] must be a list of whole numbers"),
        (INT4, {"exact_layers": [True]}, "exact_layers = [True] must be a list of whole numbers"),
        (FP8, {"exact_layers": [[0]]}, "exact_layers = [[0]] must be a list of whole numbers"),
        (FP8, {"exact_layers": [2, -1]}, "exact_layers = [2, -1]: layers are counted from 0, and -1 is below"),
        (INT8, {"exact_layers": [1, 0, 1]}, "exact_layers = [1, 0, 1] names layer 1 more than once"),
        (GOOD, {"exact_layers": [0]}, "'exact_layers' is of no use for onnxruntime in fp32, which takes none of its"),
        (
            FP8,
            {"precision": "fp16", "calibrator": None, "exact_layers": [0]},
            "'exact_layers' is of no use for tensorrt in fp16, which takes head_precision, head_chunk; leave it out",
        ),
        (INT8, {"calibrator": "largest"}, "'calibrator' is of no use for onnxruntime in int8, which takes head_precis"),
    ],
)
def test_recipes_that_are_wrong(
    write: Callable[..., str], keys: dict[str, Any], changes: dict[str, Any], expected: str
) -> None:
    path = write(keys, **changes)
    with pytest.raises(UsageError) as caught:
        load_recipe(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert expected in message
    assert "\n" not in message


@pytest.mark.parametrize("text", ["engine = onnxruntime", "engine = " + "[" * 5000, "a = 1\na = 2"])
def test_texts_that_are_no_toml(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.toml").write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match="is no TOML"):
        load_recipe(str(tmp_path / "a.toml"))


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="is no TOML"):
        load_recipe(str(tmp_path / "a.toml"))


def test_recipes_that_are_not_there(tmp_path: Path) -> None:
    for name in ("no-such", str(tmp_path), str(tmp_path / "no.toml")):
        with pytest.raises(UsageError, match=f"is neither a file nor one of {', '.join(SHIPPED)}"):
            load_recipe(name)


ENGINE_NAMES = st.sampled_from([*ENGINES, "", "Onnxruntime"])
PRECISIONS = st.sampled_from([*{name for precisions in ENGINES.values() for name in precisions}, "int3"])
SCALARS = st.one_of(st.booleans(), st.integers(-1, 300), st.floats(allow_nan=False, allow_infinity=False), PRECISIONS)
ANYTHING = SCALARS | st.lists(SCALARS, max_size=3)
RECIPES = st.fixed_dictionaries(
    {"description": st.just("x"), "engine": ENGINE_NAMES, "precision": PRECISIONS, "vocabulary_tile": st.just(8)},
    optional={"token_budget": ANYTHING, **dict.fromkeys(sorted(OWN_KEYS), ANYTHING), "unknown": ANYTHING},
)


@given(keys=RECIPES)
def test_any_keys_make_a_recipe_or_one_line(keys: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    """Whatever is accepted is a recipe with exactly these keys, which its engine can run."""
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_text(as_toml(keys), encoding="utf-8")
    try:
        recipe = load_recipe(str(path))
    except UsageError as error:
        recipe, message = None, str(error)
    if recipe is None:
        assert message.startswith(f"{path}: ")
        assert "\n" not in message
        return
    layers = keys.pop("exact_layers", None)
    assert layers is None or (list(recipe.exact_layers) == layers and recipe.precision in OPTIONAL["exact_layers"])
    assert {key: getattr(recipe, key) for key in keys} == keys
    assert set(keys) == {*COMMON, *ENGINES[recipe.engine][recipe.precision]}


@given(text=st.text(max_size=200))
def test_any_text_makes_a_recipe_or_one_line(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "text.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError):
        load_recipe(str(path))
