"""From a policy and its reference to a bundle: check, copy, trace, bind, compare with PyTorch, and only then keep."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
from transformers import AutoConfig, PretrainedConfig

from dpo_fast.batches import Layout
from dpo_fast.bundle import FORMAT, MANIFEST, POLICY, REFERENCE, Manifest, ModelEntry, hash_files, write_manifest
from dpo_fast.errors import CheckpointError, UsageError
from dpo_fast.export import checkpoint, graph, weights
from dpo_fast.export.checkpoint import Checkpoint, open_checkpoint
from dpo_fast.export.self_check import SelfCheck, self_check
from dpo_fast.files import new_folder
from dpo_fast.provenance import versions
from dpo_fast.publish.card import write_card
from dpo_fast.recipes import DEFAULT, load_recipe
from dpo_fast.tokens import load_tokenizer

DEFAULT_MAX_LENGTH = 1024  # tokens; TRL's default (trl/trainer/dpo_config.py)
PACKAGES = ("dpo-fast", "torch", "transformers", "onnx", "onnxscript", "onnx-ir", "onnxruntime", "numpy")
# What a configuration says of where a checkpoint came from and how it was stored, not of its graph.
PROVENANCE_KEYS = frozenset(
    {"_name_or_path", "dtype", "torch_dtype", "transformers_version", "_attn_implementation", "pad_token_id",
     "bos_token_id", "eos_token_id", "use_cache", "architectures"}
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """What a user can choose about an export.

    Attributes:
        policy_revision, reference_revision: branch, tag or commit of a Hub id.
        recipe: a shipped recipe's name, or a file.
        max_length: default truncation of evaluations in tokens; None takes 1024, or fewer where the model has fewer
            positions.
        layout: "shared", "plain", or None to let the self-check choose.
        self_check: whether the graphs are compared with PyTorch.
        trust_remote_code: whether the checkpoints' own Python code may be run.
        overwrite: whether an existing output is replaced.
    """

    policy_revision: str | None = None
    reference_revision: str | None = None
    recipe: str = DEFAULT
    max_length: int | None = None
    layout: Layout | None = None
    self_check: bool = True
    trust_remote_code: bool = False
    overwrite: bool = False


@dataclass(frozen=True, slots=True)
class _Model:
    """A role's checkpoint, its configuration, and which stored tensor each parameter is."""

    checkpoint: Checkpoint
    config: PretrainedConfig
    stored_names: dict[str, str]


def export(
    policy: str,
    reference: str | None,
    output: Path,
    options: ExportOptions = ExportOptions(),
    report: Callable[[str], None] = lambda step: None,
) -> Path:
    """Export a policy and its reference as a bundle.

    Args:
        policy: local folder or Hub id.
        reference: local folder or Hub id; None for a bundle that scores without a reference.
        output: the bundle to write; nothing is left there if anything fails.
        options: see `ExportOptions`.
        report: called with a line at each step.

    Returns:
        The bundle's folder.

    Raises:
        InputError: what was given cannot be exported; the message says why.
        SelfCheckError: a graph does not say what its PyTorch model says.
    """
    recipe = load_recipe(options.recipe)
    if options.max_length is not None and options.max_length < 2:
        raise UsageError(f"--max-length {options.max_length} leaves no room for a prompt and a completion")
    with new_folder(output, overwrite=options.overwrite, marker=MANIFEST) as folder:
        report("checking the checkpoints")
        models = {POLICY: _open(policy, options.policy_revision, options)}
        if reference is not None:
            models[REFERENCE] = _open(reference, options.reference_revision, options)
            _check_same_language(models[POLICY], models[REFERENCE], options)
        else:
            _check_tokenizer(models[POLICY], options)
        max_length = _max_length(models, options)

        entries: dict[str, ModelEntry] = {}
        traced: tuple[dict[str, Any], ir.Model] | None = None
        for role, model in models.items():
            report(f"{role}: copying {model.checkpoint.source}")
            checkpoint.copy_folder(model.checkpoint, folder / role, trust_remote_code=options.trust_remote_code)
            if role == POLICY:
                _write_card(model.checkpoint, folder / role)
            architecture = _architecture(model.config)
            if traced is None or traced[0] != architecture:
                report(f"{role}: tracing {model.config.model_type}")
                traced = (
                    architecture,
                    graph.trace(
                        model.config,
                        vocabulary_tile=recipe.vocabulary_tile,
                        trust_remote_code=options.trust_remote_code,
                    ),
                )
            bound = weights.bind(traced[1], model.checkpoint, model.stored_names, role)
            ir.save(bound, folder / f"{role}.onnx")
            checked: SelfCheck | None = None
            if options.self_check:
                report(f"{role}: comparing the graph with PyTorch")
                checked = self_check(
                    folder / f"{role}.onnx",
                    folder / role,
                    layout=options.layout,
                    trust_remote_code=options.trust_remote_code,
                )
                report(f"{role}: {checked}")
            entries[role] = _entry(role, model, checked, options)
        report("hashing")
        write_manifest(
            folder,
            Manifest(
                format=FORMAT,
                versions=versions(PACKAGES),
                recipe=asdict(recipe),
                max_length=max_length,
                inputs=graph.INPUTS,
                outputs=list(graph.OUTPUTS),
                models=entries,
                files=hash_files(folder),
            ),
        )
    return output


def _write_card(source: Checkpoint, copy: Path) -> None:
    """Make the policy's README.md a model card; one that cannot be kept is named where the user has it."""
    try:
        write_card(copy, None)
    except CheckpointError as error:
        raise CheckpointError(str(error).replace(str(copy), str(source.folder))) from error


def _open(name: str, revision: str | None, options: ExportOptions) -> _Model:
    """Find a checkpoint and refuse one that cannot be exported, before anything is traced or copied."""
    found = open_checkpoint(name, revision, trust_remote_code=options.trust_remote_code)
    try:
        settings = json.loads((found.folder / "config.json").read_text(encoding="utf-8"))
        config = AutoConfig.from_pretrained(
            found.folder, local_files_only=True, trust_remote_code=options.trust_remote_code
        )
    except Exception as error:  # each architecture's configuration class refuses values in its own way
        needs_code = "trust_remote_code" in str(error)
        hint = "it brings its own Python code: read that, then say --trust-remote-code" if needs_code else error
        raise CheckpointError(f"{name}: config.json cannot be used: {' '.join(str(hint).split())[:300]}") from error
    if settings.get("quantization_config") is not None:
        raise CheckpointError(f"{name}: is quantised already (quantization_config); export the original weights")
    stored_names = weights.match_names(config, found, trust_remote_code=options.trust_remote_code)
    checkpoint.check_finite(found)
    return _Model(found, config, stored_names)


def _architecture(config: PretrainedConfig) -> dict[str, Any]:
    """What decides the graph: a configuration without its provenance."""
    return {key: value for key, value in config.to_dict().items() if key not in PROVENANCE_KEYS}


def _vocabulary(model: _Model) -> int:
    """Rows of the embedding."""
    return int(model.config.get_text_config().vocab_size)


def _check_tokenizer(model: _Model, options: ExportOptions) -> dict[str, int]:
    """The tokenizer's ids by token, refused if the model has no row for one of them."""
    tokenizer = load_tokenizer(model.checkpoint.folder, trust_remote_code=options.trust_remote_code)
    ids = tokenizer.get_vocab()
    largest = max(ids.values(), default=-1)
    if largest >= _vocabulary(model):
        raise CheckpointError(
            f"{model.checkpoint.source}: the tokenizer has the id {largest}, and the model's vocabulary ends at "
            f"{_vocabulary(model) - 1}; is the tokenizer the model's own?"
        )
    return dict(ids)


def _check_same_language(policy: _Model, reference: _Model, options: ExportOptions) -> None:
    """Refuse a policy and a reference that do not speak of the same tokens.

    A reference without a tokenizer of its own is read with the policy's, as TRL reads every reference.
    """
    if _vocabulary(policy) != _vocabulary(reference):
        raise CheckpointError(
            f"policy and reference have different vocabularies: {policy.checkpoint.source} {_vocabulary(policy)}, "
            f"{reference.checkpoint.source} {_vocabulary(reference)}; the reference is the model that the policy was "
            "trained from"
        )
    ids = _check_tokenizer(policy, options)
    folder = reference.checkpoint.folder
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")):
        return
    others = _check_tokenizer(reference, options)
    differing = sorted(token for token in ids.keys() | others.keys() if ids.get(token) != others.get(token))
    if differing:
        token = differing[0]
        raise CheckpointError(
            f"policy and reference have different tokenisers: {len(differing)} tokens differ, such as {token!r} "
            f"({policy.checkpoint.source}: id {ids.get(token)}, {reference.checkpoint.source}: id {others.get(token)})"
        )


def _max_length(models: dict[str, _Model], options: ExportOptions) -> int:
    """The bundle's truncation in tokens, within every model's positions."""
    positions = [limit for model in models.values() if (limit := _positions(model.config)) is not None]
    limit = min(positions, default=None)
    wanted = options.max_length
    if wanted is None:
        return DEFAULT_MAX_LENGTH if limit is None else min(DEFAULT_MAX_LENGTH, limit)
    if limit is not None and wanted > limit:
        raise UsageError(f"--max-length {wanted}: the model has positions for {limit} tokens")
    return wanted


def _positions(config: PretrainedConfig) -> int | None:
    """How many tokens a model has positions for, or None if it does not say."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return None if positions is None else int(positions)


def _entry(role: str, model: _Model, checked: SelfCheck | None, options: ExportOptions) -> ModelEntry:
    """A role's part of the manifest."""
    tensors = model.checkpoint.tensors
    architectures = model.config.architectures
    named = architectures[0] if isinstance(architectures, list) and architectures else type(model.config).__name__
    return ModelEntry(
        source=model.checkpoint.source,
        revision=model.checkpoint.revision,
        architecture=str(named),
        model_type=model.config.model_type,
        stored_dtypes=sorted({tensor.dtype for tensor in tensors.values()}),
        parameters=sum(math.prod(tensor.shape) for tensor in tensors.values()),
        vocabulary=_vocabulary(model),
        max_positions=_positions(model.config),
        graph=f"{role}.onnx",
        layout=checked.layout if checked else options.layout or "shared",
        self_check=checked.as_dict() if checked else None,
    )
