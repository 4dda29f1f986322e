"""Recipes: what a bundle is made for, one TOML file each (see export/README.md)."""

import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from dpo_fast.errors import UsageError

DEFAULT = "cpu-fp32"
CHUNKS = (256, 512, 1024, 2048, 4096)
# The precisions that each engine runs, and the keys that belong to each, with the values that they take.
ENGINES: dict[str, dict[str, dict[str, tuple[str | int | bool, ...]]]] = {
    "onnxruntime": {
        "fp32": {},
        "int8": {"head_precision": ("fp32", "int8"), "reduce_range": (False, True)},
        "int4": {
            "head_precision": ("fp32", "int4"),
            "block_size": (16, 32, 64, 128, 256),
            "symmetric": (False, True),
        },
    },
    "onnxruntime-cuda": {
        "fp16": {"head_precision": ("fp32", "fp16")},
        "bf16": {"head_precision": ("fp32", "bf16")},
    },
    "onnxruntime-tensorrt": {"fp16": {"head_precision": ("fp32", "fp16")}},
    "openvino": {"fp32": {}, "bf16": {}, "int8": {"head_precision": ("fp32", "int8")}},
    "tensorrt": {
        "fp32": {"head_chunk": CHUNKS},
        "fp16": {"head_precision": ("fp32", "fp16"), "head_chunk": CHUNKS},
        "bf16": {"head_precision": ("fp32", "bf16"), "head_chunk": CHUNKS},
        "fp8": {"head_precision": ("fp32", "fp16"), "head_chunk": CHUNKS, "calibrator": ("largest", "modelopt")},
    },
    "tensorrt-rtx": {
        "fp16": {"head_precision": ("fp32", "fp16"), "head_chunk": CHUNKS},
        "bf16": {"head_precision": ("fp32", "bf16"), "head_chunk": CHUNKS},
    },
}
# What may be left out, and the precisions that it belongs to.
OPTIONAL = {"exact_layers": ("int8", "int4", "fp8")}
# What every recipe has, and of which kind.
COMMON = {"description": str, "engine": str, "precision": str, "vocabulary_tile": int, "token_budget": int}


@dataclass(frozen=True, slots=True)
class Recipe:
    """A recipe's keys; those that do not belong to its precision have their defaults.

    Attributes:
        name: the file's name without its suffix.
        description: one line for people.
        engine: a key of `ENGINES`.
        precision: of the matrix products; one of the engine's.
        vocabulary_tile: columns of the vocabulary that the head computes at a time.
        token_budget: tokens of a batch, padding included.
        head_precision: of the head's matrix product.
        reduce_range: whether int8 weights have 7 bits, for processors that add pairs of products in 16 bits.
        block_size: entries of a column that share an int4 scale.
        head_chunk: targets that a TensorRT head takes at a time.
        symmetric: whether int4 levels lie around zero, or between a block's smallest and largest entry.
        calibrator: who measures the activations that constant scales are chosen for; None where there are none.
        exact_layers: numbers of the layers, counted from 0, whose products are not quantised.
    """

    name: str
    description: str
    engine: str
    precision: str
    vocabulary_tile: int
    token_budget: int
    head_precision: str = "fp32"
    reduce_range: bool | None = None
    block_size: int | None = None
    symmetric: bool | None = None
    head_chunk: int | None = None
    calibrator: str | None = None
    exact_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Take a list too, which is what TOML and JSON have."""
        object.__setattr__(self, "exact_layers", tuple(self.exact_layers))


def recipe_folder() -> Path:
    """Where the shipped recipes lie: in the package when installed, at the top of the project otherwise."""
    package = Path(__file__).parent
    installed = package / "recipe_files"
    return installed if installed.is_dir() else package.parent / "export"


def load_recipe(name: str) -> Recipe:
    """A shipped recipe by name, or any by file.

    Raises:
        UsageError: it does not exist, a key is unknown, missing or of no use, or the engine cannot run it.
    """
    shipped = {path.stem: path for path in sorted(recipe_folder().glob("*.toml"))}
    path = shipped.get(name, Path(name))
    if not path.is_file():
        raise UsageError(f"--recipe {name!r} is neither a file nor one of {', '.join(shipped)}")
    try:
        keys = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"{path}: is no TOML: {error}") from error
    _check_common(path, keys)
    own = ENGINES[keys["engine"]][keys["precision"]]
    optional = [key for key, precisions in OPTIONAL.items() if keys["precision"] in precisions]
    for key in keys:
        if key not in COMMON and key not in own and key not in optional:
            use = f"which takes {', '.join([*own, *optional])}" if own else "which takes none of its own"
            raise UsageError(
                f"{path}: the key {key!r} is of no use for {keys['engine']} in {keys['precision']}, {use}; leave it out"
            )
    for key, choices in own.items():
        if key not in keys:
            raise UsageError(f"{path}: the key {key!r} is missing; choose from {_listed(choices)}")
        # Kinds are compared too: in Python, true is 1.
        if not any(type(keys[key]) is type(choice) and keys[key] == choice for choice in choices):
            raise UsageError(f"{path}: {key} = {keys[key]!r} is not possible; choose from {_listed(choices)}")
    _check_exact_layers(path, keys.get("exact_layers", []))
    return Recipe(name=path.stem, **keys)


def _check_exact_layers(path: Path, layers: Any) -> None:
    """Refuse what is no list of layers; whether a model has them is for the export to say."""
    if not isinstance(layers, list) or any(type(layer) is not int for layer in layers):
        raise UsageError(f"{path}: exact_layers = {layers!r} must be a list of whole numbers, such as [0, 29]")
    for layer in layers:
        if layer < 0:
            raise UsageError(f"{path}: exact_layers = {layers!r}: layers are counted from 0, and {layer} is below")
        if layers.count(layer) > 1:
            raise UsageError(f"{path}: exact_layers = {layers!r} names layer {layer} more than once")


def _check_common(path: Path, keys: dict[str, Any]) -> None:
    """Refuse keys that no recipe has, and what every recipe must have but this one does not."""
    known = [field.name for field in fields(Recipe) if field.name != "name"]
    for key in keys:
        if key not in known:
            raise UsageError(f"{path}: the key {key!r} is not known; a recipe has {', '.join(known)}")
    for key, kind in COMMON.items():
        if key not in keys:
            raise UsageError(f"{path}: the key {key!r} is missing; a recipe has {', '.join(COMMON)}")
        if type(keys[key]) is not kind:
            raise UsageError(f"{path}: {key} = {keys[key]!r} must be {'a whole number' if kind is int else 'text'}")
    engine, precision = keys["engine"], keys["precision"]
    if engine not in ENGINES:
        raise UsageError(f"{path}: engine = {engine!r} is not known; choose from {', '.join(ENGINES)}")
    if precision not in ENGINES[engine]:
        raise UsageError(
            f"{path}: {engine} cannot run precision = {precision!r}; choose from {', '.join(ENGINES[engine])}"
        )
    for key in ("vocabulary_tile", "token_budget"):
        if keys[key] < 1:
            raise UsageError(f"{path}: {key} = {keys[key]} must be at least 1")


def _listed(choices: tuple[str | int | bool, ...]) -> str:
    """Values as TOML writes them."""
    return ", ".join(str(choice).lower() if isinstance(choice, bool) else str(choice) for choice in choices)
