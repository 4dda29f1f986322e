"""From a policy and its reference to a bundle: check, copy, trace, bind, compare with PyTorch, and only then keep."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir

from dpo_fast.batches import Layout
from dpo_fast.bundle import FORMAT, MANIFEST, POLICY, REFERENCE, Manifest, ModelEntry, hash_files, write_manifest
from dpo_fast.errors import UsageError
from dpo_fast.export.adapter_roles import BASE, TRAINED_FROM, find_trained_from, open_roles
from dpo_fast.export.calibration import read_calibration
from dpo_fast.export.checkpoint import ADAPTER_FILE, Checkpoint, copy_folder, copy_tokenizer
from dpo_fast.export.engine_graphs import make_engine_graphs
from dpo_fast.export.graph import INPUTS, trace
from dpo_fast.export.head import OUTPUTS
from dpo_fast.export.modelopt_calibration import check_calibrator
from dpo_fast.export.probes import make_probes
from dpo_fast.export.roles import (
    RoleModel,
    architecture,
    check_same_language,
    check_tokenizer,
    choose_max_length,
)
from dpo_fast.export.self_check import SelfCheck, check_mixed_rows, self_check
from dpo_fast.export.weights import bind
from dpo_fast.files import new_folder
from dpo_fast.provenance import versions
from dpo_fast.publish.card import start_card
from dpo_fast.recipes import DEFAULT, load_recipe
from dpo_fast.tensorrt.bundle_plans import check_build_options, make_plans
from dpo_fast.tensorrt.options import BuildOptions

RECORDED = ("dpo-fast", "torch", "transformers", "onnx", "onnxscript", "onnx-ir", "onnxruntime", "numpy")


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """What a user can choose about an export.

    Attributes:
        policy_revision, reference_revision: branch, tag or commit of a Hub id.
        base: an adapter's base model, where it is not the one that its adapter_config.json names.
        recipe: a shipped recipe's name, or a file.
        max_length: default truncation of evaluations in tokens; None takes 1024, or fewer where the model has fewer
            positions.
        layout: "shared", "plain", or None to let the self-check choose; without one it is plain.
        calibration: data set whose first pairs the scales of activations are chosen from, for recipes that need it.
        build: how plans are built, for recipes whose engine runs such.
        self_check: whether the graphs are compared with PyTorch.
        link: whether weights are hard-linked into the bundle instead of copied, where the disk allows.
        trust_remote_code: whether the checkpoints' own Python code may be run.
        overwrite: whether an existing output is replaced.
    """

    policy_revision: str | None = None
    reference_revision: str | None = None
    base: str | None = None
    recipe: str = DEFAULT
    max_length: int | None = None
    layout: Layout | None = None
    calibration: str | None = None
    build: BuildOptions = field(default_factory=BuildOptions)
    self_check: bool = True
    link: bool = False
    trust_remote_code: bool = False
    overwrite: bool = False


def export(
    policy: str,
    reference: str | None,
    output: Path,
    options: ExportOptions = ExportOptions(),
    report: Callable[[str], None] = lambda step: None,
) -> Path:
    """Export a policy and its reference as a bundle.

    Args:
        policy: local folder or Hub id, of a model or a PEFT adapter.
        reference: local folder or Hub id; "base" for what an adapter was trained from; None for a bundle that scores
            without a reference.
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
    check_build_options(recipe, options.build)
    if reference in (BASE, None) and options.reference_revision is not None:
        raise UsageError(
            f"--reference-revision {options.reference_revision} goes with a Hub id, and --reference is "
            f"{reference or 'none'}"
        )
    trust = options.trust_remote_code
    with new_folder(output, overwrite=options.overwrite, marker=MANIFEST) as folder:
        report("checking the checkpoints")
        models = open_roles(
            policy,
            reference,
            policy_revision=options.policy_revision,
            reference_revision=options.reference_revision,
            base=options.base,
            trust_remote_code=trust,
        )
        for model in models.values():
            check_calibrator(recipe, model.checkpoint.folder)
        if REFERENCE in models:
            check_same_language(models[POLICY], models[REFERENCE], trust_remote_code=trust)
        else:
            check_tokenizer(models[POLICY], trust_remote_code=trust)
        max_length = choose_max_length(models.values(), options.max_length)
        calibration = read_calibration(
            options.calibration, recipe, models[POLICY].tokenizer_folder, max_length, trust_remote_code=trust
        )

        entries: dict[str, ModelEntry] = {}
        for role, model in models.items():
            report(f"{role}: copying {model.checkpoint.source}")
            _copy_role(role, model, folder, options)
        traced: tuple[Any, ir.Model] | None = None
        for role, model in models.items():
            if traced is None or traced[0] != (architecture(model.config), model.adapters):
                report(f"{role}: tracing {model.config.model_type}")
                traced = (
                    (architecture(model.config), model.adapters),
                    trace(
                        model.config,
                        vocabulary_tile=recipe.vocabulary_tile,
                        trust_remote_code=trust,
                        adapters=model.adapters,
                        dense_experts="tensorrt" in recipe.engine,
                    ),
                )
            if not (folder / model.graph).exists():
                ir.save(bind(traced[1], model.bindings), folder / model.graph)
            checked: SelfCheck | None = None
            if options.self_check:
                report(f"{role}: comparing the graph with PyTorch")
                checked = self_check(
                    folder / model.graph,
                    folder / role,
                    layout=options.layout,
                    trust_remote_code=trust,
                    base=folder / str(model.base_folder) if model.checkpoint.is_adapter else None,
                    gates=model.gates,
                )
                report(f"{role}: {checked}")
            entries[role] = _entry(role, model, checked, options.layout)
        if options.self_check and len(models) > len({model.graph for model in models.values()}):
            report("comparing a batch of both roles")
            gates = [list(model.gates or ()) for model in models.values()]
            probes = make_probes(models[POLICY].sizes.vocabulary, positions=models[POLICY].sizes.positions)
            check_mixed_rows(folder / models[POLICY].graph, probes, gates, entries[POLICY].layout)
        entries = make_engine_graphs(
            folder, entries, recipe, calibration=calibration, check=options.self_check, report=report
        )
        entries = make_plans(folder, entries, recipe, max_length, options.build, trust_remote_code=trust, report=report)
        report("hashing")
        write_manifest(
            folder,
            Manifest(
                format=FORMAT,
                versions=versions(RECORDED),
                recipe=asdict(recipe),
                max_length=max_length,
                inputs=INPUTS,
                outputs=list(OUTPUTS),
                models=entries,
                files=hash_files(folder),
            ),
        )
    return output


def _copy_role(role: str, model: RoleModel, folder: Path, options: ExportOptions) -> None:
    """Copy a role's checkpoint into the bundle, and what an adapter needs beside it: its base, a tokenizer."""

    def copy(checkpoint: Checkpoint, target: str) -> None:
        copy_folder(checkpoint, folder / target, trust_remote_code=options.trust_remote_code, link=options.link)

    copy(model.checkpoint, role)
    if model.base_folder == BASE and not (folder / BASE).exists():
        assert model.base is not None
        copy(model.base, BASE)
    if model.base is not None and model.tokenizer_folder != model.checkpoint.folder:
        copy_tokenizer(model.base.folder, folder / role)
    if model.checkpoint.is_adapter and (trained_from := find_trained_from(model.checkpoint)) is not None:
        copy(trained_from, f"{role}/{TRAINED_FROM}")
    if role == POLICY:
        start_card(folder / role, model.checkpoint.folder)


def _entry(role: str, model: RoleModel, checked: SelfCheck | None, layout: Layout | None) -> ModelEntry:
    """A role's part of the manifest; its engine runs the exact graph unless the recipe makes another."""
    beneath = model.base if model.checkpoint.is_adapter else None
    tensors = [*model.checkpoint.tensors.values(), *(beneath.tensors.values() if beneath else ())]
    architectures = model.config.architectures
    named = architectures[0] if isinstance(architectures, list) and architectures else type(model.config).__name__
    return ModelEntry(
        source=model.checkpoint.source,
        revision=model.checkpoint.revision,
        architecture=str(named),
        model_type=model.config.model_type,
        stored_dtypes=sorted({tensor.dtype for tensor in tensors}),
        parameters=sum(math.prod(tensor.shape) for tensor in tensors),
        vocabulary=model.sizes.vocabulary,
        hidden=model.sizes.hidden,
        layers=model.sizes.layers,
        heads=model.sizes.heads,
        max_positions=model.sizes.positions,
        graph=model.graph,
        engine_graph=model.graph,
        weights=[str(model.base_folder), f"{role}/{ADAPTER_FILE}"] if beneath else [role],
        adapter_gates=None if model.gates is None else list(model.gates),
        layout=checked.layout if checked else layout or "plain",  # unchecked, what is right for every family
        self_check=checked.as_dict() if checked else None,
        engine_check=None,
    )
