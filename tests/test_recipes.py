"""Recipes: what is shipped loads and is documented, and what is wrong is named."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from dpo_fast.errors import UsageError
from dpo_fast.recipes import DEFAULT, ENGINES, Recipe, load_recipe, recipe_folder

PROJECT = Path(__file__).parent.parent
SHIPPED = sorted(path.stem for path in (PROJECT / "export").glob("*.toml"))
GOOD = {
    "description": '"one"',
    "engine": '"onnxruntime"',
    "precision": '"fp32"',
    "vocabulary_tile": "4096",
    "token_budget": "512",
}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Writes a good recipe with some keys changed, or left out where None."""

    def write(**changes: str | None) -> str:
        keys = {key: value for key, value in {**GOOD, **changes}.items() if value is not None}
        path = tmp_path / "mine.toml"
        path.write_text("\n".join(f"{key} = {value}" for key, value in keys.items()), encoding="utf-8")
        return str(path)

    return write


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_load_and_are_documented(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    readme = (PROJECT / "export" / "README.md").read_text(encoding="utf-8")
    row = next(line for line in readme.splitlines() if line.startswith(f"| `{name}`"))
    assert ("(the default)" in row) == (name == DEFAULT)


def test_the_readme_documents_no_others_and_every_key() -> None:
    readme = (PROJECT / "export" / "README.md").read_text(encoding="utf-8")
    recipes, keys = (table.splitlines() for table in re.findall(r"\|---.*\n((?:\|.*\n?)+)", readme))
    assert [re.match(r"\| `([^`]+)`", row)[1] for row in recipes] == SHIPPED
    documented = [re.match(r"\| `([^`]+)`", row)[1] for row in keys]
    assert documented == [key for key in Recipe.__dataclass_fields__ if key != "name"]


def test_the_shipped_folder_is_the_projects() -> None:
    assert recipe_folder() == PROJECT / "export"
    assert DEFAULT in SHIPPED


def test_a_recipe_by_file(write: Callable[..., str]) -> None:
    assert load_recipe(write()) == Recipe("mine", "one", "onnxruntime", "fp32", 4096, 512)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"vocab_tile": "3"}, "the key 'vocab_tile' is not known; a recipe has description, engine"),
        ({"name": '"x"'}, "the key 'name' is not known"),
        ({"precision": None}, "the key 'precision' is missing; a recipe has description, engine"),
        ({"token_budget": '"512"'}, "token_budget = '512' must be a whole number"),
        ({"token_budget": "512.0"}, "token_budget = 512.0 must be a whole number"),
        ({"token_budget": "true"}, "token_budget = True must be a whole number"),
        ({"description": "3"}, "description = 3 must be text"),
        ({"engine": '"tensorflow"'}, "engine = 'tensorflow' is not known; choose from onnxruntime"),
        ({"precision": '"int3"'}, "onnxruntime cannot run precision = 'int3'; choose from fp32"),
        ({"vocabulary_tile": "0"}, "vocabulary_tile = 0 must be at least 1"),
        ({"token_budget": "-1"}, "token_budget = -1 must be at least 1"),
        ({"engine": "onnxruntime"}, "is no TOML"),
        ({"engine": "[" * 5000}, "is no TOML"),
    ],
)
def test_recipes_that_are_wrong(write: Callable[..., str], changes: dict[str, str | None], expected: str) -> None:
    path = write(**changes)
    with pytest.raises(UsageError) as caught:
        load_recipe(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert expected in message
    assert "\n" not in message


def test_recipes_that_are_not_there(tmp_path: Path) -> None:
    for name in ("no-such", str(tmp_path), str(tmp_path / "no.toml")):
        with pytest.raises(UsageError, match=f"is neither a file nor one of {', '.join(SHIPPED)}"):
            load_recipe(name)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="is no TOML"):
        load_recipe(str(tmp_path / "a.toml"))


def test_every_engine_has_a_precision() -> None:
    assert all(ENGINES.values())
