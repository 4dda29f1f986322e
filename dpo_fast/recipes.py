"""Recipes: what a bundle is made for, one TOML file each (see export/README.md)."""

import tomllib
from dataclasses import dataclass, fields
from pathlib import Path

from dpo_fast.errors import UsageError

DEFAULT = "cpu-fp32"
# What each engine can run, by precision.
ENGINES = {"onnxruntime": ("fp32",)}


@dataclass(frozen=True, slots=True)
class Recipe:
    """A recipe's keys.

    Attributes:
        name: the file's name without its suffix.
        description: one line for people.
        engine: a key of `ENGINES`.
        precision: one of the engine's.
        vocabulary_tile: columns of the vocabulary that the head computes at a time.
        token_budget: tokens of a batch, padding included.
    """

    name: str
    description: str
    engine: str
    precision: str
    vocabulary_tile: int
    token_budget: int


def recipe_folder() -> Path:
    """Where the shipped recipes lie: in the package when installed, at the top of the project otherwise."""
    package = Path(__file__).parent
    installed = package / "recipe_files"
    return installed if installed.is_dir() else package.parent / "export"


def load_recipe(name: str) -> Recipe:
    """A shipped recipe by name, or any by file.

    Raises:
        UsageError: it does not exist, a key is unknown or missing, or the engine cannot run it.
    """
    shipped = {path.stem: path for path in sorted(recipe_folder().glob("*.toml"))}
    path = shipped.get(name, Path(name))
    if not path.is_file():
        raise UsageError(f"--recipe {name!r} is neither a file nor one of {', '.join(shipped)}")
    try:
        keys = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"{path}: is no TOML: {error}") from error
    known = {field.name: field.type for field in fields(Recipe) if field.name != "name"}
    for key in keys:
        if key not in known:
            raise UsageError(f"{path}: the key {key!r} is not known; a recipe has {', '.join(known)}")
    for key, kind in known.items():
        if key not in keys:
            raise UsageError(f"{path}: the key {key!r} is missing; a recipe has {', '.join(known)}")
        if type(keys[key]) is not kind:
            raise UsageError(f"{path}: {key} = {keys[key]!r} must be {'a whole number' if kind is int else 'text'}")
    recipe = Recipe(name=path.stem, **keys)
    if recipe.engine not in ENGINES:
        raise UsageError(f"{path}: engine = {recipe.engine!r} is not known; choose from {', '.join(ENGINES)}")
    if recipe.precision not in ENGINES[recipe.engine]:
        raise UsageError(
            f"{path}: {recipe.engine} cannot run precision = {recipe.precision!r}; "
            f"choose from {', '.join(ENGINES[recipe.engine])}"
        )
    for key in ("vocabulary_tile", "token_budget"):
        if keys[key] < 1:
            raise UsageError(f"{path}: {key} = {keys[key]} must be at least 1")
    return recipe
