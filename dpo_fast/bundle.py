"""A bundle: graphs, the weights they point into, and a manifest that says what they are (DESIGN: the bundle).

BUNDLE/
bundle.json                 this file's `Manifest`
policy.onnx reference.onnx  the exact graphs, a few MB each, in float32
policy.RECIPE.onnx …        the graph that the recipe's engine runs, where it is another
policy/ reference/          ordinary Transformers (or PEFT) folders
base/                       the weights beneath an adapter, where the reference is not the base itself
engines/RECIPE/             quantised weights; TensorRT's plans
attestation.json model.sig  what `verify` found of these files, and who signed them
"""

import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any

from dpo_fast.batches import LAYOUTS, Layout
from dpo_fast.errors import BundleError
from dpo_fast.files import sha256, write_json
from dpo_fast.recipes import Recipe

MANIFEST = "bundle.json"
FORMAT = 3
POLICY, REFERENCE = "policy", "reference"
ROLES = (POLICY, REFERENCE)
# The model card is written again after each evaluation, and the manifest cannot hold its own hash; everything else
# stays as it was exported.
ATTESTATION, SIGNATURE = "attestation.json", "model.sig"  # of a verification; they come after the export
UNTRACKED = frozenset({MANIFEST, ATTESTATION, SIGNATURE, f"{POLICY}/README.md"})


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """One role's model in the manifest.

    Attributes:
        source: Hub id, or the name of the local folder it came from.
        revision: the Hub's commit, or None.
        architecture: the model's class.
        model_type: Transformers' name of the architecture.
        stored_dtypes: safetensors' names, such as ["BF16"].
        parameters: number of stored elements.
        vocabulary: rows of the embedding.
        hidden, layers, heads: width of a state, layers of the decoder, query heads of a layer; None if not known.
        max_positions: longest sequence in tokens that the model has positions for, or None.
        graph: the exact graph's file.
        engine_graph: the file of the graph that the recipe's engine runs; `graph` itself where nothing is converted.
        weights: the folders and files whose tensors decide this role's scores, such as ["reference", "policy"].
        adapter_gates: what turns the graph's adapters on (1) or off (0) for this role, or None where it has none.
        layout: "shared" or "plain"; what the self-check found to be exact.
        self_check: its figures, or None when it was left out on request.
        engine_check: how far the engine's graph is from the exact one, or None where they are the same graph or the
            engine's cannot run here.
        plan: the file that describes the plans which TensorRT runs, or None where none are built.
    """

    source: str
    revision: str | None
    architecture: str
    model_type: str
    stored_dtypes: list[str]
    parameters: int
    vocabulary: int
    hidden: int | None
    layers: int | None
    heads: int | None
    max_positions: int | None
    graph: str
    engine_graph: str
    weights: list[str]
    adapter_gates: list[float] | None
    layout: Layout
    self_check: dict[str, Any] | None
    engine_check: dict[str, Any] | None
    plan: str | None = None


@dataclass(frozen=True, slots=True)
class Manifest:
    """The content of bundle.json.

    Attributes:
        format: of this file.
        versions: of the packages that made the bundle.
        recipe: the recipe's keys.
        max_length: default truncation in tokens.
        inputs, outputs: the graphs' (the graph contract).
        models: by role; a bundle without a reference has none under "reference".
        files: size in bytes and SHA-256 of every file by its path in the bundle.
    """

    format: int
    versions: dict[str, str]
    recipe: dict[str, Any]
    max_length: int
    inputs: dict[str, list[str]]
    outputs: list[str]
    models: dict[str, ModelEntry]
    files: dict[str, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle on disk."""

    folder: Path
    manifest: Manifest

    @property
    def has_reference(self) -> bool:
        """Whether there is a reference to compare the policy with."""
        return REFERENCE in self.manifest.models

    def graph(self, role: str) -> Path:
        """A role's exact graph."""
        return self.folder / self.manifest.models[role].graph

    def engine_graph(self, role: str) -> Path:
        """The graph of a role that the recipe's engine runs."""
        return self.folder / self.manifest.models[role].engine_graph

    def model_folder(self, role: str) -> Path:
        """A role's Transformers folder."""
        return self.folder / role

    @property
    def base_model(self) -> str | None:
        """The Hub id that the policy was trained from, for its card; None where the reference is a local folder."""
        reference = self.manifest.models.get(REFERENCE)
        return reference.source if reference is not None and reference.revision is not None else None

    def role_hashes(self, role: str) -> list[str]:
        """The SHA-256 of all that decides a role's scores: of the engine's graph, every weight file, its plans."""
        entry = self.manifest.models[role]
        return [
            self.manifest.files[name]["sha256"]
            for name in sorted(self.manifest.files)
            if name == entry.engine_graph
            or (name.endswith(".safetensors") and any(name == w or name.startswith(f"{w}/") for w in entry.weights))
            or (entry.plan is not None and is_of_plan(name, entry.plan))
        ]

    def verify(self) -> None:
        """Check that every file is there and is the one that was exported.

        Raises:
            BundleError: with the first file that is missing or altered.
        """

        def check(name: str) -> None:
            recorded, path = self.manifest.files[name], self.folder / name
            if not path.is_file():
                raise BundleError(f"{path}: is missing, and {MANIFEST} lists it; export the bundle again")
            size = path.stat().st_size
            if size != recorded["bytes"] or sha256(path) != recorded["sha256"]:
                raise BundleError(
                    f"{path}: is not the file that was exported ({size} bytes, {recorded['bytes']} recorded; "
                    "its SHA-256 differs); export the bundle again"
                )

        # Hashing releases the interpreter, so files are hashed side by side; the largest begin.
        names = sorted(self.manifest.files, key=lambda name: -self.manifest.files[name]["bytes"])
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            for _ in threads.map(check, names):
                pass


def open_bundle(folder: Path) -> Bundle:
    """Read a bundle's manifest; `Bundle.verify` then checks the files.

    Raises:
        BundleError: it is missing, of another format, or names files outside the bundle.
    """
    path = folder / MANIFEST
    if not folder.is_dir():
        raise BundleError(f"{folder}: no such bundle; make one with `dpo-fast export --output {folder}`")
    if not path.is_file():
        raise BundleError(f"{folder}: holds no {MANIFEST}, so it is no bundle; make one with `dpo-fast export`")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if value["format"] != FORMAT:
            raise BundleError(
                f"{path}: has format {value['format']!r}, and this version reads {FORMAT}; export the bundle again"
            )
        models = {role: ModelEntry(**entry) for role, entry in value.pop("models").items()}
        manifest = Manifest(models=models, **value)
        names = [*manifest.files, *(name for entry in models.values() for name in (entry.graph, entry.engine_graph))]
        names += [entry.plan for entry in models.values() if entry.plan is not None]
        layouts = {entry.layout for entry in models.values()}
        _check_kinds(manifest)
        # What engines are made of lies in these, or will.
        folders = [Recipe(**manifest.recipe).name, *(name for entry in models.values() for name in entry.weights)]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BundleError(f"{path}: is damaged ({type(error).__name__}: {error}); export the bundle again") from error
    for name in [*names, *folders]:
        parts = PurePosixPath(name).parts
        if not parts or ".." in parts or PurePosixPath(name).is_absolute() or "\\" in name:
            raise BundleError(f"{path}: names {name!r}, which lies outside the bundle; do not trust this bundle")
    for name in names:
        if name not in manifest.files:
            raise BundleError(f"{path}: has no hash of {name!r}; export the bundle again")
    if POLICY not in models or not set(models) <= set(ROLES) or not layouts <= set(LAYOUTS):
        raise BundleError(
            f"{path}: is damaged (models {sorted(models)}, layouts {sorted(layouts)}); export the bundle again"
        )
    return Bundle(folder, manifest)


def is_of_plan(name: str, plan: str) -> bool:
    """Whether a file of a bundle is a plan's description or one of the plans beside it."""
    return name == plan or (name.startswith(plan.removesuffix("json")) and name.endswith(".plan"))


def _check_kinds(manifest: Manifest) -> None:
    """Refuse values that others compute with and that are of another kind; JSON may hold anything.

    Raises:
        TypeError: a value is.
        KeyError: a value is missing.
    """
    files, recipe, models = manifest.files.values(), manifest.recipe, manifest.models.values()
    numbers = [manifest.max_length, recipe["token_budget"], *(model.vocabulary for model in models)]
    numbers += [model.max_positions for model in models if model.max_positions is not None]
    numbers += [file["bytes"] for file in files]
    texts = [recipe["name"], recipe["engine"], *(file["sha256"] for file in files)]
    texts += [text for model in models for text in (model.source, model.graph, model.engine_graph, model.layout)]
    texts += [name for model in models for name in model.weights]
    texts += [model.plan for model in models if model.plan is not None]
    for value in numbers:
        if type(value) is not int:
            raise TypeError(f"{value!r} instead of a whole number")
    for gates in (model.adapter_gates for model in models):
        if gates is not None and not all(type(gate) in (int, float) for gate in gates):
            raise TypeError(f"{gates!r} instead of a list of numbers")
    for value in texts:
        if not isinstance(value, str):
            raise TypeError(f"{value!r} instead of a text")


def hash_files(folder: Path, known: Mapping[str, dict[str, Any]] = MappingProxyType({})) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file of a bundle that evaluations leave alone, by path.

    Args:
        folder: the bundle's.
        known: what has been hashed already, and is not read again.
    """
    paths = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}

    def describe(name: str) -> dict[str, Any]:
        path = folder / name
        return known.get(name) or {"bytes": path.stat().st_size, "sha256": sha256(path)}

    names = sorted(paths - UNTRACKED)
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return dict(zip(names, threads.map(describe, names), strict=True))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write bundle.json."""
    write_json(folder / MANIFEST, asdict(manifest))
